"""Forms of tars: concatenated, with links, with files that operating systems add. No sample is
lost.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import Members, opened, packed, pairs, picture, tar_of

from modelchain.errors import InputError
from modelchain_data.index import ShardSet
from modelchain_data.tars import _headers


def joined(path: Path, *parts: Path, between: bytes = b"") -> Path:
    path.write_bytes(between.join(part.read_bytes() for part in parts))
    return path


def check(data: ShardSet, count: int) -> None:
    """All `count` samples of `pairs` exist, each with the bytes of its own picture."""
    assert len(data) == count and data.caption_counts.tolist() == [1] * count
    assert [data.picture(i) for i in range(count)] == [picture(i) for i in range(count)]


@pytest.mark.parametrize("sizes", [(4, 4), (1, 1, 1), (3, 0, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("between", [b"", bytes(512), bytes(5120)])
def test_tars_behind_one_another_are_read_to_the_end(
    tmp_path: Path, sizes: tuple[int, ...], between: bytes
) -> None:
    parts, start = [], 0
    for number, size in enumerate(sizes):
        keys = [f"k{start + i}" for i in range(size)]
        parts.append(tar_of(tmp_path / f"part{number}", pairs(*keys, start=start)))
        start += size
    shard = joined(tmp_path / "train-0.tar", *parts, between=between)
    check(opened(shard), start)
    _, found = packed(shard)
    assert [(image, meta["captions"]) for image, meta in found.values()] == [
        (picture(i), [f"picture {i}"]) for i in range(start)
    ]


@pytest.mark.parametrize("keys", [["sample"], ["0", "1", "2"]])
def test_keys_that_repeat_in_joined_tars(tmp_path: Path, keys: list[str]) -> None:
    parts = [tar_of(tmp_path / f"part{i}", pairs(*keys, start=i * len(keys))) for i in range(2)]
    shard = joined(tmp_path / "train-0.tar", *parts)
    check(opened(shard), 2 * len(keys))
    _, found = packed(shard)
    assert [image for image, _ in found.values()] == [picture(i) for i in range(2 * len(keys))]


def test_a_joined_tar_that_is_damaged_is_refused(tmp_path: Path) -> None:
    one, two = (tar_of(tmp_path / f"part{i}", pairs(*"abc"[: i + 2], start=i)) for i in range(2))
    whole, first = joined(tmp_path / "whole", one, two).read_bytes(), len(one.read_bytes())
    with tarfile.open(two) as tar:
        places = [
            first + at
            for member in tar
            for at in (member.offset, member.offset_data, member.offset_data + 1)
        ]
    shard = tmp_path / "train-0.tar"
    for cut in [first + 1, first + 100, *places[1:]]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"train-0.tar: .*tar"):
            opened(shard)
    for text, damaged in {
        "what follows its end mark": whole[:first] + b"junk" * 500,
        "what follows its end mark, at byte": whole[:first] + b"\1" + whole[first + 1 :],
        "truncated or damaged": whole[: places[3]] + b"\xff" * 512 + whole[places[3] + 512 :],
        "damaged tar": whole[: places[3]]
        + bytes(512)
        + whole[places[3] + 512 :],  # a hole where a header was
    }.items():
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=text):
            opened(shard)


HIDDEN = [
    "._K.png",
    "._K.txt",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/._K.png",
    "__MACOSX/K.png",
    ".K.png",
]


@pytest.mark.parametrize("folder", ["", "./", "data/", "./a/b/"])
@pytest.mark.parametrize("before", [True, False])
def test_hidden_members_are_passed_over_wherever_they_lie(
    tmp_path: Path, folder: str, before: bool
) -> None:
    members: Members = []
    for i in range(3):
        key, sample = f"{folder}0000{i}", pairs(f"{folder}0000{i}", start=i)
        hidden = [
            (folder + name.replace("K", key.rpartition("/")[2]), b"\0\5\x16\7") for name in HIDDEN
        ]
        between = [m for pair in zip(hidden, [*sample, *hidden], strict=False) for m in pair][
            : 2 * len(sample)
        ]
        members += hidden + sample if before else between + [h for h in hidden if h not in between]
    shard = tar_of(tmp_path / "train-0.tar", members)
    check(opened(shard), 3)
    assert len(packed(shard)[1]) == 3


def test_folders_whose_names_have_dots_hold_samples(tmp_path: Path) -> None:
    """Also hidden folders, and names that only look like webdataset's meta data."""
    keys = [".data/0", "v1.0/x.y/1", "__a__2", "..3/3"]
    check(opened(tar_of(tmp_path / "train-0.tar", pairs(*keys))), 4)
    assert (
        len(
            opened(
                tar_of(
                    tmp_path / "meta.tar", [*pairs("0"), ("__meta__/x.png", b""), ("__x__", b"")]
                )
            )
        )
        == 1
    )


