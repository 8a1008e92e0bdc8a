"""`python -m modelchain_trainer [TASK.json]`: train one stage, under torchrun or alone; in a pod
its task is in MODELCHAIN_TASK. `... verify [TASK.json]`: re-hash what the stage left; `... evaluate
FILE`: measure an artifact.

Whatever happens, the last word is written before the process ends, and the exit code says the same
(RULES section 5).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelchain.api.contracts import EvaluationRequest, FailureClass, LastWord, Task
from modelchain.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_WORK_FAILED,
    InputError,
    WorkError,
)
from modelchain.io import watchdog
from modelchain.io.guard import PARENT, die_with_parent
from modelchain.io.lastword import blame, verify_artifact, write_last_word
from modelchain.io.stop import Preempted, StopRequest

EXIT_SECONDS = 5  # before a trainer is killed, to give up by itself


def main(arguments: list[str]) -> int:
    if PARENT in os.environ:
        die_with_parent(signal.SIGKILL, int(os.environ[PARENT]))
    if arguments[:1] == ["evaluate"]:
        return evaluate(EvaluationRequest.model_validate_json(Path(arguments[1]).read_bytes()))
    work = verify if arguments[:1] == ["verify"] else train
    rest = arguments[work is verify :]
    text = Path(rest[0]).read_text() if rest else os.environ["MODELCHAIN_TASK"]
    try:
        task = Task.model_validate_json(text)
    except ValidationError as error:  # an operator and an image of two versions
        if work is train:
            message = (
                "spec.runner.image and the operator are of different versions: the task is not"
                f" read: {error}"
            )
            word = LastWord(result="Failed", failure=FailureClass.USER_ERROR, message=message)
            write_last_word(Path(json.loads(text)["lastWord"]), word)
        raise
    if work is train:
        watchdog.start(task)
    return work(task)


def evaluate(request: EvaluationRequest) -> int:
    """Measure a finished artifact; the metrics go to standard output."""
    from modelchain_trainer.evaluate import measure

    try:
        print(json.dumps(measure(Path(request.artifact), request.data)))
    except (InputError, WorkError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def verify(task: Task) -> int:
    """Say what the stage left: 0 if it is whole, else 1. An unreadable volume (OSError) leaves no
    last word.
    """
    word = verify_artifact(task)
    _say(f"{word.failure}: {word.message}" if word.failure else f"whole: {word.artifact_digest}")
    write_last_word(Path(task.last_word), word)
    return EXIT_WORK_FAILED if word.failure else EXIT_DONE


def train(task: Task) -> int:
    """Train, and say how it ended: 0, 1, 2 or 75."""
    stop, report = StopRequest(), dict[str, Any]()
    preempted = partial(_failed, task, report, FailureClass.PREEMPTED)
    # torchrun, too, kills only after that time; in a pod it is longer (operator's template).
    seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) - EXIT_SECONDS
    try:
        with stop.heard(
            seconds, lambda: os._exit(preempted("stopped by force; the newest checkpoint stands"))
        ):
            return _train(task, stop, report)
    except Preempted as error:
        return preempted(str(error))


def _train(task: Task, stop: StopRequest, report: dict[str, Any]) -> int:
    # Imported late: a worker must ask to die with its parent, and listen, before torch takes its
    # seconds to load.
    from modelchain_trainer.runtime import failure_of
    from modelchain_trainer.train import Trainer

    try:
        stop.check()  # an import may have swallowed it
        word = Trainer(task, stop, report, _say).train()
    except InputError as error:
        return _failed(task, report, FailureClass.USER_ERROR, str(error))
    except WorkError as error:
        return _failed(
            task, report | blame(error, error.failure), FailureClass(error.failure), str(error)
        )
    except Exception as error:
        traceback.print_exc()
        if stop.asked:  # another rank left first, and took the process group with it
            raise Preempted("stopped") from error
        failure = failure_of(error)
        return _failed(
            task, report | blame(error, failure), failure, f"{type(error).__name__}: {error}"
        )
    write_last_word(Path(task.last_word), word)
    return EXIT_DONE


def _failed(task: Task, report: dict[str, Any], failure: FailureClass, message: str) -> int:
    """Say so, and the exit code."""
    _say(f"{failure}: {message}")
    write_last_word(
        Path(task.last_word), LastWord(result="Failed", failure=failure, message=message, **report)
    )
    codes = {FailureClass.PREEMPTED: EXIT_PREEMPTED, FailureClass.USER_ERROR: EXIT_BAD_INPUT}
    return codes.get(failure, EXIT_WORK_FAILED)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no waiting for threads or process groups that a failed peer left hanging
