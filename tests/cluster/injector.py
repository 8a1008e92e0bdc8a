"""A stand-in for a mesh: a mutating webhook that adds containers to the trainers' pods of one
namespace.

    with Injector(control_plane, namespace) as injector:
        injector.down()  # it cannot be reached, and no pod can be created
"""

from __future__ import annotations

import base64
import json
import ssl
import time
from types import TracebackType
from typing import Any

from aiohttp import web
from apiclient import Json, run
from controlplane import ControlPlane

PROXY = {"name": "istio-proxy", "image": "istio/proxyv2:1.20"}
ROLE, CHAIN = "modelchain.dev/role", "modelchain.dev/chain"
PROBE = """
{apiVersion: v1, kind: Pod, metadata: {name: probe, namespace: %s},
 spec: {containers: [{name: main, image: none}]}}
"""


class Injector:
    """The pods of chains in `native` get an init container that is restarted; those of all others
    get a container. It is asked about every pod of the namespace.
    """

    def __init__(self, plane: ControlPlane, namespace: str, native: tuple[str, ...] = ()):
        self.plane, self.namespace, self.native = plane, namespace, native
        self.asked, self.port = 0, 0

    def __enter__(self) -> Injector:
        certificate, key = self.plane.authority.server(f"mesh-{time.time_ns()}", "IP:127.0.0.1")
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self.up()
        self.plane.kubectl("create", "-f", "-", input=json.dumps(self._configuration()))
        deadline = time.monotonic() + 30
        while not self.asked:
            assert time.monotonic() < deadline, "the API server does not ask the webhook"
            probe = PROBE % self.namespace
            self.plane.kubectl("create", "--dry-run=server", "-f", "-", input=probe)
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.plane.kubectl("delete", "mutatingwebhookconfiguration", self._name)
        self.down()

    @property
    def _name(self) -> str:
        return f"mesh-{self.namespace}"

    def up(self) -> None:
        """It answers, at the port that it had before."""
        run(self._listen())

    def down(self) -> None:
        run(self._server.cleanup())

    async def _listen(self) -> None:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/inject", self._inject)
        self._server = web.AppRunner(app, access_log=None)
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", self.port, ssl_context=self._tls).start()
        self.port = int(self._server.addresses[0][1])

    async def _inject(self, request: web.Request) -> web.Response:
        asked = (await request.json())["request"]
        self.asked += 1
        labels = asked["object"]["metadata"].get("labels") or {}
        patch = self._patch(asked["object"]["spec"], labels) if ROLE in labels else []
        response: Json = {"uid": asked["uid"], "allowed": True}
        if patch:
            encoded = base64.b64encode(json.dumps(patch).encode()).decode()
            response |= {"patchType": "JSONPatch", "patch": encoded}
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
        return web.json_response({**review, "response": response})

    def _patch(self, spec: Json, labels: Json) -> list[Json]:
        if labels[CHAIN] not in self.native:
            return [{"op": "add", "path": "/spec/containers/-", "value": PROXY}]
        inits = [PROXY | {"restartPolicy": "Always"}, *spec.get("initContainers", [])]
        return [{"op": "add", "path": "/spec/initContainers", "value": inits}]

    def _configuration(self) -> Json:
        authority = base64.b64encode(self.plane.authority.certificate.read_bytes()).decode()
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}
        webhook: dict[str, Any] = {
            "name": "inject.stand-in.example.com",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "timeoutSeconds": 5,
            "clientConfig": {
                "url": f"https://127.0.0.1:{self.port}/inject",
                "caBundle": authority,
            },
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}},
            "rules": [rule | {"operations": ["CREATE"]}],
        }
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": self._name},
            "webhooks": [webhook],
        }
