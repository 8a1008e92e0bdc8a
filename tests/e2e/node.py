"""A control plane and one real node, in Linux namespaces of their own. Started by `lab.py`, not by
hand.

Network, mounts and process ids are private: what containerd, kubelet and kube-proxy do to routes,
iptables, /run and /var stays inside, and the kernel removes all of it when this process ends,
however it ends. `node.py DIRECTORY` takes commands on standard input, a line each, and
answers "ok" or "error: …".
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from build import program
from controlplane import ControlPlane, KubectlError, _answers, _Component

HOST, ADDRESS, PREFIX = (
    "198.18.77.1",
    "198.18.77.2",
    30,
)  # from the block that RFC 2544 keeps for benchmarks
PODS = "10.244.0.0/24"
DNS_PORT, PROMETHEUS = 53, 9095
RULES = Path(__file__).parents[2] / "charts" / "modelchain" / "files" / "rules.yaml"
NAME = "node-a"
CGROUP = "modelchain-e2e"
KERNEL = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
PAUSE = "registry.local/pause:1"
STORAGE_CLASSES = ("rwx", "small")  # directories; a tmpfs as large as the claim asks


class Node(ControlPlane):
    """etcd to kubelet on one address. Images stay in containerd's store from one run to the
    next.
    """

    address = ADDRESS
    api_options = ()
    controller_options = ()

    def _start(self) -> None:
        self._prepare()
        client = self.authority.client("kubelet-client", ["system:masters"])
        self._components["kube-apiserver"].command += [
            *(f"--kubelet-client-certificate={client[0]}", f"--kubelet-client-key={client[1]}"),
            "--kubelet-preferred-address-types=InternalIP",
        ]
        self._components |= {
            "containerd": self._containerd(),
            "kubelet": self._kubelet(),
            "kube-proxy": self._kube_proxy(),
            "coredns": self._coredns(),
            "prometheus": self._prometheus(),  # started by the test that asks it
        }
        self._start_api()
        self._launch("kube-controller-manager")
        self.start_component("containerd")
        self.kubectl(
            "apply",
            "-f",
            "-",
            input=json.dumps({"apiVersion": "v1", "kind": "List", "items": _classes()}),
        )
        for name in ("coredns", "kubelet"):
            self.start_component(name)
        self.kubectl("wait", "--for=create", f"node/{NAME}", "--timeout=60s")
        self.start_component("kube-proxy")  # which without a node would wait half a minute for one
        self.kubectl("wait", "--for=condition=Ready", f"node/{NAME}", "--timeout=60s")
        threading.Thread(target=self._provision, daemon=True).start()

    def ctr(self, *words: str) -> str:
        """containerd's own client, in the namespace of Kubernetes."""
        command = [
            "ctr",
            "--address",
            str(self.directory / "containerd.sock"),
            "--namespace",
            "k8s.io",
            *words,
        ]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout

    def _containerd(self) -> _Component:
        networks = self.directory / "cni"
        networks.mkdir()
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": PODS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(self.directory / "addresses"),
            },
        }
        plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
        (networks / "bridge.conflist").write_text(
            json.dumps({"cniVersion": "0.4.0", "name": "bridge", "plugins": plugins})
        )
        config = self.directory / "containerd.toml"
        config.write_text(f"""
version = 2
root = "{self.directory.parent}/containerd"
state = "/run/containerd"
oom_score = 0
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.directory}/opt"
[grpc]
  address = "{self.directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{networks}"
""")
        return _Component(["containerd", "--config", str(config)], self._containerd_answers)

    def _containerd_answers(self) -> bool:
        try:
            return bool(self.ctr("version"))
        except subprocess.CalledProcessError:
            return False

    def _kubelet(self) -> _Component:
        certificate, key = self.authority.server(NAME, f"DNS:{NAME}", f"IP:{ADDRESS}")
        config = self.directory / "kubelet.json"
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "x509": {"clientCAFile": str(self.ca)},
                "anonymous": {"enabled": False},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "maxOpenFiles": 20000,
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "containerRuntimeEndpoint": f"unix://{self.directory}/containerd.sock",
            "clusterDNS": [ADDRESS],
            "clusterDomain": "cluster.local",
            "resolvConf": "/dev/null",
            "volumePluginDir": str(self.directory / "volume-plugins"),
            "podLogsDir": str(self.directory / "pods"),
        }
        config.write_text(json.dumps(settings))
        kubeconfig = self.kubeconfig_for(f"system:node:{NAME}", ["system:nodes", "system:masters"])
        command = [
            *(str(program("kubelet")), f"--config={config}", f"--kubeconfig={kubeconfig}"),
            *(
                f"--root-dir={self.directory}/kubelet",
                f"--hostname-override={NAME}",
                f"--node-ip={ADDRESS}",
            ),
        ]
        return _Component(command, lambda: _answers("http://127.0.0.1:10248/healthz"))

    def _kube_proxy(self) -> _Component:
        kubeconfig = self.kubeconfig_for("system:kube-proxy")
        command = [
            *(str(program("kube-proxy")), "--proxy-mode=iptables", f"--kubeconfig={kubeconfig}"),
            *(
                f"--hostname-override={NAME}",
                f"--cluster-cidr={PODS}",
                "--conntrack-max-per-core=0",
            ),
            *("--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"),
        ]
        return _Component(command, lambda: _answers("http://127.0.0.1:10256/livez"))

    def _coredns(self) -> _Component:
        config = self.directory / "Corefile"
        config.write_text(f"""
.:{DNS_PORT} {{
  bind {ADDRESS}
  ready 127.0.0.1:8181
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {self.kubeconfig}
    pods insecure
    ttl 1
  }}
  loop
}}
""")
        return _Component(
            [str(program("coredns")), "-conf", str(config)],
            lambda: _answers("http://127.0.0.1:8181/ready"),
        )

    def _prometheus(self) -> _Component:
        """Debian's knows no Kubernetes, so `_discover` tells it of pods, as a PodMonitor would."""
        config, data = self.directory / "prometheus.json", self.directory / "prometheus"
        found = [{"files": [str(self.directory / "targets-*.json")]}]
        often = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"}
        jobs = [{"job_name": "pods", "honor_labels": True, "file_sd_configs": found}]
        told = {"global": often, "scrape_configs": jobs, "rule_files": [str(RULES)]}
        config.write_text(json.dumps(told))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}"]
        return _Component(
            [*command, f"--web.listen-address={ADDRESS}:{PROMETHEUS}"],
            lambda: _answers(f"http://{ADDRESS}:{PROMETHEUS}/-/ready"),
        )

    def _discover(self) -> None:
        """Running pods of ours with a port named metrics."""
        pods: list[dict[str, Any]] = json.loads(self.kubectl("get", "pods", "-A", "-o", "json"))[
            "items"
        ]
        targets = []
        for pod in pods:
            labels = pod["metadata"].get("labels", {})
            operator = labels.get("app.kubernetes.io/name") == "modelchain"
            ours = operator or labels.get("modelchain.dev/role") in ("train", "baseline")
            ports = {p.get("name") for c in pod["spec"]["containers"] for p in c.get("ports", ())}
            runs = (
                pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
            )
            if ours and runs and "metrics" in ports:
                who = {"who": "operator" if operator else "trainer", "pod": pod["metadata"]["name"]}
                of = {} if operator else self._of_trainer(pod["metadata"])
                targets.append({"targets": [f"{pod['status']['podIP']}:9090"], "labels": who | of})
        new = self.directory / "new-targets"
        new.write_text(json.dumps(targets))
        new.rename(self.directory / "targets-pods.json")

    @staticmethod
    def _of_trainer(meta: dict[str, Any]) -> dict[str, str]:
        """The labels that the chart's PodMonitor gives to a trainer's series."""
        copied = ("chain", "stage", "role")
        named = {name: meta["labels"][f"modelchain.dev/{name}"] for name in copied}
        return named | {"namespace": meta["namespace"]}

    def _provision(self) -> None:
        """A volume for every claim of our classes, a directory that any user may write; and
        Prometheus's targets.
        """
        while True:
            time.sleep(0.5)
            try:
                claims: list[dict[str, Any]] = json.loads(
                    self.kubectl("get", "pvc", "-A", "-o", "json")
                )["items"]
                for claim in claims:
                    if (
                        claim["spec"].get("storageClassName") in STORAGE_CLASSES
                        and "volumeName" not in claim["spec"]
                    ):
                        self.kubectl("apply", "-f", "-", input=json.dumps(self._volume(claim)))
                if "prometheus" in self.pids():
                    self._discover()
            except (KubectlError, OSError, subprocess.CalledProcessError):
                traceback.print_exc()

    def _volume(self, claim: dict[str, Any]) -> dict[str, Any]:
        spec, meta = claim["spec"], claim["metadata"]
        size = spec["resources"]["requests"]["storage"]
        path = self.directory / "volumes" / f"{meta['namespace']}-{meta['name']}-{meta['uid'][:8]}"
        if not path.exists():
            path.mkdir(parents=True)
            if spec["storageClassName"] == "small":
                _run(
                    "mount",
                    "-t",
                    "tmpfs",
                    "-o",
                    f"size={size.removesuffix('i')},mode=0777",
                    "tmpfs",
                    str(path),
                )
            path.chmod(0o777)
        reference = {k: meta[k] for k in ("name", "namespace", "uid")} | {
            "kind": "PersistentVolumeClaim"
        }
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"pv-{meta['uid']}"},
            "spec": {
                "capacity": {"storage": size},
                "accessModes": spec["accessModes"],
                "claimRef": reference,
                "storageClassName": spec["storageClassName"],
                "hostPath": {"path": str(path)},
                "persistentVolumeReclaimPolicy": "Retain",
            },
        }


