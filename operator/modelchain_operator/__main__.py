"""`modelchain-operator`, also `python -m modelchain_operator`: runs a cluster's chains.

It runs until a signal asks it to stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import kopf
import typer

from modelchain.errors import EXIT_BAD_INPUT, EXIT_WORK_FAILED, InputError
from modelchain.io.load import load_model
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import connect
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.reconcile.events import Events
from modelchain_operator.watch import metrics
from modelchain_operator.watch.leader import Leader
from modelchain_operator.watch.service import Service

LEASE_NAMESPACE = "modelchain-system"

# click's UsageError. Typer bundles click under a private name, so it cannot be imported by its own.
_UsageError: Any = typer.BadParameter.__mro__[1]

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def operator(
    config: Annotated[
        Path | None, typer.Option(help="Node pools, defaults and settings, as YAML.")
    ] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Default: the pod's service account, else kubectl's.")
    ] = None,
    namespace: Annotated[
        list[str] | None, typer.Option(help="Serve only this namespace; repeatable.")
    ] = None,
    liveness_port: Annotated[
        int, typer.Option(help="Port of GET /healthz.", min=1, max=65535)
    ] = 8080,
    metrics_port: Annotated[
        int, typer.Option(help="Port of GET /metrics; 0 switches it off.", min=0, max=65535)
    ] = 9090,
    leader_election: Annotated[bool, typer.Option("--leader-election/--no-leader-election")] = True,
    log_format: Annotated[Literal["plain", "json"], typer.Option()] = "plain",
    verbose: Annotated[bool, typer.Option(help="Log every event and decision.")] = False,
) -> None:
    """Run the operator."""
    _configure_logging(log_format, verbose)
    settings = load_model(PoolFile, config) if config else PoolFile()
    _check_port(liveness_port, "GET /healthz", "--liveness-port")
    _check_port(metrics_port, "GET /metrics", "--metrics-port")
    health = f"http://0.0.0.0:{liveness_port}/healthz"
    asyncio.run(
        _operate(
            settings,
            kubeconfig,
            namespace or settings.namespaces,
            health,
            metrics_port,
            leader_election,
        )
    )


def _check_port(port: int, use: str, option: str) -> None:
    """Raise InputError if a port cannot be bound. Port 0 always can.

    This is checked before anything starts, since kopf would try a port that is taken again and
    again.
    """
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("0.0.0.0", port))
        except OSError as error:
            raise InputError(
                f"port {port} for {use} cannot be used: {error.strerror}; choose another with"
                f" {option}"
            ) from error


async def _operate(
    settings: PoolFile,
    kubeconfig: Path | None,
    namespaces: list[str],
    health: str,
    metrics_port: int,
    leader_election: bool,
) -> None:
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    async with connect(kubeconfig) as kube:
        leader = (
            Leader(kube, os.environ.get("POD_NAMESPACE", LEASE_NAMESPACE), identity)
            if leader_election
            else None
        )
        controller = Controller(kube, Events(kube, identity), settings, clock=kube.now)
        service = Service(kube, controller, namespaces, leader, health)
        if metrics_port:
            served = metrics.registry(service, settings, controller.hand_overs, kube.now)
            metrics.serve(metrics_port, served)
        await service.run()


def _configure_logging(form: str, verbose: bool) -> None:
    kopf.configure(
        verbose=verbose, log_format=kopf.LogFormat.JSON if form == "json" else kopf.LogFormat.FULL
    )
    if not verbose:
        # These log a line for each event, probe and login.
        for name in (
            "kopf.objects",
            "kopf.activities",
            "kopf._core.engines.activities",
            "aiohttp.access",
        ):
            logging.getLogger(name).setLevel(logging.WARNING)
    # kopf hides this logger, and with it the errors that callbacks raise.
    logging.getLogger("asyncio").propagate = True
    # At DEBUG this logger writes whole responses.
    logging.getLogger("kubernetes").setLevel(logging.INFO)
    # This logger warns that kopf catches no signals. It need not, since `Service` does.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line. The exit code is 0 if a signal stopped it, 1 for an error, 2 for wrong
    input.
    """
    try:
        app(standalone_mode=False)
    except _UsageError as error:
        print(f"modelchain-operator: {error.format_message()}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"modelchain-operator: {line}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Exception:
        log.exception("the operator failed and exits; Kubernetes starts it again")
        sys.exit(EXIT_WORK_FAILED)


if __name__ == "__main__":
    main()
