"""`python -m modelchain_data REQUEST.json`: index and check all data of a chain before its first
stage.

It writes one DataAnswer to standard output. Its exit code is 0, 1 or 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

from modelchain.api.contracts import DataAnswer, DataRequest
from modelchain.errors import EXIT_DONE, EXIT_WORK_FAILED, InputError, WorkError
from modelchain_data.request import IndexingLine, open_data


def main(request: DataRequest) -> int:
    notes: list[str] = []
    try:
        train_set, _ = open_data(request, notes.append, IndexingLine())
        answer, code = DataAnswer(fingerprint=train_set.fingerprint, notes=notes), EXIT_DONE
    except (InputError, WorkError) as error:
        answer, code = DataAnswer(problems=str(error).splitlines()), error.exit_code
    except OSError as error:  # of the root, such as a full disk
        problem = f"{error.filename or request.cache}: {error.strerror or error}"
        answer, code = DataAnswer(problems=[problem]), EXIT_WORK_FAILED
    print(answer.model_dump_json(by_alias=True))
    return code


if __name__ == "__main__":
    sys.exit(main(DataRequest.model_validate_json(Path(sys.argv[1]).read_bytes())))
