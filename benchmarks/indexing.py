"""`python benchmarks/indexing.py`: the index of 13 million samples in 1,293 shards: killed in the
middle, resumed, opened, and used for a set of the same shards in another order.

Ten tars of synthetic samples with one caption each are hard-linked under all names, because the
disk is small. Each name is given a digest of its own, so that every one is tokenised; hashing is
timed apart. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer, default_bpe

from markers import between
from modelchain.api.contracts import DataRequest, IndexTask, TrainFiles
from modelchain.io.files import sha256_of
from modelchain_bench.machine import processor
from modelchain_data.build import DIGESTS, SHARDS, Shards, cores
from modelchain_data.tokens import Tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TARS, KILLED_AT = 10, 0.4
WORDS = 10  # of a caption: with start and end of text, 12 tokens
SECONDS_GOAL, MEMORY_GOAL = 60, 2048  # for a million captions on one core; MiB
Json = dict[str, Any]


class Captions:
    """Random captions: words of the vocabulary by Zipf's law, and in every fiftieth a sign that is
    not ASCII.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1:49000]
        merged = ("".join(line.split()) for line in lines)
        self.words = [w[:-4] for w in merged if w.endswith("</w>") and w[:-4].isalpha()]
        self.weights = list(
            itertools.accumulate(1 / rank for rank in range(1, len(self.words) + 1))
        )

    def __call__(self, number: int) -> str:
        words = self.random.choices(self.words, cum_weights=self.weights, k=WORDS)
        return " ".join(words) if number % 50 else " ".join([*words[1:], "café"])


