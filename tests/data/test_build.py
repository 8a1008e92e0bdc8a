"""Indexes are shared and compose, an interrupted build goes on, and builders do no harm to each
other.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from making import pairs, tar_of

from modelchain.api.contracts import DataAnswer, DataRequest, IndexTask, LastWord, TrainFiles
from modelchain.errors import InputError
from modelchain_data import __main__ as command
from modelchain_data import build, index
from modelchain_data.index import ShardSet, open_set
from modelchain_data.pack import pack
from modelchain_data.tars import members


def shards_of(folder: Path, count: int, start: int = 0, samples: int = 3) -> list[Path]:
    """Shards of `samples` pairs each, all different."""
    return [
        tar_of(
            folder / f"t-{n}.tar",
            pairs(*(f"k{n}-{i}" for i in range(samples)), start=(start + n) * samples),
        )
        for n in range(count)
    ]


def content(data: ShardSet) -> list[object]:
    tokens = [data.tokens(i, 0, 77).tolist() for i in range(len(data))]
    return [data.fingerprint, data.keys, tokens, [data.picture(i) for i in range(len(data))]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != build.DIGESTS
    }


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The shards that are tokenised in this process, in order."""
    found: list[Path] = []
    original = build.index_shard

    def counted(shard: Path) -> object:
        found.append(shard)
        return original(shard)

    monkeypatch.setattr(build, "index_shard", counted)
    yield found


def test_a_set_of_two_packed_sets_tokenises_nothing(tmp_path: Path, indexed: list[Path]) -> None:
    packed = []
    for number, name in enumerate(("one", "two")):
        source = tar_of(tmp_path / f"{name}-src.tar", pairs(*"abcde", start=5 * number))
        pack(source, tmp_path / name, per_shard=2)
        packed += sorted((tmp_path / name).glob("*.tar"))
    assert len(indexed) == 6
    data = open_set(packed, tmp_path / "root")
    assert len(indexed) == 6, "the indexes beside the shards were used"
    assert data.keys == [*"abcde"] * 2 and data.counts == [2, 2, 1] * 2
    again = open_set(packed[::-1], tmp_path / "root")
    assert len(indexed) == 6 and again.keys == [*"ecdab"] * 2
    fresh = [tar_of(tmp_path / "moved" / path.name, []) for path in packed[:1]]
    fresh[0].write_bytes(packed[0].read_bytes())
    assert content(open_set(fresh, tmp_path / "other"))[2] == content(data)[2][:2]
    assert indexed[6:] == fresh, "another root knows nothing of it"


def test_chains_on_a_root_share_indexes(tmp_path: Path, indexed: list[Path]) -> None:
    """Whatever the order of the shards, their names and the folders that they lie in."""
    one, two = shards_of(tmp_path / "one", 2), shards_of(tmp_path / "two", 2, start=2)
    root = tmp_path / "index"
    open_set(one, root)
    open_set(two, root)
    assert indexed == one + two
    open_set([*two, *one], root)
    linked = tmp_path / "linked.tar"
    linked.hardlink_to(one[0])
    data = open_set([linked, two[1], linked], root)
    assert indexed == one + two and data.counts == [3, 3, 3]
    assert data.keys == ["k0-0", "k0-1", "k0-2", "k1-0", "k1-1", "k1-2", "k0-0", "k0-1", "k0-2"]
    assert len(list((root / "shards").iterdir())) == 4 and len(list(root.iterdir())) == 4 + 2


def test_equal_shards_are_tokenised_once(tmp_path: Path, indexed: list[Path]) -> None:
    [shard] = shards_of(tmp_path, 1)
    links = [tmp_path / f"link-{n}.tar" for n in range(20)]
    for link in links:
        link.hardlink_to(shard)
    data = open_set(links, tmp_path / "index")
    assert len(indexed) == 1 and len(data) == 60
    assert data.keys == ["k0-0", "k0-1", "k0-2"] * 20


