"""What must be true of every ledger: each moment of GPU time has one use, and sums are sums."""

from __future__ import annotations

from collections.abc import Iterator

from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    Expenses,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.decide.ledger import added, total_of


def check_sums(status: ChainStatus) -> None:
    """The uses sum up to the GPU time, for every attempt, stage, baseline and chain."""
    ledgers: list[StageLedger] = [*status.stages, *status.removed]
    for ledger in [*ledgers, *status.baselines]:
        for amounts in _amounts(ledger):
            assert amounts.gpu_milliseconds.total == round(1000 * amounts.gpu_seconds), amounts
            assert 0 <= amounts.lost_macs <= amounts.macs, amounts
        for attempt in ledger.attempts:
            _check_attempt(attempt)
        if ledger.trained_here or ledger.reused:
            reused = [at.spent for at in ledger.reused]
            open_ = [a for a in ledger.attempts if a.finished_at is None]
            parts = added([ledger.spent, *reused, *open_])
            assert Expenses(**added([ledger])) == Expenses(**parts)
        if ledger.relaxed is not None:
            assert ledger.relaxed.macs <= ledger.macs
            assert ledger.relaxed.gpu_milliseconds.total <= ledger.gpu_milliseconds.total
        if isinstance(ledger, StageStatus) and ledger.state is State.SUCCEEDED:
            assert ledger.gpu_milliseconds.unsaved == 0, "a finished stage is settled"
    assert status.total == total_of(ledgers)


def _check_attempt(attempt: AttemptStatus) -> None:
    if attempt.finished_at is not None and attempt.unsettled is None:
        assert attempt.gpu_milliseconds.unsaved == 0, "a closed attempt is settled, or says why not"
    if attempt.finished_at is None:
        assert attempt.unsettled is None
    priced = attempt.gpu_milliseconds.total - round(1000 * attempt.unpriced_seconds)
    assert priced >= 0 and (attempt.cost is not None or priced == 0)


def _amounts(ledger: StageLedger) -> Iterator[Expenses]:
    yield ledger
    yield ledger.spent
    yield ledger.trained
    yield from (before.spent for before in (*ledger.trained_before, *ledger.reused))
    for attempt in ledger.attempts:
        yield attempt
        if attempt.finished_at is None:
            yield attempt.gone


def check_settled_stays(before: Expenses, after: Expenses) -> None:
    """What the metrics export, all time that is settled, never falls."""
    for use, time in before.gpu_milliseconds:
        assert use == "unsaved" or getattr(after.gpu_milliseconds, use) >= time, use
