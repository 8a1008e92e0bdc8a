"""What `modelchain watch` shows, at real sizes: eight stages, 256 pods, 1e20 MACs, much money."""

from __future__ import annotations

import io

import podshapes
import pytest
import watched
from rich.console import Console

from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus, State
from modelchain.report.cost import PARTS, outlook_columns, outlooks_of, units
from modelchain_operator.api.kube import Object
from modelchain_operator.cli.tree import (
    ASCII,
    MOST_PODS,
    UNICODE,
    Signs,
    next_command,
    pod_state,
    seconds_left,
    tree,
    watched_of,
)

LONG = "0/900 nodes are available: " + "900 Insufficient nvidia.com/gpu, " * 60


def drawn(
    thing: Object, pods: list[Object] | None = None, width: int = 160, signs: Signs = UNICODE
) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    view = watched_of(thing, watched.pods() if pods is None else pods, watched.NOW)
    console.print(tree(view, width, signs))
    return [line.rstrip() for line in console.export_text().splitlines()]


def line_of(lines: list[str], begin: str) -> str:
    return next(line for line in lines if line.strip().startswith(begin))


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("pods", [0, 1, watched.NODES])
def test_no_line_is_wider_than_the_terminal(width: int, pods: int) -> None:
    queued = watched.told(
        StageStatus(name=watched.name_of(2), state=State.QUEUED),
        Reason(Code.UNSCHEDULABLE, "pod-0", LONG),
    )
    for thing in (watched.chain(), watched.chain(queued)):
        lines = drawn(thing, watched.pods(pods), width)
        assert max(map(len, lines)) <= width
        assert [line for line in lines if "Succeeded" in line]


def test_a_narrow_terminal_shows_what_matters() -> None:
    lines = drawn(watched.chain(), width=80)
    assert line_of(lines, "Chain").startswith("Chain    vision/family, generation 3")
    assert line_of(lines, "State").split()[:3] == ["State", "Running", "3/8"]
    a, c = line_of(lines, "✔  a"), line_of(lines, "●  c")
    assert a.split() == ["✔", "a", "Succeeded", "━━━━━━━━━━", "100%", *["100,000.01"] * 2, "33.00"]
    assert c.split() == [
        "●",
        "c",
        "Running",
        "━━━━━─────",
        "50%",
        "2h05m",
        "50,000.00",
        "100,000.00",
    ]
    assert len([line for line in lines if line.startswith("·")]) == 5


def test_attempts_are_counted_where_one_was_repeated() -> None:
    assert not [line for line in drawn(watched.chain()) if "attempts" in line]
    lines = drawn(watched.chain(watched.running(2).changed(attempt_count=3)))
    assert [line for line in lines if "  attempts" in line]
    assert line_of(lines, "●  c").split()[-4:-3] == ["3"] and " 1  2 Pre" in line_of(lines, "✔  a")


def test_a_wide_terminal_has_the_notes() -> None:
    lines = drawn(watched.chain())
    assert line_of(lines, "✔  a").endswith("2 Preempted, hand-over 0.8 s")
    assert line_of(lines, "●  c").endswith("123.46 k samples/s")
    assert line_of(lines, "·  d").endswith("waits for stage c")


def test_money_and_projections_are_those_of_the_command_cost() -> None:
    thing = watched.chain()
    view = watched_of(thing, [], watched.NOW)
    assert view.plan is not None
    found = outlooks_of(view.plan, view.status)
    lines = drawn(thing)
    for title, unit, estimates in units("family", view.status):
        columns = outlook_columns(found, unit, estimates)
        sums = [columns[part][-1] for part in PARTS]
        row = line_of(lines, title.removeprefix("family, ")).split()
        assert [cell for cell in row if cell in sums] == [cell for cell in sums if cell]
    money = outlook_columns(found, next(units("family", view.status))[1], True)
    for name, spent, projected in zip(
        money["stage"][:-1], money["spent"], money["projected"], strict=False
    ):
        [row] = [line.split() for line in lines if line.split()[1:2] == [name]]
        assert projected in row and (spent in row or spent == "0.00")
    assert "9.88e20" in line_of(lines, "MACs").split()


def test_the_budget_counts_what_baselines_and_removed_stages_took() -> None:
    assert "2,000,000.00 (13% used)" in line_of(drawn(watched.chain()), "USD")
    assert "900,000.0 (11% used)" in line_of(drawn(watched.chain()), "GPU hours")
    thing = watched.chain()
    thing["status"]["baselines"] = [thing["status"]["stages"][0] | {"name": "b"}]
    lines = drawn(thing)
    assert "2,000,000.00 (18% used)" in line_of(lines, "USD")
    assert line_of(lines, "✔  b alone").split()[2:5] == ["alone", "inline", "Succeeded"]


def test_pods_beyond_a_few_are_counted() -> None:
    lines = drawn(watched.chain(), width=80)
    pods = [line for line in lines if "family-c-a1-" in line]
    assert len(pods) == MOST_PODS == 8 and "family-c-a1-master-0  Running  node node-0" in pods[0]
    assert lines[lines.index(pods[-1]) + 1] == "   └─ … and 248 more Running"
    assert not [line for line in drawn(watched.chain(), watched.pods(8)) if "more" in line]


