"""For each alert the series by which it fires, and those by which it does not: minutes of one chain
`v/a`, as promtool writes series. Moments are seconds since minute 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Series = dict[str, str]


@dataclass(frozen=True)
class Case:
    """Series, a minute, and the alerts that are expected then.

    `fires` has the labels of each but for its severity; `shows` is what stands for its value.
    """

    name: str
    series: Series
    at: int
    fires: list[dict[str, str]] = field(default_factory=list)
    shows: str = ""


CHAIN = {"namespace": "v", "chain": "a"}
STAGE = {**CHAIN, "stage": "s"}
TRAINER = {**STAGE, "role": "train"}
OPERATOR = {"namespace": "home", "job": "operator"}
HOUR = 60


def chain(name: str, values: str, **labels: str) -> Series:
    return _series(f"modelchain_{name}", values, {**CHAIN, "pod": "o-0", **labels})


def stage(name: str, values: str, **labels: str) -> Series:
    return chain(f"stage_{name}", values, **{"stage": "s", **labels})


def trainer(name: str, values: str, **labels: str) -> Series:
    return _series(f"modelchain_trainer_{name}", values, {**TRAINER, "pod": "a-s-a1-0", **labels})


def operator(name: str, values: str, pod: str = "o-0", **labels: str) -> Series:
    every = {**OPERATOR, "pod": pod, "instance": pod, **labels}
    return _series(f"modelchain_operator_{name}", values, every)


def _series(name: str, values: str, labels: dict[str, str]) -> Series:
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return {f"{name}{{{inside}}}": values}


def condition(kind: str, values: str, **labels: str) -> Series:
    return chain("condition", values, condition=kind, **labels)


GOES_ON = condition("Finished", "0x1000")
IS_OVER = condition("Finished", "1x1000")
SUCCEEDED = stage("state", "1x600", state="Succeeded")
PLAN = stage("planned_macs", "1e20x600") | stage("state", "1x600", state="Running")
ALONE = stage("baseline_macs", "2e20x600")
RECONCILING = condition("Reconciling", "1x600")
STARTED = stage("start_timestamp_seconds", "600x600")


def work(spent: str, lost: str, stage_: str = "s") -> Series:
    """MACs that a stage has spent in this chain, and those of them that are lost."""
    of = {"stage": stage_, "source": "trained"}
    return stage("macs_total", f"{spent}x60", **of) | stage("lost_macs_total", f"{lost}x60", **of)


CHAINS = {
    "ModelChainFailed": [
        Case(
            "two replicas tell it, and it is one alert",
            condition("Failed", "0x4 1x20") | condition("Failed", "_x4 1x20", pod="o-1"),
            at=8,
            fires=[CHAIN],
        ),
        Case("for less than a minute", condition("Failed", "0x4 1 0x20"), at=6),
    ],
    "ModelChainStalled": [
        Case("it stays so", condition("Stalled", "1x30"), at=15, fires=[CHAIN]),
        Case("for a few minutes", condition("Stalled", "1x5 0x30"), at=15),
        Case(
            "the chain has failed, which is another alert",
            condition("Stalled", "1x30") | condition("Failed", "1x30"),
            at=15,
        ),
    ],
    "ModelChainNoProgress": [
        Case(
            "no step since minute 10",
            stage("last_progress_timestamp_seconds", "600x60")
            | stage("state", "1x60", state="Running"),
            at=31,
            fires=[STAGE],
            shows="21m 0s",
        ),
        Case(
            "a step in each minute",
            stage("last_progress_timestamp_seconds", "0+60x60")
            | stage("state", "1x60", state="Running"),
            at=40,
        ),
        Case(
            "the attempt has ended, and another replica is a minute behind",
            stage("last_progress_timestamp_seconds", "600x60", pod="o-1")
            | stage("state", "0x60", state="Running"),
            at=40,
        ),
    ],
    "ModelChainProgressUnknown": [
        Case(
            "it stays so", stage("reason", "1x40", reason="ProgressUnknown"), at=20, fires=[STAGE]
        ),
        Case("one answer did not come", stage("reason", "1x3 _x40", reason="ProgressUnknown"), 20),
        Case("the stage runs", stage("reason", "1x40", reason="Running"), at=20),
    ],
    "ModelChainRequestRefused": [
        Case(
            "a quota refuses the job",
            stage("reason", "1x20", reason="LaunchRefused"),
            at=12,
            fires=[{**STAGE, "reason": "LaunchRefused"}],
        ),
        Case(
            "pods are refused",
            stage("reason", "1x20", reason="PodsForbidden"),
            at=12,
            fires=[{**STAGE, "reason": "PodsForbidden"}],
        ),
        Case("another reason", stage("reason", "1x20", reason="Queued"), at=12),
    ],
    "ModelChainRetryStorm": [
        Case(
            "three of one class in an hour",
            stage("retries_total", "0x9 1x9 2x9 3x40", **{"class": "OutOfMemory"}),
            at=50,
            fires=[{**STAGE, "class": "OutOfMemory"}],
            shows="3",
        ),
        Case(
            "one of each class",
            stage("retries_total", "0x9 1x60", **{"class": "OutOfMemory"})
            | stage("retries_total", "0x9 1x60", **{"class": "Preempted"}),
            at=50,
        ),
        Case(
            "another replica goes on to tell three old ones",
            stage("retries_total", "3x30 stale", **{"class": "Error"})
            | stage("retries_total", "_x31 3x60", pod="o-1", **{"class": "Error"}),
            at=50,
        ),
    ],
    "ModelChainQueuedTooLong": [
        Case("seven hours", stage("state", "1x600", state="Queued"), at=7 * HOUR, fires=[STAGE]),
        Case("five hours", stage("state", "1x600", state="Queued"), at=5 * HOUR),
        Case("twice five hours", stage("state", "1x300 0 1x300", state="Queued"), at=7 * HOUR),
    ],
    "ModelChainStartsTooLong": [
        Case("half an hour", stage("state", "1x60", state="Starting"), at=30, fires=[STAGE]),
        Case("ten minutes", stage("state", "1x10 0x60", state="Starting"), at=30),
    ],
    "ModelChainPreparesTooLong": [
        Case(
            "it indexes, for a claim of data that is missing",
            RECONCILING | stage("state", "1x600", state="Indexing"),
            at=4 * HOUR,
            fires=[CHAIN],
        ),
        Case(
            "it verifies, and the next stage waits",
            RECONCILING
            | stage("state", "1x600", state="Verifying")
            | stage("state", "1x600", stage="t", state="Pending")
            | stage("state", "0x600", stage="t", state="Running"),
            at=4 * HOUR,
            fires=[CHAIN],
        ),
        Case(
            "for two hours", RECONCILING | stage("state", "1x120 0x600", state="Indexing"), 4 * HOUR
        ),
        Case(
            "another stage trains",
            RECONCILING
            | stage("state", "1x600", stage="t", state="Pending")
            | stage("state", "1x600", state="Running"),
            at=4 * HOUR,
        ),
        Case(
            "another stage is in a queue",
            RECONCILING
            | stage("state", "1x600", stage="t", state="Pending")
            | stage("state", "1x600", state="Queued"),
            at=4 * HOUR,
        ),
        Case(
            "a model is trained alone",
            RECONCILING
            | stage("state", "1x600", stage="t", state="Pending")
            | stage("allocated_gpus", "8x600", stage="s alone"),
            at=4 * HOUR,
        ),
        Case(
            "another chain trains the stage",
            RECONCILING
            | stage("state", "1x600", state="Pending")
            | stage("reason", "1x600", reason="SharedStage"),
            at=4 * HOUR,
        ),
        Case(
            "it waits for a person, which is another alert",
            condition("Reconciling", "0x600") | stage("state", "1x600", state="Pending"),
            at=4 * HOUR,
        ),
    ],
    "ModelChainHandoverSlow": [
        Case(
            "two minutes",
            stage("transition_seconds", "_x9 120x60") | STARTED | GOES_ON,
            at=30,
            fires=[STAGE],
            shows="2m 0s",
        ),
        Case("a second", stage("transition_seconds", "_x9 1.2x60") | STARTED | GOES_ON, at=30),
        Case(
            "it was two minutes, some hours ago",
            stage("transition_seconds", "120x600") | STARTED | GOES_ON,
            at=300,
        ),
        Case(
            "it was a day ago, and Prometheus is new",
            stage("transition_seconds", "120x60")
            | stage("start_timestamp_seconds", "-86400x60")
            | GOES_ON,
            at=30,
        ),
        Case(
            "the chain has finished",
            stage("transition_seconds", "120x60") | STARTED | IS_OVER,
            at=30,
        ),
    ],
    "ModelChainLostWork": [
        Case(
            "a third",
            work("9e19", "3e19") | PLAN | GOES_ON,
            at=20,
            fires=[{**STAGE, "source": "trained"}],
            shows="33.33%",
        ),
        Case(
            "a third, of a model that the gate trains alone",
            work("9e19", "3e19", "s alone") | ALONE | SUCCEEDED | GOES_ON,
            at=20,
            fires=[{**STAGE, "stage": "s alone", "source": "trained"}],
            shows="33.33%",
        ),
        Case("a tenth", work("10e19", "1e19") | PLAN | GOES_ON, at=20),
        Case("the chain has finished", work("9e19", "3e19") | PLAN | IS_OVER, at=20),
        Case(
            "the stage has succeeded, and the chain goes on",
            work("9e19", "3e19") | PLAN | SUCCEEDED | GOES_ON,
            at=20,
        ),
        Case(
            "the model that was trained alone has its result",
            work("9e19", "3e19", "s alone")
            | ALONE
            | stage("baseline_result", "70x60", metric="top1")
            | GOES_ON,
            at=20,
        ),
        Case(
            "all of a first attempt that died in its first minutes",
            work("4e18", "4e18") | PLAN | GOES_ON,
            at=20,
        ),
        Case("nothing was done yet", work("0", "0") | PLAN | GOES_ON, at=20),
    ],
    "ModelChainArtifactMissing": [
        Case(
            "its claim was replaced",
            stage("reason", "1x20", reason="ArtifactMissing"),
            at=8,
            fires=[{**STAGE, "reason": "ArtifactMissing"}],
        ),
        Case(
            "its bytes have changed",
            stage("reason", "1x20", reason="CorruptPredecessor"),
            at=8,
            fires=[{**STAGE, "reason": "CorruptPredecessor"}],
        ),
        Case("it is hashed", stage("reason", "1x20", reason="Verifying"), at=8),
    ],
    "ModelChainDigestConflict": [
        Case("at once", stage("reason", "_ 1x20", reason="DigestConflict"), at=1, fires=[STAGE]),
        Case("another reason", stage("reason", "1x20", reason="ArtifactMissing"), at=8),
    ],
    "ModelChainGateMissed": [
        Case("it missed", stage("gate", "1x20", verdict="Missed") | GOES_ON, at=8, fires=[STAGE]),
        Case("it passed", stage("gate", "1x20", verdict="Passed") | GOES_ON, at=8),
        Case("the chain has finished", stage("gate", "1x20", verdict="Missed") | IS_OVER, at=8),
    ],
}


def cost(values: str, stage_: str = "s", source: str = "trained") -> Series:
    return stage("cost_total", values, stage=stage_, source=source, currency="USD")


def time(values: str, use: str) -> Series:
    return stage("gpu_seconds_total", values, source="trained", use=use)


BUDGET = chain("budget_cost", "1000x60", currency="USD")

MONEY = {
    "ModelChainBudgetNearlySpent": [
        Case(
            "95% of the money, by a stage and a removed one",
            BUDGET | cost("900x60") | cost("50x60", "", "removed") | GOES_ON,
            at=10,
            fires=[{**CHAIN, "limit": "cost"}],
            shows="95%",
        ),
        Case(
            "all of the hours, and half of the money",
            BUDGET
            | cost("500x60")
            | chain("budget_gpu_seconds", "3600x60")
            | time("3000x60", "productive")
            | time("600x60", "lost")
            | GOES_ON,
            at=10,
            fires=[{**CHAIN, "limit": "gpuHours"}],
            shows="100%",
        ),
        Case("80%", BUDGET | cost("800x60") | GOES_ON, at=10),
        Case("without a budget", cost("800x60") | GOES_ON, at=10),
        Case("the chain has finished", BUDGET | cost("950x60") | IS_OVER, at=10),
    ],
    "ModelChainProjectedOverBudget": [
        Case(
            "two stages, and a baseline that has no projection",
            BUDGET
            | stage("projected_cost", "600x60", currency="USD")
            | stage("projected_cost", "300x60", stage="t", currency="USD")
            | cost("400x60")
            | cost("200x60", "s alone")
            | GOES_ON,
            at=20,
            fires=[CHAIN],
            shows="110%",
        ),
        Case(
            "less, of which two replicas tell",
            BUDGET
            | stage("projected_cost", "600x60", currency="USD")
            | stage("projected_cost", "600x60", currency="USD", pod="o-1")
            | cost("400x60")
            | GOES_ON,
            at=20,
        ),
    ],
    "ModelChainNoPrice": [
        Case("it waits", stage("reason", "1x20", reason="NoPrice"), at=8, fires=[STAGE]),
        Case("the budget is spent", stage("reason", "1x20", reason="BudgetExceeded"), at=8),
    ],
    "ModelChainSlowerThanAlone": [
        Case("it is", chain("saved_macs", "-1e18x60") | GOES_ON, at=20, fires=[CHAIN]),
        Case("it saves work", chain("saved_macs", "1e20x60") | GOES_ON, at=20),
        Case("it was, and is over", chain("saved_macs", "-1e18x60") | IS_OVER, at=20),
    ],
}

TRAINERS = {
    "ModelChainCheckpointStale": [
        Case(
            "none since minute 0",
            trainer("last_checkpoint_timestamp_seconds", "0x120"),
            at=90,
            fires=[TRAINER],
            shows="1h 30m 0s",
        ),
        Case(
            "none at all, in an hour and a half",
            trainer("checkpoint_step", "0x300")
            | trainer("seconds_total", "0+50x300", activity="step")
            | trainer("seconds_total", "0+10x300", activity="data"),
            at=90,
            fires=[TRAINER],
            shows="1h 30m 0s",
        ),
        Case(
            "one in each minute, of a trainer that runs for hours",
            trainer("last_checkpoint_timestamp_seconds", "0+60x120")
            | trainer("seconds_total", "7200+60x120", activity="step"),
            at=90,
        ),
        Case(
            "none yet, in half an hour",
            trainer("seconds_total", "0+60x120", activity="step"),
            at=30,
        ),
        Case("the trainer has ended", trainer("last_checkpoint_timestamp_seconds", "0x9"), at=90),
    ],
    "ModelChainLossNotFinite": [
        Case(
            "one in each minute",
            trainer("skipped_batches_total", "0x9 0+1x30"),
            at=30,
            fires=[TRAINER],
            shows="15",
        ),
        Case(
            "a model that is trained alone skips, and its stage does not",
            trainer("skipped_batches_total", "0x9 0+1x30", role="baseline")
            | trainer("skipped_batches_total", "0x60"),
            at=30,
            fires=[{**STAGE, "role": "baseline"}],
            shows="15",
        ),
        Case("two, once", trainer("skipped_batches_total", "0x9 2x30"), at=20),
    ],
    "ModelChainWaitsForData": [
        Case(
            "half of its time",
            trainer("seconds_total", "0+30x120", activity="data")
            | trainer("seconds_total", "0+30x120", activity="step"),
            at=60,
            fires=[TRAINER],
            shows="50%",
        ),
        Case("a tenth", trainer("seconds_total", "0+6x120", activity="data"), at=60),
        Case(
            "half of its time is a checkpoint",
            trainer("seconds_total", "0+30x120", activity="checkpoint"),
            at=60,
        ),
    ],
    "ModelChainLowUtilization": [
        Case("5%", trainer("mfu_ratio", "0.05x240"), at=120, fires=[TRAINER], shows="5%"),
        Case("30%", trainer("mfu_ratio", "0.3x240"), at=120),
        Case("5% for half an hour", trainer("mfu_ratio", "0.05x30 0.4x240"), at=120),
    ],
}

OPERATORS = {
    "ModelChainOperatorDown": [
        Case(
            "one replica waits, and the other is gone",
            operator("leader", "1x10 stale") | operator("leader", "0x40", pod="o-1"),
            at=20,
            fires=[OPERATOR],
        ),
        Case("nobody was ever there", {}, at=10, fires=[{}]),
        Case(
            "no replica of a release leads, and another release works",
            operator("leader", "1x10 0x40")
            | operator("leader", "1x50", pod="p-0", namespace="elsewhere"),
            at=20,
            fires=[OPERATOR],
        ),
        Case(
            "all replicas of a release are gone, and another release works",
            operator("leader", "1x10 stale")
            | operator("leader", "1x50", pod="p-0", namespace="elsewhere"),
            at=40,
            fires=[OPERATOR],
        ),
        Case("another leads within two minutes", operator("leader", "1x10 0x2 1x40"), at=30),
    ],
    "ModelChainTwoLeaders": [
        Case(
            "both replicas",
            operator("leader", "1x20") | operator("leader", "1x20", pod="o-1"),
            at=10,
            fires=[OPERATOR],
            shows="2",
        ),
        Case(
            "one, and one of another release",
            operator("leader", "1x20")
            | operator("leader", "1x20", pod="p-0", namespace="elsewhere"),
            at=10,
        ),
    ],
    "ModelChainOperatorStale": [
        Case(
            "the leader does not, and a replica that waits does",
            operator("leader", "1x40")
            | operator("leader", "0x40", pod="o-1")
            | operator("last_list_timestamp_seconds", "0+60x4 240x40")
            | operator("last_list_timestamp_seconds", "0+60x40", pod="o-1"),
            at=12,
            fires=[OPERATOR],
            shows="8m 0s",
        ),
        Case(
            "every minute",
            operator("leader", "1x40") | operator("last_list_timestamp_seconds", "0+60x40"),
            at=12,
        ),
    ],
    "ModelChainReconcileErrors": [
        Case(
            "one of four",
            operator("reconcile_duration_seconds_count", "0+1x60", result="failed")
            | operator("reconcile_duration_seconds_count", "0+3x60", result="ok"),
            at=30,
            fires=[OPERATOR],
            shows="25%",
        ),
        Case(
            "one of fifty",
            operator("reconcile_duration_seconds_count", "0+1x60", result="failed")
            | operator("reconcile_duration_seconds_count", "0+49x60", result="ok"),
            at=30,
        ),
    ],
}

CASES: dict[str, list[Case]] = CHAINS | MONEY | TRAINERS | OPERATORS
