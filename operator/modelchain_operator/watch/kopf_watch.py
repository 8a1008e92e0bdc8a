"""The only module that uses kopf: for watches and login.

Every object that kopf sees is passed to a receiver. A watch event alone decides nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import kopf

from modelchain_operator.api.kube import ARTIFACTS, CHAINS, Kube, Object, Resource
from modelchain_operator.runners.template import CHAIN_UID

Receiver = Callable[[Object], None]


async def watch(
    kube: Kube, receivers: Mapping[Resource, Receiver], namespaces: Sequence[str]
) -> None:
    """Call the receivers with every object of their kinds, now and after each change, until
    cancelled.

    The receivers are called in this loop. Raises the error that ended kopf, or RuntimeError if kopf
    ends without one.

    Args:
        kube: gives the address of the API server and the login.
        receivers: by kind. All kinds must be installed.
        namespaces: those to watch; all if empty.
    """
    stop = threading.Event()
    registry = _registry(kube, receivers)
    settings = _settings(receivers)

    async def operate() -> None:
        try:
            await kopf.operator(
                registry=registry,
                settings=settings,
                stop_flag=stop,
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
            )
        finally:
            stop.set()  # a thread of kopf waits for it

    # When kopf ends, it ends every task of its loop. So it gets a loop of its own, in a thread.
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, operate()))
    try:
        await asyncio.shield(thread)
        raise RuntimeError("kopf ended without being asked to")
    finally:
        stop.set()
        await thread


def _registry(kube: Kube, receivers: Mapping[Resource, Receiver]) -> kopf.OperatorRegistry:
    """The handlers of events and of kopf's login."""
    loop = asyncio.get_running_loop()
    registry = kopf.OperatorRegistry()
    for kind, receiver in receivers.items():
        on_event = kopf.on.event(kind.group, kind.version, kind.plural, registry=registry)
        on_event(_handler(loop, receiver))
    kopf.on.login(registry=registry)(_login(kube))
    return registry


def _handler(loop: asyncio.AbstractEventLoop, receiver: Receiver) -> Callable[..., Any]:
    async def on_event(event: Any, **_: Any) -> None:
        loop.call_soon_threadsafe(receiver, event["object"])

    return on_event


def _login(kube: Kube) -> Callable[..., Awaitable[kopf.ConnectionInfo]]:
    async def login(**_: Any) -> kopf.ConnectionInfo:
        settings = kube.api.configuration
        scheme, _space, token = (
            await settings.get_api_key_with_prefix("BearerToken") or ""
        ).partition(" ")
        return kopf.ConnectionInfo(
            server=settings.host,
            ca_path=settings.ssl_ca_cert,
            insecure=not settings.verify_ssl,
            certificate_path=settings.cert_file,
            private_key_path=settings.key_file,
            scheme=scheme or None,
            token=token or None,
        )

    return login


def _settings(kinds: Iterable[Resource]) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.connect_timeout = 5
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Forever()
    settings.networking.enforce_retry_after = True
    settings.watching.connect_timeout = 5
    settings.watching.server_timeout = 290
    settings.watching.client_timeout = 320
    for kind in kinds:
        # Only those pods and jobs are watched that belong to a chain.
        if kind not in (CHAINS, ARTIFACTS):
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = CHAIN_UID
    # kopf writes these only for handlers that we do not register. If it ever does, they have our
    # names.
    settings.persistence.finalizer = "modelchain.dev/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(
        prefix="kopf.modelchain.dev"
    )
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix="kopf.modelchain.dev"
    )
    return settings


class _Forever:
    """The pauses between kopf's tries, in seconds, without end.

    So an API server that does not answer never ends the operator.
    """

    def __iter__(self) -> Iterator[float]:
        # 1, 2, 4, 8 and 16 s, and then always 30 s, each shortened by a random part.
        return (
            min(30.0, 2.0**n) * random.uniform(0.5, 1.0)
            for n in itertools.chain(range(5), itertools.repeat(5))
        )
