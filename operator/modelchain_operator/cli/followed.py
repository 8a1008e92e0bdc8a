"""A chain and its pods, as watches tell them."""

from __future__ import annotations

from modelchain.errors import WorkError
from modelchain_operator.api.kube import CHAINS, PODS, Forbidden, Kube, Object
from modelchain_operator.api.objects import (
    annotation,
    is_deleting,
    is_true,
    label,
    name,
    true_condition,
    uid,
)
from modelchain_operator.cli.changes import Feeds, changes
from modelchain_operator.reconcile.snapshot import RETRY
from modelchain_operator.runners.template import CHAIN, CHAIN_UID, TRAINS


class Followed:
    """A chain and its pods, as the watches have told them last."""

    def __init__(self, chain: Object):
        self._name, self._chains = name(chain), [chain]
        self._pods: list[Object] = []
        # Whether the pods that there are have been told.
        self.ready = False

    @property
    def chain(self) -> Object:
        """Raises WorkError once the chain is gone."""
        if not self._chains:
            raise WorkError(f"{self._name} was deleted")
        return self._chains[0]

    @property
    def pods(self) -> list[Object]:
        """Those of the chain that is there now, and not of one that had its name before."""
        return of_chain(self.chain, self._pods)

    def follow(self, feeds: Feeds, kube: Kube, namespace: str, *, need_pods: bool) -> None:
        """Follow both. Without the right to see pods, the chain alone, unless they are needed."""
        chains = changes(kube, CHAINS, namespace, fields=f"metadata.name={self._name}")
        feeds.add(chains, self._take_chains)
        feeds.run(self._follow_pods(feeds, kube, namespace, need_pods))

    async def _follow_pods(self, feeds: Feeds, kube: Kube, namespace: str, need_pods: bool) -> None:
        try:
            async for pods in changes(kube, PODS, namespace, selector(self._name)):
                self._pods, self.ready = pods, True
                feeds.tell()
        except Forbidden:
            if need_pods:
                raise
            self.ready = True

    def _take_chains(self, chains: list[Object]) -> None:
        self._chains = chains


def selector(chain: str) -> str:
    """The label selector of a chain's training pods."""
    return f"{CHAIN}={chain},{TRAINS}"


def of_chain(chain: Object, pods: list[Object]) -> list[Object]:
    return [pod for pod in pods if label(pod, CHAIN_UID) == uid(chain)]


def end_of(chain: Object) -> str | None:
    """Why nothing more happens to the chain by itself: empty if it is complete, else what has
    stopped it. None while it goes on.

    A chain that was asked to retry goes on, although the operator may not have seen that yet.
    """
    if is_true(chain, "Complete"):
        return ""
    asked = annotation(chain, RETRY)
    if is_deleting(chain) or (asked and asked != (chain.get("status") or {}).get("retry")):
        return None
    for kind, ended in (("Failed", "has failed"), ("Stalled", "is stalled")):
        if is_true(chain, kind):
            found = true_condition(chain, kind) or {}
            return f"{name(chain)} {ended}: {found['message']}"
    return None