def test_pods_that_do_not_run_come_first() -> None:
    troubled = {f"rank_{200 + i}": podshapes.unschedulable(200 + i) for i in range(10)}
    pods = watched.pods(**troubled)
    lines = drawn(watched.chain(), pods)
    assert line_of(lines, "├─ family-c-a1-worker-199").split()[2] == "Unschedulable"
    assert line_of(lines, "└─ … and").strip() == "└─ … and 248 more: 246 Running, 2 Unschedulable"


def test_pods_of_another_job_are_not_shown() -> None:
    pods = watched.pods(2)
    for pod in pods:
        pod["metadata"]["uid"] = "another"
        pod["metadata"]["ownerReferences"][0]["uid"] = "another"
    assert not [line for line in drawn(watched.chain(), pods) if "master" in line]


@pytest.mark.parametrize(
    ("pod", "word"),
    [
        (podshapes.pending(), "Pending"),
        (podshapes.unschedulable(), "Unschedulable"),
        (podshapes.waiting(0, "ImagePullBackOff"), "ImagePullBackOff"),
        (podshapes.running(), "Running"),
        (podshapes.ended(code=0), "Completed"),
        (podshapes.ended(code=137, reason="OOMKilled"), "OOMKilled"),
    ],
)
def test_the_word_for_a_pod(pod: Object, word: str) -> None:
    assert pod_state(pod) == word
    pod["metadata"]["deletionTimestamp"] = podshapes.at(5)
    assert pod_state(pod) == "Terminating"


def test_why_it_waits_and_the_next_command() -> None:
    name = watched.name_of(2)
    queued = watched.told(
        StageStatus(name=name, state=State.QUEUED),
        Reason(Code.UNSCHEDULABLE, f"family-{name}-a1-master-0", LONG),
    )
    lines = drawn(watched.chain(queued), [], 80)
    assert line_of(lines, "State").startswith("State    Queued 3/8  stage c: Unschedulable: 0/900")
    assert lines[-1].startswith("next: kubectl describe pod family-c-a1-master-0")
    stalled = watched.told(
        StageStatus(name=name), Reason(Code.BUDGET_EXCEEDED, name, "too much"), stalled=True
    )
    lines = drawn(watched.chain(stalled))
    assert line_of(lines, "⚠  c").split()[2:4] == ["inline", "Stalled"]
    assert lines[-1] == "next: kubectl edit mchain family -n vision"


def test_a_command_is_folded_and_not_cut() -> None:
    stage = StageStatus(name=watched.name_of(2), state=State.QUEUED)
    pod = "p" * 200
    thing = watched.chain(watched.told(stage, Reason(Code.UNSCHEDULABLE, pod, "no")))
    lines = drawn(thing, [], 80)
    begins = lines.index(next(line for line in lines if line.startswith("next: ")))
    text = "".join("".join(lines[begins:]).split())
    assert text == f"next:kubectldescribepod{pod}-nvision" and max(map(len, lines)) == 80


def test_a_chain_that_no_operator_has_seen() -> None:
    lines = drawn(watched.spec(), [])
    assert line_of(lines, "Chain").startswith("Chain    vision/family, generation 3, not observed")
    assert line_of(lines, "State") == "State    New  no operator has looked at it yet"
    assert lines[-1] == "next: modelchain explain family -n vision"
    assert not [line for line in lines if "USD" in line or "stage" in line]


def test_a_refused_spec_names_the_command_to_mend_it() -> None:
    thing = watched.chain()
    condition = {
        "type": "Stalled",
        "status": "True",
        "reason": "InvalidSpec",
        "message": "spec.stages: too few",
        "lastTransitionTime": podshapes.at(0),
    }
    thing["status"]["conditions"] = [condition]
    thing["status"]["summary"]["state"] = "InvalidSpec"
    view = watched_of(thing, [], watched.NOW)
    assert next_command(view) == "kubectl edit mchain family -n vision"
    assert "spec.stages: too few" in line_of(drawn(thing), "State")


def test_the_time_that_is_left() -> None:
    """c says 7,500 s. d to h have 40,000 GPU hours each, at 2,048 GPUs."""
    view = watched_of(watched.chain(), [], watched.NOW)
    each = 40_000 * 3600 / 2048
    assert seconds_left(view) == pytest.approx(7_500 + 5 * each, rel=1e-3)
    assert "in 4d03h, 20" in line_of(drawn(watched.chain()), "Finish")
    waits = watched.chain(watched.waiting(2))
    assert seconds_left(watched_of(waits, [], watched.NOW)) is None


def test_a_spec_of_another_version_still_shows_its_stages() -> None:
    thing = watched.chain()
    thing["spec"] = thing["spec"] | {"unheardOf": True}
    lines = drawn(thing)
    assert line_of(lines, "●  c") and not [line for line in lines if "projected" in line]


def test_without_unicode_and_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(watched.chain(), signs=ASCII) + drawn(watched.chain(), width=60, signs=ASCII)
    text = "\n".join(lines)
    assert text.isascii() and "`- family-c-a1" in text
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    console = Console(width=100, file=out, force_terminal=True)
    console.print(tree(watched_of(watched.chain(), [], watched.NOW), 100))
    assert "\x1b[3" not in out.getvalue() and "Running" in out.getvalue()
