"""From the figures of all arms to docs/: one JSON document, tables between markers, pictures."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelchain.cli.files import write_atomic

Json = dict[str, Any]
Cell = tuple[
    str, str, bool, tuple[int, ...]
]  # part, name, with distillation, epochs of each stage: arms but for the seed
TOLERANCE = 0.5  # points below the baseline that are no loss (paper, 3.1.2)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # by number of seeds: two-sided 95 % of Student's t
BEGIN, END = "<!-- method.py: {} -->", "<!-- end -->"


def document(arms: Sequence[Json], workers: int) -> Json:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {"cpu": found[1] if found else platform.machine(), "workers": workers, "threads": 1}
    return {"environment": machine | {name: version(name) for name in ("torch", "open_clip_torch")}, "arms": list(arms)}


def write(report: Json, folder: Path) -> None:
    """method.json, the tables of method.md, a picture of each data set."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(arm, ensure_ascii=False) for arm in report["arms"])
    write_atomic(
        folder / "method.json",
        f'{{"environment": {json.dumps(report["environment"])}, "arms": [\n{lines}\n]}}\n'.encode(),
    )
    page = folder / "method.md"
    text = page.read_text() if page.exists() else ""
    for name, table in tables(report).items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        after = rest.partition(END)[2] if found else "\n"
        text = f"{before}{begin}\n{table}\n{END}{after}"
    write_atomic(page, text.encode())
    for setup in _setups(report):
        picture(setup, [a for a in report["arms"] if a["setup"] == setup], folder / f"method-{setup}.png")


def tables(report: Json) -> dict[str, str]:
    """By name, as Markdown."""
    found = {}
    for setup in _setups(report):
        arms = [arm for arm in report["arms"] if arm["setup"] == setup]
        parts = {part: [a for a in arms if a["part"] == part] for part in ("tuning", "table", "epochs", "ablation")}
        base = {a["seed"]: a for a in arms if a["part"] == "individual"}
        if parts["tuning"]:
            found[f"{setup} tuning"] = _tuning(parts["tuning"])
        if base:
            found[f"{setup} individual"] = _individual(list(base.values()))
            found[f"{setup} lossless"] = _lossless([*parts["table"], *parts["epochs"]], base)
            found[f"{setup} table"] = _compared(parts["table"], base)
            if parts["epochs"]:
                same = {(a["name"], a["ifd"]) for a in parts["epochs"]}
                swept = [*parts["epochs"], *(a for a in parts["table"] if (a["name"], a["ifd"]) in same)]
                found[f"{setup} epochs"] = _compared(swept, base)
        if parts["ablation"]:
            found[f"{setup} ablation"] = _ablation(parts["ablation"], parts["table"], base)
    return found


def score(metrics: Mapping[str, float], name: str) -> float:
    """A metric of `results.json`; r10 is the mean of both directions' R@10."""
    if name in metrics:
        return metrics[name]
    found = [value for key, value in metrics.items() if key.endswith(f"-{name}")]
    return sum(found) / len(found)


def shown(arm: Json) -> list[str]:
    """The metrics that are shown of an arm, the evaluation's own first."""
    first = arm["stages"][0]["final"]
    return ["top1"] if "top1" in first else ["r1", "r10"]


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % t-interval; None for a single difference."""
    mean, n = statistics.fmean(differences), len(differences)
    return mean, T_95[n] * statistics.stdev(differences) / n**0.5 if n > 1 else None


def verdict(differences: Sequence[float]) -> str:
    """Of one model against the same one trained alone, over seeds: lossless, undecided, or not lossless."""
    mean, half = interval(differences)
    if half is not None and abs(mean + TOLERANCE) <= half:
        return "undecided"
    return "lossless" if mean >= -TOLERANCE else "not lossless"


def worst(verdicts: Iterable[str]) -> str:
    return max(verdicts, key=("lossless", "undecided", "not lossless").index)


def acceleration(arm: Json, base: Json) -> float:
    """MACs of training the arm's models each alone over those of the arm."""
    own = {stage["model"]: stage["macs"] for stage in base["stages"]}
    return sum(own[s["model"]] for s in arm["stages"]) / sum(s["macs"] for s in arm["stages"])


