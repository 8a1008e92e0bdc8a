"""`python -m modelchain_data [TASK.json]`: index and check all data of a chain before its first
stage. In a pod the task is in MODELCHAIN_TASK.

It writes one DataAnswer to standard output, and the last word if the task names a file for it. Its
exit code is 0 if the data can be used, 1 if the work failed, 2 if the data or the spec is wrong,
and 75 if it was stopped. What it has indexed stays, so the next one goes on from there.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback

from modelchain.api.contracts import DataAnswer, DataRequest, FailureClass, IndexTask, LastWord
from modelchain.errors import InputError, WorkError
from modelchain.io.lastword import end, read_task
from modelchain.io.stop import STOPS, listen
from modelchain_data.request import IndexingLine, open_data


def main(arguments: list[str]) -> int:
    task = read_task(IndexTask, arguments)
    listen(STOPS, lambda *_: os._exit(_preempted(task)))
    began = time.monotonic()
    answer, failure = _index(task.data)
    print(answer.model_dump_json(by_alias=True), flush=True)
    word = LastWord(
        result="Failed" if failure else "Succeeded",
        failure=failure,
        message="\n".join(answer.problems),
        seconds=round(time.monotonic() - began, 3),
        fingerprint=answer.fingerprint,
    )
    return end(task.last_word, word)


def _index(request: DataRequest) -> tuple[DataAnswer, FailureClass | None]:
    """What is told of the data, and why it cannot be used, if so."""
    notes: list[str] = []
    try:
        train_set, _ = open_data(request, notes.append, IndexingLine())
        return DataAnswer(fingerprint=train_set.fingerprint, notes=notes), None
    except InputError as error:
        problems, failure = str(error).splitlines(), FailureClass.USER_ERROR
    except WorkError as error:
        problems, failure = str(error).splitlines(), FailureClass(error.failure)
    except OSError as error:  # of the root, such as a full disk
        problems = [f"{error.filename or request.index}: {error.strerror or error}"]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        failure = FailureClass.VOLUME_FULL if full else FailureClass.ERROR
    except Exception as error:
        traceback.print_exc()
        problems, failure = [f"{type(error).__name__}: {error}"], FailureClass.ERROR
    return DataAnswer(problems=problems), failure


def _preempted(task: IndexTask) -> int:
    message = "stopped; what has been indexed stays"
    word = LastWord(result="Failed", failure=FailureClass.PREEMPTED, message=message)
    return end(task.last_word, word)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
