"""`python benchmarks/cluster_picture.py CHAIN -n NAMESPACE`: draw a chain's life as
docs/cluster.svg.

Start it just after the chain was applied. It runs the commands that the picture shows in the
cluster of the current context: some while the second stage runs, the others when the chain has
finished.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 112


def output(command: str) -> str:
    environment = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1"}
    return subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain")
    parser.add_argument("-n", "--namespace", default="default")
    given = parser.parse_args()
    chain, here = given.chain, f"-n {given.namespace}"
    console = Console(record=True, width=WIDTH, file=Path("/dev/null").open("w"))  # noqa: SIM115

    def status() -> dict:
        return json.loads(output(f"kubectl get mchain {chain} {here} -o json")).get("status", {})

    def wait(ready: Callable[[dict], bool]) -> None:
        while not ready(status()):
            time.sleep(0.5)

    def show(*commands: str) -> None:
        for command in commands:
            console.print(f"$ {command}", style="bold", highlight=False)
            console.print(Text.from_ansi(output(command).rstrip()))
            console.print()

    def half_way(found: dict) -> bool:
        stages = found.get("stages", [])
        progress = (stages[1].get("progress") or {}) if len(stages) > 1 else {}
        return progress.get("step", 0) > 0.4 * progress.get("steps", 1)

    wait(half_way)
    show(f"kubectl get mchain {here}", f"modelchain explain {chain} {here}")
    wait(
        lambda found: any(
            c["type"] == "Finished" and c["status"] == "True" for c in found.get("conditions", [])
        )
    )
    show(f"kubectl get sart {here}", f"modelchain explain {chain} {here}")
    console.save_svg(
        str(Path(__file__).parent.parent / "docs" / "cluster.svg"), title="ModelChain on a cluster"
    )


if __name__ == "__main__":
    main()
