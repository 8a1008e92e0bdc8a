"""`python -m modelchain.cli.crds FOLDER` writes the CRDs; `make crds` calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from modelchain.crd import definitions


def rendered() -> dict[str, str]:
    """The CRDs as YAML, by file name."""
    return {
        name: yaml.safe_dump(definition, sort_keys=False, width=10_000, allow_unicode=True)
        for name, definition in definitions().items()
    }


if __name__ == "__main__":
    for name, text in rendered().items():
        (Path(sys.argv[1]) / name).write_text(text)
