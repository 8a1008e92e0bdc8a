"""The examples fit the data: their shards are those that `pack` writes for their samples."""

from __future__ import annotations

import inspect
import re
from math import ceil
from pathlib import Path

import pytest
import yaml
from making import pairs, tar_of

from modelchain.identity.shards import expand
from modelchain_data.pack import PER_SHARD, pack

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
# Pictures of each folder and split: the paper's Table A, ImageNet's and COCO's validation sets, the
# digits.
SAMPLES = {
    "/data/cc3m/train": 2_753_427,
    "/data/cc12m/train": 10_173_631,
    "/data/imagenet/val": 50_000,
    "/data/coco/val": 5_000,
    "/data/train": 1_442,
    "/data/val": 355,
    "/data/digits/train": 1_442,
    "/data/digits/val": 355,
}


def shards_of(example: Path) -> dict[str, list[Path]]:
    """By folder and split, the paths that the example names, in order."""
    [spec] = [
        d["spec"] for d in yaml.safe_load_all(example.read_text()) if d["kind"] == "ModelChain"
    ]
    found: dict[str, list[Path]] = {}
    for shards in [
        spec["data"]["train"]["shards"],
        *(evaluation["shards"] for evaluation in spec["evaluation"]),
    ]:
        for name in expand(shards):
            found.setdefault(name.rpartition("-")[0], []).append(Path(name))
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_the_shards_of_an_example_are_those_that_pack_writes(example: Path, tmp_path: Path) -> None:
    [spec] = [
        d["spec"] for d in yaml.safe_load_all(example.read_text()) if d["kind"] == "ModelChain"
    ]
    assert spec["data"]["train"]["samples"] == sum(
        SAMPLES[split] for split in shards_of(example) if split.endswith("train")
    )
    for number, (split, named) in enumerate(shards_of(example).items()):
        assert len(named) == ceil(SAMPLES[split] / PER_SHARD), split
        few = min(len(named), 12)
        source = tar_of(
            tmp_path / f"{number}" / f"{Path(split).name}-0.tar", pairs(*map(str, range(few)))
        )
        [report] = pack(source, tmp_path / f"{number}" / "out", per_shard=1)
        written = sorted(path.name for path in (tmp_path / f"{number}" / "out").glob("*.tar"))
        assert written == [shard.name for shard in named[:few]]
        assert [Path(name).name for name in expand(report.shards)] == written


def test_pack_writes_ten_thousand_samples_a_shard() -> None:
    assert PER_SHARD == 10_000 == inspect.signature(pack).parameters["per_shard"].default
    page = (EXAMPLES[0].parents[1] / "docs" / "own-data.md").read_text()
    assert re.search(r"10,000 samples each", page)
