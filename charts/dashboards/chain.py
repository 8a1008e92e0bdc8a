"""One chain: how its stages come along, how well they train, and what holds them up."""

from __future__ import annotations

import json

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import board, chains
from dashboards.colours import ACTIVITIES, STATES
from dashboards.panels import (
    BLUE,
    GOOD_IF_POSITIVE,
    GPU_HOURS,
    MONEY,
    NUMBER,
    POINTS,
    RATIO,
    SECONDS,
    TIME,
    Panel,
    Steps,
    TableColumn,
    bars,
    grid,
    lines,
    number,
    timeline,
)
from dashboards.promql import (
    CHAIN,
    COST,
    GPU_SECONDS,
    IN_CURRENCY,
    MACS_LOST,
    QUEUE_SECONDS,
    RETRIES,
    STAGE,
    done,
    gauge,
    of_trainers,
    rate,
    series,
    time_left,
    total,
)
from modelchain.api.status import State

NONE_IS_GOOD: Steps = ((None, "green"), (1, "red"))
FEW_ARE_GOOD: Steps = ((None, "green"), (1, "orange"), (5, "red"))
WHOLE = "{{namespace}} / {{chain}}"
NAME = f"{WHOLE} / {{{{stage}}}}"


def build() -> Dashboard:
    return board(
        "chain",
        "Chain",
        "One chain: how its stages come along, how well they train, and what holds them up",
        chains(),
        {
            "Now": [*_now(), _states(), _stages()],
            "Progress and accuracy": [*_progress(), _results()],
            "Training": [*_losses(), *_speed(), *_time()],
            "Checkpoints, retries and waiting": [*_checkpoints(), *_retries()],
        },
        since="now-24h",
    )


def _now() -> list[Panel]:
    return [
        number(
            "Done",
            "Share of the planned MACs whose steps are done, over all stages.",
            RATIO,
            f"{total(done())} / {total(gauge('modelchain_stage_planned_macs'))}",
            decimals=0,
        ),
        number(
            "Time left",
            "Until the last stage ends, as projected. Empty if nothing runs or it is unknown.",
            SECONDS,
            time_left(),
            decimals=1,
        ),
        number(
            "GPUs held",
            "GPUs of the pods that are bound to a node now, also while a stage starts.",
            NUMBER,
            total(gauge("modelchain_stage_allocated_gpus")),
        ),
        number("Spent", "Of all attempts.", MONEY, total(series(COST, IN_CURRENCY))),
        number(
            "Retries",
            "Attempts that the operator made again by itself, of all classes of failure.",
            NUMBER,
            total(series(RETRIES)),
            decimals=0,
            colours=FEW_ARE_GOOD,
        ),
        number(
            "Waiting for a person",
            "Chains with the condition Stalled. `modelchain explain` says what to do.",
            NUMBER,
            total(gauge("modelchain_condition", 'condition="Stalled"')),
            decimals=0,
            colours=NONE_IS_GOOD,
        ),
    ]


def _states() -> Panel:
    # A number for each state, because a state timeline draws numbers and maps them to names.
    numbered = list(enumerate(State, start=1))
    each = [
        f"({gauge('modelchain_stage_state', f'state={json.dumps(state)}')} == 1) * {value}"
        for value, state in numbered
    ]
    return timeline(
        "Stages",
        "The state of every stage.",
        f"max by ({STAGE}) ({' or '.join(each)})",
        NAME,
        {value: (str(state), STATES[state]) for value, state in numbered},
    )


def _stages() -> Panel:
    finish = (
        f"{gauge('modelchain_stage_completion_timestamp_seconds')}"
        f" or {gauge('modelchain_stage_eta_timestamp_seconds')}"
    )
    state = f"max by ({STAGE}, state) ({gauge('modelchain_stage_state')} == 1)"
    return grid(
        "Stages as of now",
        "What each stage trains, and how far it is. Finish is when it has finished, or will at the"
        " rate that was measured. The verdict is the gate's; docs/gate.md says what it means.",
        {
            "namespace": "Namespace",
            "chain": "Chain",
            "stage": "Stage",
            "model": "Model",
            "gpu": "GPU",
            "gpus": "GPUs",
            "state": "State",
            "verdict": "Verdict",
        },
        TableColumn(
            "Info", _of_stage("modelchain_stage_info", "model", "gpu", "gpus"), hidden=True
        ),
        TableColumn("State value", state, hidden=True),
        TableColumn("Gate", _of_stage("modelchain_stage_gate", "verdict"), hidden=True),
        TableColumn("Done", _of_stage("modelchain_stage_progress_ratio"), RATIO, 0),
        TableColumn(
            "Start", f"1000 * {_of_stage('modelchain_stage_start_timestamp_seconds')}", TIME
        ),
        TableColumn("Finish", f"1000 * max by ({STAGE}) ({finish})", TIME),
        TableColumn("GPU time", f"{total(series(GPU_SECONDS), STAGE)} / 3600", GPU_HOURS, 1),
        TableColumn("Spent", total(series(COST, IN_CURRENCY), STAGE), MONEY),
        height=10,
    )


def _of_stage(name: str, *labels: str) -> str:
    return f"max by ({', '.join((STAGE, *labels))}) ({series(name)})"


def _by_chain(counter: str) -> str:
    return total(gauge(counter), CHAIN)


