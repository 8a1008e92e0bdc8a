"""`python -m modelchain_data REQUEST.json`: index and check all data of a chain before its first stage.

Answers with one DataAnswer on standard output; exit code 0, 1 or 2.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

from modelchain.contracts import DataAnswer, DataRequest
from modelchain.errors import EXIT_DONE, EXIT_WORK_FAILED, InputError, WorkError
from modelchain_data.request import open_data

SECONDS = 3.0


class _Progress:
    """A line on standard error every few seconds while captions are tokenised, with the time that is left."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, all_: int) -> None:
        now = time.monotonic()
        if now - self.said > SECONDS:
            self.said = now
            left = timedelta(seconds=round((now - self.started) / done * (all_ - done)))
            print(f"indexing shards: {done} of {all_}, {left} left", file=sys.stderr, flush=True)


def main(request: DataRequest) -> int:
    notes: list[str] = []
    try:
        train_set, _ = open_data(request, notes.append, _Progress())
        answer, code = DataAnswer(fingerprint=train_set.fingerprint, notes=notes), EXIT_DONE
    except (InputError, WorkError) as error:
        answer, code = DataAnswer(problems=str(error).splitlines()), error.exit_code
    except OSError as error:  # of the root: a full disk, say
        problem = f"{error.filename or request.cache}: {error.strerror or error}"
        answer, code = DataAnswer(problems=[problem]), EXIT_WORK_FAILED
    print(answer.model_dump_json(by_alias=True))
    return code


if __name__ == "__main__":
    sys.exit(main(DataRequest.model_validate_json(Path(sys.argv[1]).read_bytes())))
