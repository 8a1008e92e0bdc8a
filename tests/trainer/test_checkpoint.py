"""checkpoint.py: what is saved comes back bit for bit, and nothing else is ever loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelchain.errors import WorkError
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io.files import verify
from modelchain.io.stop import Preempted, StopRequest
from modelchain_trainer import checkpoint, models
from modelchain_trainer.state import TrainState

torch.set_num_threads(1)
DIGEST = "ab" * 32
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def student(seed=0, fused=True):
    """A student with T, and its optimizer with two parameter groups, like the trainer's."""
    model = models.Student(models.build(CONFIG, seed), 8)
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[models.decays(name, parameter)].append(parameter)
    groups = [
        {"params": groups[True], "weight_decay": 0.1},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), fused=fused)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(1, 32, (4, 6), generator=generator)
        features = model(
            torch.randn(2, 3, 16, 16, generator=generator), [(tokens, torch.arange(4))]
        )
        optimizer.zero_grad()
        sum(tensor.float().square().sum() for tensor in features).backward()
        optimizer.step()


def everything(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{kind}/{names[p]}": t for p, kinds in optimizer.state.items() for kind, t in kinds.items()
    }
    return {**model.state_dict(), **moments}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saver(root, attempt="local-a1", digest=DIGEST):
    directory = root / digest / attempt
    directory.mkdir(parents=True, exist_ok=True)
    return checkpoint.Checkpointer(directory, {"seed": 0}, {"trainerMath": TRAINER_MATH})


def save(root, step, attempt="local-a1", digest=DIGEST, trained=None, **state):
    """Save a checkpoint of `trained`, by default a student after one step; returns its path."""
    model, optimizer = trained or student()
    if trained is None:
        train(model, optimizer, 1)
    writer = saver(root, attempt, digest)
    writer.save(model, optimizer, TrainState(step=step, **state))
    writer.wait()
    assert writer.saved_step == step
    return root / digest / attempt / f"step-{step}"


def steps(root):
    return sorted(
        str(path.relative_to(root / DIGEST)) for path in (root / DIGEST).glob("*/*step-*")
    )


@pytest.mark.parametrize("fused", [True, False])
def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path, fused):
    model, optimizer = trained = student(fused=fused)
    train(*trained, 3)
    state = {"seconds": 1.5, "initial_loss": 0.1 + 0.2, "initial_metrics": {}}
    path = save(tmp_path, 3, trained=trained, **state)
    other, others_optimizer = student(seed=1, fused=fused)
    assert checkpoint.restore(path, other, others_optimizer) == TrainState(step=3, **state)
    assert same(everything(other, others_optimizer), everything(model, optimizer))
    train(*trained, 3, first=3)
    train(other, others_optimizer, 3, first=3)
    assert same(everything(other, others_optimizer), everything(model, optimizer)), (
        "training continues as if it had not been interrupted"
    )


def test_the_copy_is_taken_at_once_and_written_later(tmp_path, monkeypatch):
    model, optimizer = student()
    train(model, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in everything(model, optimizer).items()}
    writer = saver(tmp_path)
    go, write = threading.Event(), writer._write
    monkeypatch.setattr(writer, "_write", lambda *a: go.wait(30) and write(*a))
    state = TrainState(step=1)
    writer.save(model, optimizer, state)
    train(model, optimizer, 2, first=1)
    state.count(task_loss=2.0, skipped=False)
    assert steps(tmp_path) == [] and writer.saved_step == 0, "not saved before it is on the disk"
    go.set()
    end = time.monotonic() + 30
    while writer.saved_step != 1:
        assert time.monotonic() < end, "known as soon as it is on the disk, without a call of wait"
    writer.wait()
    other, others_optimizer = student(seed=1)
    path = tmp_path / DIGEST / "local-a1" / "step-1"
    assert checkpoint.restore(path, other, others_optimizer) == TrainState(step=1)
    assert same(everything(other, others_optimizer), before)


def test_the_memory_for_copies_is_allocated_once_and_a_write_in_progress_shows_as_busy(
    tmp_path, monkeypatch
):
    trained = student()
    writer = saver(tmp_path)
    writer.prepare(trained[0])
    writer.wait()
    where = {
        name: copy.data_ptr() for file in writer._copies.values() for name, copy in file.items()
    }
    write, go = writer._write, threading.Event()
    monkeypatch.setattr(writer, "_write", lambda *a: go.wait(30) and write(*a))
    for step in (1, 2):
        train(*trained, 1, first=step)
        writer.save(*trained, TrainState(step=step))
        assert writer.busy
        go.set()
        writer.wait()
        assert (
            not writer.busy
            and writer.saved_step == step
            and set(writer.seconds) == {"stall", "write"}
        )
        go.clear()
    now = {name: copy.data_ptr() for file in writer._copies.values() for name, copy in file.items()}
    assert {name: now[name] for name in where} == where
    other = student(seed=1)
    checkpoint.restore(tmp_path / DIGEST / "local-a1" / "step-2", *other)
    assert same(everything(*other), everything(*trained))


