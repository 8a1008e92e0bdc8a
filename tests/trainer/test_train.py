"""train.py, runtime.py and __main__.py: real trainers on a few digits, in this process."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import threading
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny import BATCH, EPOCHS, STEPS, STEPS_PER_EPOCH, stop_after

from modelchain.api.contracts import RESULTS, WEIGHTS, FailureClass, LastWord, Results, Task
from modelchain.api.messages import one_line
from modelchain.errors import InputError, WorkError
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io.lastword import verify_artifact, write_last_word
from modelchain.io.stop import STOPS, Preempted, StopRequest
from modelchain_data.batches import global_batch
from modelchain_trainer import __main__ as entry
from modelchain_trainer import checkpoint, evaluate, models, runtime
from modelchain_trainer.step import Step
from modelchain_trainer.train import Trainer

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.data(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def first(tmp_path_factory, folder):
    """The first stage, trained without interruption: its task, its last word, and the learning
    rates of every step.
    """
    task, rates = tiny.task(tiny.spec(), folder, tmp_path_factory.mktemp("first")), []
    word, _ = tiny.train(
        task,
        lambda trainer, _: rates.append(
            [g["lr"] for g in trainer.stage.step.optimizer.param_groups]
        ),
    )
    return task, word, rates


@pytest.fixture(scope="module")
def second(first, folder):
    """The successor, which has another embed_dim, trained without interruption; and its T after
    the last step.
    """
    projections = {}

    def keep(trainer, done):
        if done == STEPS:
            projections.update(
                {
                    n: p.detach().clone()
                    for n, p in trainer.stage.student.named_parameters()
                    if "clip" not in n
                }
            )

    task = tiny.task(tiny.spec(), folder, Path(first[0].root), index=1, before=first[0])
    word, _ = tiny.train(task, keep)
    return task, word, projections


def weights(task: Task) -> bytes:
    return (tiny.artifact(task) / WEIGHTS).read_bytes()


def results(task: Task) -> Results:
    return Results.model_validate_json((tiny.artifact(task) / RESULTS).read_bytes())


def test_learning_rate_is_table_c():
    rates = [runtime.learning_rate(step, 100, 10, 1e-3) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert (
        rates[10] == 1e-3
        and rates[55] == pytest.approx(5e-4)
        and rates[10:] == sorted(rates[10:], reverse=True)
    )
    assert 0 < rates[99] < 1e-6 and runtime.learning_rate(100, 100, 10, 1e-3) == 0
    assert runtime.learning_rate(0, 10, 0, 1e-3) == 1e-3


def test_every_step_has_its_learning_rate_for_all_parameters(first):
    _, _, rates = first
    expected = [runtime.learning_rate(step, STEPS, 3, 1e-3) for step in range(STEPS)]
    assert rates == [[rate, rate] for rate in expected]


def test_weight_decay_groups_and_the_first_step_from_the_random_init(folder, tmp_path):
    task = tiny.task(tiny.spec(epochs=1, evaluation=False), folder, tmp_path)
    started = {}

    def look(trainer, done):
        if done == 1:
            started.update(trainer.stage.student.clip.state_dict())
            decayed, free = trainer.stage.step.optimizer.param_groups
            assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
            assert all(p.ndim >= 2 for p in decayed["params"])
            assert any(p is trainer.stage.student.clip.logit_scale for p in free["params"])
            started.update({name: tensor.clone() for name, tensor in started.items()})

    tiny.train(task, look)
    fresh = models.build(task.inputs["modelConfig"], task.inputs["seed"]).state_dict()
    rate = runtime.learning_rate(0, STEPS_PER_EPOCH, 3, 1e-3)
    # Adam's first update is at most the learning rate, and weight decay adds less than that.
    for name, tensor in started.items():
        assert (tensor - fresh[name]).abs().max() <= 1.2 * rate, name
    assert not torch.equal(started["visual.conv1.weight"], fresh["visual.conv1.weight"])


def test_results_and_last_word(first, folder):
    task, word, _ = first
    found, lines = results(task), tiny.entries(task)
    assert (found.stage, found.model) == ("s0", "inline")
    assert (found.predecessor, found.growth) == (None, None)
    assert (found.steps, found.samples_seen, found.macs) == (STEPS, STEPS * BATCH, STEPS * 1000)
    assert found.initial.loss == pytest.approx(lines[0]["taskLoss"])
    assert found.final.loss == lines[-1]["taskLoss"]
    assert set(found.initial.metrics) == set(found.final.metrics)
    assert {"top1", "r1"} <= set(found.final.metrics)
    assert found.seconds > 0 and set(found.evaluations) == {"top1", "r1"}
    assert found.counters == {"replacedPictures": 0, "scarceCaptions": 0, "skippedBatches": 0}
    assert word.result == "Succeeded"
    assert (word.step, word.steps, word.macs) == (STEPS, STEPS, STEPS * 1000)
    manifest = tiny.manifest(tiny.artifact(task))
    assert word.artifact_digest == manifest.artifact_digest == manifest.files[WEIGHTS].sha256
    assert word.metrics == found.final.metrics and manifest.inputs == task.inputs
    assert word.trainer_math == manifest.environment["trainerMath"] == TRAINER_MATH
    assert not list(Path(task.root).glob("*/*/step-*"))
    assert not list(Path(task.root).glob("*/*/.step-*"))


def test_metrics_have_every_step_once(first):
    task, *_ = first
    lines = tiny.entries(task)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["macs"] for line in lines] == [1000 * step for step in range(1, STEPS + 1)]
    assert all(line["loss"] == line["taskLoss"] and line["distillationLoss"] == 0 for line in lines)
    assert [line["step"] for line in tiny.entries(task, "evaluation")] == [0, STEPS]


def test_without_alpha_there_is_growth_and_no_teacher(first, folder, tmp_path):
    task = tiny.task(
        tiny.spec(alpha="0", evaluation=False), folder, tmp_path, index=1, before=first[0]
    )
    alive = []
    _, said = tiny.train(
        task,
        lambda trainer, _: alive.append(
            (trainer.stage.teacher, trainer.stage.student.image_projection)
        ),
    )
    assert alive == [(None, None)] * STEPS
    assert all(
        line["loss"] == line["taskLoss"] and line["distillationLoss"] == 0
        for line in tiny.entries(task)
    )
    assert results(task).growth.inserted > 0
    (growth,) = tiny.entries(task, "growth")
    assert set(growth["cosines"]) == {"visual.transformer.resblocks", "transformer.resblocks"}
    start = said.index("grown from s0 by Insert in width and Duplicate in depth:")
    assert said[start + 2].startswith("visual.transformer.resblocks ")
    assert said[start + 5].startswith("together ")
    together = [int(word.replace(",", "")) for word in said[start + 5].split()[1:]]
    assert together == [growth[kind] for kind in ("inserted", "duplicated", "new")]
    assert together == [
        sum(c.get(kind, 0) for c in growth["stacks"].values())
        for kind in ("inserted", "duplicated", "new")
    ]


def test_a_successor_starts_grown_and_its_projections_stay_out_of_the_artifact(first, second):
    task, _, projections = second
    found = results(task)
    assert found.predecessor == "s0" and found.growth is not None
    assert found.growth.inserted > 0 and found.growth.duplicated > 0 and found.growth.new > 0
    total = sum(p.numel() for p in models.build(task.inputs["modelConfig"], 0).parameters())
    assert found.growth.inserted + found.growth.duplicated + found.growth.new == total
    assert tiny.entries(task)[0]["distillationLoss"] > 0
    assert {name: list(p.shape) for name, p in projections.items()} == {
        "image_projection.weight": [16, 24],
        "text_projection.weight": [16, 24],
    }
    names = set(load_file(tiny.artifact(task) / WEIGHTS))
    assert names == set(models.build(task.inputs["modelConfig"], 0).state_dict())
    assert not torch.equal(projections["image_projection.weight"], torch.eye(16, 24)), (
        "T is trained"
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_stopped_within_an_epoch_and_resumed_leaves_the_same_bytes_as_without_interruption(
    first, second, folder, tmp_path, stage
):
    uninterrupted = (first, second)[stage][0]
    before = first[0] if stage else None
    tasks = [
        tiny.task(tiny.spec(), folder, tmp_path, stage, attempt, before) for attempt in (1, 2, 3)
    ]
    with pytest.raises(Preempted, match=f"step 2 of {STEPS}"):
        tiny.train(tasks[0], stop_after(2))
    step = Path(tasks[0].root) / tasks[0].input_digest / "local-a1" / "step-2"
    assert ("image_projection.weight" in load_file(step / "model.safetensors")) == bool(stage)
    with pytest.raises(Preempted, match=f"step 7 of {STEPS}"):
        tiny.train(tasks[1], stop_after(7))
    word, said = tiny.train(tasks[2])
    assert any("resumes from step 7" in text for text in said)
    assert weights(tasks[2]) == weights(uninterrupted)
    assert [[line["step"] for line in tiny.entries(task)] for task in tasks] == [
        [1, 2],
        [3, 4, 5, 6, 7],
        [8, 9, 10, 11, 12],
    ]
    losses = [line["loss"] for task in tasks for line in tiny.entries(task)]
    assert losses == [line["loss"] for line in tiny.entries(uninterrupted)]
    once, again = results(uninterrupted), results(tasks[2])
    assert (again.initial, again.final, again.macs) == (once.initial, once.final, once.macs)
    assert word.macs == 5000, "a last word counts what its own attempt spent"


def test_an_attempt_that_resumes_after_the_last_step_ends_and_trains_no_further(
    first, folder, tmp_path, monkeypatch
):
    tasks = [tiny.task(tiny.spec(), folder, tmp_path, attempt=attempt) for attempt in (1, 2)]
    monkeypatch.setattr(
        Trainer, "_finish", lambda *_: (_ for _ in ()).throw(Preempted("in the last evaluation"))
    )
    with pytest.raises(Preempted):
        tiny.train(tasks[0], stop_after(STEPS))
    monkeypatch.undo()

    def no_more(_trainer, done):
        raise AssertionError(f"step {done} of {STEPS}")

    word, _ = tiny.train(tasks[1], no_more)
    assert (word.macs, word.step) == (0, STEPS)
    assert weights(tasks[1]) == weights(first[0])
    assert results(tasks[1]).final == results(first[0]).final


def test_an_artifact_that_is_already_there_is_reported_without_training(first, folder):
    task, word, _ = first
    before = {p: p.stat().st_mtime_ns for p in tiny.artifact(task).iterdir()}
    again = task.model_copy(update={"owner": "local-a9"})
    reported, said = tiny.train(again, stop_after(0))
    assert reported.macs == 0 and "nothing to train" in said[0]
    assert (reported.artifact_digest, reported.manifest_digest) == (
        word.artifact_digest,
        word.manifest_digest,
    )
    assert reported.metrics == word.metrics and reported.step == STEPS
    assert before == {p: p.stat().st_mtime_ns for p in tiny.artifact(task).iterdir()}


def test_an_artifact_of_another_trainer_math_is_a_hit_and_the_last_word_says_which(
    first, folder, tmp_path
):
    task, word, _ = first
    assert word.trainer_math == TRAINER_MATH == verify_artifact(task).trainer_math
    shutil.copytree(Path(task.root), tmp_path / "root")
    moved = task.model_copy(update={"root": str(tmp_path / "root")})
    path = tiny.artifact(moved) / "manifest.json"
    for other in (TRAINER_MATH - 1, None):
        manifest = json.loads(path.read_text())
        manifest["environment"] = {"torch": "x"} if other is None else {"trainerMath": other}
        path.write_text(json.dumps(manifest))
        again, said = tiny.train(moved, stop_after(0))
        assert (again.macs, again.trainer_math) == (0, other) and "nothing to train" in said[0]
        assert verify_artifact(moved).trainer_math == other


def test_a_stage_whose_checkpoints_are_of_another_trainer_math_starts_again(
    first, folder, tmp_path, monkeypatch
):
    tasks = [tiny.task(tiny.spec(), folder, tmp_path, attempt=attempt) for attempt in (1, 2)]
    with monkeypatch.context() as before:
        before.setattr(runtime, "TRAINER_MATH", TRAINER_MATH - 1)
        before.setattr(checkpoint, "TRAINER_MATH", TRAINER_MATH - 1)
        with pytest.raises(Preempted):
            tiny.train(tasks[0], stop_after(5))
    word, said = tiny.train(tasks[1])
    assert any("passing over" in text and "TRAINER_MATH" in text for text in said)
    assert word.macs == STEPS * 1000 and weights(tasks[1]) == weights(first[0])


def poison(at, name="visual.proj", times=None):
    """Make weights NaN after step `at`, as an overflowing update does whose own loss was finite; at
    most `times` times.
    """
    left = [times]

    def after(trainer, done):
        if done == at and left[0] != 0:
            left[0] = left[0] and left[0] - 1
            trainer.stage.saver.wait()
            with torch.no_grad():
                dict(trainer.stage.student.clip.named_parameters())[name].fill_(math.nan)

    return after


@pytest.mark.parametrize("at", [2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_losses_that_are_not_finite_end_the_attempt_and_nothing_of_them_is_saved(
    folder, tmp_path, at
):
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path)
    with pytest.raises(WorkError, match="not finite") as error:
        tiny.train(task, poison(at))
    assert error.value.failure == "NonFinite"
    if at != STEPS_PER_EPOCH:  # otherwise the checkpoint at the epoch's end finds it first
        assert f"step {at + 1} of {STEPS}" in str(error.value)
    assert not tiny.artifact(task).exists()
    for step in Path(task.root).glob("*/*/step-*/model.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(step).values())
    steps = [path.name for path in Path(task.root).glob("*/*/step-*")]
    assert steps in (
        [],
        [f"step-{STEPS_PER_EPOCH}"] if at > STEPS_PER_EPOCH else [],
    ), "the checkpoint of the epoch's end may not have been written yet"


def test_no_checkpoint_between_two_readings_of_the_losses_holds_a_nan(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("modelchain_trainer.cadence.READ_SECONDS", 1e9)
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path).model_copy(
        update={"checkpoint_seconds": 0}
    )
    wait, poisoned = (lambda trainer, _: trainer.stage.saver.wait()), poison(2)
    with pytest.raises(WorkError) as error:
        tiny.train(task, lambda *a: (wait(*a), poisoned(*a)))
    assert error.value.failure == "NonFinite"
    assert [path.name for path in Path(task.root).glob("*/*/step-*")] == ["step-1"]


def test_weights_that_are_not_finite_are_restored_from_the_checkpoint_once(first, folder, tmp_path):
    task = tiny.task(tiny.spec(), folder, tmp_path)
    trainers, poisoned = [], poison(STEPS_PER_EPOCH + 2, times=1)
    word, said = tiny.train(task, lambda *a: (trainers.append(a[0]), poisoned(*a)))
    assert any(f"not finite at step {STEPS_PER_EPOCH + 3} of {STEPS}" in text for text in said)
    assert weights(task) == weights(first[0]), "the NaN has left no trace"
    steps, (back,) = tiny.entries(task), tiny.entries(task, "wentBack")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert not any(line["skipped"] for line in steps)
    repeated = back["nonFiniteTo"] - back["step"]
    assert (back["step"], back["nonFiniteFrom"]) == (STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3)
    assert repeated >= 5
    assert word.macs == steps[-1]["macs"] == (STEPS + repeated) * 1000, "repeated steps count twice"
    assert trainers[0].meter.samples == (STEPS + repeated) * BATCH
    assert results(task).counters["skippedBatches"] == 0, "of the training that made these weights"


def everything(step):
    """Copies of the weights and, after the first step, of moments and step counts."""
    state = step.optimizer.state
    parameters = list(step.student.parameters())
    return [
        t.detach().clone()
        for p in parameters
        for t in (p, *state.get(p, {}).values())
        if t is p or t.any()
    ]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(
    folder, tmp_path, monkeypatch, what
):
    """The first batch of all, although the results need a first loss, and one after a resume."""
    bad, forward, call = (0, 5), models.Student.forward, Step.__call__

    def spoiled(student, *arguments):
        features = forward(student, *arguments)
        if student.spoil and what == "loss":
            return features._replace(scale=features.scale * math.inf)
        if student.spoil:
            features.image.register_hook(lambda gradient: gradient * math.inf)
        return features

    def watched(step, batch):
        step.student.spoil = batch.step in bad
        before = everything(step)
        numbers = call(step, batch)
        after = everything(step)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert same == bool(numbers[3]) == (batch.step in bad)
        return numbers

    monkeypatch.setattr(models.Student, "forward", spoiled)
    monkeypatch.setattr(Step, "__call__", watched)
    tasks = [
        tiny.task(tiny.spec(evaluation=False), folder, tmp_path, attempt=attempt)
        for attempt in (1, 2)
    ]
    with pytest.raises(Preempted):
        tiny.train(tasks[0], stop_after(3))
    tiny.train(tasks[1])
    lines = [line for task in tasks for line in tiny.entries(task)]
    assert [line["step"] - 1 for line in lines if line["skipped"]] == list(bad)
    assert all((line["loss"] is None) == line["skipped"] for line in lines)
    found = results(tasks[1])
    assert found.counters["skippedBatches"] == 2 and found.initial.loss == lines[1]["taskLoss"]


def test_final_weights_that_are_not_finite_leave_no_artifact(folder, tmp_path):
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path)
    with pytest.raises(WorkError) as error:
        tiny.train(task, poison(STEPS))
    assert error.value.failure == "NonFinite" and not tiny.artifact(task).exists()


def test_bf16_trains(folder, tmp_path):
    task = tiny.task(tiny.spec(precision="bf16", epochs=1), folder, tmp_path)
    tiny.train(task)
    assert all(
        tensor.dtype == torch.float32
        for tensor in load_file(tiny.artifact(task) / WEIGHTS).values()
    )
    assert results(task).final.loss < 2 * math.log(BATCH)


def test_micro_batches_are_the_same_training(first, folder, tmp_path):
    task = tiny.task(tiny.spec(microBatchSize=4), folder, tmp_path)
    assert task.input_digest == first[0].input_digest
    tiny.train(task)
    ours, whole = ([line["loss"] for line in tiny.entries(t)] for t in (task, first[0]))
    assert ours == pytest.approx(whole, rel=1e-4)


def test_evaluations_due_after_an_epoch_are_recorded(folder, tmp_path):
    task = tiny.task(tiny.spec(), folder, tmp_path)
    tiny.train(tiny.evaluated_every(task, epochs=2))
    assert [line["step"] for line in tiny.entries(task, "evaluation")] == [
        0,
        2 * STEPS_PER_EPOCH,
        STEPS,
    ]


def test_a_world_that_does_not_divide_the_batch_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "join", lambda *_: (0, 3, torch.device("cpu")))
    with pytest.raises(InputError, match="16 is not divisible by 3 processes"):
        Trainer(tiny.task(tiny.spec(), folder, tmp_path), StopRequest(), {}, print)


def test_data_of_another_fingerprint_is_refused_before_anything_is_trained(folder, tmp_path):
    task = tiny.task(tiny.spec(), folder, tmp_path)
    files = task.data.train.model_copy(update={"fingerprint": "0" * 64})
    task = task.model_copy(update={"data": task.data.model_copy(update={"train": files})})
    with pytest.raises(InputError, match="fingerprint"):
        tiny.train(task)


def test_swin_trains_and_draws_the_same_paths_again(folder, tmp_path):
    class Enough(Exception):
        pass

    vision = {"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 224}
    text = {"context_length": 12, "width": 64, "heads": 1, "layers": 1}
    chain = tiny.spec(
        {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
        globalBatchSize=2,
        evaluation=False,
    )
    found = []

    def two_steps(trainer, done):
        if done == 2:
            found.append(
                {
                    name: p.detach().clone()
                    for name, p in trainer.stage.student.clip.named_parameters()
                }
            )
            raise Enough

    for attempt in (1, 2):
        with pytest.raises(Enough):
            tiny.train(tiny.task(chain, folder, tmp_path, attempt=attempt), two_steps)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    fresh = dict(models.build(chain.spec.stages[0].config.resolved(), 0).named_parameters())
    assert all(tensor.isfinite().all() for tensor in found[0].values())
    assert not torch.equal(
        found[0]["visual.trunk.patch_embed.proj.weight"],
        fresh["visual.trunk.patch_embed.proj.weight"],
    )


# The entry point: the last word and the exit code.


def run(task, monkeypatch, after_step=None):
    """Exit code and last word of `python -m modelchain_trainer`, but in this process."""
    if after_step is not None:
        build, call, trainers = Trainer._build, Step.__call__, []

        def building(trainer):
            trainers.append(trainer)
            return build(trainer)

        def counted(step, batch):
            losses = call(step, batch)
            after_step(trainers[0], batch.step + 1)
            return losses

        monkeypatch.setattr(Trainer, "_build", building)
        monkeypatch.setattr(Step, "__call__", counted)
    handlers = {sig: signal.getsignal(sig) for sig in (*STOPS, signal.SIGINT)}
    try:
        code = entry.train(task)
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
        monkeypatch.undo()
    return code, LastWord.model_validate_json(Path(task.last_word).read_bytes())


def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_the_loop_is_preempted_with_a_true_last_word(folder, tmp_path, monkeypatch):
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path)
    code, word = run(task, monkeypatch, lambda _, done: terminate() if done == 2 else None)
    assert (code, word.failure) == (75, "Preempted")
    assert (word.step, word.checkpoint_step, word.macs) == (2, 2, 2000)
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path, attempt=2)
    code, word = run(task, monkeypatch, lambda _, done: terminate() if done == 3 else None)
    assert (code, word.failure) == (75, "Preempted")
    assert (word.step, word.checkpoint_step, word.macs) == (3, 3, 1000)


@pytest.mark.parametrize(
    "where", ["train.open_data", "stage.growth.grow", "artifact.seal", "artifact.save_file"]
)
def test_sigterm_outside_the_loop_is_preempted_too(first, folder, tmp_path, monkeypatch, where):
    task = tiny.task(
        tiny.spec(epochs=1, evaluation=False),
        folder,
        tmp_path,
        int("grow" in where),
        before=first[0],
    )
    monkeypatch.setattr(f"modelchain_trainer.{where}", terminate)
    code, word = run(task, monkeypatch)
    assert (code, word.failure) == (75, "Preempted")
    assert not tiny.artifact(task).exists() and not list(Path(task.root).glob("*/.artifact-*"))
    code, word = run(
        task.model_copy(update={"owner": "local-a2", "last_word": str(tmp_path / "w")}), monkeypatch
    )
    assert (code, word.result) == (0, "Succeeded")
    assert word.macs == (0 if "artifact" in where else STEPS_PER_EPOCH * 1000), (
        "nothing is trained twice"
    )


def test_sigterm_in_evaluations_and_while_a_checkpoint_is_written_loses_no_step(
    first, folder, tmp_path, monkeypatch
):
    tasks = [tiny.task(tiny.spec(), folder, tmp_path, attempt=attempt) for attempt in (1, 2, 3, 4)]
    tasks = [tiny.evaluated_every(task, epochs=1) for task in tasks]
    write, classify, words = checkpoint.save_file, evaluate.class_names, []

    def terminate_and(do, *arguments):
        terminate()
        return do(*arguments)

    def run_until(task, done):
        """SIGTERM in the evaluation after `done` steps; or, if `done` is 6, while the checkpoint of
        step 4 is written.
        """

        def after(_, step):
            if step == done:
                monkeypatch.setattr(evaluate, "class_names", partial(terminate_and, classify))

        if done == 6:
            monkeypatch.setattr(checkpoint, "save_file", partial(terminate_and, write))
        code, word = run(task, monkeypatch, after)
        words.append((code, word.failure, word.step, word.checkpoint_step))

    for task, done in zip(tasks, (4, 6, STEPS), strict=False):
        run_until(task, done)
    assert words[0] == (75, "Preempted", 4, 4) and words[2] == (75, "Preempted", STEPS, STEPS)
    assert words[1][:2] == (75, "Preempted") and words[1][2] == words[1][3] > STEPS_PER_EPOCH
    code, word = run(tasks[3], monkeypatch)
    assert (code, word.macs, weights(tasks[3])) == (0, 0, weights(first[0]))
    lines = [line for task in tasks for line in tiny.entries(task)]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    measured = {line["step"] for task in tasks for line in tiny.entries(task, "evaluation")}
    assert measured == {0, 4, 8, STEPS}, "an interrupted evaluation is run again"


def test_a_main_thread_that_handles_no_signal_is_ended_by_another(monkeypatch):
    given_up, stop, handlers = (
        [],
        StopRequest(),
        {s: signal.getsignal(s) for s in (*STOPS, signal.SIGINT)},
    )
    try:
        with pytest.raises(Preempted), stop.heard(0.1, lambda: given_up.append(True)):
            threading.Timer(0.1, terminate).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second or more inside C code
        assert given_up
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_training_does_not_wait_for_a_slow_disk(folder, tmp_path, monkeypatch):
    written, write = threading.Event(), checkpoint.Checkpointer._write
    monkeypatch.setattr(
        checkpoint.Checkpointer, "_write", lambda *a: written.wait(60) and write(*a)
    )
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path).model_copy(
        update={"checkpoint_seconds": 0}
    )
    seen = []

    def after(trainer, done):
        seen.append(trainer.stage.saver.saved_step)
        if done == STEPS:
            assert set(seen) == {0}
            written.set()

    tiny.train(task, after)
    assert seen == [0] * STEPS and tiny.artifact(task).exists()


def test_sighup_acts_like_sigterm(folder, tmp_path, monkeypatch):
    """torchrun forwards whichever signal it was sent."""
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    hang_up = lambda _, done: os.kill(os.getpid(), signal.SIGHUP) if done == 2 else None  # noqa: E731
    code, word = run(task, monkeypatch, hang_up)
    signal.signal(signal.SIGHUP, before)
    assert (code, word.failure, word.checkpoint_step) == (75, "Preempted", 2)


def test_a_failing_device_is_reported_with_its_node(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.AcceleratorError(
            "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be"
        )

    monkeypatch.setenv("MODELCHAIN_NODE", "gpu-7")
    code, word = run(tiny.task(tiny.spec(evaluation=False), folder, tmp_path), monkeypatch, fail)
    assert (code, word.failure, word.node, word.fault) == (1, "Hardware", "gpu-7", "EccError")


def test_a_second_sigterm_does_no_harm(folder, tmp_path, monkeypatch):
    task = tiny.task(tiny.spec(), folder, tmp_path)
    monkeypatch.setattr("modelchain_trainer.train.open_data", terminate)
    say = entry._say
    monkeypatch.setattr(entry, "_say", lambda text: (terminate(), say(text)))
    assert run(task, monkeypatch)[0] == 75


def test_the_last_word_of_a_failure_says_what_was_done_until_then(folder, tmp_path, monkeypatch):
    task = tiny.task(tiny.spec(evaluation=False), folder, tmp_path)
    code, word = run(task, monkeypatch, poison(STEPS_PER_EPOCH + 2))
    assert (code, word.failure) == (1, "NonFinite") and "step 7 of 12" in word.message
    assert word.checkpoint_step in (None, STEPS_PER_EPOCH) and word.macs >= 4000


def test_bad_input_is_exit_2(folder, tmp_path, monkeypatch):
    task = tiny.task(tiny.spec(), folder, tmp_path)
    files = task.data.train.model_copy(update={"samples": 71})
    code, word = run(
        task.model_copy(update={"data": task.data.model_copy(update={"train": files})}), monkeypatch
    )
    assert (code, word.failure) == (2, "UserError") and "spec.data.train.samples" in word.message
    assert word.checkpoint_step is None


def test_a_replaced_predecessor_is_exit_1_and_permanent(first, folder, tmp_path, monkeypatch):
    task = tiny.task(tiny.spec(), folder, tmp_path, index=1, before=first[0])
    other = task.predecessor.model_copy(update={"artifact_digest": "0" * 64})
    code, word = run(task.model_copy(update={"predecessor": other}), monkeypatch)
    assert (code, word.failure) == (1, "CorruptPredecessor") and word.failure.permanent
    assert "0" * 64 in word.message and str(first[1].artifact_digest) in word.message


@pytest.mark.parametrize("text", ["x" * 9000, '"\\\n\x00' * 3000, "数据卷" * 3000, "🙂" * 3000])
def test_the_last_word_fits_two_kibibytes(tmp_path, text):
    path = tmp_path / "word"
    word = LastWord(
        result="Failed", failure=FailureClass.ERROR, message=text, step=10**9, macs=10**24
    )
    write_last_word(path, word)
    assert 1000 < path.stat().st_size <= 2048
    read = LastWord.model_validate_json(path.read_bytes())
    # The middle is left out, and control characters are escaped.
    begin, _, end = read.message.partition("...")
    assert begin and end and read.macs == 10**24
    assert one_line(text).startswith(begin) and one_line(text).endswith(end)


def test_a_success_with_many_metrics_fits_too_and_keeps_the_main_ones(tmp_path):
    details = [f"{way}-r{k}" for way in ("image-to-text", "text-to-image") for k in (1, 5, 10)]
    metrics = {
        f"{i:x<63}{d}": 100 / 3 for i in range(16) for d in ("", *(f"/{x}" for x in details))
    }
    word = LastWord(
        result="Succeeded", artifact_digest="a" * 64, manifest_digest="b" * 64, metrics=metrics
    )
    write_last_word(tmp_path / "word", word)
    assert (tmp_path / "word").stat().st_size <= 2048
    read = LastWord.model_validate_json((tmp_path / "word").read_bytes())
    assert read.artifact_digest == "a" * 64 and set(read.metrics) == {
        f"{i:x<63}" for i in range(16)
    }


def test_the_first_failure_stands_even_in_a_file_that_was_there(tmp_path):
    path = tmp_path / "termination-log"
    path.touch()  # as a kubelet does
    for message in ("the cause", "a consequence"):
        write_last_word(
            path, LastWord(result="Failed", failure=FailureClass.ERROR, message=message)
        )
    assert LastWord.model_validate_json(path.read_bytes()).message == "the cause"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"result": "Failed", "class": "Unknown", "message": "a peer died"}', "the cause"),
        ('{"result": "Failed", "class": "Error", "message": "first"}', "first"),
        (
            '{"result": "Failed", "class": "Error", "message": "first", "fault": "class:Unknown"}',
            "first",
        ),
    ],
)
def test_a_failure_of_unknown_class_gives_way(tmp_path, before, after):
    """However its JSON is spaced."""
    path = tmp_path / "word"
    path.write_text(before)
    cause = LastWord(result="Failed", failure=FailureClass.ERROR, message="the cause")
    write_last_word(path, cause)
    assert LastWord.model_validate_json(path.read_bytes()).message == after


# Several ranks.


def rank_main(rank, world, port, task, ids):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    call = Step.__call__

    def counted(step, batch):
        (Path(ids) / f"{batch.step}-{rank}").write_text(json.dumps(batch.ids.tolist()))
        if rank == 1 and (world, batch.step) == (2, 4):
            terminate()  # only this one of the two ranks
        if rank == 3 and batch.step == 8:
            os._exit(9)
        return call(step, batch)

    Step.__call__ = counted
    assert entry.train(Task.model_validate_json(task)) == 75
    torch.distributed.destroy_process_group()


def spawn_ranks(task, world, ids):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world, port, task.model_dump_json(by_alias=True), str(ids))
    mp.start_processes(rank_main, arguments, world, start_method="forkserver")


@pytest.mark.timeout(900)  # seven trainers, some of them side by side
def test_attempts_with_2_ranks_and_4_ranks_and_1_rank_train_on_the_same_batches(
    first, folder, tmp_path
):
    """The first attempt is stopped, of the second one rank dies, and the third finishes."""
    tasks = [
        tiny.task(tiny.spec(), folder, tmp_path / "root", attempt=attempt) for attempt in (1, 2, 3)
    ]
    ids = tmp_path / "ids"
    ids.mkdir()
    spawn_ranks(tasks[0], 2, ids)
    with pytest.raises(mp.ProcessExitedException):
        spawn_ranks(tasks[1], 4, ids)
    tiny.train(tasks[2])
    words = [LastWord.model_validate_json(Path(task.last_word).read_bytes()) for task in tasks[:2]]
    assert words[0].failure == "Preempted"
    assert (words[0].step, words[0].checkpoint_step, words[0].macs) == (6, 6, 6000)
    assert words[1].failure in ("Unknown", "Preempted")
    for step in range(8):
        parts = [
            json.loads((ids / f"{step}-{rank}").read_text()) for rank in range(2 if step < 6 else 4)
        ]
        assert list(chain(*parts)) == global_batch(step, tiny.SAMPLES, BATCH, 0).tolist()
    losses = [line["loss"] for task in tasks for line in tiny.entries(task)]
    assert losses == pytest.approx([line["loss"] for line in tiny.entries(first[0])], rel=1e-4)
    assert [[line["step"] for line in tiny.entries(task)] for task in tasks] == [
        [1, 2, 3, 4, 5, 6],
        [7, 8],
        [9, 10, 11, 12],
    ], "steps done before the rank died are not repeated"
    assert results(tasks[2]).initial.metrics == pytest.approx(results(first[0]).initial.metrics), (
        "sharded evaluation"
    )
    assert EPOCHS * STEPS_PER_EPOCH == STEPS
