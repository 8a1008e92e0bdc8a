"""The trainer as a pod runs it: the task in the environment, an empty volume, and one file for the
last word in each pod.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import forked
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from prometheus_client.parser import text_string_to_metric_families
from tiny import STEPS

from modelchain.api.contracts import (
    MANIFEST,
    RESULTS,
    WEIGHTS,
    EvaluationTask,
    FailureClass,
    LastWord,
    LiveProgress,
    Results,
    Task,
)
from modelchain.api.uses import Resumed, Uses
from modelchain.identity.digest import short_key
from modelchain.io.files import sha256_of
from modelchain.io.lastword import write_last_word
from modelchain.io.stop import Preempted, StopRequest
from modelchain_trainer import __main__ as entry
from modelchain_trainer import runtime

TORCHRUN = ["-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data(tmp_path_factory.mktemp("data") / "digits")


def container(task: Task | EvaluationTask, log: Path, **more: str) -> dict[str, str]:
    """The environment of a container, and its termination message file, which a kubelet creates."""
    log.touch()
    told = task.model_copy(update={"last_word": str(log)}).model_dump_json(by_alias=True)
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {"MODELCHAIN_TASK": told, **threads, **more}


def pod(
    task: Task | EvaluationTask, log: Path, *command: str, **more: str
) -> tuple[subprocess.Popen[str], Path]:
    """Start a container's process."""
    environment = os.environ | container(task, log, **more)
    arguments = [sys.executable, *(command or ("-m", "modelchain_trainer"))]
    return subprocess.Popen(arguments, env=environment, cwd=log.parent, text=True), log


def forked_pod(task: Task, log: Path, **more: str) -> forked.Program:
    """A container's trainer that finds torch loaded."""
    environment = container(task, log, **more)
    return forked.Program(["-m", "modelchain_trainer"], [], log.with_suffix(".out"), environment)


def word_in(log: Path) -> LastWord:
    return LastWord.model_validate_json(log.read_bytes())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str = "/progress") -> LiveProgress | None:
    """None while no server listens, and if the process ends while it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            assert (
                answer.headers["Content-Type"] == "application/json"
                and answer.headers["Content-Length"]
            )
            return LiveProgress.model_validate_json(answer.read())
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException):
        return None


SCRAPES: list[str] = []  # of the first stage's /metrics


def scrape(port: int) -> str:
    """Empty while no server listens, and if the process ends while it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return str(answer.read().decode())
    except (OSError, http.client.HTTPException):
        return ""


@pytest.fixture(scope="module")
def trained(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Task, Path, list[LiveProgress]]:
    """A first stage on an empty volume: its task, its termination message, and all answers of
    /progress.
    """
    work, port, seen = tmp_path_factory.mktemp("one"), free_port(), []
    task = tiny.task(tiny.spec(), folder, work / "artifacts")
    (work / "artifacts" / task.input_digest / task.owner).rmdir()
    (work / "artifacts" / task.input_digest).rmdir()
    metrics_port = free_port()
    ports = {"MODELCHAIN_PROGRESS_PORT": str(port), "MODELCHAIN_METRICS_PORT": str(metrics_port)}
    log = work / "termination-log"
    process = forked_pod(task, log, **ports)
    while process.alive():
        if page := scrape(metrics_port):
            SCRAPES.append(page)
        if answer := get(port):
            if not seen:
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    get(port, "/")
            seen.append(answer)
        time.sleep(0.02)
    assert process.wait(0) == 0
    return task, log, seen


def test_an_empty_volume_is_all_a_trainer_needs(
    trained: tuple[Task, Path, list[LiveProgress]],
) -> None:
    task, log, _ = trained
    word = word_in(log)
    assert (word.result, word.step, word.macs) == ("Succeeded", STEPS, STEPS * 1000)
    assert word.manifest_digest == sha256_of(tiny.artifact(task) / MANIFEST)
    assert len(list(Path(task.data.index).glob("*/index.json"))) == 2 and log.stat().st_size <= 2048


