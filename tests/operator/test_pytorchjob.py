"""The PyTorchJob that the operator creates, releases and reads. The rules are checked here as we
read them; tests/cluster asks the real webhook.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from jobrequests import CPU_POOL, IMAGE, generated, of_examples, request

from modelchain.errors import InputError
from modelchain.plan.pools import NodePool
from modelchain_operator.runners import verify
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.pytorchjob import PyTorchJob

RUNNER = PyTorchJob()
REQUESTS = [*of_examples(), *(generated(seed) for seed in range(40))]
Object = dict[str, Any]


def templates(asked: JobRequest) -> list[Object]:
    replicas = RUNNER.build(asked)["spec"]["pytorchReplicaSpecs"]
    return [
        *(spec["template"] for spec in replicas.values()),
        verify.build(asked)["spec"]["template"],
    ]


def master(asked: JobRequest) -> Object:
    template: Object = RUNNER.build(asked)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    return template


def env(template: Object) -> dict[str, str]:
    return {v["name"]: v["value"] for v in template["spec"]["containers"][0]["env"] if "value" in v}


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda r: f"{r.chain}-{r.stage}")
def test_every_pod_meets_the_restricted_standard(asked: JobRequest) -> None:
    for template in templates(asked):
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security.get("runAsUser") != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all(
            {"persistentVolumeClaim", "emptyDir"} & volume.keys() for volume in spec["volumes"]
        )
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        for container in spec["containers"]:
            inner = container["securityContext"]
            assert (
                inner["allowPrivilegeEscalation"] is False
                and inner["readOnlyRootFilesystem"] is True
            )
            assert inner["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda r: f"{r.chain}-{r.stage}")
def test_every_pod_is_consistent(asked: JobRequest) -> None:
    for template in templates(asked):
        [container] = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert (
            len(mounts) == len(container["volumeMounts"])
            and {m["name"] for m in mounts.values()} == volumes.keys()
        )
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        ]
        assert len(claims) == len(set(claims)), "a claim in two volumes of a pod hangs the kubelet"
        assert {"/tmp", "/home/modelchain"} <= mounts.keys()
        resources = container["resources"]
        assert resources.get("requests", {}).keys() == resources.get("limits", {}).keys()
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        assert env(template)["MODELCHAIN_TASK"].replace("$$", "$") == asked.task
        assert (container["terminationMessagePath"], container["terminationMessagePolicy"]) == (
            "/dev/termination-log",
            "File",
        )
        assert (
            template["metadata"]["labels"]["modelchain.dev/input-digest"] == asked.input_digest[:63]
        )
        assert (
            template["metadata"]["annotations"]["modelchain.dev/input-digest"] == asked.input_digest
        )
        assert all(len(value) <= 63 for value in template["metadata"]["labels"].values())


def test_rank_0_is_the_master_and_further_nodes_are_workers() -> None:
    alone = RUNNER.build(request())["spec"]
    assert alone["pytorchReplicaSpecs"].keys() == {"Master"}
    assert alone["nprocPerNode"] == "8"
    assert alone["runPolicy"] == {"cleanPodPolicy": "Running", "suspend": True}
    four = RUNNER.build(request(nodes=4))["spec"]["pytorchReplicaSpecs"]
    assert {kind: (spec["replicas"], spec["restartPolicy"]) for kind, spec in four.items()} == {
        "Master": (1, "Never"),
        "Worker": (3, "Never"),
    }
    ports = {
        kind: spec["template"]["spec"]["containers"][0].get("ports") for kind, spec in four.items()
    }
    assert ports["Worker"] is None
    assert {p["name"]: p["containerPort"] for p in ports["Master"]} == {
        "metrics": 9090,
        "progress": 9091,
    }


def test_a_new_job_is_owned_without_blocking_and_in_a_queue_that_does_not_exist() -> None:
    meta = RUNNER.build(request())["metadata"]
    [owner] = meta["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["controller"], owner["blockOwnerDeletion"]) == (
        "ModelChain",
        "vit",
        True,
        False,
    )
    assert meta["labels"] == {
        "modelchain.dev/chain": "vit",
        "modelchain.dev/chain-uid": "11111111-2222-3333-4444-555555555555",
        "modelchain.dev/claim-uid": "99999999-8888-7777-6666-555555555555",
        "modelchain.dev/stage": "b",
        "modelchain.dev/attempt": "1",
        "modelchain.dev/input-digest": ("ab" * 32)[:63],
        "kueue.x-k8s.io/queue-name": "modelchain-held",
        "modelchain.dev/role": "train",
    }


def test_mounts() -> None:
    mounts = {m["mountPath"]: m for m in master(request())["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["/artifacts"] == {"name": "artifacts", "mountPath": "/artifacts"}
    assert mounts["/predecessors"] == {
        "name": "artifacts",
        "mountPath": "/predecessors",
        "readOnly": True,
    }
    assert mounts["/data"]["readOnly"] and mounts["/dev/shm"]["name"] == "shm"
    volumes = {v["name"]: v for v in master(request())["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "cc3m", "readOnly": True}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


@pytest.mark.parametrize("path", ["/", "/tmp", "/artifacts/data", "/home", "/dev/"])
def test_data_mounted_over_the_operators_paths_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="mount the data at /data"):
        RUNNER.build(request(mount_path=path))


def test_a_task_too_large_is_refused() -> None:
    request(task="x" * 65_536)
    with pytest.raises(InputError, match="more than 65536"):
        request(task="é" * 40_000)


def test_the_settings_of_a_pool_reach_the_pod() -> None:
    pool = NodePool.model_validate(
        {
            "gpu": "A100",
            "gpusPerNode": 8,
            "cpu": 96,
            "memory": "900Gi",
            "ephemeralStorage": "1Ti",
            "extraResources": {"rdma/hca": 1},
            "env": {"NCCL_DEBUG": "WARN", "HOME": "/tmp"},
            "nodeSelector": {"a": "b"},
            "labels": {"team": "vision"},
            "annotations": {"note": "mine"},
            "imagePullSecrets": ["registry"],
            "serviceAccountName": "trainer",
            "priorityClassName": "high",
            "schedulerName": "mine",
            "runtimeClassName": "nvidia",
            "graceSeconds": 300,
            "fsGroup": 7,
            "runAsUser": 8,
            "topology": {"required": "rack"},
        }
    )
    template = master(request(pool=pool, processes_per_node=4))
    spec, container = template["spec"], template["spec"]["containers"][0]
    assert (
        container["resources"]["limits"]
        == container["resources"]["requests"]
        == {
            "cpu": "96",
            "memory": "900Gi",
            "ephemeral-storage": "1Ti",
            "rdma/hca": "1",
            "nvidia.com/gpu": "4",
        }
    )
    assert {
        "NCCL_DEBUG": "WARN",
        "HOME": "/tmp",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "285",
    }.items() <= env(template).items()
    assert template["metadata"]["labels"]["team"] == "vision"
    annotations = template["metadata"]["annotations"]
    assert (
        annotations["note"] == "mine"
        and annotations["kueue.x-k8s.io/podset-required-topology"] == "rack"
    )
    expected = {
        "nodeSelector": {"a": "b"},
        "serviceAccountName": "trainer",
        "priorityClassName": "high",
        "schedulerName": "mine",
        "runtimeClassName": "nvidia",
        "terminationGracePeriodSeconds": 300,
        "imagePullSecrets": [{"name": "registry"}],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }
    assert expected.items() <= spec.items()
    assert spec["securityContext"] | {"fsGroup": 7, "runAsUser": 8} == spec["securityContext"]


def test_autoscalers_may_not_evict_by_default() -> None:
    annotations = master(request())["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_a_cpu_pool_requests_no_resources() -> None:
    spec = master(request(pool=CPU_POOL, processes_per_node=1))["spec"]
    assert spec["containers"][0]["resources"] == {} and "tolerations" not in spec


def test_torchrun_reads_its_rank_from_training_operators_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.distributed.run import parse_args

    set_by_training_operator = {
        "PET_NNODES": "4",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "j-master-0",
        "PET_MASTER_PORT": "23456",
    }
    for name, value in set_by_training_operator.items():
        monkeypatch.setenv(name, value)
    command = master(request(nodes=4))["spec"]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    read = parse_args(command[3:])
    assert (
        read.nnodes,
        read.nproc_per_node,
        read.node_rank,
        read.master_addr,
        read.master_port,
    ) == (
        "4",
        "8",
        3,
        "j-master-0",
        23456,
    )
    assert (read.max_restarts, read.module, read.training_script) == (0, True, "modelchain_trainer")


def test_torchrun_on_one_node_does_not_resolve_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that does not resolve would delay it for ten minutes. With several nodes the peers
    find rank 0 by its name, so then the name is used.
    """
    from torch.distributed.run import parse_args

    for name, value in {
        "PET_NNODES": "1",
        "PET_MASTER_ADDR": "j-master-0",
        "PET_MASTER_PORT": "23456",
    }.items():
        monkeypatch.setenv(name, value)
    for nodes, address in ((1, "127.0.0.1"), (2, None)):
        for template in templates(request(nodes=nodes))[:-1]:
            read = parse_args(template["spec"]["containers"][0]["command"][3:])
            assert (read.local_addr, read.master_addr) == (address, address or "j-master-0")
            assert (read.module, read.training_script) == (True, "modelchain_trainer")


