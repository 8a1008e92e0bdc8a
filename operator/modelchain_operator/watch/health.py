"""Answers liveness probes, in a thread of its own.

So they are answered before the CRDs are installed, while the API server is away, and also when the
event loop hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


def serve(url: str, alive: Callable[[], str | None]) -> ThreadingHTTPServer:
    """Answer GET of this URL until the process ends or the server is shut down.

    Args:
        url: its host and port are those to listen on.
        alive: returns why this process has to be restarted, or None. The status is 500 or 200.
    """
    at = urlsplit(url)

    class Probe(BaseHTTPRequestHandler):
        # A client that sends nothing does not keep its thread for longer, in seconds.
        timeout = 5

        def do_GET(self) -> None:
            reason = alive()
            status = 404 if self.path != at.path else 500 if reason else 200
            answer = (reason or "alive").encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *values: object) -> None:
            """Log nothing: a probe comes every few seconds."""

    server = ThreadingHTTPServer((at.hostname or "", at.port or 0), Probe)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
