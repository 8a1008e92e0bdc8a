"""The trainer's process.

- `python -m modelchain_trainer [TASK.json]` trains one stage, under torchrun or alone. In a pod the
  task is in MODELCHAIN_TASK.
- `python -m modelchain_trainer verify [TASK.json]` hashes again what the stage left.
- `python -m modelchain_trainer evaluate [TASK.json]` measures an artifact.

A trainer writes its last word before it ends, however it ends, and its exit code agrees with it: 0
succeeded, 1 failed, 2 bad input, 75 preempted.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from modelchain.api.contracts import EvaluationTask, FailureClass, Findings, LastWord, Task
from modelchain.errors import InputError, WorkError
from modelchain.io import watchdog
from modelchain.io.guard import PARENT, die_with_parent
from modelchain.io.lastword import blame, end, read_task, verify_artifact
from modelchain.io.stop import STOPS, Preempted, StopRequest, listen

EXIT_SECONDS = 5  # a trainer that cannot stop gives up this long before it would be killed


def main(arguments: list[str]) -> int:
    if PARENT in os.environ:
        die_with_parent(signal.SIGKILL, int(os.environ[PARENT]))
    match arguments:
        case ["evaluate", *files]:
            return evaluate(read_task(EvaluationTask, files))
        case ["verify", *files]:
            return verify(read_task(Task, files, refuses=False))
    task = read_task(Task, arguments)
    watchdog.start(task)
    return train(task)


def evaluate(task: EvaluationTask) -> int:
    """Measure a finished artifact, write what was found to standard output and, in a pod, a last
    word; returns the exit code.
    """
    listen(STOPS, lambda *_: os._exit(end(task.last_word, _stopped("stopped while it measured"))))
    word = _measured(task)
    if word.failure is None:
        found = Findings(metrics=word.metrics, pictures=word.pictures)
        _say(found.model_dump_json(by_alias=True))
    else:
        print(word.message, file=sys.stderr, flush=True)
    return end(task.last_word, word)


def _measured(task: EvaluationTask) -> LastWord:
    with _without_collections():
        from modelchain_trainer.evaluate import measure
        from modelchain_trainer.runtime import failure_of

    try:
        found = measure(task)
        return LastWord(result="Succeeded", metrics=found.metrics, pictures=found.pictures)
    except InputError as error:
        failure, message = FailureClass.USER_ERROR, str(error)
    except WorkError as error:
        failure, message = FailureClass(error.failure), str(error)
    except Exception as error:
        traceback.print_exc()
        failure, message = failure_of(error), f"{type(error).__name__}: {error}"
    return LastWord(result="Failed", failure=failure, message=message)


def _stopped(message: str) -> LastWord:
    return LastWord(result="Failed", failure=FailureClass.PREEMPTED, message=message)


def verify(task: Task) -> int:
    """Write a last word on what the stage left; 0 if its artifact is whole, else 1. An unreadable
    volume raises OSError and leaves no last word, because it proves nothing.
    """
    word = verify_artifact(task)
    _say(f"{word.failure}: {word.message}" if word.failure else f"whole: {word.artifact_digest}")
    return end(task.last_word, word)


def train(task: Task) -> int:
    """Train, write the last word, and return the exit code: 0, 1, 2 or 75."""
    stop = StopRequest()
    report: dict[str, Any] = {}  # the trainer keeps it up to date for the last word
    preempted = partial(_failed, task, report, FailureClass.PREEMPTED)
    # When torchrun would kill this process. In a pod the operator's template allows longer.
    seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) - EXIT_SECONDS
    try:
        with stop.heard(
            seconds, lambda: os._exit(preempted("stopped by force; the newest checkpoint stands"))
        ):
            return _train(task, stop, report)
    except Preempted as error:
        return preempted(str(error))


def _train(task: Task, stop: StopRequest, report: dict[str, Any]) -> int:
    # Imported late, because torch takes seconds to load. Before that the process has asked to die
    # with its parent, and handles signals.
    with _without_collections():
        from modelchain_trainer.runtime import failure_of
        from modelchain_trainer.train import Trainer

    try:
        stop.check()  # a Preempted that was raised during an import may have been swallowed there
        word = Trainer(task, stop, report, _say).train()
    except InputError as error:
        return _failed(task, report, FailureClass.USER_ERROR, str(error))
    except WorkError as error:
        return _failed(
            task, report | blame(error, error.failure), FailureClass(error.failure), str(error)
        )
    except Exception as error:
        traceback.print_exc()
        if stop.asked:  # another rank has left first, and the process group failed with it
            raise Preempted("stopped") from error
        failure = failure_of(error)
        return _failed(
            task, report | blame(error, failure), failure, f"{type(error).__name__}: {error}"
        )
    return end(task.last_word, word)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Import packages inside. They leave hardly any garbage, and looking for it again and again
    takes a fifth of the CPU time. What is loaded then is never looked at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _failed(task: Task, report: dict[str, Any], failure: FailureClass, message: str) -> int:
    """Write the last word of a failure; returns the exit code."""
    _say(f"{failure}: {message}")
    word = LastWord(result="Failed", failure=failure, message=message, **report)
    return end(task.last_word, word)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for threads or process groups, which may hang if another rank has failed.
    os._exit(code)
