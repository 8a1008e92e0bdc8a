"""Shard sets: what is read and refused, and a cache that survives races and damage."""

from __future__ import annotations

import errno
import gzip
import io
import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from modelchain.errors import InputError, WorkError
from modelchain_data import build
from modelchain_data.index import (
    check_labels,
    check_pictures,
    check_training,
    open_set,
)
from modelchain_data.samples import Problems, read_shard

SHARED = Path(__file__).parents[3] / "shared" / "data"
JPEG = b"\xff\xd8 not decoded here"
LONG = (
    "a very long caption about a dog, a cat, two birds and 17 fish that swim in a bowl on the"
    " table " * 6
)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(
    key: str, suffix: str = "jpg", picture: bytes = JPEG, **meta: object
) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", picture), (f"{key}.json", json.dumps(meta).encode())]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    one = [*sample("a", captions=["A dog.", LONG], label=1, classname="dog", license="by")]
    one += [
        *sample("d/b", "PNG", b"png", caption="one caption"),
        ("c.webp", b"webp"),
        ("c.txt", b"x\n\n y \n"),
    ]
    one += [
        ("c.cls", b"3\n"),
        ("c.seg.png", b"ignored"),
        ("__meta__/x.jpg", b"ignored"),
        ("._a.jpg", b"ignored"),
    ]
    return [
        write_tar(tmp_path / "t-0.tar", one),
        write_tar(tmp_path / "t-1.tar", sample("a", captions=["z"] * 3)),
    ]


