"""A gate on a laptop, with real training: a target that cannot be reached, and a model trained
alone.
"""

from __future__ import annotations

import json
import os
from typing import Any

from harness import Chain, wait_until

from modelchain.errors import EXIT_WORK_FAILED


def gate(chain: Chain, **fields: Any) -> None:
    chain.spec["spec"]["gate"] = {"metric": "top1", **fields}


def attempts(chain: Chain) -> list[str]:
    """Every attempt of which a task was written."""
    tasks = (json.loads(path.read_text()) for path in chain.root.glob("*/local-a*/task.json"))
    return sorted(task["attempt"] for task in tasks)


def end(chain: Chain) -> dict[str, Any]:
    """What of the status must not depend on what happened on the way."""
    status = chain.status()
    stages = [
        {name: stage[name] for name in ("name", "epochs", "round", "results", "gate", "artifact")}
        for stage in status["stages"]
    ]
    return {"stages": stages, "rounds": status["relaxation"]["rounds"]}


def relaxing(chain: Chain) -> Chain:
    """The second stage is allocated one epoch, and no model reaches 100 %."""
    chain.spec["spec"]["stages"][1].pop("epochs")
    chain.spec["spec"]["allocation"] = {"targetAcceleration": "1.3"}
    gate(chain, baseline={"two": "100"}, onMiss="Relax")
    return chain


def check_by_hand(chain: Chain, stage: dict[str, Any]) -> None:
    """The verdict follows from the artifact's own file and from the number of pictures."""
    results = json.loads((chain.root / stage["artifact"]["path"] / "results.json").read_text())
    share, pictures = results["final"]["metrics"]["top1"], results["pictures"]["top1"]
    assert stage["gate"] == {
        "verdict": "Missed",
        "metric": "top1",
        "result": f"{share:.2f}",
        "baseline": "100",
        "difference": f"{round(share, 2) - 100:.2f}",
        "standardError": f"{(share * (100 - share) / pictures) ** 0.5:.2f}",
    }


def test_an_impossible_target(half_finished: Chain) -> None:
    """It trains again what missed until it has all of baselineEpochs, and then a person decides.

    Everything is killed while the second schedule trains. The same command reaches the same end,
    also without its status.
    """
    chain = relaxing(half_finished)
    process = chain.start()
    wait_until(lambda: "tiny-two-a2" in attempts(chain))
    chain.kill()
    process.communicate()
    done = chain.run()
    assert done.returncode == EXIT_WORK_FAILED, done.stderr
    assert "stage two: GateMissed: top1 is" in done.stderr, done.stderr
    reached, made = end(chain), attempts(chain)
    assert [stage["epochs"] for stage in reached["stages"]] == [2, 2]
    assert [(one["stage"], one["epochs"]) for one in reached["rounds"]] == [("two", 2)]
    assert {name[:-1] for name in made} == {"tiny-one-a", "tiny-two-a"}
    check_by_hand(chain, reached["stages"][1])
    (chain.root / "status.json").unlink()
    newest_first = sorted(chain.root.glob("*/artifact/*.json"), key=lambda p: -p.stat().st_mtime)
    for time, path in enumerate(newest_first):  # as in a copy of the root, in another order
        os.utime(path, (time, time))
    again = chain.run()
    assert again.returncode == EXIT_WORK_FAILED
    assert end(chain) == reached and attempts(chain) == made, "nothing is trained again"
    spent = chain.status()["relaxation"]["spent"]["macs"]
    assert spent == chain.status()["stages"][1]["relaxed"]["macs"] > 0, "of the round before"
    gate(chain, baseline={"two": "100"}, onMiss="Continue")
    allowed = chain.run()
    assert allowed.returncode == 0 and "Missed" in allowed.stdout, allowed.stdout
    assert attempts(chain) == made


def test_a_baseline_is_trained_once(half_finished: Chain) -> None:
    """It starts from nothing; `run --alone` and a chain whose gate trains it share it."""
    chain = half_finished
    gate(chain, train=["two"], tolerance="100")
    alone = chain.run("--alone", "two")
    assert alone.returncode == 0, alone.stderr
    assert attempts(chain) == ["tiny-one-a1", "tiny-two-b1"] and "two alone" in alone.stdout
    found = [json.loads(p.read_text()) for p in chain.root.glob("*/artifact/results.json")]
    [results] = [one for one in found if one["stage"] == "two"]
    assert results["predecessor"] is None and results["growth"] is None
    assert results["steps"] == 2 * (chain.samples // 32)
    done = chain.run()
    assert done.returncode == 0, done.stderr
    assert attempts(chain) == ["tiny-one-a1", "tiny-two-a1", "tiny-two-b1"]
    [row] = chain.status()["baselines"]
    [_, two] = chain.status()["stages"]
    assert row["cache"] == "Hit" and two["gate"]["verdict"] == "Passed"
    assert two["gate"]["baseline"] == row["results"]["top1"]


def test_a_chain_trains_its_baseline(half_finished: Chain) -> None:
    chain = half_finished
    gate(chain, train=["two"], tolerance="100")
    done = chain.run()
    assert done.returncode == 0, done.stderr
    assert attempts(chain) == ["tiny-one-a1", "tiny-two-a1", "tiny-two-b1"]
    assert "two alone: Running" in done.stderr or "two alone: Succeeded" in done.stderr
    assert "alone:" in done.stdout and "Passed" in done.stdout
    again = chain.run("--alone", "two")
    assert again.returncode == 0 and len(attempts(chain)) == 3