def _progress() -> list[Panel]:
    return [
        lines(
            "Progress",
            "Share of each stage's steps that are done.",
            RATIO,
            (gauge("modelchain_stage_progress_ratio"), NAME),
            width=8,
            highest=1,
        ),
        bars(
            "Time left by stage",
            "Of the running stage and of the whole chain, at the rate that was measured. Empty if"
            " nothing runs.",
            SECONDS,
            (f"clamp_min({gauge('modelchain_stage_eta_timestamp_seconds')} - time(), 0)", NAME),
            (
                f"clamp_min({gauge('modelchain_eta_timestamp_seconds')} - time(), 0)",
                f"{WHOLE}: whole chain",
            ),
        ),
        bars(
            "Better than alone",
            "The gate's metric of each finished stage less that of the model trained alone. The"
            " middle of a bar is as good as alone.",
            POINTS,
            (gauge("modelchain_stage_gate_difference_points"), NAME),
            decimals=2,
            lowest=-2,
            highest=2,
            colours=GOOD_IF_POSITIVE,
        ),
    ]


def _results() -> Panel:
    labels = f"{STAGE}, metric"
    result = _of_stage("modelchain_stage_result", "metric")
    alone = _of_stage("modelchain_stage_baseline_result", "metric")
    return grid(
        "Results",
        "What each finished stage was measured to reach, beside the same model trained alone where"
        " the gate knows it.",
        {"namespace": "Namespace", "chain": "Chain", "stage": "Stage", "metric": "Metric"},
        TableColumn("Chain's model", result, NUMBER, 2),
        TableColumn("Trained alone", alone, NUMBER, 2),
        TableColumn("Difference", f"{result} - on ({labels}) {alone}", NUMBER, 2),
        height=10,
    )


def _losses() -> list[Panel]:
    return [
        lines(
            "Losses",
            "Of the last logged step. The sum of the components is trained on.",
            NUMBER,
            (of_trainers(gauge("modelchain_trainer_loss")), f"{NAME} {{{{component}}}}"),
            lowest=None,
        ),
        lines(
            "Distillation ratio r",
            "The distillation loss over the task loss. Only a successor has one.",
            NUMBER,
            (of_trainers(gauge("modelchain_trainer_distillation_ratio")), NAME),
        ),
    ]


def _speed() -> list[Panel]:
    return [
        lines(
            "Samples a second",
            "Over all ranks. Pauses for checkpoints and evaluations count.",
            NUMBER,
            (of_trainers(rate("modelchain_trainer_samples_total")), NAME),
            width=8,
        ),
        lines(
            "MFU",
            "Model FLOPs utilization: twice the MACs a second over the peak of all GPUs in bf16."
            " Empty where the peak of the device is unknown.",
            RATIO,
            (of_trainers(gauge("modelchain_trainer_mfu_ratio")), NAME),
            width=8,
        ),
        lines(
            "Token efficiency",
            "Share of the text tokens of a batch that are not padding.",
            RATIO,
            (of_trainers(gauge("modelchain_trainer_text_token_efficiency")), NAME),
            width=8,
            highest=1,
        ),
    ]


def _time() -> list[Panel]:
    seconds = "modelchain_trainer_seconds_total"
    return [
        lines(
            "Data wait",
            "Share of the time in which the training loop had no batch. The GPU may still have been"
            " busy with the batch before.",
            RATIO,
            (of_trainers(rate("modelchain_trainer_data_wait_seconds_total")), NAME),
            width=8,
        ),
        lines(
            "Time by activity",
            "What the trainers do, as shares of their running time.",
            RATIO,
            (
                f"{rate(seconds, by='activity')} / on () group_left () {rate(seconds, by='')}",
                "{{activity}}",
            ),
            width=8,
            colours=ACTIVITIES,
            stacked=True,
            highest=1,
        ),
        lines(
            "Skipped and replaced",
            "Batches whose loss or gradients were not finite, and pictures that could not be"
            " decoded, since the attempt's start.",
            NUMBER,
            (_by_chain("modelchain_trainer_skipped_batches_total"), f"{WHOLE} batches"),
            (_by_chain("modelchain_trainer_replaced_pictures_total"), f"{WHOLE} pictures"),
            width=8,
        ),
    ]


def _checkpoints() -> list[Panel]:
    saved = gauge("modelchain_trainer_last_checkpoint_timestamp_seconds")
    return [
        lines(
            "Age of the newest checkpoint",
            "The work that a disruption would cost now.",
            SECONDS,
            (of_trainers(f"time() - {saved}"), NAME),
            width=8,
        ),
        lines(
            "Time of a checkpoint",
            "The loop waited (stall), then a thread wrote (write).",
            SECONDS,
            (
                of_trainers(gauge("modelchain_trainer_last_checkpoint_duration_seconds")),
                f"{NAME} {{{{phase}}}}",
            ),
            width=8,
        ),
        bars(
            "Lost work",
            "MACs of each stage that no checkpoint has kept, or that were done twice.",
            "sci",
            (f"{total(series(MACS_LOST), STAGE)} > 0", NAME),
            colours=((None, "orange"),),
        ),
    ]


def _retries() -> list[Panel]:
    return [
        lines(
            "Retries by class",
            "Cumulated, by the class of the attempt before; docs/failures.md says what to do. Empty"
            " without a retry.",
            NUMBER,
            (f"{total(series(RETRIES), f'{CHAIN}, class')} > 0", f"{WHOLE} {{{{class}}}}"),
            width=8,
        ),
        bars(
            "Time in the queue",
            "For how long the attempts of each stage waited in a queue or for the scheduler.",
            SECONDS,
            (f"{total(series(QUEUE_SECONDS), STAGE)} > 0", NAME),
            colours=BLUE,
        ),
        bars(
            "Hand-over",
            "From the end of the predecessor's trainer to the job of the stage.",
            SECONDS,
            (gauge("modelchain_stage_transition_seconds"), NAME),
            colours=((None, "green"), (10, "orange"), (60, "red")),
        ),
    ]