def _die_at(call: int, shards: list[Path], root: Path) -> None:
    """Open the set, and die at the `call`th flush to the disk."""
    calls = 0
    fsync = build.fsync

    def counted(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(path)

    build.fsync = counted  # type: ignore[attr-defined]
    open_set(shards, root)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("call", range(1, 12))
def test_a_build_that_was_killed_goes_on(tmp_path: Path, indexed: list[Path], call: int) -> None:
    """Killed at each flush to the disk: two for each of four shards, then those of the set."""
    shards = shards_of(tmp_path / "data", 4)
    whole = content(open_set(shards, tmp_path / "whole"))
    indexed.clear()
    root = tmp_path / "index"
    child = multiprocessing.get_context("fork").Process(target=_die_at, args=(call, shards, root))
    child.start()
    child.join(100)
    assert child.exitcode == (-signal.SIGKILL if call <= 10 else 0)
    there = len(list((root / "shards").glob("*"))) if (root / "shards").exists() else 0
    assert there == min(call // 2, 4)
    assert content(open_set(shards, root)) == whole
    assert len(indexed) == 4 - there, "only what was missing"
    left = {name for name in files_of(root) if name.startswith(".")}
    assert {n: c for n, c in files_of(root).items() if n not in left} == files_of(
        tmp_path / "whole"
    )
    assert not left or call == 10, "the next build removes what a killed one left"


def test_digests_of_an_interrupted_build_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(tmp_path / "data", 4)

    def interrupted(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_set(shards, tmp_path / "index", interrupted)
    hashed: list[Path] = []
    sha256_of = build.sha256_of
    monkeypatch.setattr(build, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    progress: list[tuple[int, int]] = []
    open_set(shards, tmp_path / "index", lambda *done: progress.append(done))
    assert [path for path in hashed if path in shards] == shards[2:]
    assert progress == [(1, 2), (2, 2)], "of the shards that had to be read"


def _open_beside_others(shards: list[Path], root: Path, locks: bool, barrier, answers) -> None:  # type: ignore[no-untyped-def]
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        build.fcntl.flock = no_locks  # type: ignore[attr-defined]
    barrier.wait()
    answers.put(content(open_set(shards, root)))


@pytest.mark.parametrize("locks", [True, False])
def test_builders_at_the_same_time_do_no_harm(tmp_path: Path, locks: bool) -> None:
    """Three processes build sets that have shards in common."""
    shards = shards_of(tmp_path / "data", 6)
    sets = [shards[:4], shards[2:], shards[::-1]]
    expected = [content(open_set(some, tmp_path / f"c{n}")) for n, some in enumerate(sets)]
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        barrier, answers, root = context.Barrier(3), context.Queue(), tmp_path / f"root{attempt}"
        workers = [
            context.Process(target=_open_beside_others, args=(some, root, locks, barrier, answers))
            for some in sets
        ]
        for worker in workers:
            worker.start()
        found = [answers.get(timeout=100) for _ in workers]
        for worker in workers:
            worker.join()
        assert sorted(map(repr, found)) == sorted(map(repr, expected))
        assert len(list((root / "shards").iterdir())) == 6
        known = json.loads((root / build.DIGESTS).read_bytes())
        assert len(known) == 6 or not locks, "without locks some may have to be hashed again"
        for some, right in zip(sets, expected, strict=True):
            assert content(open_set(some, root)) == right


def test_an_index_that_is_there_is_used_unread_without_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranks do that come after rank 0."""
    shards = shards_of(tmp_path / "data", 2)
    expected = content(open_set(shards, tmp_path / "index"))
    refuse: Callable[[Path], bool] = lambda path: pytest.fail(f"read {path}")  # noqa: E731
    monkeypatch.setattr(build, "is_whole", refuse)
    monkeypatch.setattr(build, "sha256_of", refuse)
    assert content(open_set(shards, tmp_path / "index", check=False)) == expected


def test_a_shard_of_other_bytes_is_indexed_anew(tmp_path: Path, indexed: list[Path]) -> None:
    shards = shards_of(tmp_path / "data", 2)
    open_set(shards, tmp_path / "index")
    tar_of(shards[1], pairs("new"))
    assert open_set(shards, tmp_path / "index").keys[3:] == ["new"]
    assert indexed == [*shards, shards[1]]


def test_no_index_is_made_of_a_shard_with_problems(tmp_path: Path) -> None:
    good, other = shards_of(tmp_path, 2)
    bad = tar_of(tmp_path / "bad.tar", [("a.txt", b"no picture")])
    with pytest.raises(InputError, match=r"bad\.tar: a\.txt"):
        open_set([good, bad, other], tmp_path / "index")
    left = list((tmp_path / "index" / "shards").iterdir())
    assert len(left) == 2, "the good ones are not indexed again when this is mended"


LIMITED = """
import json, resource, sys
from pathlib import Path
soft, hard = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
import numpy as np
from modelchain_data.index import open_set
folder = Path(sys.argv[1])
shards = sorted(folder.glob("*.tar"))
data = open_set(shards, folder / "index")
opened, original = [], Path.open
Path.open = lambda self, *mode, **more: opened.append(self) or original(self, *mode, **more)
for i in np.random.default_rng(0).permutation(len(data)).tolist():
    data.picture(i), data.tokens(i, 0, 77)
print(json.dumps([len(shards), len(opened), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))
"""


@pytest.mark.parametrize(("soft", "hard"), [(300, 4096), (4096, 4096), (300, 400)])
def test_as_many_shards_are_kept_open_as_the_process_may(
    tmp_path: Path, soft: int, hard: int
) -> None:
    """In a random order over all shards each would otherwise be opened again and again."""
    shards = shards_of(tmp_path, 700, samples=2)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path, str(soft), str(hard)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    count, opened, limit = json.loads(done.stdout)
    assert count == len(shards) and limit == min(max(soft, 2 * 700 + 512), hard)
    assert opened == 2 * 700 if hard == 4096 else opened > 2 * 700


def test_reading_a_tar_takes_little_memory(tmp_path: Path) -> None:
    """tarfile remembers all members; of 13 million samples that would be 30 GB."""
    tar = tar_of(tmp_path / "t.tar", [(f"{n:08d}.txt", b"x") for n in range(4000)])
    with tar.open("rb") as file:
        tracemalloc.start()
        assert sum(1 for _ in members(file)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4000 * 700


def task_of(tmp_path: Path, shards: list[Path], samples: int, **more: object) -> IndexTask:
    files = TrainFiles(
        files=[str(shard) for shard in shards],
        samples=samples,
        captions_per_sample=1,
        fingerprint=None,
    )
    request = DataRequest(
        index=str(tmp_path / "index"),
        file="ModelChain c",
        train=files.model_copy(update=more),
        evaluation=[],
    )
    return IndexTask(data=request, last_word=str(tmp_path / "word"))


def run(task: IndexTask) -> subprocess.Popen[str]:
    """As a pod does."""
    return subprocess.Popen(
        [sys.executable, "-m", "modelchain_data"],
        env=os.environ | {"MODELCHAIN_TASK": task.model_dump_json(by_alias=True)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def word(tmp_path: Path) -> LastWord:
    return LastWord.model_validate_json((tmp_path / "word").read_bytes())


def test_a_job_indexes_and_leaves_a_last_word(tmp_path: Path, indexed: list[Path]) -> None:
    shards = shards_of(tmp_path / "data", 2)
    job = run(task_of(tmp_path, shards, 6))
    answer = DataAnswer.model_validate_json(job.communicate(timeout=100)[0])
    said = word(tmp_path)
    data = open_set(shards, tmp_path / "index")
    assert indexed == [], "the trainer finds all of it"
    assert job.returncode == 0 and (said.result, said.failure) == ("Succeeded", None)
    assert data.fingerprint == said.fingerprint == answer.fingerprint and said.seconds > 0


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "data", 2)
    job = run(task_of(tmp_path, shards, 5))
    answer = DataAnswer.model_validate_json(job.communicate(timeout=100)[0])
    assert job.returncode == 2 and word(tmp_path).failure == "UserError"
    assert word(tmp_path).message == "\n".join(answer.problems)
    assert "spec.data.train.samples: the shards hold 6 samples, not 5" in answer.problems[0]


@pytest.mark.parametrize(
    ("error", "failure", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/r/x"), "VolumeFull", "/r/x: No space"),
        (PermissionError(errno.EACCES, "Permission denied", "/r/x"), "Error", "/r/x: Permission"),
        (RuntimeError("a bug"), "Error", "RuntimeError: a bug"),
    ],
)
def test_a_job_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, failure: str, text: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    task, file = task_of(tmp_path, shards_of(tmp_path / "data", 1), 3), tmp_path / "task.json"
    file.write_text(task.model_dump_json(by_alias=True))
    monkeypatch.setattr(build, "index_shard", fails)
    monkeypatch.setattr(command, "listen", lambda *_: {})
    assert command.main([str(file)]) == 1
    assert word(tmp_path).failure == failure and text in word(tmp_path).message


def test_a_job_of_another_version_says_so(tmp_path: Path) -> None:
    task = json.loads(task_of(tmp_path, [], 1).model_dump_json(by_alias=True)) | {"v": 2}
    environment = os.environ | {"MODELCHAIN_TASK": json.dumps(task)}
    done = subprocess.run(
        [sys.executable, "-m", "modelchain_data"], env=environment, capture_output=True
    )
    assert done.returncode == 1 and word(tmp_path).failure == "UserError"
    assert "different versions" in word(tmp_path).message


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_stopped_ends_at_once(tmp_path: Path, sig: int) -> None:
    good = shards_of(tmp_path / "data", 1)
    os.mkfifo(tmp_path / "data" / "t-9.tar")  # a shard that a hanging disk never gives
    job = run(task_of(tmp_path, [*good, tmp_path / "data" / "t-9.tar"], 6))
    while not list((tmp_path / "index").glob("shards/*")):
        assert job.poll() is None
    job.send_signal(sig)
    job.communicate(timeout=30)
    assert job.returncode == 75 and word(tmp_path).failure == "Preempted"
    assert len(list((tmp_path / "index" / "shards").iterdir())) == 1, "what is indexed stays"


def test_cores_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(build, "CPU_LIMIT", tmp_path / "cpu.max")
    assert build.cores() == 64
    for text, cores in {"max 100000": 64, "800000 100000": 8, "50000 100000": 1}.items():
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert build.cores() == cores


def test_rows_are_mapped_and_not_objects(tmp_path: Path) -> None:
    """13 million samples are 37 bytes each in a file, which ranks of a node share."""
    data = open_set(shards_of(tmp_path / "data", 2), tmp_path / "index")
    assert build.ROW.itemsize == 37 and data.labels.base is not None
    assert (tmp_path / "index" / build.set_key(data.fingerprint) / build.ROWS).stat().st_size == (
        37 * len(data)
    )
    assert isinstance(
        index.read_index(next((tmp_path / "index" / "shards").iterdir())).rows, np.ndarray
    )
