"""Packing shards, DreamLIP tables and the digits: all or nothing, and the same bytes each time."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from modelchain.errors import InputError
from modelchain_data.batches import decode
from modelchain_data.build import set_key
from modelchain_data.index import ShardSet, check_labels, check_training, open_set
from modelchain_data.pack import pack

SHARED = Path(__file__).parents[3] / "shared" / "data"
torch.set_num_threads(1)


def picture(size: tuple[int, int] = (20, 16), form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    ).save(buffer, form)
    return buffer.getvalue()


def tar_of(path: Path, samples: dict[str, tuple[str, bytes, dict[str, object]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (suffix, data, meta) in samples.items():
            for name, content in (
                (f"{key}.{suffix}", data),
                (f"{key}.json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opened(folder: Path, split: str) -> ShardSet:
    return open_set(sorted(folder.glob(f"{split}-*.tar")), folder.parent / "cache")


def test_tars_of_a_folder_become_splits(tmp_path: Path) -> None:
    big, source, to = picture((90, 60)), tmp_path / "src", tmp_path / "out"
    meta = {"captions": ["a", "b"], "label": 1, "classname": "dog", "license": "by", "size": 3}
    many = {f"k{i}": ("jpg", picture(), {"caption": f"c {i}"}) for i in range(5)}
    tar_of(source / "train" / "train-000000.tar", many)
    tar_of(
        source / "train" / "train-000001.tar",
        {"big": ("JPG", big, meta), "p": ("jpg", picture(form="PNG"), {"caption": "c"})},
    )
    tar_of(source / "val-000000.tar", {"k0": ("webp", picture(form="WEBP"), {"captions": ["v"]})})
    progress: list[int] = []
    train, val = pack(source, to, size=30, per_shard=3, on_progress=progress.append)
    assert progress == [7, 1]
    assert (train.name, train.samples, train.skipped, val.samples) == ("train", 7, 0, 1)
    assert train.shards == str(to / "train-{000000..000002}.tar") and val.shards == str(
        to / "val-000000.tar"
    )
    sizes = {
        "train-000000.tar": 3,
        "train-000001.tar": 3,
        "train-000002.tar": 1,
        "val-000000.tar": 1,
    }
    assert json.loads((to / "sizes.json").read_text()) == sizes
    assert sorted(path.name for path in to.iterdir()) == sorted({*sizes, "sizes.json", "index"})
    assert sorted(path.name for path in (to / "index").iterdir()) == sorted(
        [set_key(train.fingerprint), set_key(val.fingerprint), "shards"]
    )
    assert len(list((to / "index" / "shards").iterdir())) == 4
    data = opened(to, "train")
    assert data.fingerprint == train.fingerprint and data.keys == [*many, "big", "p"]
    assert [data.picture(i) for i in range(5)] == [picture()] * 5 and data.picture(6) == picture(
        form="PNG"
    )
    small = decode(data.picture(5)).permute(1, 2, 0).numpy().astype(int)
    expected = np.array(
        Image.open(io.BytesIO(big)).resize((45, 30), Image.Resampling.BICUBIC)
    ).astype(int)
    assert (
        small.shape == (30, 45, 3) and np.abs(small - expected).mean() < 12
    )  # noise, through JPEG
    assert data.labels.tolist()[5:] == [1, -1] and data.caption_counts.tolist() == [1] * 5 + [2, 1]
    with tarfile.open(to / "train-000001.tar") as tar:
        members = tar.getmembers()
        assert json.loads(tar.extractfile("big.json").read()) == meta
        assert {m.mtime for m in members} == {0} and members[-1].name == "big.json"


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    samples = {f"k{i}": ("jpg", picture((40, 40)), {"caption": f"c {i}"}) for i in range(300)}
    shard = tar_of(tmp_path / "some.tar", samples)
    reports = [pack(shard, tmp_path / name, size=16, per_shard=100) for name in ("a", "b")]
    assert reports[0][0].fingerprint == reports[1][0].fingerprint and reports[0][0].name == "some"
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    kept = pack(shard, tmp_path / "c", size=None)
    assert kept[0].samples == 300 and opened(tmp_path / "c", "some").picture(0) == picture((40, 40))


def test_the_index_beside_the_shards_is_used_while_it_is_theirs_and_whole(tmp_path: Path) -> None:
    samples = {
        f"k{i}": ("jpg", picture(), {"captions": [f"c {i}", "d"], "label": i}) for i in range(6)
    }
    to, cache = tmp_path / "out", tmp_path / "cache"
    report = pack(tar_of(tmp_path / "t.tar", samples), to, per_shard=4)[0]
    before, shards = bytes_of(to), sorted(to.glob("*.tar"))

    def built(shards: list[Path]) -> tuple[set[str], list[object]]:
        """The kinds of index that were built in the cache, and what the set holds."""
        before = bytes_of(cache)
        data = open_set(shards, cache)
        tokens = [data.tokens(i, j, 77).tolist() for i in range(len(data)) for j in range(2)]
        new = bytes_of(cache).keys() - before.keys() - {"sha256.json"}
        return {"shard" if name.startswith("shards/") else "set" for name in new}, [
            data.fingerprint,
            data.keys,
            data.labels.tolist(),
            data.picture(3),
            tokens,
        ]

    given = built(shards)
    assert (
        not given[0]
        and bytes_of(to) == before
        and [path.name for path in cache.iterdir()] == ["sha256.json"]
    )
    # Other data, in another order or only a part, have other sets, but the same shards.
    assert built(shards[::-1])[0] == {"set"} and built(shards[:1])[0] == {"set"}
    tokens = next((to / "index" / "shards").iterdir())
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert built(shards) == ({"shard"}, given[1])  # into the cache, without repair
    assert built(shards) == (set(), given[1])
    rows = to / "index" / set_key(report.fingerprint) / "samples"
    rows.write_bytes(rows.read_bytes()[:-1])
    assert built(shards) == ({"set"}, given[1]) and built(shards) == (set(), given[1])
    assert bytes_of(to).keys() == before.keys() and bytes_of(to) != before


def test_webdataset_reads_what_is_packed(tmp_path: Path) -> None:
    pack(
        tar_of(tmp_path / "0001.tar", {"a": ("jpg", picture(), {"caption": "x"})}), tmp_path / "out"
    )
    found = list(
        webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    )
    assert [(s["__key__"], s["jpg"], json.loads(s["json"])["captions"]) for s in found] == [
        ("a", picture(), ["x"])
    ]


def test_braces_and_a_percent_sign_in_the_path(tmp_path: Path) -> None:
    for i in range(2):
        tar_of(tmp_path / "50%d" / f"t-{i}.tar", {f"k{i}": ("jpg", picture(), {"caption": "x"})})
    report = pack(tmp_path / "50%d" / "t-{0..1}.tar", tmp_path / "50%d" / "out")
    assert [(split.name, split.samples) for split in report] == [("t", 2)]


def test_an_existing_folder_is_refused_unless_empty(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "t.tar", {"a": ("jpg", picture(), {"caption": "x"})})
    to = tmp_path / "out"
    to.mkdir()
    assert pack(shard, to)[0].samples == 1
    before = bytes_of(to)
    with pytest.raises(InputError, match="exists already"):
        pack(shard, to)
    with pytest.raises(InputError, match="exists already"):
        pack(shard, shard)
    assert bytes_of(to) == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "t.tar",
    ]


def test_bad_pictures_are_skipped_up_to_one_in_a_thousand(tmp_path: Path) -> None:
    samples = {f"k{i:04d}": ("jpg", picture(), {"caption": "x"}) for i in range(1000)}
    samples["k0500"] = ("jpg", picture()[:50], {"caption": "x"})
    report = pack(tar_of(tmp_path / "t.tar", samples), tmp_path / "out")
    assert (report[0].samples, report[0].skipped) == (999, 1)
    assert "k0500" not in opened(tmp_path / "out", "t").keys
    samples["k0501"] = samples["k0500"]
    with pytest.raises(
        InputError, match=r"2 of 1000 rows are unusable, at most 1 may be; the first is .*k0500"
    ):
        pack(tar_of(tmp_path / "u.tar", samples), tmp_path / "out2")
    assert not (tmp_path / "out2").exists() and not list(tmp_path.glob(".out2*"))


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.csv").write_text("title\tfilepath\nx\ta.jpg\n")
    (tmp_path / "none.csv").write_text("\t".join("abcdefgh") + "\n")
    for source, text in {
        tmp_path / "empty": "holds no .tar file",
        tmp_path / "gone.tar": "No such file",
        tmp_path / "gone.csv": "no such file",
        tmp_path / "two.csv": "must have 8 columns separated by tabs, not 2",
        tmp_path / "none.csv": "holds no sample",
        tar_of(
            tmp_path / "x.tar", {"k": ("gif", b"", {"caption": "x"})}
        ): "k.json: sample 'k': has 0 pictures",
        tar_of(
            tmp_path / "c.tar", {"k": ("jpg", picture(), {"captions": []})}
        ): "k: has neither a caption nor a label",
    }.items():
        with pytest.raises(InputError, match=text):
            pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def _samples(shard: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False))


def test_digits(tmp_path: Path) -> None:
    to = tmp_path / "new" / "digits"
    report = pack("digits", to)
    assert [(split.name, split.samples) for split in report] == [("train", 1442), ("val", 355)]
    names, templates = (
        json.loads((to / f"{kind}.json").read_text()) for kind in ("classnames", "templates")
    )
    assert (
        len(names) == 10
        and len(set(templates)) >= 16
        and all(text.count("{}") == 1 for text in templates)
    )
    train, val = opened(to, "train"), opened(to, "val")
    assert [train.fingerprint, val.fingerprint] == [split.fingerprint for split in report]
    assert check_training(train, 1442, 16, "f") == 0
    for data in (train, val):
        check_labels(data, names, "f")
        assert [data.classnames[i] for i in range(20)] == [
            names[label] for label in data.labels[:20]
        ]
        assert min(np.bincount(data.labels)) / len(data) > 0.09
        assert decode(data.picture(0)).shape == (3, 32, 32)
    assert not set(train.keys) & set(val.keys)
    captions = [tuple(train.tokens(0, j, 77).tolist()) for j in range(train.caption_count(0))]
    assert len(set(captions)) >= 16
    before = bytes_of(to)
    assert pack("digits", to) == report and bytes_of(to) == before
    shutil.rmtree(to / "index")  # as an earlier version left it
    assert pack("digits", to) == report and bytes_of(to).keys() < before.keys()
    (to / "sizes.json").write_text("{}")
    with pytest.raises(InputError, match="holds something else"):
        pack("digits", to)
    assert (to / "sizes.json").read_text() == "{}" and [
        path.name for path in to.parent.iterdir() if path != to
    ] == ["cache"]


def test_real_photos(tmp_path: Path) -> None:
    report = pack(SHARED / "coco-mini", tmp_path / "out", size=64)
    assert {(split.name, split.samples) for split in report} == {("train", 50), ("val", 51)}
    data = opened(tmp_path / "out", "val")
    assert min(decode(data.picture(0)).shape[1:]) == 64 and check_training(data, 51, 5, "f") == 0
    meta = json.loads(_samples(tmp_path / "out" / "val-000000.tar")[0]["json"])
    assert meta["license"].startswith("http") and len(meta["captions"]) == 5
