"""The programs of GitOps tools, built once from the Go module proxy: `verdicts`, which asks
kstatus, Argo CD's engine and Flux's library about objects, and Flux's controllers.

`python tests/gitops/programs.py` builds `verdicts` (5 minutes of CPU), or the programs that it is
given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
import golang

TOOLS = Path(__file__).parent / "tools"
VERDICTS, KUSTOMIZE, SOURCE = "verdicts", "kustomize-controller", "source-controller"
# Of this one, only the CRDs are used.
NOTIFICATION, NOTIFICATION_VERSION = "notification-controller", "v1.9.3"
FLUX = "github.com/fluxcd"
_PACKAGES = {VERDICTS: f"./{VERDICTS}"} | {name: f"{FLUX}/{name}" for name in (KUSTOMIZE, SOURCE)}


def program(name: str) -> Path:
    """One program of the pinned version, built first where it is missing. Raises `Unavailable`."""
    sources = [TOOLS / "go.mod", TOOLS / "go.sum", TOOLS / VERDICTS / "main.go"]
    path = golang.cache("gitops", b"".join(file.read_bytes() for file in sources)) / name
    if not path.is_file():
        if not golang.is_installed():
            raise golang.Unavailable(
                f"{name} is built from source: install Go >= 1.26 (https://go.dev/dl)"
            )
        with golang.locked(path.parent):
            if not path.is_file():
                golang.build(TOOLS, _PACKAGES[name], path, "-s -w")
    return path


def crds_of(name: str) -> Path:
    """The folder of the CRDs of one of Flux's controllers. Read-only."""
    if name == NOTIFICATION:
        words = ("mod", "download", "-json", f"{FLUX}/{name}@{NOTIFICATION_VERSION}")
        source = json.loads(golang.go(TOOLS, *words))["Dir"]
    else:
        source = golang.go(TOOLS, "list", "-m", "-f", "{{.Dir}}", _PACKAGES[name]).strip()
    return Path(source) / "config" / "crd" / "bases"


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or [VERDICTS]:
            print(program(wanted))
    except golang.Unavailable as reason:  # the tests skip for the same reason: a failure on CI
        print(reason, file=sys.stderr)
