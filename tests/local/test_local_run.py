"""The local runner end to end: real processes, real data, real kills."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import open_clip
import pytest
import sweeps
import torch
from harness import Chain, InPieces, TwoRanks, wait_until

WEIGHTS = "open_clip_model.safetensors"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_of(finished: Chain, tmp_path: Path) -> Chain:
    """The finished root in another place: paths inside a root are relative."""
    chain = Chain(tmp_path, finished.data)
    shutil.copytree(finished.root, chain.root)
    return chain


def attempts(chain: Chain) -> int:
    return len(list(chain.root.glob("*/local-a*/task.json")))


def test_a_chain_is_trained_and_its_artifacts_open_in_open_clip(finished: Chain) -> None:
    status = finished.status()
    assert [s["state"] for s in status["stages"]] == ["Succeeded", "Succeeded"]
    assert [s["cache"] for s in status["stages"]] == ["Miss", "Miss"]
    first, second = finished.artifact(0), finished.artifact(1)
    assert status["stages"][0]["artifact"]["digest"] == sha(first / WEIGHTS)
    results = json.loads((second / "results.json").read_text())
    assert {
        "stage",
        "model",
        "steps",
        "samplesSeen",
        "macs",
        "seconds",
        "initial",
        "final",
        "growth",
    } <= set(results)
    assert results["predecessor"] == "one" and results["steps"] == finished.samples // 32
    assert set(results["initial"]) == {"loss", "metrics"}
    assert results["growth"]["inserted"] > 0 and results["growth"]["duplicated"] > 0
    assert status["total"]["macs"] == sum(
        json.loads((p / "results.json").read_text())["macs"] for p in (first, second)
    )
    model = open_clip.create_model(f"local-dir:{second}").eval()
    with torch.no_grad():
        assert model.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 48)
        assert model.encode_text(
            open_clip.SimpleTokenizer(context_length=16)(["a three"])
        ).shape == (1, 48)
    assert not list(finished.root.glob("*/*/step-*")), "checkpoints go when the artifact verifies"
    assert list(finished.root.glob("*/local-a1/metrics.jsonl")), "metrics stay"
    assert not [p for p in finished.data.iterdir() if p.name.startswith(".")], (
        "nothing is written beside the data"
    )


def test_nothing_that_leaves_the_weights_alone_trains_again(
    finished: Chain, tmp_path: Path
) -> None:
    chain = copy_of(finished, tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(chain.data, moved)
    chain.data = moved
    chain.spec["metadata"]["labels"] = {"team": "vision"}
    chain.spec["spec"]["runner"] = {
        "queueName": "other",
        "image": "example.com/other:v2",
        "nodePool": "h100",
    }
    chain.spec["spec"]["data"]["volume"] = {"mountPath": "/elsewhere"}
    chain.spec["spec"]["data"]["train"]["shards"] = "/elsewhere/train-000000.tar"
    evaluation = chain.spec["spec"]["evaluation"][0]
    for key in ("shards", "classNames", "templates"):
        evaluation[key] = evaluation[key].replace("/data", "/elsewhere")
    done = chain.run()
    assert done.returncode == 0, done.stderr
    assert [s["cache"] for s in chain.status()["stages"]] == ["Hit", "Hit"]
    assert attempts(chain) == 2


def test_an_edit_of_the_distillation_trains_the_successor_alone(
    finished: Chain, tmp_path: Path
) -> None:
    chain = copy_of(finished, tmp_path)
    before = sha(chain.artifact(1) / WEIGHTS)
    chain.spec["spec"]["transfer"] = {"distillation": {"alpha": "100"}}
    done = chain.run()
    assert done.returncode == 0, done.stderr
    one, two = chain.status()["stages"]
    assert (one["cache"], two["cache"]) == ("Hit", "Miss")
    assert "transfer.distillation.alpha" in two["reason"]
    assert sha(chain.artifact(1) / WEIGHTS) != before
    chain.spec["spec"].pop("transfer")
    done = chain.run()
    assert done.returncode == 0 and attempts(chain) == 3, (
        "edited back: the old artifact is found, nothing trains"
    )


def test_a_flipped_byte_is_refused(finished: Chain, tmp_path: Path) -> None:
    chain = copy_of(finished, tmp_path)
    weights = chain.artifact(0) / WEIGHTS
    right = sha(weights)
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    chain.spec["spec"]["stages"][1]["rerun"] = "once more"
    done = chain.run()
    assert done.returncode == 1
    assert str(weights) in done.stderr and right in done.stderr and sha(weights) in done.stderr
    assert "Traceback" not in done.stderr
    assert weights.read_bytes() == raw and attempts(chain) == 2


EPOCHS = {"one": 2, "two": 1}  # of the stages
MOMENTS = ["before a stage trains", "one", "two"]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("who", ["tree", "runner"])
def test_killed_at_any_moment_it_goes_on_and_ends_bitwise_equal(
    finished: Chain, chain: Chain, who: str
) -> None:
    """Once in `make test`; in `make test-all` once before and in each stage, in one life."""
    sweep = f"kills of the {who}"
    rng = sweeps.chance(f"steps of {sweep}")
    for moment in sorted(sweeps.sample(sweep, MOMENTS, 1), key=MOMENTS.index):
        runner = chain.start()
        if moment in EPOCHS:
            step = rng.randrange(EPOCHS[moment] * (chain.samples // 32))
            wait_until(lambda: chain.step(moment) > step or runner.poll() is not None)  # noqa: B023
        else:
            time.sleep(rng.uniform(0.5, 8))
        if who == "tree":
            chain.kill()
        else:
            runner.kill()
        runner.communicate()
    done = chain.run()
    assert done.returncode == 0, done.stderr
    assert not chain.processes()
    for stage in (0, 1):
        assert sha(chain.artifact(stage) / WEIGHTS) == sha(finished.artifact(stage) / WEIGHTS)
    steps: dict[str, set[str]] = {}
    for word in chain.root.glob("*/local-a*/termination.json"):
        if json.loads(word.read_text())["result"] == "Succeeded":
            steps.setdefault(word.parent.parent.name, set()).add(word.parent.name)
    assert all(len(owners) == 1 for owners in steps.values()), "nothing finished is trained again"


def test_a_second_run_names_the_first_and_a_lost_status_makes_no_name_twice(
    finished: Chain, tmp_path: Path
) -> None:
    """While stage two is trained again: a second run, a stop, and a status that is lost."""
    chain = copy_of(finished, tmp_path)
    shutil.rmtree(chain.artifact(1))
    first = chain.start()
    # The copy may have the note of the run before.
    lock = chain.root / ".lock"
    wait_until(lambda: lock.exists() and f'"pid": {first.pid}' in lock.read_text())
    second = chain.run()
    assert second.returncode == 1 and f"pid {first.pid}" in second.stderr
    wait_until(lambda: list(chain.root.glob("*/local-a2/metrics.jsonl")))
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert not chain.processes()
    other = Chain(chain.folder, chain.data)
    other.spec["metadata"]["name"] = "another"
    refused = other.run()
    assert refused.returncode == 2 and "'tiny'" in refused.stderr
    (chain.root / "status.json").unlink()
    done = chain.run()
    assert done.returncode == 0, done.stderr
    one, two = chain.status()["stages"]
    assert (one["cache"], two["cache"]) == ("Hit", "Miss")
    assert [a["name"] for a in two["attempts"]] == ["tiny-two-a3"]
    assert sha(chain.artifact(1) / WEIGHTS) == sha(finished.artifact(1) / WEIGHTS)


def losses(chain: Chain) -> list[float]:
    """Of stage one."""
    path = chain.artifact(0).parent / "local-a1" / "metrics.jsonl"
    return [
        r["loss"] for r in map(json.loads, path.read_text().splitlines()) if r["event"] == "step"
    ]


@pytest.mark.parametrize("how", ["two_ranks", "in_pieces"])
def test_ranks_and_micro_batches_change_nothing(
    finished: Chain, how: str, request: pytest.FixtureRequest
) -> None:
    mine, reference = losses(request.getfixturevalue(how).chain), losses(finished)
    assert len(mine) == len(reference)
    assert max(abs(a - b) for a, b in zip(mine[:20], reference[:20], strict=True)) <= 1e-5
    assert max(abs(a - b) / b for a, b in zip(mine[:100], reference[:100], strict=True)) <= 1e-3


def test_two_processes_train_where_the_hosts_name_does_not_resolve(
    two_ranks: TwoRanks,
) -> None:
    """torchrun and gloo would look each other up by it, for ten minutes."""
    if not two_ranks.renamed:
        pytest.skip("a host name of one's own needs root and `unshare`")
    root = two_ranks.chain.root
    log = "".join(path.read_text() for path in root.glob("*/local-a1/logs/**/combined.log"))
    assert "Unable to resolve" not in log and "cannot be retrieved" not in log


def test_under_nohup_it_goes_on(in_pieces: InPieces) -> None:
    assert in_pieces.hung_up_at_step > 0
    assert in_pieces.done.returncode == 0, in_pieces.done.stderr


def test_an_evaluation_added_later_runs_without_training(finished: Chain, tmp_path: Path) -> None:
    chain = copy_of(finished, tmp_path)
    before = (chain.artifact(0) / "results.json").read_bytes()
    added = {"name": "found", "kind": "Retrieval", "shards": "/data/val-000000.tar"}
    chain.spec["spec"]["evaluation"].append(added)
    done = chain.run()
    assert done.returncode == 0, done.stderr
    assert attempts(chain) == 2
    for stage in chain.status()["stages"]:
        assert stage["cache"] == "Hit" and {"top1", "found"} <= set(stage["results"])
    assert (chain.artifact(0) / "results.json").read_bytes() == before


def test_an_evaluation_that_changed_under_its_name_is_measured_anew(
    finished: Chain, tmp_path: Path
) -> None:
    """And what it measured before counts again when the edit is taken back."""
    chain = copy_of(finished, tmp_path)
    before = [stage["results"]["top1"] for stage in chain.status()["stages"]]
    top1 = dict(chain.spec["spec"]["evaluation"][0])
    other = {"name": "top1", "kind": "Retrieval", "shards": "/data/val-000000.tar"}
    chain.spec["spec"]["evaluation"][0] = other
    done = chain.run()
    assert done.returncode == 0, done.stderr
    stages = chain.status()["stages"]
    assert all("top1/image-to-text-r1" in stage["results"] for stage in stages)
    chain.spec["spec"]["evaluation"][0] = top1
    done = chain.run()
    assert done.returncode == 0 and "measuring" not in done.stderr
    stages = chain.status()["stages"]
    assert [stage["results"]["top1"] for stage in stages] == before
    assert attempts(chain) == 2 and not any("unmeasured" in s and s["unmeasured"] for s in stages)
