"""`decide`: from a spec, what is seen and the time, the one next step. Pure; the same for a laptop
and a cluster.

A step is at most one write. If the status must change, that is the step; an action is taken only
from a status that already says so. So whoever dies between two steps finds everything it needs in
what was written.
"""

from __future__ import annotations

from typing import Any

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, StageStatus, State
from modelchain.decide.conditions import completed
from modelchain.decide.nodes import still_avoided, without_faults
from modelchain.decide.observed import Action, Discard, DropShare, Observed, Step, Stop
from modelchain.decide.walk import Walk
from modelchain.plan.plan import plan


def decide(chain: ModelChain, observed: Observed, now: float) -> Step:
    """The next step of a chain.

    Args:
        chain: the checked spec.
        observed: live reads, the stored status among them.
        now: seconds since the epoch.
    """
    old = observed.status
    retried = (
        bool(observed.retry) and observed.retry != old.retry
    )  # a value that is taken away asks for nothing
    fresh = retried or old.observed_generation != (chain.metadata.generation or 0)
    stages = _resolved(chain, old, fresh)
    avoid = [] if retried else still_avoided(old.avoid, now)
    if fresh:
        avoid = without_faults(avoid)
    walk = Walk(
        chain,
        observed,
        now,
        finished=not fresh and old.is_over(len(stages)),
        retried=retried,
        avoid=avoid,
    )
    stages = [walk.visit(index, stage) for index, stage in enumerate(stages)]
    status = completed(chain, old, stages, observed.retry or old.retry, now, walk.avoid)
    if status != old:
        return Step(status, write=True, again=0.0)
    action = _before_all(observed, walk) or walk.action or _after_all(observed, walk)
    at_rest = not observed.live - walk.wanted and walk.again is None and action is None
    return Step(
        status,
        write=False,
        action=action,
        again=None if at_rest else walk.again or observed.poll_seconds,
    )


def _before_all(observed: Observed, walk: Walk) -> Action | None:
    """What nobody asks for, or no longer, goes first."""
    for uid, name in sorted(observed.strays.items()):
        return Discard(uid, name)
    for name in sorted(observed.live - walk.wanted):
        return Stop(name)
    return None


def _after_all(observed: Observed, walk: Walk) -> Action | None:
    """What tidies up."""
    for digest in sorted(observed.shares - walk.shares):
        return DropShare(digest)
    for uid, name in sorted(observed.spent_jobs.items()):
        return Discard(uid, name)
    return None


def _resolved(chain: ModelChain, old: ChainStatus, fresh: bool) -> list[StageStatus]:
    """Stages in the spec's order with what is known of each; epochs frozen by an earlier launch
    stay.
    """
    known = {s.name: s for s in old.stages}
    frozen = old.frozen_epochs
    planned = {s.name: s for s in plan(chain, "analytic", {}, frozen).stages}
    out = []
    for stage in chain.spec.stages:
        status = known.get(stage.name, StageStatus(name=stage.name))
        update: dict[str, Any] = {
            "epochs": planned[stage.name].epochs,
            "planned_macs": planned[stage.name].macs,
            "frozen": stage.epochs is None and stage.name in frozen,
            "stalled": False,
        }
        if fresh:
            update |= {
                "cache": None,
                "reason": "",
                "retries": 0,
                "disruptions": 0,
                "not_before": None,
            }
            if status.state is State.FAILED:
                update["state"] = State.PENDING
        out.append(status.model_copy(update=update))
    return out