def make_tar(path: Path, samples: int, seed: int) -> None:
    """Pictures that begin like a JPEG, each with a caption."""
    caption = Captions(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            meta = json.dumps({"captions": [caption(number)]}).encode()
            for suffix, data in (("jpg", b"\xff\xd8\xff" + bytes(61)), ("json", meta)):
                info = tarfile.TarInfo(f"{seed:03d}{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, shards: int, samples: int) -> list[Path]:
    """`shards` names of TARS tars, which together hold `samples`, give or take a few."""
    names = [folder / f"train-{number:06d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        if number < TARS:
            make_tar(name, samples // shards, number)
        else:
            name.hardlink_to(names[number % TARS])
    return names


def name_digests(shards: list[Path], index: Path) -> None:
    """Have the index know a digest for each name, as if the tars were different."""
    index.mkdir()
    states = Shards.of(shards, index).states
    known = {state: hashlib.sha256(state.encode()).hexdigest() for state in states}
    (index / DIGESTS).write_text(json.dumps(known))


class Indexing:
    """`python -m modelchain_data`, with the memory of all its processes."""

    def __init__(self, shards: list[Path], samples: int, index: Path):
        files = TrainFiles(
            files=[str(shard) for shard in shards],
            samples=samples,
            captions_per_sample=1,
            fingerprint=None,
        )
        request = DataRequest(index=str(index), file="benchmark", train=files, evaluation=[])
        self.task = index.parent / "task.json"
        self.task.write_text(IndexTask(data=request).model_dump_json(by_alias=True))
        self.shards = index / SHARDS

    def indexed(self) -> int:
        return len(list(self.shards.glob("*")))

    def run(self, kill_at: int | None = None) -> Json:
        """Run to the end, or kill it (SIGKILL) once there are `kill_at` indexes of shards."""
        before = self.indexed()
        used = _cpu()
        began = time.monotonic()
        command = [sys.executable, "-m", "modelchain_data", str(self.task)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            if kill_at is not None and self.indexed() >= kill_at:
                process.kill()
            time.sleep(0.2)
        if kill_at is None and process.returncode:
            raise SystemExit("indexing failed")
        return {
            "seconds": time.monotonic() - began,
            "cpuSeconds": _cpu() - used,
            "indexed": self.indexed() - before,
            "memory": peak,
        }


def _cpu() -> float:
    """CPU seconds of the children that have ended, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _memory(pid: int) -> float:
    """MiB of a process and its children; what they share counts once (PSS)."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_memory(int(p)) for p in (task / "children").read_text().split())
    except OSError:  # it has ended
        pass
    return total


OPENING = """
import resource, sys, time
from pathlib import Path
from modelchain.api.contracts import IndexTask
from modelchain_data.request import open_data
request = IndexTask.model_validate_json(Path(sys.argv[1]).read_bytes()).data
began = time.monotonic()
open_data(request, check=sys.argv[2] == "check")
print(time.monotonic() - began)
"""


def _opening(task: Path, check: str) -> float:
    command = [sys.executable, "-c", OPENING, str(task), check]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run(folder: Path, shards: int, samples: int) -> Json:
    names, index = make_shards(folder, shards, samples), folder / "index"
    samples = samples // shards * shards
    began = time.process_time()
    for name in names[:TARS]:
        sha256_of(name)
    hashed = sum(name.stat().st_size for name in names[:TARS])
    figures: Json = {"hashing": hashed / (time.process_time() - began), "tokens": _tokenising()}
    name_digests(names, index)
    indexing = Indexing(names, samples, index)
    figures["killed"] = indexing.run(int(shards * KILLED_AT))
    figures["resumed"] = indexing.run()
    figures["again"] = indexing.run()
    figures["opened"] = {check: _opening(indexing.task, check) for check in ("check", "")}
    half = shards // 2
    figures["composed"] = Indexing(names[half:] + names[:half], samples, index).run()
    bytes_ = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    return figures | {
        "shards": shards,
        "samples": samples,
        "bytes": bytes_,
        "environment": {
            "cores": cores(),
            "processor": processor(),
            "python": sys.version.split()[0],
            "open_clip": open_clip.__version__,
        },
    }


def _tokenising() -> Json:
    """CPU seconds a million captions, of our tokeniser and of open_clip's, once both know the
    words.
    """
    caption = Captions(0)
    captions, found = [caption(number) for number in range(20_000)], {}
    for name, encode in {"ours": Tokenizer().encode, "stock": SimpleTokenizer().encode}.items():
        for _ in range(2):
            began = time.process_time()
            for text in captions:
                encode(text)
            found[name] = (time.process_time() - began) / len(captions) * 1e6
    return found


def table(figures: Json) -> str:
    about = figures["environment"]
    lines = [
        f"| {figures['shards']} shards | measured | goal |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in (*_building(figures), *_using(figures))),
        "",
        f"Machine: {about['cores']} cores ({about['processor']}), Python {about['python']},"
        f" open_clip {about['open_clip']}.",
    ]
    return "\n".join(lines)


def _building(figures: Json) -> list[tuple[str, str, str]]:
    killed, resumed = figures["killed"], figures["resumed"]
    captions = figures["samples"] / 1e6  # millions
    # The CPU time of processes that were killed is not known.
    resumed_captions = captions * resumed["indexed"] / figures["shards"]
    twice = killed["indexed"] + resumed["indexed"] - figures["shards"]
    return [
        ("samples, of one caption of 12 tokens", f"{captions:.2f} million", ""),
        ("killed (SIGKILL) after", f"{killed['seconds']:.0f} s, {killed['indexed']} shards", ""),
        (
            "resumed, to the end",
            f"{resumed['seconds']:.0f} s, {resumed['indexed']} shards; {twice} twice",
            "",
        ),
        (
            "CPU time for a million captions, with reading the tars",
            f"{resumed['cpuSeconds'] / resumed_captions:.0f} s",
            f"<= {SECONDS_GOAL} s",
        ),
        (
            "of that, tokens; open_clip's tokeniser needs",
            f"{figures['tokens']['ours']:.1f} s; {figures['tokens']['stock']:.0f} s",
            "",
        ),
        (
            "memory of all processes, at most",
            f"{max(killed['memory'], resumed['memory']):.0f} MiB",
            f"<= {MEMORY_GOAL} MiB",
        ),
        ("to hash the tars, before they are indexed", f"{figures['hashing'] / 1e9:.1f} GB/s", ""),
    ]


def _using(figures: Json) -> list[tuple[str, str, str]]:
    composed = figures["composed"]
    return [
        ("the finished index", f"{figures['bytes'] / 1e9:.1f} GB", ""),
        (
            "to open it and check all its bytes, as rank 0",
            f"{figures['opened']['check']:.1f} s",
            "",
        ),
        ("to open it, as the other ranks", f"{figures['opened']['']:.1f} s", ""),
        (
            "a set of the same shards in another order",
            f"{composed['seconds']:.1f} s, {composed['indexed']} shards tokenised",
            "0 tokenised",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1293)
    parser.add_argument("--samples", type=int, default=13_000_000)
    parser.add_argument(
        "--folder", type=Path, help="where all is written; a temporary directory by default"
    )
    parser.add_argument(
        "-o", "--output", choices=["json"], help="print the figures as one JSON document"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="indexing-", dir=given.folder))
    try:
        figures = run(folder, given.shards, given.samples)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1) if given.output else table(figures))
    if given.write:
        PAGE.write_text(between(PAGE.read_text(), "indexing.py", table(figures)))


if __name__ == "__main__":
    main()