def _classes() -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "provisioner": "modelchain.dev/e2e",
            "metadata": {
                "name": name,
                "annotations": {
                    "storageclass.kubernetes.io/is-default-class": str(name == "rwx").lower()
                },
            },
        }
        for name in STORAGE_CLASSES
    ]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def isolate(directory: Path) -> None:
    """Inside the new namespaces: /run and /var are ours, mounts below `directory` are seen by
    containers.
    """
    for folder in ("/run", "/opt", "/etc/cni"):
        if Path(folder).is_dir():
            _run("mount", "-t", "tmpfs", "tmpfs", folder)
    for (
        name,
        value,
    ) in (
        KERNEL.items()
    ):  # the kubelet sets them for the whole machine, unless they read as it wants
        wanted = directory / name.replace("/", "-")
        wanted.write_text(f"{value}\n")
        _run("mount", "--bind", str(wanted), f"/proc/sys/{name}")
    upper, work = directory / "var", directory / "var-work"
    for folder in (upper, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _run(
        "mount",
        "-t",
        "overlay",
        "-o",
        f"lowerdir=/var,upperdir={upper},workdir={work}",
        "overlay",
        "/var",
    )
    _run("mount", "--bind", str(directory), str(directory))
    _run("mount", "--make-rshared", str(directory))
    for hierarchy in cgroups():
        (hierarchy / CGROUP).mkdir(exist_ok=True)
        if (hierarchy / "cpuset.cpus").exists():
            for name in ("cpuset.cpus", "cpuset.mems"):
                (hierarchy / CGROUP / name).write_text((hierarchy / name).read_text())
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", f"{ADDRESS}/{PREFIX}", "dev", "eth0")
    _run("ip", "link", "set", "eth0", "up")
    _run("ip", "route", "add", "default", "via", HOST)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def cgroups() -> Sequence[Path]:
    """The directories in which a process group of ours gets a directory of its own."""
    root = Path("/sys/fs/cgroup")
    return (
        [root]
        if (root / "cgroup.controllers").exists()
        else [p for p in root.iterdir() if (p / "cgroup.procs").exists()]
    )


def main() -> None:
    directory = Path(sys.argv[1])
    assert sys.stdin.readline() == "network is there\n"
    isolate(directory)
    node = Node(directory / "cluster")
    node.start()
    print("ok", flush=True)
    for line in sys.stdin:
        try:
            match line.split():
                case ["stop", name]:
                    node.stop_component(name)
                case ["start", name]:
                    node.start_component(name)
                case ["ctr", *rest]:
                    print(json.dumps(node.ctr(*rest)), flush=True)
                    continue
                case words:
                    raise ValueError(f"no such command: {words}")
            print("ok", flush=True)
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