def test_after_a_signal_ends_a_wait_the_copies_still_belong_to_the_writer(tmp_path, monkeypatch):
    trained, writer, go = student(), saver(tmp_path), threading.Event()
    train(*trained, 1)
    monkeypatch.setattr(writer, "_write", lambda *_: go.wait(30))
    writer.save(*trained, TrainState(step=1))
    handler = signal.signal(signal.SIGALRM, StopRequest().on_signal)
    try:
        with pytest.raises(Preempted):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            writer.wait()
    finally:
        signal.signal(signal.SIGALRM, handler)
        assert writer.busy, "the next save has to wait for it"
        go.set()


def test_a_checkpoint_is_safetensors_and_json_and_its_manifest_covers_all_files(tmp_path):
    path = save(tmp_path, 4)
    manifest = verify(path)
    names = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(manifest.files) == names and {p.name for p in path.iterdir()} == {
        *names,
        "manifest.json",
    }
    assert (manifest.kind, manifest.step, manifest.input_digest) == ("checkpoint", 4, DIGEST)
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        else:
            load_file(file)


def test_the_newest_of_all_attempts_is_found_by_number_not_by_text(tmp_path):
    assert checkpoint.newest(tmp_path / DIGEST, print) is None
    for attempt, step in (("local-a1", 9), ("local-a3", 8), ("0a1b2c3d-a2", 10)):
        path = save(tmp_path, step, attempt)
    said = []
    assert checkpoint.newest(tmp_path / DIGEST, said.append) == path and not said


def damage_truncated(path):
    os.truncate(path / "model.safetensors", 100)


def damage_flipped(path):
    with (path / "optimizer.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        byte = file.read(1)
        file.seek(-5, 2)
        file.write(bytes([byte[0] ^ 1]))


def damage_state(path):
    (path / "state.json").write_text('{"step": 3}')


def damage_missing(path):
    (path / "optimizer.safetensors").unlink()


def damage_no_manifest(path):
    (path / "manifest.json").unlink()


def damage_torn_manifest(path):
    os.truncate(path / "manifest.json", 60)


def damage_foreign(path):
    other = save(path.parents[2], 30, digest="cd" * 32)
    shutil.rmtree(path)
    shutil.copytree(other, path)


def damage_covers_too_little(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"].pop("optimizer.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "optimizer.safetensors").unlink()


def damage_an_artifact(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"kind": "artifact"}))


def damage_renamed(path):
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 30
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": 25}))