def test_progress_is_served_from_before_the_first_step(
    trained: tuple[Task, Path, list[LiveProgress]],
) -> None:
    task, _, seen = trained
    told = seen[0].milliseconds
    assert told == Uses(startup=told.startup) and told.startup > 0
    assert seen[0] == LiveProgress(
        attempt=task.attempt,
        step=0,
        steps=STEPS,
        samples_per_second=0,
        eta_seconds=0,
        checkpoint_step=0,
        macs=0,
        milliseconds=told,
    )
    last = seen[-1]
    assert (last.step, last.macs, last.eta_seconds) == (
        STEPS,
        STEPS * 1000,
        0,
    ) and last.samples_per_second > 0
    steps = [answer.step for answer in seen]
    assert steps == sorted(steps) and last.checkpoint_step <= STEPS
    totals = [answer.milliseconds.total for answer in seen]
    assert totals == sorted(totals) and last.resumed == Resumed()


def test_the_last_word_says_how_all_time_was_used(
    trained: tuple[Task, Path, list[LiveProgress]],
) -> None:
    """Of a training that went well all steps are kept, and nothing is lost."""
    task, log, _ = trained
    word = word_in(log)
    results = Results.model_validate_json((tiny.artifact(task) / RESULTS).read_bytes())
    told = word.milliseconds
    assert (told.lost, told.unsaved, told.stalled) == (0, 0, 0)
    assert min(told.startup, told.productive, told.evaluating) > 0
    assert word.saved_macs == word.macs == STEPS * 1000 and word.resumed == Resumed()
    stepped = told.total - told.startup
    assert stepped <= 1000 * word.seconds + 100 <= told.total + 200, "and what came before torch"
    made_by = results.made_by
    assert made_by is not None and made_by.attempt == task.attempt
    assert (made_by.macs, made_by.saved_macs) == (word.macs, word.macs)
    assert made_by.milliseconds.productive == told.productive


def test_metrics_agree_with_the_last_word(trained: tuple[Task, Path, list[LiveProgress]]) -> None:
    task, log, _ = trained
    pages = [
        {
            sample.name: sample
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        for page in SCRAPES
    ]
    first, last = pages[0], {name: sample.value for name, sample in pages[-1].items()}
    assert first["modelchain_trainer_step"].value == 0 and "modelchain_trainer_loss" not in first
    about = first["modelchain_trainer_info"].labels
    assert (about["model"], about["attempt"]) == (task.model, task.attempt)
    assert not about.keys() & {"chain", "stage"}, "a scrape adds them, and would rename these"
    word = word_in(log)
    told = {
        name: last[f"modelchain_trainer_{name}"] for name in ("step", "macs_total", "samples_total")
    }
    assert told == {"step": word.step, "macs_total": word.macs, "samples_total": STEPS * tiny.BATCH}
    assert (
        last["modelchain_trainer_planned_macs"]
        == STEPS * 1000
        == last["modelchain_trainer_planned_steps"] * 1000
    )
    assert 0 < last["modelchain_trainer_data_wait_seconds_total"] < word.seconds
    assert last["modelchain_trainer_loss"] > 0 and last["modelchain_trainer_samples_per_second"] > 0
    assert (
        last["modelchain_trainer_replaced_pictures_total"] == 0
        and last["process_resident_memory_bytes"] > 0
    )
    assert "modelchain_trainer_distillation_ratio" not in last, "a first stage has no predecessor"
    macs = [page["modelchain_trainer_macs_total"].value for page in pages]
    assert macs == sorted(macs)
    activities = [
        sample.value
        for family in text_string_to_metric_families(SCRAPES[-1])
        for sample in family.samples
        if sample.name == "modelchain_trainer_seconds_total"
    ]
    assert len(activities) == 6
    assert 0 < sum(activities) <= word.milliseconds.total / 1000 + 0.5, "of the whole process"


def test_a_port_that_is_taken_does_not_stop_the_training(folder: Path, tmp_path: Path) -> None:
    task = tiny.task(tiny.spec(epochs=1, evaluation=False), folder, tmp_path / "artifacts")
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"MODELCHAIN_PROGRESS_PORT": port, "MODELCHAIN_METRICS_PORT": port}
        process = forked_pod(task, tmp_path / "log", **ports)
        assert process.wait(120) == 0 and word_in(tmp_path / "log").result == "Succeeded"


