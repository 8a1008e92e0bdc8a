"""Writing the figures of all arms to docs/: a JSON document, tables between markers, pictures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markers import between
from modelchain.io.files import write_atomic
from modelchain_bench.machine import processor

Json = dict[str, Any]
Kind = tuple[str, bool, tuple[int, ...]]  # name, distillation, epochs of stages: all but the seed
CLOSER = 3  # points of accuracy, in the picture's right half
TOLERANCE = 0.5  # fewer points below the baseline are no loss (paper, section 4)
# Student's t, two-sided 95 %, by the number of seeds.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}


def document(arms: Sequence[Json], workers: int) -> Json:
    machine = {"cpu": processor(), "workers": workers, "threads": 1}
    return {
        "environment": machine | {name: version(name) for name in ("torch", "open_clip_torch")},
        "arms": list(arms),
    }


def write(report: Json, folder: Path) -> None:
    """Write method.json, the tables of method.md, and a picture of each data set. Parts that were
    not run stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "method.json"
    known = json.loads(file.read_bytes())["arms"] if file.exists() else []
    run = {(arm["setup"], arm["part"]) for arm in report["arms"]}
    kept = [arm for arm in known if (arm["setup"], arm["part"]) not in run]
    report = {**report, "arms": sorted([*kept, *report["arms"]], key=lambda arm: arm["setup"])}
    lines = ",\n".join(json.dumps(arm, ensure_ascii=False) for arm in report["arms"])
    write_atomic(
        file,
        f'{{"environment": {json.dumps(report["environment"])}, "arms": [\n{lines}\n]}}\n'.encode(),
    )
    page = folder / "method.md"
    text = page.read_text() if page.exists() else ""
    for name, table in tables(report).items():
        text = between(text, f"method.py: {name}", table)
    write_atomic(page, text.encode())
    for setup in _setups(report):
        picture(
            setup,
            [a for a in report["arms"] if a["setup"] == setup],
            folder / f"method-{setup}.png",
        )


def tables(report: Json) -> dict[str, str]:
    """The tables by name, as Markdown."""
    found = {}
    for setup in _setups(report):
        arms = [arm for arm in report["arms"] if arm["setup"] == setup]
        parts: dict[str, list[Json]] = defaultdict(list)
        for arm in arms:
            parts[arm["part"]].append(arm)
        base = {arm["seed"]: arm for arm in arms if arm["name"] == "individual"}
        if parts["individual"]:
            found[f"{setup} individual"] = _individual(parts["individual"])
        for part in ("choice", "table", "sweep", "two", "fresh"):
            if chains := [arm for arm in parts[part] if arm["name"] != "individual"]:
                found[f"{setup} {part}"] = _compared(chains, base)
        if fresh := [arm for arm in parts["fresh"] if arm["name"] != "individual"]:
            known = _kinds(parts["table"]).get(_kind(fresh[0]), [])
            found[f"{setup} all seeds"] = _compared([*fresh, *known], base)
        if parts["ablation"]:
            found[f"{setup} ablation"] = _ablation(parts["ablation"], parts["table"], base)
        if parts["tuning"]:
            found[f"{setup} tuning"] = _tuning(parts["tuning"])
    return found


def score(metrics: Mapping[str, float], name: str) -> float:
    """A metric of `results.json`. R@10 is the mean of both directions."""
    if name in metrics:
        return metrics[name]
    return statistics.fmean(value for key, value in metrics.items() if key.endswith("-r10"))


def shown(arm: Json) -> str:
    """The metric that is shown of an arm."""
    return "top1" if "top1" in arm["stages"][0]["final"] else "R@10"


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % t-interval; None for a single difference."""
    mean, n = statistics.fmean(differences), len(differences)
    return mean, T_95[n] * statistics.stdev(differences) / n**0.5 if n > 1 else None


def verdict(differences: Sequence[float]) -> str:
    """The verdict on one model against the same model trained alone, over seeds: lossless,
    undecided, or not lossless.
    """
    mean, half = interval(differences)
    if half is not None and abs(mean + TOLERANCE) <= half:
        return "undecided"
    return "lossless" if mean > -TOLERANCE else "not lossless"


def worst(verdicts: Iterable[str]) -> str:
    return max(verdicts, key=("lossless", "undecided", "not lossless").index)


def acceleration(arm: Json, base: Json) -> float:
    """MACs of training each of the arm's models alone, over those of the arm."""
    own = {stage["model"]: stage["macs"] for stage in base["stages"]}
    return sum(own[s["model"]] for s in arm["stages"]) / sum(s["macs"] for s in arm["stages"])


