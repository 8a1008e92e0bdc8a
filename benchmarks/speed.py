"""`python benchmarks/speed.py --write`: the trainer's tables in docs/performance.md, by `modelchain
bench` for the models that have goals.

Each figure is kept in runs/speed and not measured again; remove the folder to start anew. After
Ctrl-C the table has the figures measured so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from markers import between
from modelchain.io.files import write_atomic
from modelchain_bench import LEVERS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
KEPT = Path(__file__).parents[1] / "runs" / "speed"
BENCH = Path(sys.executable).with_name("modelchain")
STEP = ["--batch", "32", "--captions", "4"]
GOALS = {"ViT-T-16": 1.6, "ViT-S-16": 1.45, "ViT-B-16": 1.25, "Swin-T": 1.3}
PADDED_GOAL = 1.05
LOADER_GOAL = 2
PACKED_GOAL = 600
TOKENS_GOAL = 0.6

Json = dict[str, Any]


def bench(*arguments: str) -> Json:
    kept = KEPT / ("_".join(arguments).replace("--", "") + ".json")
    if kept.exists():
        return dict(json.loads(kept.read_bytes()))
    print("modelchain bench", *arguments, file=sys.stderr, flush=True)
    run = subprocess.run(
        [BENCH, "bench", *arguments, "-o", "json"], check=True, stdout=subprocess.PIPE
    )
    found: Json = json.loads(run.stdout)
    print(f"  {found['ratio']:.3f}", file=sys.stderr, flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, run.stdout)
    return found


def measure(pairs: int) -> Iterator[tuple[str, str, Json]]:
    """Yields group, name and figures."""
    turns, first = ["--pairs", str(pairs)], next(iter(GOALS))
    for name in GOALS:
        yield "step", name, bench("step", "--model", name, *STEP, *turns)
    yield "loader", "", bench("loader")
    for name in GOALS:
        yield "padded", name, bench("step", "--model", name, *STEP, "--pad", "77", *turns)
    for lever in [name for name in LEVERS if name != "compiled"]:  # it acts only on a GPU
        yield "levers", lever, bench("step", "--model", first, *STEP, "--without", lever, *turns)
    yield (
        "endToEnd",
        first,
        bench("end-to-end", "--model", first, "--batch", "8", "--captions", "4"),
    )


def table(found: dict[str, dict[str, Json]]) -> str:
    rows = ["| | ours, samples/s | stock | ratio | goal |", "|---|---|---|---|---|"]

    def row(label: str, one: Json, goal: str) -> None:
        rates = one["samplesPerSecond"]
        rows.append(
            f"| {label} | {rates['ours']:.2f} | {rates['stock']:.2f} | {one['ratio']:.2f} |"
            f" {goal} |"
        )

    for name, one in found["step"].items():
        row(f"step, {name}", one, f">= {GOALS[name]}")
    for name, one in found["padded"].items():
        row(f"step, {name}, captions padded to 77", one, f">= {PADDED_GOAL}")
    for name, one in found["endToEnd"].items():
        row(f"end to end, {name}, batch 8 (waits for data: {one['dataWait']:.1%})", one, "")
    for one in found["loader"].values():
        row("loader, pictures a second of one core", one, f">= {LOADER_GOAL}")
        rows.append(
            f"| loader, packed shards | {one['packedSamplesPerSecond']:.0f} | | | >= {PACKED_GOAL}"
            " a core |"
        )
    first, whole = next(iter(found["step"].items()))
    rows += ["", f"| {first} without | ratio |", "|---|---|", f"| nothing | {whole['ratio']:.2f} |"]
    rows += [f"| `{lever}` | {one['ratio']:.2f} |" for lever, one in found["levers"].items()]
    tokens, about = (
        whole["tokens"],
        ", ".join(f"{name} {value}" for name, value in whole["environment"].items()),
    )
    share = (
        f"Tokens real / processed: {tokens['real'] / tokens['processed']:.0%} (goal >="
        f" {TOKENS_GOAL:.0%})."
    )
    return "\n".join([*rows, "", share, f"Machine: {about}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON document"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    found: dict[str, dict[str, Json]] = defaultdict(dict)
    with suppress(KeyboardInterrupt):  # the table then has the figures so far
        for group, name, figures in measure(given.pairs):
            found[group][name] = figures
    print(json.dumps(found, indent=1) if given.json else table(found))
    if given.write:
        PAGE.write_text(between(PAGE.read_text(), "speed.py", table(found)))


if __name__ == "__main__":
    main()