def linked(path: Path, *links: tuple[str, str, bytes]) -> Path:
    """A tar with a.png, folder/b.png, and these links (name, target, type), each with a caption."""
    with tarfile.open(path, "w") as tar:
        for name, data in (*pairs("a"), *pairs("folder/b", start=1)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
            info = tarfile.TarInfo(name.replace(".png", ".txt"))
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return path


def test_links_within_a_tar_are_followed(tmp_path: Path) -> None:
    links = [("c.png", "a.png", tarfile.LNKTYPE), ("folder/d.png", "b.png", tarfile.SYMTYPE)]
    links += [
        ("e.png", "./folder/b.png", tarfile.LNKTYPE),
        ("x/f.png", "../c.png", tarfile.SYMTYPE),
    ]
    shard = linked(tmp_path / "train-0.tar", *links)
    expected = [picture(i) for i in (0, 1, 0, 1, 1, 0)]
    assert [opened(shard).picture(i) for i in range(6)] == expected
    assert [image for image, _ in packed(shard)[1].values()] == expected


def test_linked_shards_are_read_as_files_are(tmp_path: Path) -> None:
    """As Hugging Face's cache keeps them, and of unequal sizes."""
    links, start = [], 0
    for number, size in enumerate((1, 5, 1, 1)):
        keys = [f"k{start + i}" for i in range(size)]
        blob = tar_of(tmp_path / "blobs" / f"{number:064x}", pairs(*keys, start=start))
        links.append(tmp_path / "snapshot" / f"train-{number:06d}.tar")
        links[-1].parent.mkdir(exist_ok=True)
        links[-1].symlink_to(f"../blobs/{blob.name}")
        start += size
    check(opened(*links), start)
    assert opened(*links).counts == [1, 5, 1, 1]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_that_lead_out_of_a_tar_are_refused_by_name(tmp_path: Path, kind: bytes) -> None:
    shard = linked(tmp_path / "train-0.tar", ("c.png", "/data/c.png", kind))
    with pytest.raises(
        InputError, match=r"sample 'c': 'c.png' is a link to '/data/c.png', which is not before it"
    ):
        opened(shard)
    with pytest.raises(InputError, match=r"'c.png' is a link"):
        packed(shard)


def test_a_compressed_tar_is_refused_by_name(tmp_path: Path) -> None:
    for mode in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"train-{mode}.tar", f"w:{mode}"):
            pass
        for use in (opened, packed):
            with pytest.raises(
                InputError, match=rf"train-{mode}.tar: .*a compressed one must be unpacked"
            ):
                use(tmp_path / f"train-{mode}.tar")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_headers_are_read_as_tarfile_reads_them(data: st.DataObject) -> None:
    """Also damaged ones: the same members up to the same place."""
    buffer = io.BytesIO()
    format = data.draw(
        st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    )
    kinds = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for _ in range(data.draw(st.integers(1, 5))):
            name = data.draw(st.sampled_from(["a.jpg", "é.txt", "d/b.json", "f/" * 60 + "x", "e/"]))
            info = tarfile.TarInfo(name)
            info.type = data.draw(st.sampled_from(kinds))
            info.size = data.draw(st.sampled_from([0, 1, 512, 1000])) if info.isreg() else 0
            info.mtime = data.draw(st.sampled_from([0, 1, 2**32]))
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, 4095)) % len(raw)] = data.draw(st.integers(0, 255))

    def read(infos: Callable[[io.BytesIO, tarfile.TarFile], Iterable[tarfile.TarInfo]]) -> object:
        file, found = io.BytesIO(raw), list[object]()
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for i in infos(file, tar):
                    found.append((i.name, i.size, i.offset_data, i.type, i.linkname))
                found.append(tar.offset)
        except (tarfile.TarError, ValueError) as error:
            found.append(type(error))
        return found

    assert read(lambda file, tar: _headers(file, tar, 0)) == read(lambda _, tar: tar)