DAMAGE = {
    name.removeprefix("damage_"): do for name, do in globals().items() if name.startswith("damage_")
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_does_not_verify_is_passed_over_with_a_message_and_not_removed(tmp_path, damage):
    good = save(tmp_path, 20)
    bad = save(tmp_path, 30, "local-a2")
    damage(bad)
    left, said = sorted(p.name for p in bad.iterdir()), []
    assert checkpoint.newest(tmp_path / DIGEST, said.append) == good
    assert len(said) == 1 and "passing over" in said[0] and str(bad) in said[0]
    assert sorted(p.name for p in bad.iterdir()) == left
    damage_truncated(good)
    assert checkpoint.newest(tmp_path / DIGEST, said.append) is None


def test_directories_with_other_names_are_not_checkpoints(tmp_path):
    path = save(tmp_path, 5)
    for name in (".step-9", "step-", "step-x", "step-7.tmp", "artifact"):
        shutil.copytree(path, path.parent / name)
    assert checkpoint.newest(tmp_path / DIGEST, print) == path


def test_the_newest_two_that_verify_are_kept_of_any_attempt(tmp_path):
    trained = student()
    train(*trained, 1)
    for step in (10, 20, 30):
        save(tmp_path, step, trained=trained)
    assert steps(tmp_path) == ["local-a1/step-20", "local-a1/step-30"]
    damage_flipped(tmp_path / DIGEST / "local-a1" / "step-30")
    save(tmp_path, 25, "local-a2", trained=trained)
    assert steps(tmp_path) == ["local-a1/step-20", "local-a1/step-30", "local-a2/step-25"], (
        "a damaged one does not count"
    )
    for step in (28, 40, 50):
        save(tmp_path, step, "local-a2", trained=trained)
    assert steps(tmp_path) == ["local-a2/step-40", "local-a2/step-50"]


def of_math(path, math):
    """Make it a checkpoint of a trainer with TRAINER_MATH `math`; None: of one that recorded no
    such number.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["environment"] = {} if math is None else {"trainerMath": math}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("math", [TRAINER_MATH - 1, TRAINER_MATH + 1, None])
def test_a_whole_checkpoint_of_another_trainer_math_is_passed_over_with_a_message(tmp_path, math):
    ours, other = save(tmp_path, 10), of_math(save(tmp_path, 90, "local-a2"), math)
    verify(other)
    said = []
    assert checkpoint.newest(tmp_path / DIGEST, said.append) == ours
    assert (
        len(said) == 1
        and str(other) in said[0]
        and str(math) in said[0]
        and str(TRAINER_MATH) in said[0]
    )
    shutil.rmtree(ours)
    assert checkpoint.newest(tmp_path / DIGEST, said.append) is None, "the stage starts again"


@pytest.mark.parametrize("math", [TRAINER_MATH + 1, None])
def test_newer_steps_of_another_trainer_math_displace_none_of_ours_and_are_removed_later(
    tmp_path, math
):
    for step in (80, 90):
        of_math(save(tmp_path, step), math)
    damaged = save(tmp_path, 70)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 10, "local-a2")
    assert steps(tmp_path) == [f"local-a1/step-{k}" for k in (70, 80, 90)] + ["local-a2/step-10"], (
        "they stay while there is only one of ours"
    )
    save(tmp_path, 20, "local-a2")
    assert steps(tmp_path) == ["local-a1/step-70", "local-a2/step-10", "local-a2/step-20"], (
        "a damaged one stays, to be examined"
    )
    save(tmp_path, 30, "local-a2")
    assert steps(tmp_path) == ["local-a1/step-70", "local-a2/step-20", "local-a2/step-30"]


def test_an_older_step_of_another_trainer_math_is_not_counted_as_one_of_two(tmp_path):
    of_math(save(tmp_path, 10), TRAINER_MATH - 1)
    save(tmp_path, 20)
    assert steps(tmp_path) == ["local-a1/step-10", "local-a1/step-20"]
    save(tmp_path, 30)
    assert steps(tmp_path) == ["local-a1/step-20", "local-a1/step-30"]


def test_a_damaged_checkpoint_of_the_same_attempt_is_written_again(tmp_path):
    trained = student()
    train(*trained, 1)
    path = save(tmp_path, 10, trained=trained)
    damage_flipped(path)
    assert save(tmp_path, 10, trained=trained) == path
    verify(path)
    stamp = (path / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 10, trained=trained)
    assert (path / "manifest.json").stat().st_mtime_ns == stamp, "a whole one is not written again"


def test_what_killed_attempts_left_half_written_is_removed_with_the_next_checkpoint_or_artifact(
    tmp_path,
):
    def leave_half(attempt):
        path = tmp_path / DIGEST / attempt / ".step-7"
        path.mkdir(parents=True, exist_ok=True)
        (path / "model.safetensors").write_bytes(b"half")

    leave_half("local-a1")
    save(tmp_path, 8, "local-a2")
    assert steps(tmp_path) == ["local-a2/step-8"]
    leave_half("local-a1")
    (tmp_path / DIGEST / ".artifact-local-a1").mkdir()
    (tmp_path / DIGEST / "artifact").mkdir()
    (tmp_path / DIGEST / "local-a2" / "metrics.jsonl").touch()
    checkpoint.remove_checkpoints(tmp_path / DIGEST)
    left = sorted(str(p.relative_to(tmp_path / DIGEST)) for p in (tmp_path / DIGEST).rglob("*"))
    assert left == ["artifact", "local-a1", "local-a2", "local-a2/metrics.jsonl"]


@pytest.mark.parametrize("where", ["save_file", "entry_of", "seal"])
@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "VolumeFull"),
        (OSError(errno.EIO, "Input/output error"), "Error"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "VolumeFull"),
    ],
)
def test_a_failed_write_is_reported_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, where, error, failure
):
    save(tmp_path, 10)
    model, optimizer = student()
    train(model, optimizer, 1)

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, where, fail)
    writer = saver(tmp_path)
    writer.save(model, optimizer, TrainState(step=20))
    with pytest.raises(WorkError, match="checkpoint of step 20") as caught:
        writer.wait()
    assert caught.value.failure == failure and writer.saved_step == 0
    assert steps(tmp_path) == ["local-a1/step-10"]
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / DIGEST, print) == tmp_path / DIGEST / "local-a1" / "step-10"
    writer.save(model, optimizer, TrainState(step=20))
    writer.wait()
    assert writer.saved_step == 20


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        trained = student()
        train(*trained, 1)
        save(disk, 10, trained=trained)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 40_000))
        writer = saver(disk)
        writer.save(*trained, TrainState(step=20))
        with pytest.raises(WorkError) as caught:
            writer.wait()
        assert caught.value.failure == "VolumeFull"
        assert steps(disk) == ["local-a1/step-10"]
        verify(disk / DIGEST / "local-a1" / "step-10")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", ["weights", "moments"])
def test_weights_or_moments_that_are_not_finite_are_not_saved(tmp_path, kind):
    model, optimizer = student()
    train(model, optimizer, 1)
    with torch.no_grad():
        parameter = model.clip.visual.proj
        (parameter if kind == "weights" else optimizer.state[parameter]["exp_avg_sq"])[0, 0] = (
            float("inf")
        )
    writer = saver(tmp_path)
    writer.save(model, optimizer, TrainState(step=5))
    with pytest.raises(WorkError, match=r"visual\.proj is not finite") as caught:
        writer.wait()
    assert caught.value.failure == "NonFinite" and steps(tmp_path) == []


def test_nothing_in_the_trainer_pickles(repository: Path):
    for file in (repository / "trainer").rglob("*.py"):
        text = file.read_text()
        assert not [
            word
            for word in ("torch.save", "torch.load", "import pickle", "object_list")
            if word in text
        ], file