def test_sigterm_is_heard_before_torch_has_loaded(folder: Path, tmp_path: Path) -> None:
    process, log = pod(tiny.task(tiny.spec(), folder, tmp_path / "artifacts"), tmp_path / "log")
    caught = 0
    while not caught >> (signal.SIGTERM - 1) & 1:  # until it has a handler
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:\t")[1].split()[0], 16)
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.terminate()
    assert process.wait(60) == 75 and word_in(log).failure == "Preempted"


def nodes(task: Task, work: Path) -> list[tuple[subprocess.Popen[str], Path]]:
    """Start master and worker of one attempt, each a torchrun with its own termination message
    file.
    """
    port, pods = free_port(), []
    for rank in (0, 1):
        place = [
            "--nnodes=2",
            f"--node-rank={rank}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
        command = [*TORCHRUN, *place, "--nproc-per-node=1", "-m", "modelchain_trainer"]
        (work / f"pod{rank}").mkdir()
        pods.append(
            pod(
                task,
                work / f"pod{rank}" / "log",
                *command,
                MODELCHAIN_PROGRESS_PORT=str(free_port()),
            )
        )
    return pods


def test_two_nodes_train_a_successor_and_rank_0_alone_reports(
    trained: tuple[Task, Path, list[LiveProgress]], folder: Path, tmp_path: Path
) -> None:
    first, root = trained[0], tmp_path / "artifacts"
    task = tiny.task(tiny.spec(), folder, root, index=1, before=first)
    (tmp_path / "predecessors").symlink_to(first.root)
    path = str(tmp_path / "predecessors" / first.input_digest / "artifact")
    assert task.predecessor is not None
    task = task.model_copy(
        update={"predecessor": task.predecessor.model_copy(update={"path": path})}
    )
    pods = nodes(task, tmp_path)
    assert [process.wait(240) for process, _ in pods] == [0, 0]
    assert word_in(pods[0][1]).artifact_digest == sha256_of(tiny.artifact(task) / WEIGHTS)
    assert pods[1][1].read_bytes() == b""
    assert (
        Results.model_validate_json((tiny.artifact(task) / RESULTS).read_bytes()).predecessor
        == "s0"
    )


def test_rank_0_reports_bad_data_and_the_other_node_does_not_name_a_cause(
    folder: Path, tmp_path: Path
) -> None:
    task = tiny.task(tiny.spec(), folder, tmp_path / "artifacts")
    gone = str(folder / "train-1.tar")
    train = task.data.train.model_copy(update={"files": [*task.data.train.files, gone]})
    task = task.model_copy(update={"data": task.data.model_copy(update={"train": train})})
    pods = nodes(task, tmp_path)
    assert all(process.wait(240) != 0 for process, _ in pods)
    words = [word_in(log) for _, log in pods]
    assert words[0].failure == "UserError" and gone in words[0].message
    assert words[1].failure in ("Unknown", "Preempted"), "it lost its peer, or torchrun ended it"


def waiting_rank(rank: int, port: int, files: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    if rank == 1:
        signal.signal(signal.SIGALRM, StopRequest().on_signal)
        signal.alarm(1)
    try:
        with runtime.rank_0_first():
            time.sleep(3)
    except (Preempted, RuntimeError) as error:
        failure = None if isinstance(error, Preempted) else runtime.failure_of(error)
        Path(files[rank]).write_text(json.dumps([time.time(), failure]))
    os._exit(0)


def test_a_rank_that_waits_for_rank_0_handles_signals_and_a_lost_peer_is_unknown(
    tmp_path: Path,
) -> None:
    files = [str(tmp_path / name) for name in "01"]
    mp.start_processes(waiting_rank, (free_port(), files), 2, start_method="forkserver")
    ends, failures = zip(*(json.loads(Path(file).read_bytes()) for file in files), strict=True)
    assert failures == ("Unknown", None) and ends[1] < ends[0] - 1


def test_classes_of_unexpected_exceptions() -> None:
    assert (
        runtime.failure_of(torch.OutOfMemoryError("CUDA out of memory"))
        is FailureClass.OUT_OF_MEMORY
    )
    assert runtime.failure_of(OSError(28, "No space left on device")) is FailureClass.VOLUME_FULL
    assert runtime.failure_of(dist.DistBackendError("NCCL error")) is FailureClass.UNKNOWN
    assert runtime.failure_of(RuntimeError("shapes differ")) is FailureClass.ERROR


def test_a_known_cause_replaces_unknown_and_no_other_class(tmp_path: Path) -> None:
    for failure in (
        FailureClass.UNKNOWN,
        FailureClass.DATA,
        FailureClass.UNKNOWN,
        FailureClass.ERROR,
    ):
        write_last_word(
            tmp_path / "log", LastWord(result="Failed", failure=failure, message=failure)
        )
    assert word_in(tmp_path / "log").message == "Data"


def test_a_task_of_another_version_is_refused_with_a_last_word(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.task(tiny.spec(), folder, tmp_path).model_dump(mode="json", by_alias=True)
    monkeypatch.setenv(
        "MODELCHAIN_TASK", json.dumps({**task, "v": 2, "lastWord": str(tmp_path / "log")})
    )
    for arguments, told in ((["verify"], False), ([], True)):
        with pytest.raises(ValueError, match="validation error"):
            entry.main(arguments)
        assert (tmp_path / "log").exists() == told
    assert word_in(tmp_path / "log").failure == "UserError"


# The command `verify`.

VERIFY = "import sys; from modelchain_trainer.__main__ import main; code = main(['verify'])"
NO_TORCH = f"{VERIFY}; assert 'torch' not in sys.modules; sys.exit(code)"


def verify(task: Task, work: Path) -> tuple[int, LastWord | None]:
    work.mkdir(exist_ok=True)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path(task.root).rglob("*"))
    process, log = pod(task, work / "log", "-c", NO_TORCH)
    code = process.wait(60)
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in Path(task.root).rglob("*")), (
        "the volume may be mounted read-only"
    )
    return code, word_in(log) if log.stat().st_size else None


def test_verify_replaces_a_lost_last_word(
    trained: tuple[Task, Path, list[LiveProgress]], tmp_path: Path
) -> None:
    task, log, _ = trained
    (code, word), lost = verify(task, tmp_path), word_in(log)
    assert code == 0 and word is not None
    apart = {"seconds", "milliseconds", "resumed"}  # as of the export, which takes time itself
    assert word.model_dump(exclude=apart) == lost.model_dump(exclude=apart) and word.seconds > 0
    known, told = word.milliseconds, lost.milliseconds
    assert (known.startup, known.productive) == (told.startup, told.productive)
    assert 0 < known.evaluating <= told.evaluating and (known.lost, known.unsaved) == (0, 0)


def test_verify_tells_missing_from_damaged_and_writes_nothing_without_a_volume(
    trained: tuple[Task, Path, list[LiveProgress]], folder: Path, tmp_path: Path
) -> None:
    task, root = trained[0], tmp_path / "artifacts"
    task = task.model_copy(update={"root": str(root)})
    assert verify(task, tmp_path / "w") == (1, None), "without a volume nothing is known"
    root.mkdir()
    for missing in (task.input_digest, "artifact", MANIFEST):
        code, word = verify(task, tmp_path / "w")
        assert (
            code == 1
            and word is not None
            and (word.failure, word.result) == ("NoArtifact", "Failed")
        )
        assert word.message.endswith(f"holds no {missing}")
        (tmp_path / "w" / "log").unlink()
        if missing == task.input_digest:
            (root / missing).mkdir()
        elif missing == "artifact":
            target = root / task.input_digest / "artifact"
            target.mkdir()
    for path in tiny.artifact(trained[0]).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = bytearray((target / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (target / WEIGHTS).write_bytes(weights)
    code, word = verify(task, tmp_path / "w")
    assert (
        code == 1
        and word is not None
        and word.failure == "CorruptArtifact"
        and WEIGHTS in word.message
    )


def test_verify_refuses_an_artifact_of_other_inputs(
    trained: tuple[Task, Path, list[LiveProgress]], tmp_path: Path
) -> None:
    task = trained[0].model_copy(
        update={"root": str(tmp_path / "artifacts"), "input_digest": "ab" * 32}
    )
    target = tiny.artifact(task)
    target.mkdir(parents=True)
    for path in tiny.artifact(trained[0]).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    code, word = verify(task, tmp_path / "w")
    assert (
        code == 1
        and word is not None
        and word.failure == "CorruptArtifact"
        and "other inputs" in word.message
    )


# The command `evaluate`.


def evaluation(task: Task, *names: str, index: Path, **changes: object) -> EvaluationTask:
    """The task of an evaluation Job, with an index outside the artifacts, which are read-only."""
    weights = sha256_of(tiny.artifact(task) / WEIGHTS)
    data = task.data.model_copy(update={"index": str(index)})
    whole = EvaluationTask(
        artifact=str(tiny.artifact(task)),
        artifact_digest=weights,
        data=data,
        names=list(names),
        device="cpu",
    )
    return whole.model_copy(update=changes)


def evaluate(task: EvaluationTask, work: Path) -> tuple[int, LastWord]:
    process, log = pod(task, work / "log", "-m", "modelchain_trainer", "evaluate")
    return process.wait(120), word_in(log)


def test_evaluate_measures_what_was_asked_for_and_writes_nothing_but_its_last_word(
    trained: tuple[Task, Path, list[LiveProgress]], tmp_path: Path
) -> None:
    task, log, _ = trained
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path(task.root).rglob("*"))
    code, word = evaluate(evaluation(task, "r1", index=tmp_path / "index"), tmp_path)
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in Path(task.root).rglob("*"))
    trained_with = word_in(log)
    own = {n: v for n, v in trained_with.metrics.items() if n.partition("/")[0] == "r1"}
    assert (code, word.result, word.metrics) == (0, "Succeeded", own) and "r1" in own
    assert word.pictures == {"r1": trained_with.pictures["r1"]}
    assert trained_with.evaluations == {e.name: short_key(e) for e in task.data.evaluation}


def test_evaluate_tells_why_it_failed(
    trained: tuple[Task, Path, list[LiveProgress]], tmp_path: Path
) -> None:
    good = evaluation(trained[0], "top1", index=tmp_path / "index")
    code, word = evaluate(good.model_copy(update={"artifact_digest": "ab" * 32}), tmp_path)
    assert (code, word.failure) == (1, "CorruptArtifact") and "ab" * 32 in word.message
    (tmp_path / "log").unlink()
    top1, *others = good.data.evaluation
    gone = top1.model_copy(update={"class_names": "/nowhere.json"})
    data = good.data.model_copy(update={"evaluation": [gone, *others]})
    code, word = evaluate(good.model_copy(update={"data": data}), tmp_path)
    assert (code, word.failure) == (2, "UserError") and "/nowhere.json" in word.message


def test_evaluate_that_is_told_to_stop_says_so(
    trained: tuple[Task, Path, list[LiveProgress]], tmp_path: Path
) -> None:
    task = evaluation(trained[0], "top1", index=tmp_path / "index")
    process, log = pod(task, tmp_path / "log", "-m", "modelchain_trainer", "evaluate")
    caught = 0
    while not caught >> (signal.SIGTERM - 1) & 1:  # until it has a handler
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:\t")[1].split()[0], 16)
    process.terminate()
    assert process.wait(60) == 75 and word_in(log).failure == "Preempted"


def test_evaluate_refuses_a_task_of_another_version_with_a_last_word(
    trained: tuple[Task, Path, list[LiveProgress]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = evaluation(trained[0], "top1", index=tmp_path, last_word=str(tmp_path / "log"))
    newer = {**task.model_dump(mode="json", by_alias=True), "v": 2}
    monkeypatch.setenv("MODELCHAIN_TASK", json.dumps(newer))
    with pytest.raises(ValueError, match="validation error"):
        entry.main(["evaluate"])
    assert word_in(tmp_path / "log").failure == "UserError"