@pytest.mark.parametrize("asked", REQUESTS[:12], ids=lambda r: f"{r.chain}-{r.stage}")
def test_every_pod_gets_its_nodes_name_and_no_pool_can_override_it(asked: JobRequest) -> None:
    pool = asked.pool.model_copy(update={"env": {**asked.pool.env, "MODELCHAIN_NODE": "elsewhere"}})
    for template in templates(replace(asked, pool=pool)):
        [node] = [
            v for v in template["spec"]["containers"][0]["env"] if v["name"] == "MODELCHAIN_NODE"
        ]
        assert node == {
            "name": "MODELCHAIN_NODE",
            "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
        }


NOW = "2026-09-01T00:00:00Z"


def made(asked: JobRequest, *conditions: tuple[str, str]) -> Object:
    """The job as the API server would return it."""
    job: Object = json.loads(json.dumps(RUNNER.build(asked)))
    job["metadata"] |= {"uid": "u-1", "resourceVersion": "7"}
    job["status"] = {
        "conditions": [{"type": t, "status": s, "message": f"{t} said"} for t, s in conditions]
    }
    return job


def merged(job: Object, patch: Object) -> Object:
    out = dict(job)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def test_a_release_without_a_queue_removes_the_label_and_then_lifts_the_suspension() -> None:
    """It takes two patches, because Kueue does not allow the label's removal from a job that the
    same patch starts.
    """
    job = made(request())
    first = RUNNER.release(job, None, NOW)
    assert first == {
        "metadata": {
            "uid": "u-1",
            "resourceVersion": "7",
            "labels": {"kueue.x-k8s.io/queue-name": None},
        }
    }
    between = merged(job, first)
    assert not RUNNER.state(between).released and RUNNER.state(between).suspended
    second = RUNNER.release(between, None, NOW)
    assert second == {
        "metadata": {
            "uid": "u-1",
            "resourceVersion": "7",
            "annotations": {"modelchain.dev/released": NOW},
        },
        "spec": {"runPolicy": {"suspend": False}},
    }
    after = RUNNER.state(merged(between, second))
    assert after.released and not after.suspended and after.queue is None


