"""A chain as it is stored: in a local root, or on a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelchain.api.artifact import StageArtifactSpec
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.errors import InputError
from modelchain.io.load import parse, status_of
from modelchain.local.root import parse_status, read_object

NEEDS_OPERATOR = (
    "clusters are reached with the operator's packages; install them: pip install"
    " 'modelchain[operator]'"
)


def read_stored(
    name: str | None,
    root: Path | None,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
) -> tuple[dict[str, Any], ChainStatus]:
    """The object of one chain, and its status: NAME on a cluster, or the chain in a local root.

    Raises:
        InputError: both or none of the two are named, or there is no such chain.
        WorkError: the status cannot be read.
    """
    if (name is None) == (root is None):
        raise InputError("name one chain: NAME for one on a cluster, or --root DIR for a local one")
    if root is not None and (namespace or kubeconfig or context):
        raise InputError("a local root has no namespace, kubeconfig or context; leave them out")
    if root is not None:
        return _read_root(root)
    assert name is not None
    stored = of_the_operator("read")(name, namespace, kubeconfig, context)
    return stored, status_of(stored)


def read_begun(
    name: str | None,
    root: Path | None,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
) -> tuple[ModelChain, ChainStatus]:
    """The spec and the status of one chain, named as for `read_stored`.

    Raises InputError also if the chain has no status yet.
    """
    stored, status = read_stored(name, root, namespace, kubeconfig, context)
    chain = parse(ModelChain, stored, stored["metadata"]["name"])
    if not status.stages:
        raise InputError(f"chain {chain.metadata.name} has no status yet; try again in a minute")
    return chain, status


def _read_root(root: Path) -> tuple[dict[str, Any], ChainStatus]:
    """The object and the status of the chain in a local root."""
    file = root / "status.json"
    if not file.is_file():
        raise InputError("holds no chain; `modelchain run -f FILE --root DIR` makes one", file=root)
    stored = read_object(file)
    return stored, parse_status(stored, file)


def read_records(
    namespace: str | None, kubeconfig: Path | None, context: str | None
) -> list[StageArtifactSpec]:
    """The records of a namespace on a cluster. Those of another version are left out."""
    found: list[dict[str, Any]] = of_the_operator("records")(namespace, kubeconfig, context)
    records = []
    for one in found:
        with suppress(ValidationError):
            records.append(StageArtifactSpec.model_validate_json(json.dumps(one.get("spec"))))
    return records


def of_the_operator(name: str) -> Callable[..., Any]:
    """A function that reads from a cluster.

    It is the operator's. Core knows no Kubernetes, so it finds the function by its entry point.
    """
    for entry in entry_points(group="modelchain.cluster", name=name):
        # The entry point is always registered, but its packages are optional.
        with suppress(ImportError):
            read: Callable[..., Any] = entry.load()
            return read
    raise InputError(NEEDS_OPERATOR)
