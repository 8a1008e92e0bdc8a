"""`modelchain` in the test's own process: to load it takes a process of its own a second of a core.

That it works as a process is seen by tests/local, and page by page by tests/docs and
tests/cluster/test_docs.py.
"""

from __future__ import annotations

import io
import traceback
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from modelchain.cli.app import main


def modelchain(*words: str, folder: Path = Path()) -> CompletedProcess[str]:
    """What the command returns, prints and complains of, called in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = patch("sys.argv", ["modelchain", *words])
    with argv, redirect_stdout(out), redirect_stderr(err), chdir(folder):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:  # as the interpreter would
            traceback.print_exc()
            code = 1
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())