def differences(arms: Sequence[Json], base: Mapping[int, Json], model: str, metric: str) -> list[float]:
    """Of one model, seed by seed, points above the same model trained alone with that seed."""
    return [score(_of(a, model)["final"], metric) - score(_of(base[a["seed"]], model)["final"], metric) for a in arms]


def _of(arm: Json, model: str) -> Json:
    return next(stage for stage in arm["stages"] if stage["model"] == model)


def _setups(report: Json) -> list[str]:
    return list(dict.fromkeys(arm["setup"] for arm in report["arms"]))


def _cells(arms: Iterable[Json]) -> dict[Cell, list[Json]]:
    """Arms that differ in the seed alone, together."""
    cells: dict[Cell, list[Json]] = defaultdict(list)
    for arm in arms:
        cells[arm["part"], arm["name"], arm["ifd"], tuple(s["epochs"] for s in arm["stages"])].append(arm)
    return cells


def _failed(arms: Iterable[Json]) -> bool:
    return any("failure" in stage for arm in arms for stage in arm["stages"])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.2f}" + (f" ± {half:.2f}" if half is not None else "")


def _tuning(arms: Sequence[Json]) -> str:
    metrics = shown(arms[0])
    rows = []
    for arm in arms:
        stage = arm["stages"][0]
        values = ["failed"] * len(metrics) if _failed([arm]) else [f"{score(stage['final'], m):.2f}" for m in metrics]
        rows.append([stage["model"], stage["rate"], str(stage["epochs"]), *values])
    return _markdown(["model", "learning rate", "epochs", *metrics], sorted(rows, key=lambda r: "sml".index(r[0])))


def _individual(arms: Sequence[Json]) -> str:
    metrics = shown(arms[0])
    rows = []
    for at, stage in enumerate(arms[0]["stages"]):
        stages = [arm["stages"][at] for arm in arms]
        scores = [" / ".join(f"{score(s['final'], m):.2f}" for s in stages) for m in metrics]
        rows.append([stage["model"], str(stage["epochs"]), f"{stage['macs']:.3g}", *scores])
    return _markdown(["model", "epochs", "MACs", *(f"{m}, by seed" for m in metrics)], rows)


def _lossless(arms: Sequence[Json], base: Mapping[int, Json]) -> str:
    """For each kind of start, the cheapest chain whose models are all lossless, and the cheapest that may be so."""
    found: dict[tuple[str, bool], dict[str, float]] = defaultdict(dict)
    for (_, name, ifd, _), seeds in _cells(arms).items():
        best = found[name, ifd]
        if _failed(seeds):
            continue
        passed = worst(verdict(d) for d in _all_differences(seeds, base))
        on_average = all(statistics.fmean(d) >= -TOLERANCE for d in _all_differences(seeds, base))
        ratio = acceleration(seeds[0], base[seeds[0]["seed"]])
        for kind, holds in (("decided", passed == "lossless"), ("average", on_average)):
            if holds:
                best[kind] = max(best.get(kind, 0.0), ratio)
    rows = [
        [
            name,
            "with" if ifd else "without",
            *(f"{best[k]:.2f}x" if k in best else "none" for k in ("average", "decided")),
        ]
        for (name, ifd), best in found.items()
    ]
    return _markdown(["start", "IFD", "MACs, times fewer, where lossless on average", "and decided so"], rows)


def _all_differences(arms: Sequence[Json], base: Mapping[int, Json]) -> list[list[float]]:
    """Of every successor and every metric that is shown."""
    successors = [s["model"] for s in arms[0]["stages"][1:]]
    return [differences(arms, base, model, metric) for model in successors for metric in shown(arms[0])]


