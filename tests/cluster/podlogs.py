"""The logs of played pods, as a kubelet serves them to the API server, which passes them on."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from aiohttp import web
from playedpod import Pod


class LogServer:
    """`kubectl logs` and all that asks the API server for a log ends up here.

    Args:
        pods: the kubelet's, by UID.
        certificate, key: of 127.0.0.1; the API server does not check who signed it.
    """

    def __init__(self, pods: Mapping[str, Pod], certificate: Path, key: Path):
        self._pods = pods
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificate, key)
        # Seconds after which a stream is cut off although its container runs on; None for never.
        self.cut: float | None = None

    async def start(self) -> int:
        """Returns its port, which the Node object names."""
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._log)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _log(self, request: web.Request) -> web.StreamResponse:
        wanted = (request.match_info["namespace"], request.match_info["pod"])
        pod = next((p for p in self._pods.values() if (p.namespace, p.name) == wanted), None)
        if pod is None:
            raise web.HTTPNotFound(text="the pod is gone")
        query, response = request.query, web.StreamResponse()
        await response.prepare(request)
        at, until = _first(pod, query), asyncio.get_running_loop().time() + (self.cut or 3600)
        while True:
            running = pod.prints and query.get("follow") == "true"
            for stamp, text in pod.printed[at:]:
                time = f"{stamp} " if query.get("timestamps") == "true" else ""
                await response.write(f"{time}{text}\n".encode())
            at = len(pod.printed)
            if not running or asyncio.get_running_loop().time() > until:
                return response
            await asyncio.sleep(0.05)


def _first(pod: Pod, query: Mapping[str, str]) -> int:
    """The number of the first line that is asked for. `sinceTime` has whole seconds."""
    first = 0
    if since := query.get("sinceTime"):
        begins = datetime.fromisoformat(since).replace(microsecond=0)
        early = [stamp for stamp, _ in pod.printed if datetime.fromisoformat(stamp) < begins]
        first = len(early)
    if tail := query.get("tailLines"):
        first = max(first, len(pod.printed) - int(tail))
    return first
