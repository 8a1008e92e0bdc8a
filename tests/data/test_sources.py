"""Which tars `pack` finds, their splits, and unique keys of samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from making import opened, packed, pairs, picture, sample, tar_of

from modelchain.errors import InputError
from modelchain_data.pack import pack
from modelchain_data.sources import tars_of


@pytest.mark.parametrize(
    "places, keys",
    [
        (["00000", "00001", "00002"], ["000", "001"]),
        (["a/00000", "b/00000"], ["x/000", "x/001"]),
        (["train-0", "train-1"], ["sample"]),
        (["train-0", "train-1"], ["k", "k-1", "k-1-1"]),
    ],
)
def test_keys_that_repeat_over_tars_are_made_unique(
    tmp_path: Path, places: list[str], keys: list[str]
) -> None:
    for number, place in enumerate(places):
        tar_of(tmp_path / "src" / f"{place}.tar", pairs(*keys, start=number * len(keys)))
    _, found = packed(tmp_path / "src")
    expected = [picture(i) for i in range(len(places) * len(keys))]
    assert [image for image, _ in found.values()] == expected
    assert list(found)[: len(keys)] == keys and list(found)[len(keys)].startswith(f"{keys[0]}-1")
    # Before packing, their place tells them apart.
    data = opened(*sorted((tmp_path / "src").rglob("*.tar")))
    assert [data.picture(i) for i in range(len(data))] == expected
    pack(tmp_path / "src", tmp_path / "again", size=None)
    assert (tmp_path / "again" / "train-000000.tar").read_bytes() == (
        tmp_path / "packed" / "train-000000.tar"
    ).read_bytes()


def test_a_key_that_repeats_in_one_tar_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    shard = tar_of(
        tmp_path / "t.tar", sample("k", label=1) + sample("l", label=1) + sample("k", label=1)
    )
    for use in (opened, packed):
        with pytest.raises(InputError, match=r"t.tar: k.json: sample 'k': its key.* is used twice"):
            use(shard)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("t.tar", "cache")]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    src = tmp_path / "src"
    tar_of(src / "disk1" / "train-0.tar", pairs("a"))
    tar_of(tmp_path / "elsewhere" / "deep" / "train-1.tar", pairs("b", start=1))
    tar_of(tmp_path / "blobs" / "0123", pairs("c", start=2))
    (src / "disk2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../src")  # a cycle
    (src / "disk3").symlink_to("disk1")  # the same folder again
    (src / "disk1" / "train-2.tar").symlink_to("../../blobs/0123")
    _, found = packed(src)
    assert list(found) == ["a", "c", "b"] and [image for image, _ in found.values()] == [
        picture(i) for i in (0, 2, 1)
    ]
    shutil.rmtree(src / "disk1")
    (src / "disk3").unlink()
    assert list(packed(src, to="links")[1]) == ["b"]  # nothing but a linked folder
    (src / "disk9").symlink_to("gone")
    with pytest.raises(InputError, match=r"disk9: is a link that leads nowhere"):
        packed(src, to="out")


def test_hidden_files_and_other_spellings_among_sources(tmp_path: Path) -> None:
    src = tmp_path / ".src"
    tar_of(src / "train-0.TAR", pairs("a"))
    for name in ("._train-0.tar", ".tmp/train-1.tar", "__MACOSX/train-2.tar", "sub/._train-3.tar"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(b"no tar")
    assert list(packed(src)[1]) == ["a"]
    for name in ("b.tar.gz", "b.tgz", "sub/b.tar.zst", "b.TAR.BZ2"):
        (src / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{Path(name).name}: is compressed"):
            packed(src, to="out")
        (src / name).unlink()


@pytest.mark.parametrize(
    "stem, split",
    [
        ("train-000000", "train"),
        ("train_7", "train"),
        ("val", "val"),
        ("00001", "train"),
        ("a-train-01", "a-train"),
        ("NAME-00000-of-00002", "NAME"),
        ("NAME_00001_of_00002", "NAME"),
        ("NAME.00001.of.00002", "NAME"),
        ("00001-of-00002", "train"),
        ("NAME-1of2", "NAME"),
        ("NAME-00000-OF-00002", "NAME"),
        ("proof-3", "proof"),
        ("NAME-v2-00000-of-00010", "NAME-v2"),
    ],
)
def test_the_name_of_a_split(tmp_path: Path, stem: str, split: str) -> None:
    assert list(tars_of(tmp_path / f"{stem}.tar")) == [split]


def test_sharded_names_are_one_split(tmp_path: Path) -> None:
    for i in range(3):
        tar_of(tmp_path / "src" / f"val-0000{i}-of-00003.tar", pairs(f"k{i}", start=i))
    pattern = tmp_path / "src" / "val-{00000..00002}-of-00003.tar"
    for source, to in ((tmp_path / "src", "a"), (pattern, "b")):
        [split] = pack(source, tmp_path / to)
        assert (split.name, split.samples, split.shards) == (
            "val",
            3,
            str(tmp_path / to / "val-000000.tar"),
        )


def test_a_split_whose_name_begins_as_another_one(tmp_path: Path) -> None:
    tar_of(tmp_path / "src" / "a" / "val-small-0.tar", pairs("s"))
    tar_of(tmp_path / "src" / "b" / "val-0.tar", pairs("x", "y"))
    report = pack(tmp_path / "src", tmp_path / "out")
    assert [(split.name, split.samples) for split in report] == [("val-small", 1), ("val", 2)]
