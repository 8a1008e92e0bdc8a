"""`GET /progress` and `GET /metrics`, served by rank 0 from threads beside the training."""

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
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128  # the default of 5 is soon full of connections given up by clients


def serve(meter: Meter, say: Callable[[str], None]) -> None:
    """Serve until the process ends, on all interfaces, at the ports that MODELCHAIN_PROGRESS_PORT
    and MODELCHAIN_METRICS_PORT name. Without the variable a page is not served. A port that is
    taken is reported through `say`, and the training goes on.
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
            # With its length, a client notices an answer that the end of the process cuts short.
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...  # requests come every few seconds

    threading.Thread(target=_Server(("", port), Handler).serve_forever, daemon=True).start()
