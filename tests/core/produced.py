"""The codes that the project's own code gives while a test runs.

tests/conftest.py uses it for the tests in `produced_by.py`: each of them fails if the codes that
the list expects of it are not given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelchain.api.reasons import Reason
from modelchain.decide import conditions
from modelchain_operator.explain import explain
from modelchain_operator.reconcile import controller

ROOT = Path(__file__).parents[2]
# Where reasons are made; `api` only builds the sentence of a stored one.
OURS = (f"{ROOT}/core/modelchain/decide/", f"{ROOT}/core/modelchain/local/", f"{ROOT}/operator/")


@contextmanager
def watched() -> Iterator[set[str]]:
    """The codes of reasons, conditions, events and explanations that are made in the block. Reasons
    that the test itself makes do not count.
    """
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        make, condition = Reason.__init__, conditions._condition
        say, tell_of = explain._Case._say, controller.Controller.__init__

        def made(self: Reason, code: str, *rest: Any, **more: Any) -> None:
            if sys._getframe(1).f_code.co_filename.startswith(OURS):
                seen.add(str(code))
            make(self, code, *rest, **more)  # type: ignore[arg-type]

        def with_condition(old: Any, fact: Any, *rest: Any) -> Any:
            seen.add(str(fact.reason))
            return condition(old, fact, *rest)

        def said(self: Any, code: str, *rest: Any) -> Any:
            seen.add(str(code))
            return say(self, code, *rest)

        def built(self: Any, kube: Any, events: Any, *rest: Any, **more: Any) -> None:
            tell_of(self, kube, _Listening(events, seen), *rest, **more)  # type: ignore[arg-type]

        patch.setattr(Reason, "__init__", made)
        patch.setattr(conditions, "_condition", with_condition)
        patch.setattr(explain._Case, "_say", said)
        patch.setattr(controller.Controller, "__init__", built)
        yield seen


class _Listening:
    """The events of a controller; `seen` gets their codes."""

    def __init__(self, events: Any, seen: set[str]):
        self._events, self._seen = events, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def tell(self, chain: Any, kind: Any, code: str, message: str) -> None:
        self._seen.add(str(code))
        self._events.tell(chain, kind, code, message)
