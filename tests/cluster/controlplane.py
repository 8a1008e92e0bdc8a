"""A real Kubernetes control plane with training-operator, on loopback ports, gone when the test run
is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
import training_operator
from apiclient import Api, ApiError, Json, run
from build import find_or_build
from certificates import Authority

CRDS = Path(__file__).parents[2] / "crds"
COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "training-operator",
)

NAMESPACES = "/api/v1/namespaces"
CHAINS = "/apis/modelchain.dev/v1alpha1/namespaces/{}/modelchains"

# Fewer garbage collections: a third less CPU for more memory, which is there.
_GO = {"GOGC": "400", "GOMEMLIMIT": "1500MiB"}

_PREFIX = "modelchain-control-plane-"
_READY_SECONDS = 60
_PORT_TAKEN = "address already in use"


class KubectlError(RuntimeError):
    """kubectl failed; the message is what it wrote to stderr."""


class NotReady(RuntimeError):
    """A component ended or did not become ready; the message ends with its log."""


class Cluster:
    """Any cluster one has an admin's kubeconfig for."""

    def __init__(self, kubeconfig: Path, kubectl: Path) -> None:
        self.kubeconfig = kubeconfig
        self._kubectl = kubectl

    def read(self, path: str, **params: str) -> Json:
        """An object or a list, as admin. Raises `KubectlError`."""
        query = f"?{urlencode(params)}" if params else ""
        return dict(json.loads(self.kubectl("get", "--raw", path + query)))

    def apply(self, namespace: str, thing: Json) -> None:
        """`kubectl apply` of an object or a List. Raises `KubectlError`."""
        self.kubectl("apply", "-f", "-", f"--namespace={namespace}", input=json.dumps(thing))

    def edit_chain(self, namespace: str, name: str, patch: Json) -> None:
        """A merge patch of a ModelChain. Raises `KubectlError`."""
        body = ("--type=merge", "-p", json.dumps(patch))
        self.kubectl("patch", "mchain", name, f"--namespace={namespace}", *body)

    def create_namespace(self, name: str) -> None:
        """Returns when pods can be created in it."""
        self.kubectl("create", "namespace", name)
        self.kubectl(
            "wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=30s"
        )

    def delete_namespace(self, name: str) -> None:
        """Does not wait: without a kubelet its pods may stay for ever."""
        self.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")

    def kubectl(self, *args: str, input: str | None = None) -> str:
        """The output of `kubectl ARGS`, as admin. Raises `KubectlError`."""
        command = [str(self._kubectl), f"--kubeconfig={self.kubeconfig}", *args]
        ended = subprocess.run(command, input=input, text=True, capture_output=True)
        if ended.returncode:
            raise KubectlError(ended.stderr.strip())
        return ended.stdout


@dataclass
class _Component:
    command: list[str]
    ready: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None