def differences(
    arms: Sequence[Json], base: Mapping[int, Json], model: str, metric: str
) -> list[float]:
    """For each seed, points of one model above the same model trained alone with that seed."""
    return [
        score(_of(a, model)["final"], metric) - score(_of(base[a["seed"]], model)["final"], metric)
        for a in arms
    ]


def _of(arm: Json, model: str) -> Json:
    return next(stage for stage in arm["stages"] if stage["model"] == model)


def _setups(report: Json) -> list[str]:
    return list(dict.fromkeys(arm["setup"] for arm in report["arms"]))


def _kind(arm: Json) -> Kind:
    return arm["name"], arm["ifd"], tuple(stage["epochs"] for stage in arm["stages"])


def _kinds(arms: Iterable[Json]) -> dict[Kind, list[Json]]:
    """Arms grouped so that those of a group differ only in their seed."""
    kinds: dict[Kind, list[Json]] = defaultdict(list)
    for arm in arms:
        kinds[_kind(arm)].append(arm)
    return kinds


def _failed(arms: Iterable[Json]) -> bool:
    return any("failure" in stage for arm in arms for stage in arm["stages"])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.2f}" + (f" ± {half:.2f}" if half is not None else "")


def _tuning(arms: Sequence[Json]) -> str:
    metric = shown(arms[0])
    rows = []
    for arm in sorted(arms, key=lambda arm: "sml".index(arm["name"])):
        stage = arm["stages"][0]
        value = "failed" if _failed([arm]) else f"{score(stage['final'], metric):.2f}"
        rows.append([stage["model"], stage["rate"], str(stage["epochs"]), value])
    return _markdown(["model", "learning rate", "epochs", metric], rows)


def _individual(arms: Sequence[Json]) -> str:
    metric = shown(arms[0])
    rows = []
    for at, stage in enumerate(arms[0]["stages"]):
        scores = [score(arm["stages"][at]["final"], metric) for arm in arms]
        by_seed = " / ".join(f"{value:.2f}" for value in scores)
        rows.append(
            [
                stage["model"],
                str(stage["epochs"]),
                f"{stage['macs']:.3g}",
                f"{statistics.fmean(scores):.2f}",
                by_seed,
            ]
        )
    return _markdown(["model", "epochs", "MACs", metric, "by seed"], rows)


def _compared(arms: Sequence[Json], base: Mapping[int, Json]) -> str:
    """A row for each kind of chain: how many times cheaper it is, points of both successors above
    their baselines, and the paper's test.
    """
    metric, successors = shown(arms[0]), [stage["model"] for stage in arms[0]["stages"][1:]]
    head = ["start", "IFD", "epochs", "MACs, times fewer"]
    head += [f"{model} {at}" for model in successors for at in ("at step 0", f"{metric} − alone")]
    rows = []
    for (name, ifd, epochs), seeds in sorted(_kinds(arms).items(), key=lambda found: found[0][2]):
        row = [name, "with" if ifd else "without", "+".join(map(str, epochs))]
        if _failed(seeds):
            rows.append([*row, "failed"])
            continue
        row.append(f"{acceleration(seeds[0], base[seeds[0]['seed']]):.2f}")
        verdicts = []
        for model in successors:
            row.append(
                f"{statistics.fmean(score(_of(a, model)['initial'], metric) for a in seeds):.1f}"
            )
            values = differences(seeds, base, model, metric)
            row.append(_signed(values))
            verdicts.append(verdict(values))
        rows.append([*row, worst(verdicts)])
    return _markdown([*head, "result"], rows)