def _compared(arms: Sequence[Json], base: Mapping[int, Json]) -> str:
    """A row for each kind of chain: cheapness, points above the baseline of both successors, the paper's test."""
    metrics, successors = shown(next(iter(base.values()))), ("m", "l")
    head = ["start", "IFD", "epochs", "MACs, times fewer"]
    head += [f"{model} {at}" for model in successors for at in ("at step 0", *(f"{m} − alone" for m in metrics))]
    rows = []
    for (_, name, ifd, epochs), seeds in sorted(_cells(arms).items(), key=lambda cell: cell[0][3]):
        row = [name, "with" if ifd else "without", "+".join(map(str, epochs))]
        if _failed(seeds):
            rows.append([*row, "failed"])
            continue
        row.append(f"{acceleration(seeds[0], base[seeds[0]['seed']]):.2f}")
        verdicts = []
        for model in successors:
            row.append(f"{statistics.fmean(score(_of(a, model)['initial'], metrics[0]) for a in seeds):.1f}")
            for metric in metrics:
                values = differences(seeds, base, model, metric)
                row.append(_signed(values))
                verdicts.append(verdict(values))
        rows.append([*row, worst(verdicts)])
    return _markdown([*head, "verdict"], rows)


def _ablation(arms: Sequence[Json], table: Sequence[Json], base: Mapping[int, Json]) -> str:
    """One seed: accuracy of each arm's last two models, and points above the arm that nothing was changed of."""
    seed = arms[0]["seed"]
    plain = next(a for a in table if a["seed"] == seed and a["name"] == "Insert" and a["ifd"])
    metric = shown(plain)[0]
    rows = []
    for arm in [plain, *arms]:
        name = "Insert with IFD, nothing changed" if arm is plain else arm["name"]
        if _failed([arm]):
            rows.append([name, "failed"])
            continue
        by_model = {s["model"]: score(s["final"], metric) for s in arm["stages"]}
        steps = f"{_of(arm, 'l')['initial'][metric]:.1f}"
        change = by_model["l"] - score(_of(plain, "l")["final"], metric)
        macs = sum(s["macs"] for s in arm["stages"]) / _of(base[seed], "l")["macs"]
        middle = f"{by_model['m']:.2f}" if "m" in by_model else ""
        rows.append([name, f"{macs:.2f}", middle, steps, f"{by_model['l']:.2f}", f"{change:+.2f}"])
    return _markdown(["", "MACs, of l alone", f"m {metric}", "l at step 0", f"l {metric}", "change"], rows)


def picture(setup: str, arms: Sequence[Json], path: Path) -> None:
    """Accuracy of each model against the MACs that were spent up to it, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = _cells(a for a in arms if a["part"] in ("individual", "table", "epochs") and not _failed([a]))
    if not families:
        return
    metric = shown(arms[0])[0]
    names = list(dict.fromkeys(name for _, name, _, _ in families))
    epochs_of_table = next(epochs for (part, _, _, epochs) in families if part == "table")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for (_, name, ifd, epochs), seeds in families.items():
        spent, scores = [0.0], []
        for at in range(len(seeds[0]["stages"])):
            spent.append(spent[-1] + seeds[0]["stages"][at]["macs"])
            scores.append([score(arm["stages"][at]["final"], metric) for arm in seeds])
        means = [statistics.fmean(values) for values in scores]
        both = list(zip(means, scores, strict=True))
        spread = [[m - min(v) for m, v in both], [max(v) - m for m, v in both]]
        colour = "black" if name == "individual" else f"C{names.index(name)}"
        style = "-" if ifd or name == "individual" else "--"
        label = name if name == "individual" else f"{name}{', IFD' if ifd else ''}"
        for axes, here in ((left, epochs == epochs_of_table), (right, name == "Insert" and ifd)):
            if here or name == "individual":
                text = label if axes is left else f"{label}, {'+'.join(map(str, epochs))} epochs"
                shade = colour if axes is left or name == "individual" else f"C{min(epochs[1:])}"
                axes.errorbar(spent[1:], means, yerr=spread, color=shade, linestyle=style, marker="o", label=text)
    left.set_title(f"{setup}: chains of {'+'.join(map(str, epochs_of_table))} epochs")
    right.set_title(f"{setup}: Insert with IFD, by epochs")
    left.set_ylabel(f"{metric}, %")
    for axes in (left, right):
        axes.set_xlabel("accumulated MACs")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
