"""A command's connection to a cluster.

It takes kubeconfig, context and namespace as `kubectl` does. Every error is one line.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml
from kubernetes.aio import client, config

from modelchain.api.messages import one_line
from modelchain.errors import InputError, WorkError
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    ApiError,
    Forbidden,
    Kube,
    NotFound,
    Object,
    Resource,
    Unavailable,
)
from modelchain_operator.api.objects import name

T = TypeVar("T")

NAMESPACES = Resource("", "v1", "namespaces")
# In a pod, this file has the pod's namespace.
IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# The most open connections: the logs of a stage's 256 pods, and what else is asked meanwhile.
CONNECTIONS = 300
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class Place(NamedTuple):
    """The cluster and namespace of a command. What is None, the kubeconfig decides."""

    namespace: str | None = None
    kubeconfig: Path | None = None
    context: str | None = None


def on_cluster(place: Place, work: Callable[[Kube, str], Awaitable[T]]) -> T:
    """Connect to a cluster, and return what `work(kube, namespace)` returns.

    Raises:
        InputError: the place does not lead to an API server.
        WorkError: the API server does not answer or refuses.
    """
    if place.namespace is not None:
        check_name(place.namespace, "namespace")

    async def main() -> T:
        async with _connect(place) as (kube, namespace):
            try:
                return await work(kube, place.namespace or namespace)
            except Unavailable as error:
                host = kube.api.configuration.host
                what = "answered with an error" if error.code else "cannot be reached"
                raise WorkError(
                    f"the API server at {host} {what}: {one_line(str(error))}"
                ) from error
            except Forbidden as error:
                raise WorkError(f"the API server refuses this: {one_line(str(error))}") from error
            except ApiError as error:
                raise WorkError(one_line(str(error))) from error

    return asyncio.run(main())


def read_chain(
    name: str, namespace: str | None, kubeconfig: Path | None, context: str | None
) -> Object:
    """The chain object. Commands of core find this function by the entry point
    `modelchain.cluster`.
    """

    async def work(kube: Kube, space: str) -> Object:
        return await get_chain(kube, space, name)

    return on_cluster(Place(namespace, kubeconfig, context), work)


def read_records(
    namespace: str | None, kubeconfig: Path | None, context: str | None
) -> list[Object]:
    """All StageArtifacts of a namespace, for commands of core, as `read_chain`."""

    async def work(kube: Kube, space: str) -> list[Object]:
        return await kube.list(ARTIFACTS, space)

    return on_cluster(Place(namespace, kubeconfig, context), work)


def read_names(namespace: str | None, kubeconfig: Path | None, context: str | None) -> list[str]:
    """The names of all chains of a namespace, for the completion of shells, as `read_chain`."""

    async def work(kube: Kube, space: str) -> list[str]:
        return [name(chain) for chain in await list_chains(kube, space)]

    return on_cluster(Place(namespace, kubeconfig, context), work)


def read_stages(
    chain: str, namespace: str | None, kubeconfig: Path | None, context: str | None
) -> list[str]:
    """The names of a chain's stages, as `read_names`."""
    stages = read_chain(chain, namespace, kubeconfig, context)["spec"]["stages"]
    return [str(stage["name"]) for stage in stages]


async def get_chain(kube: Kube, namespace: str, name: str) -> Object:
    """The chain as it is now.

    Raises InputError if it does not exist. The message says whether the chain, its namespace or its
    kind is missing.
    """
    check_name(name, "ModelChain")
    try:
        return await kube.get(CHAINS, namespace, name)
    except NotFound:
        pass
    others = [chain["metadata"]["name"] for chain in await list_chains(kube, namespace)]
    there = (
        f"; it has {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}" if others else ""
    )
    raise InputError(f"there is no ModelChain {name} in namespace {namespace}{there}")


async def list_chains(kube: Kube, namespace: str | None) -> list[Object]:
    """All chains of a namespace, or of all namespaces if it is None.

    Raises InputError if the namespace or the kind does not exist.
    """
    try:
        chains = await kube.list(CHAINS, namespace)
    except NotFound as error:
        raise InputError(
            "this cluster does not know ModelChains; install them: kubectl apply -f crds/"
        ) from error
    if not chains and namespace is not None:
        try:
            await kube.get(NAMESPACES, "", namespace)
        except NotFound as error:
            raise InputError(f"there is no namespace {namespace}") from error
        except Forbidden:
            # Many users may not read namespaces. There are no chains in either case.
            pass
    return chains


def check_name(name: str, kind: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a valid name of a {kind}; use lower-case letters, digits and '-'"
        )


@asynccontextmanager
async def _connect(place: Place) -> AsyncIterator[tuple[Kube, str]]:
    settings = client.Configuration()
    settings.connection_pool_maxsize = CONNECTIONS
    try:
        namespace = await _configure(settings, place)
        api = client.ApiClient(settings)
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise InputError(f"no API server to talk to: {error}") from error
    # The client raises any of these if the file is something else than a kubeconfig.
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"no API server to talk to: the file is not a kubeconfig ({error})",
            file=place.kubeconfig,
        ) from error
    async with api:
        yield Kube(api), namespace


async def _configure(settings: client.Configuration, place: Place) -> str:
    """Fill `settings`, and return the namespace for commands that name none."""
    chosen = place.kubeconfig or place.context or os.environ.get("KUBECONFIG")
    if not chosen and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=settings)
        return IN_POD.read_text().strip()
    file = str(place.kubeconfig) if place.kubeconfig else None
    paths = file or os.environ.get("KUBECONFIG") or "~/.kube/config"
    if not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep)):
        raise config.ConfigException(
            f"there is no {paths}; name a file with --kubeconfig or KUBECONFIG"
        )
    loader = await config.load_kube_config(
        config_file=file, context=place.context, client_configuration=settings
    )
    return str(loader.current_context["context"].get("namespace") or "default")