def _ablation(arms: Sequence[Json], table: Sequence[Json], base: Mapping[int, Json]) -> str:
    """With one seed: accuracy of each arm's last two models, and points above the unchanged arm."""
    seed = arms[0]["seed"]
    plain = next(a for a in table if a["seed"] == seed and a["name"] == "Insert" and a["ifd"])
    metric = shown(plain)
    reference = score(plain["stages"][-1]["final"], metric)
    rows = []
    for arm in [plain, *arms]:
        name = "Insert with IFD, nothing changed" if arm is plain else arm["name"]
        if _failed([arm]):
            rows.append([name, "failed"])
            continue
        last = arm["stages"][-1]
        reached = score(last["final"], metric)
        middle = "".join(
            f"{score(s['final'], metric):.2f}" for s in arm["stages"] if s["model"] == "m"
        )
        macs = sum(s["macs"] for s in arm["stages"]) / _of(base[seed], "l")["macs"]
        start = f"{score(last['initial'], metric):.1f}"
        rows.append(
            [name, f"{macs:.2f}", middle, start, f"{reached:.2f}", f"{reached - reference:+.2f}"]
        )
    return _markdown(
        ["", "MACs, of l alone", f"m {metric}", "l at step 0", f"l {metric}", "change"], rows
    )


def picture(setup: str, arms: Sequence[Json], path: Path) -> None:
    """A picture: accuracy of each model against the MACs spent up to it, means over seeds. On the
    right the best points, enlarged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    usable = [arm for arm in arms if not _failed([arm])]
    chains = [arm for arm in usable if arm["part"] == "table"]
    if not chains:
        return
    metric = shown(chains[0])
    individual = [arm for arm in usable if arm["part"] == "individual"]
    kinds = _kinds([*individual, *chains])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    names = list(dict.fromkeys(name for name, _, _ in kinds))
    best = _draw_chains((left, right), kinds, names, metric)
    _draw_sweeps(right, [arm for arm in usable if arm["part"] == "sweep"], names, metric)
    left.set_title(f"{setup}: s, m, l in the order they are trained")
    right.set_title(f"the best {CLOSER} points closer")
    right.set_ylim(best - CLOSER, best + 0.2)
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("accumulated MACs, 10¹²")
        axes.set_ylabel(f"{metric}, %: mean and range over seeds")
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else ""))
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_chains(
    both: Sequence[Any], kinds: Mapping[Kind, list[Json]], names: Sequence[str], metric: str
) -> float:
    """A line for each kind of arm, on both axes. Returns the best accuracy."""
    best = 0.0
    for (name, ifd, _), seeds in kinds.items():
        points = [_point(seeds, at, metric) for at in range(len(seeds[0]["stages"]))]
        best = max(best, *(value for _, values in points for value in values))
        alone = name == "individual"
        label = "each model alone" if alone else f"{name}, {'with' if ifd else 'without'} IFD"
        colour = "black" if alone else f"C{names.index(name)}"
        for axes in both:
            _line(axes, points, color=colour, linestyle="-" if ifd or alone else "--", label=label)
    return best


def _draw_sweeps(axes: Any, arms: Sequence[Json], names: Sequence[str], metric: str) -> None:
    """A dotted line for each start: its last model, by the epochs of the last two."""
    swept = sorted(_kinds(arms).items(), key=lambda found: found[0][2])
    for start in dict.fromkeys(name for (name, _, _), _ in swept):
        ends = [
            _point(seeds, len(epochs) - 1, metric)
            for (name, _, epochs), seeds in swept
            if name == start
        ]
        _line(
            axes,
            ends,
            color=f"C{names.index(start)}",
            linestyle=":",
            label=f"{start}: its l, by epochs of m and l",
        )
    if swept:
        handles, labels = axes.get_legend_handles_labels()
        dotted = [i for i, label in enumerate(labels) if "by epochs" in label]
        axes.legend([handles[i] for i in dotted], [labels[i] for i in dotted], fontsize=8)


def _point(arms: Sequence[Json], at: int, metric: str) -> tuple[float, list[float]]:
    """MACs spent up to the end of a stage, in 10¹², and the accuracy that it reached, by seed."""
    spent = sum(stage["macs"] for stage in arms[0]["stages"][: at + 1]) / 1e12
    return spent, [score(arm["stages"][at]["final"], metric) for arm in arms]


def _line(axes: Any, points: Sequence[tuple[float, Sequence[float]]], **style: Any) -> None:
    """Means over seeds, with bars to the lowest and highest."""
    means = [statistics.fmean(values) for _, values in points]
    below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
    above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
    axes.errorbar(
        [spent for spent, _ in points], means, yerr=[below, above], marker="o", capsize=2, **style
    )