def problems_of(*shards: Path, cache: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_set(list(shards), cache or shards[0].parent / "cache")
    return str(caught.value)


def test_reads_all_kinds_of_samples(shards: list[Path], tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    data = open_set(shards, tmp_path / "cache", lambda done, total: progress.append((done, total)))
    assert progress == [(1, 2), (2, 2)]
    assert (
        len(data) == 4
        and data.keys == ["a", "d/b", "c", "a"]
        and data.classnames == ["dog", None, None, None]
    )
    assert data.labels.tolist() == [1, -1, 3, -1] and data.caption_counts.tolist() == [2, 1, 2, 3]
    assert [data.picture(i) for i in range(4)] == [JPEG, b"png", b"webp", JPEG]
    assert data.caption_count(3) == 3


@pytest.mark.parametrize("length", [16, 77])
def test_tokens_are_those_of_open_clip(shards: list[Path], tmp_path: Path, length: int) -> None:
    data, tokenizer = open_set(shards, tmp_path / "cache"), SimpleTokenizer()
    texts = {
        (0, 0): "A dog.",
        (0, 1): LONG,
        (1, 0): "one caption",
        (2, 0): "x",
        (2, 1): "y",
        (3, 2): "z",
    }
    for (i, j), text in texts.items():
        ours = data.tokens(i, j, length)
        expected = tokenizer(text, length)[0].numpy()
        assert ours.dtype == np.uint16 and len(ours) <= length
        assert np.array_equal(np.pad(ours, (0, length - len(ours))), expected)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    captions=st.lists(st.text(max_size=60).filter(str.strip), min_size=1, max_size=4),
    length=st.integers(3, 20),
)
def test_tokens_of_any_text(
    captions: list[str], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = open_set([write_tar(folder / "t.tar", sample("k", captions=captions))], folder / "cache")
    expected = SimpleTokenizer()(captions, length).numpy()
    for j in range(len(captions)):
        ours = data.tokens(0, j, length)
        assert np.array_equal(np.pad(ours, (0, length - len(ours))), expected[j])


def test_a_lone_surrogate_is_no_crash(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "t.tar", [("k.jpg", JPEG), ("k.json", b'{"captions": ["a \\ud800 b"]}')]
    )
    assert len(open_set([shard], tmp_path / "cache")) == 1


def fingerprint(shards: list[Path], cache: Path) -> str:
    return open_set(shards, cache).fingerprint


def test_fingerprint_is_of_bytes_and_order_alone(shards: list[Path], tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    mark = fingerprint(shards, cache)
    assert fingerprint(shards[::-1], cache) != mark != fingerprint(shards[:1], cache)
    other.mkdir()
    moved = [other / f"{i}.tar" for i in range(2)]
    for old, new in zip(shards, moved, strict=True):
        new.write_bytes(old.read_bytes())
    assert fingerprint(moved, tmp_path / "cache2") == mark
    moved[0].write_bytes(moved[0].read_bytes() + bytes(512))
    assert fingerprint(moved, tmp_path / "cache2") != mark


def test_sha256_is_not_computed_again(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = fingerprint(shards, tmp_path / "cache")
    sha256_of = build.sha256_of
    monkeypatch.setattr(
        "modelchain_data.build.sha256_of",
        lambda path: pytest.fail(f"hashed {path}") if path in shards else sha256_of(path),
    )
    assert fingerprint(shards, tmp_path / "cache") == mark


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"null", b'{"x": [1]}'])
def test_a_damaged_hash_cache_is_rebuilt(shards: list[Path], tmp_path: Path, damage: bytes) -> None:
    mark = fingerprint(shards, tmp_path / "cache")
    (tmp_path / "cache" / "sha256.json").write_bytes(damage)
    assert fingerprint(shards, tmp_path / "cache") == mark
    assert json.loads((tmp_path / "cache" / "sha256.json").read_bytes())


def index_bytes(cache: Path) -> dict[str, bytes]:
    """All files of an index folder, by path, without the digests, which name the shards' paths."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != "sha256.json"
    }


def test_rebuilds_are_identical_and_leave_nothing_behind(
    shards: list[Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    mark = open_set(shards, tmp_path / "c1").fingerprint
    open_set(shards, tmp_path / "c2")
    assert index_bytes(tmp_path / "c1") == index_bytes(tmp_path / "c2")
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == sorted(
        [build.set_key(mark), "sha256.json", "shards"]
    )
    assert len(list((tmp_path / "c1" / "shards").iterdir())) == 2
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "c1", tmp_path / "c2"])


def test_the_index_is_built_once(shards: list[Path], tmp_path: Path) -> None:
    open_set(shards, tmp_path / "cache")
    open_set(shards, tmp_path / "cache", lambda done, total: pytest.fail("built again"))


def test_processes_build_the_same_index(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_set(shards, tmp_path / "c1")
    monkeypatch.setattr("modelchain_data.build.PARALLEL", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    progress: list[tuple[int, int]] = []
    open_set(shards, tmp_path / "c2", lambda done, total: progress.append((done, total)))
    assert index_bytes(tmp_path / "c1") == index_bytes(tmp_path / "c2")
    assert progress == [(1, 2), (2, 2)]
    bad = [
        write_tar(tmp_path / f"bad-{i}.tar", [m for k in range(3) for m in sample(f"k{k}")[:1] * 2])
        for i in (0, 1)
    ]
    assert (
        problems_of(*bad).splitlines()
        == [
            f"{b}: k{k}.jpg: sample 'k{k}': its key, or one of its suffixes, is used twice in this"
            " shard"
            for b in bad
            for k in range(3)
        ][:5]
    )


PLACES = {
    "the set's description": ("index.json", 0.5),
    "the set's samples": ("samples", 0.5),
    "a shard's header": ("shards/*", 0.01),
    "a shard's bounds": ("shards/*", 0.4),
    "a shard's tokens": ("shards/*", 0.6),
    "a shard's keys": ("shards/*", 0.95),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_index_is_rebuilt(
    shards: list[Path], tmp_path: Path, name: str, damage: str
) -> None:
    cache = tmp_path / "cache"
    open_set(shards, cache)
    pattern, at = PLACES[name]
    whole, file = index_bytes(cache), next(cache.rglob(pattern))
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes({"cut": data[:-3], "flip": data, "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        file.unlink()
    data = open_set(shards, cache)
    assert data.picture(1) == b"png" and index_bytes(cache) == whole


def _open_in_a_process(shards: list[Path], cache: Path, barrier, answers) -> None:  # type: ignore[no-untyped-def]
    barrier.wait()
    progress: list[int] = []
    data = open_set(shards, cache, lambda done, _: progress.append(done))
    answers.put((progress, data.fingerprint, data.tokens(0, 1, 16).tolist(), len(data.picture(3))))


def test_processes_race_for_one_index_and_one_builds_it(shards: list[Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, answers = context.Barrier(2), context.Queue()
    arguments = (shards, tmp_path / "cache", barrier, answers)
    workers = [context.Process(target=_open_in_a_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0] and found[0][1:] == found[1][1:]
    assert sorted(progress for progress, *_ in found) == [[], [1, 2]]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        [build.set_key(found[0][1]), "sha256.json", "shards"]
    )


def test_the_loser_of_a_race_uses_the_winners_index(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        open_set(shards, cache)  # the other process ends just before us
        (target / "winner").touch()
        return rename(self, target)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(Path, "rename", late)
    monkeypatch.setattr("modelchain_data.build.fcntl.flock", no_locks)
    data = open_set(shards, cache)
    assert len(data) == 4
    assert (cache / build.set_key(data.fingerprint) / "winner").exists()


def test_a_damaged_index_that_another_process_mends_meanwhile_stays(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    open_set(shards, cache)
    tokens = next((cache / "shards").iterdir())
    whole = tokens.read_bytes()
    tokens.write_bytes(b"")

    def mended(*_: object) -> None:
        tokens.write_bytes(whole)
        (cache / "shards" / "mended").touch()

    monkeypatch.setattr("modelchain_data.build.fcntl.flock", mended)
    open_set(shards, cache, lambda done, total: pytest.fail("built again"))
    assert (cache / "shards" / "mended").exists()


BAD = {
    "no picture": ([("k.json", b'{"captions": ["x"]}')], "k.json", "0 pictures"),
    "two pictures": ([("k.jpg", JPEG), ("k.png", b"")], "k.png", "2 pictures"),
    "not json": ([("k.jpg", JPEG), ("k.json", b"{captions")], "k.json", "Expecting property name"),
    "not utf-8": ([("k.jpg", JPEG), ("k.json", b'{"caption": "\xff"}')], "k.json", "utf-8"),
    "deep json": ([("k.jpg", JPEG), ("k.json", b"[" * 100_000)], "k.json", "recursion"),
    "json list": ([*sample("k")[:1], ("k.json", b"[]")], "k.json", "must be an object"),
    "no text": (sample("k", captions=["a", 3]), "k.json", "captions must be a list of texts"),
    "text for list": (sample("k", captions="a"), "k.json", "captions must be a list of texts"),
    "key twice": (sample("k") + sample("l") + sample("k"), "k.json", "used twice"),
    "member twice": ([("k.jpg", JPEG), ("k.jpg", JPEG)], "k.jpg", "used twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named(tmp_path: Path, name: str) -> None:
    members, member, text = BAD[name]
    shard = write_tar(tmp_path / "bad.tar", members)
    message = problems_of(shard)
    assert f"{shard}: {member}: " in message and text in message and "\n" not in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sha256.json"]


def test_missing_shards_are_named_five_at_most(tmp_path: Path) -> None:
    message = problems_of(*(tmp_path / f"{i}.tar" for i in range(9)))
    assert message.splitlines() == [
        f"{tmp_path / f'{i}.tar'}: No such file or directory" for i in range(5)
    ]
    assert "Is a directory" in problems_of(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"x" * 5000, bytes(10_240), gzip.compress(bytes(9000))]
)
def test_what_is_no_plain_tar(tmp_path: Path, data: bytes) -> None:
    shard = tmp_path / "t.tar"
    shard.write_bytes(data)
    message = problems_of(shard)
    assert str(shard) in message and ("plain tar" in message or "no sample" in message)
    with tarfile.open(shard, "w:gz"):
        pass
    assert "compressed" in problems_of(shard)


def test_a_tar_cut_anywhere_is_refused(shards: list[Path], tmp_path: Path) -> None:
    """Also between two members, where tarfile itself would silently ignore the rest."""
    whole = shards[0].read_bytes()
    with tarfile.open(shards[0]) as tar:
        members = tar.getmembers()
    end = max(member.offset_data + member.size for member in members)
    for cut in [
        1,
        512,
        *(m.offset for m in members[1:]),
        *(m.offset_data + 1 for m in members),
        end - 1,
        end + 1,
    ]:
        shard = tmp_path / "cut.tar"
        shard.write_bytes(whole[:cut])
        problems = Problems()
        list(read_shard(shard, problems))
        assert problems and all(problem.file == str(shard) for problem in problems), cut
    assert "truncated or damaged" in problems_of(
        _cut(shards[0], members[2].offset, tmp_path / "between.tar")
    )


def _cut(shard: Path, size: int, to: Path) -> Path:
    to.write_bytes(shard.read_bytes()[:size])
    return to


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_headers_are_problems_and_never_crashes(
    shards: list[Path], data: st.DataObject
) -> None:
    raw = bytearray(shards[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    shard = shards[0].parent / "damaged.tar"
    shard.write_bytes(raw)
    try:
        list(read_shard(shard, Problems()))
    except InputError as error:
        assert len(error.problems) == 5


def test_a_shard_that_changes_under_a_run_fails_the_work(
    shards: list[Path], tmp_path: Path
) -> None:
    data = open_set(shards, tmp_path / "cache")
    os.truncate(shards[0], 600)
    with pytest.raises(WorkError, match="has changed") as caught:
        data.picture(1)
    assert caught.value.failure == "Data"
    data = open_set([shards[1]], tmp_path / "cache")
    shards[1].unlink()
    with pytest.raises(WorkError, match="No such file"):
        data.picture(0)


def numbered(path: Path, counts: list[int]) -> Path:
    return write_tar(
        path, [m for i, n in enumerate(counts) for m in sample(f"k{i}", **captions(n))]
    )


def captions(n: int) -> dict[str, object]:
    return {"captions": [f"caption {j}" for j in range(n)]} if n else {}


def test_training_data_is_compared_with_the_spec(tmp_path: Path) -> None:
    data = open_set([numbered(tmp_path / "t.tar", [4] * 999 + [2])], tmp_path / "cache")
    assert (
        check_training(data, 1000, 4, "chain.yaml") == 1
        and check_training(data, 1000, 2, "chain.yaml") == 0
    )
    with pytest.raises(InputError, match="hold 1000 samples, not 999") as caught:
        check_training(data, 999, 4, "chain.yaml")
    assert caught.value.problems[0].field == "spec.data.train.samples"
    with pytest.raises(
        InputError, match=r"1000 of 1000 .* 5 captions \(at most 1 may.*'k999' has 2"
    ) as caught:
        check_training(data, 1000, 5, "chain.yaml")
    assert str(caught.value).startswith("chain.yaml: spec.data.train.captionsPerSample: ")
    data = open_set([numbered(tmp_path / "e.tar", [4] * 1999 + [0])], tmp_path / "cache")
    assert check_training(data, 2000, 4, "chain.yaml") == 0 and data.without_caption.tolist() == [
        1999
    ]
    data = open_set([numbered(tmp_path / "n.tar", [4] * 1000 + [0, 4, 0])], tmp_path / "cache")
    with pytest.raises(
        InputError,
        match=r"2 of 1003 samples have no caption \(at most 1 may\); the first is 'k1000'",
    ):
        check_training(data, 1003, 4, "chain.yaml")


def test_labels_are_compared_with_class_names(tmp_path: Path) -> None:
    names = ["cat", "dog", "cat"]  # a name may stand for two classes, as in ImageNet's list
    members = sample("a", label=0, classname="cat") + sample("b", label=2, classname="cat")
    members += sample("c", label=1, classname="hound")
    data = open_set([write_tar(tmp_path / "t.tar", members)], tmp_path / "cache")
    check_labels(data, names, "chain.yaml")
    with pytest.raises(
        InputError, match=r"chain.yaml: f: sample 'b' has label 2; there are 2 class names"
    ):
        check_labels(data, names[:2], "chain.yaml", "f")
    with pytest.raises(InputError, match=r"'a' is called 'cat', but its label 0 stands for 'dog'"):
        check_labels(data, ["dog", "cat", "cat"], "chain.yaml")
    data = open_set([write_tar(tmp_path / "n.tar", sample("a"))], tmp_path / "cache")
    with pytest.raises(InputError, match="'a' has no label"):
        check_labels(data, names, "chain.yaml")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not beside this checkout")
def test_real_shards(tmp_path: Path) -> None:
    shards = sorted((SHARED / "coco-mini" / "val").glob("*.tar"))
    data = open_set(shards, tmp_path / "cache")
    assert len(data) == 51 and check_training(data, 51, 5, "f") == 0
    shards = sorted((SHARED / "fashion-mnist" / "val").glob("*.tar"))
    data = open_set(shards, tmp_path / "cache")
    assert len(data) == 4000
    check_labels(data, json.loads((SHARED / "fashion-mnist" / "classnames.json").read_text()), "f")


def test_members_that_are_no_pictures_are_counted(tmp_path: Path) -> None:
    png, text = b"\x89PNG\r\n\x1a\n....", b"not a picture"
    members = [(f"{i}.png", png if i else text) for i in range(5)]
    data = open_set([write_tar(tmp_path / "t.tar", members)], tmp_path / "cache")
    assert data.unreadable.tolist() == [0]
    check_pictures(data, 1, "chain.yaml", "f")
    with pytest.raises(
        InputError, match=r"chain.yaml: f: 1 of 5 pictures are no JPEG, PNG or WebP .* sample '0'"
    ):
        check_pictures(data, 0, "chain.yaml", "f")


def test_foreign_class_names_are_refused(tmp_path: Path) -> None:
    members = sample("a", label=0, classname="cat") + sample("b", label=1, classname="dog")
    data = open_set([write_tar(tmp_path / "t.tar", members)], tmp_path / "cache")
    check_labels(data, ["a cat", "a dog"], "chain.yaml")  # other words for the same classes
    with pytest.raises(
        InputError, match=r"chain.yaml: f: 3 class names, none of them among the 2 .* such as 'cat'"
    ):
        check_labels(data, ["tench", "goldfish", "shark"], "chain.yaml", "f")
