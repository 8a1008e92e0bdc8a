"""`GET /progress` and `GET /metrics`: what rank 0 tells while it trains, from threads that never
disturb it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)

from modelchain_trainer.metrics import Meter


class _Server(ThreadingTCPServer):  # not HTTPServer, which asks DNS for its own name first
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    allow_reuse_address, daemon_threads, request_queue_size = (
        True,
        True,
        128,
    )  # of 5 ten ignored ones would not show


def serve(meter: Meter, say: Callable[[str], None]) -> None:
    """On all interfaces until the process ends, each at the port that MODELCHAIN_PROGRESS_PORT or
    ..._METRICS_PORT names, if it does. A port that cannot be had is told, and disturbs nobody.
    """
    registry = CollectorRegistry()
    registry.register(meter)
    ProcessCollector(registry=registry)
    pages: dict[str, tuple[str, Callable[[], bytes]]] = {
        "progress": (
            "application/json",
            lambda: meter.live.model_dump_json(by_alias=True).encode(),
        ),
        "metrics": (CONTENT_TYPE_LATEST, lambda: generate_latest(registry)),
    }
    for name, (kind, read) in pages.items():
        if port := os.environ.get(f"MODELCHAIN_{name.upper()}_PORT"):
            try:
                _serve(int(port), f"/{name}", kind, read)
            except OSError as error:
                say(f"no {name} is served on port {port}: {error}")


def _serve(port: int, path: str, kind: str, read: Callable[[], bytes]) -> None:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            if self.path != path:
                return self.send_error(404)
            body = read()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header(
                "Content-Length", str(len(body))
            )  # an answer that the process's end cuts short shows it
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...  # it is asked every few seconds

    threading.Thread(target=_Server(("", port), Handler).serve_forever, daemon=True).start()