@pytest.mark.parametrize("foreign", [None, "default"])
def test_a_release_into_a_queue_leaves_the_suspension_to_kueue(foreign: str | None) -> None:
    job = made(request(priority_class="high"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    if foreign:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = foreign
    assert not RUNNER.state(job).released, "another client's label does not release a job"
    patch = RUNNER.release(job, "vision", NOW)
    assert patch == {
        "metadata": {
            "uid": "u-1",
            "resourceVersion": "7",
            "annotations": {"modelchain.dev/released": NOW},
            "labels": {"kueue.x-k8s.io/queue-name": "vision"},
        }
    }
    queued = RUNNER.state(merged(job, patch))
    assert queued.released and queued.suspended and queued.queue == "vision"


def test_a_job_that_another_client_started_is_only_marked_as_released() -> None:
    job = made(request())
    job["spec"]["runPolicy"]["suspend"] = False
    assert not RUNNER.state(job).released
    for queue in (None, "vision"):
        patch = RUNNER.release(job, queue, NOW)
        assert (
            patch["metadata"].keys() == {"uid", "resourceVersion", "annotations"}
            and "spec" not in patch
        )


def test_a_job_avoids_nodes_that_failed() -> None:
    job = RUNNER.build(request(nodes=3, avoid=("node-1", "node-2")))
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        rules = replica["template"]["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        [term] = rules["nodeSelectorTerms"]
        assert [(f["key"], f["operator"], f["values"]) for f in term["matchFields"]] == [
            ("metadata.name", "NotIn", ["node-1"]),
            ("metadata.name", "NotIn", ["node-2"]),
        ]


@pytest.mark.parametrize(
    ("conditions", "finished", "message"),
    [
        ([], None, ""),
        ([("Created", "True"), ("Suspended", "True")], None, ""),
        ([("Created", "True"), ("Suspended", "False"), ("Running", "True")], None, ""),
        # A queue has evicted it.
        ([("Created", "True"), ("Running", "False"), ("Suspended", "True")], None, ""),
        ([("Created", "True"), ("Running", "False"), ("Succeeded", "True")], "Succeeded", ""),
        ([("Created", "True"), ("Running", "False"), ("Failed", "True")], "Failed", "Failed said"),
    ],
)
def test_the_state_by_conditions(
    conditions: list[tuple[str, str]], finished: str | None, message: str
) -> None:
    state = RUNNER.state(made(request(), *conditions))
    assert (state.finished, state.message) == (finished, message)


def test_the_state_without_a_status_and_during_deletion() -> None:
    job = made(request())
    del job["status"]
    assert RUNNER.state(job).finished is None
    job["metadata"]["deletionTimestamp"] = "2026-09-01T00:00:00Z"
    assert RUNNER.state(job).deleting


def test_node_ranks() -> None:
    def pod(**labels: str) -> Object:
        return {
            "metadata": {
                "labels": {
                    f"training.kubeflow.org/{k.replace('_', '-')}": v for k, v in labels.items()
                }
            }
        }

    assert RUNNER.node_rank(pod(replica_type="master", replica_index="0")) == 0
    assert RUNNER.node_rank(pod(replica_type="worker", replica_index="2")) == 3
    assert RUNNER.node_rank({"metadata": {}}) is None


def test_every_pod_has_the_requested_image() -> None:
    assert {t["spec"]["containers"][0]["image"] for t in templates(request(nodes=2))} == {IMAGE}
