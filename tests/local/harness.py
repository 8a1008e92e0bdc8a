"""A tiny real chain, run by the real command line in processes of its own."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STEP = r'"event": "step", "step": (\d+)'
MODELCHAIN = str(Path(sys.executable).parent / "modelchain")

SPEC: dict[str, Any] = {
    "apiVersion": "modelchain.dev/v1alpha1",
    "kind": "ModelChain",
    "metadata": {"name": "tiny"},
    "spec": {
        "stages": [
            {
                "name": "one",
                "epochs": 2,
                "modelConfig": {
                    "embed_dim": 32,
                    "vision_cfg": {
                        "image_size": 16,
                        "patch_size": 8,
                        "width": 32,
                        "layers": 2,
                        "head_width": 16,
                    },
                    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
                },
            },
            {
                "name": "two",
                "epochs": 1,
                "modelConfig": {
                    "embed_dim": 48,
                    "vision_cfg": {
                        "image_size": 16,
                        "patch_size": 8,
                        "width": 48,
                        "layers": 3,
                        "head_width": 16,
                    },
                    "text_cfg": {"context_length": 16, "width": 48, "heads": 3, "layers": 2},
                },
            },
        ],
        "data": {
            "train": {"shards": "/data/train-000000.tar", "samples": 0, "captionsPerSample": 2}
        },
        "evaluation": [
            {
                "name": "top1",
                "kind": "ZeroShot",
                "shards": "/data/val-000000.tar",
                "classNames": "/data/classnames.json",
                "templates": "/data/templates.json",
            }
        ],
        "recipe": {
            "baselineEpochs": 2,
            "globalBatchSize": 32,
            "learningRate": "1e-3",
            "warmupSteps": {"first": 10, "successors": 5},
            "precision": "fp32",
        },
        "checkpoint": {"everySeconds": 1},
    },
}


class Chain:
    """One root, one spec file, and the command on them."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data, self.root = folder, data, folder / "root"
        self.file = folder / "chain.yaml"
        self.spec = copy.deepcopy(SPEC)
        self.samples = int(json.loads((data / "sizes.json").read_text())["train-000000.tar"])
        self.spec["spec"]["data"]["train"]["samples"] = self.samples

    def command(self, *more: str) -> list[str]:
        self.file.write_text(yaml.safe_dump(self.spec))
        return [
            *(MODELCHAIN, "run", "-f", str(self.file)),
            *("--root", str(self.root), "--data", str(self.data), *more),
        ]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*more), capture_output=True, text=True, timeout=280, check=False
        )

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [MODELCHAIN, "status", "--root", str(self.root), "-o", "json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    def artifact(self, stage: int) -> Path:
        status = json.loads((self.root / "status.json").read_text())["status"]
        return self.root / status["stages"][stage]["artifact"]["path"]

    def processes(self) -> list[int]:
        """Every process with a path of this root in its command line."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z" and any(str(self.root).encode() in word for word in words):
                found.append(int(process.name))
        return found

    def checks_data(self) -> bool:
        """The data is being checked, in a process of its own."""
        commands = (Path(f"/proc/{pid}/cmdline") for pid in self.processes())
        return any(b"modelchain_data" in file.read_bytes() for file in commands if file.exists())

    def step(self, stage: str) -> int:
        """The last step that an attempt of a stage has written down."""
        attempts = [path.parent for path in self.root.glob("*/local-a*/metrics.jsonl")]
        lines = [
            line
            for attempt in attempts
            if json.loads((attempt / "task.json").read_text())["stage"] == stage
            for line in (attempt / "metrics.jsonl").read_text().splitlines()
        ]
        return max((int(n) for n in re.findall(STEP, "\n".join(lines))), default=0)

    def kill(self) -> None:
        """kill -9 to everything at once."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def one_stage(chain: Chain, **resources: int) -> Chain:
    """The same chain without its second stage."""
    chain.spec["spec"]["stages"] = chain.spec["spec"]["stages"][:1]
    chain.spec["spec"]["stages"][0]["resources"] = resources
    return chain


def wait_until(true: Any, seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