class ControlPlane(Cluster):
    """etcd, API server, controller manager, scheduler and training-operator; `directory` is theirs
    and is emptied.

    `address` is what the API server listens on, `server` its URL, `ca` its authority's certificate,
    `client_certificate` and `client_key` an admin's, `etcd` the plain HTTP endpoint of etcd.
    """

    address = "127.0.0.1"
    api_options: Sequence[str] = (
        # An Endpoints object refuses loopback addresses.
        "--endpoint-reconciler-type=none",
        *("--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000"),
        # Every revision stays in etcd for the tests to read.
        "--etcd-compaction-interval=0",
        *("--default-not-ready-toleration-seconds=3", "--default-unreachable-toleration-seconds=3"),
    )
    controller_options: Sequence[str] = (
        *("--concurrent-gc-syncs=50", "--concurrent-job-syncs=20"),
        # No traffic goes through Services here, and each pod would cost them several writes.
        "--controllers=*,-endpoints-controller,-endpointslice-controller,"
        "-endpointslice-mirroring-controller",
        # A node is lost after 20 seconds without a heartbeat (a busy machine has held them up for
        # 8), its pods 3 later.
        *(
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=20s",
            "--node-startup-grace-period=20s",
        ),
        "--node-eviction-rate=10",
    )

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        programs = find_or_build()
        super().__init__(directory / "admin.kubeconfig", programs.paths["kubectl"])
        self._programs = programs
        self._components: dict[str, _Component] = {}
        self._numbers = itertools.count()
        self._api: Api | None = None
        # Children die with the *thread* that started them (PR_SET_PDEATHSIG), so one thread of ours
        # starts all.
        self._launcher = ThreadPoolExecutor(1)

    def call(
        self, method: str, path: str, body: Json | None = None, patch: str = "", **params: str
    ) -> Json:
        """One request, as admin, without kubectl: a process of it takes a tenth of a second of a
        core. Raises `KubectlError`, as kubectl would.
        """
        if self._api is None:
            self._api = Api(self.kubeconfig)
        try:
            return run(self._api.request(method, path, body, params, patch))
        except (ApiError, aiohttp.ClientError, OSError) as error:
            raise KubectlError(str(error)) from error

    def read(self, path: str, **params: str) -> Json:
        return self.call("GET", path, **params)

    def apply(self, namespace: str, thing: Json) -> None:
        """Server-side, with one request for each object."""
        for item in thing["items"] if thing["kind"] == "List" else [thing]:
            version, plural = item["apiVersion"], item["kind"].lower() + "s"
            root = f"/{'api' if version == 'v1' else 'apis'}/{version}/namespaces/{namespace}"
            path = f"{root}/{plural}/{item['metadata']['name']}"
            self.call("PATCH", path, item, "apply-patch+yaml", fieldManager="tests", force="true")

    def edit_chain(self, namespace: str, name: str, patch: Json) -> None:
        self.call("PATCH", f"{CHAINS.format(namespace)}/{name}", patch, "merge-patch+json")

    def create_namespace(self, name: str) -> None:
        self.call("POST", NAMESPACES, {"metadata": {"name": name}})
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                self.read(f"{NAMESPACES}/{name}/serviceaccounts/default")
                return
            except KubectlError:
                assert time.monotonic() < deadline, f"namespace {name} gets no service account"
                time.sleep(0.05)

    def delete_namespace(self, name: str) -> None:
        with contextlib.suppress(KubectlError):  # it may be gone
            self.call("DELETE", f"{NAMESPACES}/{name}")

    def start(self) -> ControlPlane:
        """Returns when all components are ready and the webhook refuses a bad PyTorchJob. Raises
        `NotReady`.
        """
        for attempt in range(3):
            try:
                self._start()
                return self
            except NotReady as reason:
                self._kill_all()
                if _PORT_TAKEN not in str(reason) or attempt == 2:
                    raise
            except BaseException:
                self._kill_all()
                raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Kill everything and remove the directory."""
        self._kill_all()
        self._launcher.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop_component(self, name: str) -> None:
        """Kill one of `COMPONENTS`, as a crash would."""
        process = self._components[name].process
        assert process, f"{name} does not run"
        if name == "kube-apiserver" and self._api is not None:  # its connections break
            run(self._api.close())
            self._api = None
        process.kill()
        process.wait()
        self._components[name].process = None

    def start_component(self, name: str) -> None:
        """Start a stopped component, on the same port, and wait until all that run are ready."""
        self._launch(name)
        for running in self.pids():
            self._await(running)

    def restart(self, name: str) -> None:
        self.stop_component(name)
        self.start_component(name)

    def logs(self, name: str) -> str:
        """All that a component has written since the control plane started, over its restarts."""
        return self._log(name).read_text(errors="replace")

    def pids(self) -> dict[str, int]:
        """Process id of each running component."""
        return {
            name: component.process.pid
            for name, component in self._components.items()
            if component.process
        }

    def kubeconfig_for(
        self, user: str, groups: Sequence[str] = (), server: str | None = None
    ) -> Path:
        """A kubeconfig file with a fresh client certificate; `server` is another URL to talk to,
        such as a proxy's.
        """
        path = self.directory / f"{next(self._numbers)}.kubeconfig"
        self._write_kubeconfig(path, *self.authority.client(user, groups), server or self.server)
        return path

    def _start(self) -> None:
        self._prepare()
        webhook, metrics, probe = free_ports(3)
        self._components["training-operator"] = self._training_operator(webhook, metrics, probe)
        self._start_api()
        # The garbage collector looks for new kinds only every 30 seconds, so they all come before
        # it.
        self.kubectl("apply", "--server-side", "-f", str(self._programs.manifests / "crds"))
        if any(CRDS.glob("*.yaml")):
            self.kubectl("apply", "-f", str(CRDS))
        for there in (
            "jsonpath={.status.conditions}",
            "condition=Established",
        ):  # the second fails without the first
            self.kubectl("wait", f"--for={there}", "crd", "--all", "--timeout=30s")
        self._launch("kube-controller-manager")
        self.kubectl(
            "apply", "--server-side", "-f", "-", input=self._training_operator_objects(webhook)
        )
        self.start_component("training-operator")

    def _prepare(self) -> None:
        """An empty directory with certificates and kubeconfig, and what is to be started."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700, parents=True)
        (self.directory / "logs").mkdir()
        (self.directory / "processes").write_text(f"{os.getpid()} {_started(os.getpid())}\n")
        self.authority = Authority(self.directory / "pki")
        self.ca = self.authority.certificate
        etcd, peer, api, controllers, scheduler = free_ports(5)
        self.etcd = f"http://127.0.0.1:{etcd}"
        self.server = f"https://{self.address}:{api}"
        self.client_certificate, self.client_key = self.authority.client(
            "admin", ["system:masters"]
        )
        self._write_kubeconfig(
            self.kubeconfig, self.client_certificate, self.client_key, self.server
        )
        self._components = {
            "etcd": self._etcd(peer),
            "kube-apiserver": self._api_server(api),
            "kube-controller-manager": self._controller_manager(controllers),
            "kube-scheduler": self._scheduler(scheduler),
        }

    def _start_api(self) -> None:
        for name in ("etcd", "kube-apiserver"):
            self.start_component(name)
        self._launch("kube-scheduler")

    def _etcd(self, peer: int) -> _Component:
        peers = f"http://127.0.0.1:{peer}"
        command = [
            *("--unsafe-no-fsync", "--log-level=warn", f"--data-dir={self.directory}/etcd"),
            *(f"--listen-client-urls={self.etcd}", f"--advertise-client-urls={self.etcd}"),
            *(
                f"--listen-peer-urls={peers}",
                f"--initial-advertise-peer-urls={peers}",
                f"--initial-cluster=default={peers}",
            ),
        ]
        return _Component(self._command("etcd", command), lambda: _answers(f"{self.etcd}/health"))

    def _api_server(self, port: int) -> _Component:
        names = [f"IP:{self.address}", "IP:10.0.0.1", "DNS:localhost", "DNS:kubernetes.default.svc"]
        certificate, key = self.authority.server("kube-apiserver", *names)
        self._service_account_key = self.authority.service_account_key()
        command = [
            *(
                f"--bind-address={self.address}",
                f"--secure-port={port}",
                f"--etcd-servers={self.etcd}",
            ),
            *(
                f"--tls-cert-file={certificate}",
                f"--tls-private-key-file={key}",
                f"--client-ca-file={self.ca}",
            ),
            f"--service-account-key-file={self._service_account_key}",
            f"--service-account-signing-key-file={self._service_account_key}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            # The stand-in kubelet's nodes have no name that is found by DNS.
            "--kubelet-preferred-address-types=InternalIP",
            *(
                "--authorization-mode=RBAC",
                "--allow-privileged=true",
                "--service-cluster-ip-range=10.0.0.0/16",
            ),
            *self.api_options,
        ]
        return _Component(
            self._command("kube-apiserver", command), lambda: _answers(f"{self.server}/readyz")
        )

    def _controller_manager(self, port: int) -> _Component:
        args = [
            *(
                "--use-service-account-credentials",
                f"--service-account-private-key-file={self._service_account_key}",
            ),
            *(f"--root-ca-file={self.ca}", *self.controller_options),
        ]
        return self._kubernetes_controller("kube-controller-manager", port, args)

    def _scheduler(self, port: int) -> _Component:
        return self._kubernetes_controller("kube-scheduler", port, [])

    def _kubernetes_controller(self, name: str, port: int, args: Sequence[str]) -> _Component:
        common = [
            *(f"--kubeconfig={self.kubeconfig_for(f'system:{name}')}", "--leader-elect=false"),
            *(
                "--bind-address=127.0.0.1",
                f"--secure-port={port}",
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
            ),
        ]
        return _Component(
            self._command(name, [*common, *args]),
            lambda: _answers(f"https://127.0.0.1:{port}/healthz"),
        )

    def _training_operator(self, webhook: int, metrics: int, probe: int) -> _Component:
        names = ["IP:127.0.0.1", "DNS:training-operator.kubeflow.svc"]
        self._webhook_certificate = self.authority.server("training-operator", *names)
        training_operator.serve_from(self.directory, *self._webhook_certificate)
        command = [
            *(
                f"--kubeconfig={self.kubeconfig_for(training_operator.USER)}",
                "--enable-scheme=pytorchjob",
            ),
            *(f"--webhook-server-port={webhook}", f"--metrics-bind-address=127.0.0.1:{metrics}"),
            f"--health-probe-bind-address=127.0.0.1:{probe}",
            f"--pytorch-init-container-template-file={training_operator.INIT_CONTAINER}",
            *(
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
                "--controller-threads=10",
                "--zap-log-level=info",
            ),
        ]
        return _Component(
            self._command("training-operator.v1", command),
            lambda: _answers(f"http://127.0.0.1:{probe}/readyz") and self._webhook_refuses(),
            {"TMPDIR": str(self.directory)},
        )

    def _training_operator_objects(self, webhook: int) -> str:
        authority = (self.authority.certificate, self.authority.key)
        return training_operator.objects(
            self._programs.manifests, *self._webhook_certificate, *authority, webhook
        )

    def _webhook_refuses(self) -> bool:
        try:
            self.kubectl("create", "--dry-run=server", "-f", "-", input=training_operator.NOT_A_JOB)
        except KubectlError as error:
            return "denied the request" in str(error)
        return False

    def _command(self, program: str, args: list[str]) -> list[str]:
        return ["setpriv", "--pdeathsig", "KILL", "--", str(self._programs.paths[program]), *args]

    def _launch(self, name: str) -> None:
        component = self._components[name]
        with self._log(name).open("ab") as log:
            launched = self._launcher.submit(
                subprocess.Popen,
                component.command,
                env={"PATH": os.environ["PATH"], **_GO, **component.environment},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            component.process = process = launched.result()
        with (self.directory / "processes").open("a") as processes:
            processes.write(f"{process.pid} {_started(process.pid)}\n")

    def _await(self, name: str) -> None:
        component = self._components[name]
        deadline = time.monotonic() + _READY_SECONDS
        while not component.ready():
            ended = component.process is None or component.process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else f"is not ready after {_READY_SECONDS} s"
                raise NotReady(f"{name} {what}: {self.logs(name)[-3000:]}")
            time.sleep(0.05)

    def _kill_all(self) -> None:
        for name in reversed(self.pids()):
            self.stop_component(name)

    def _log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    def _write_kubeconfig(self, path: Path, certificate: Path, key: Path, server: str) -> None:
        cluster = {
            "server": server,
            **({"certificate-authority": str(self.ca)} if server.startswith("https") else {}),
        }
        user = {"client-certificate": str(certificate), "client-key": str(key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "tests", "user": user}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "current-context": "tests",
        }
        path.write_text(json.dumps(config, indent=1))


def new_directory() -> Path:
    """A fresh directory for a control plane, after removing what test runs that crashed have left
    of theirs.
    """
    parent = Path(tempfile.gettempdir())
    for directory in parent.glob(f"{_PREFIX}*"):
        _clean_up(directory)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


def _clean_up(directory: Path) -> None:
    try:
        lines = [line.split() for line in (directory / "processes").read_text().splitlines()]
        ours = directory.stat().st_uid == os.getuid()
    except OSError:
        return
    alive = [int(pid) for pid, started in lines if _started(int(pid)) == started]
    if not ours or not lines or int(lines[0][0]) in alive:
        return
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)


def _started(pid: int) -> str | None:
    """A process's start time in clock ticks since boot; with its id it names one process for
    ever.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def free_ports(count: int) -> list[int]:
    """Ports without a listener, below those the kernel gives to outgoing connections."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32768), 500):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports between 20000 and 32768")


_unverified = ssl.create_default_context()
_unverified.check_hostname = False
_unverified.verify_mode = ssl.CERT_NONE
_opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_unverified)
)


def _answers(url: str) -> bool:
    try:
        with _opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False
