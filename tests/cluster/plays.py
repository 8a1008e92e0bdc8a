"""Plays for the stand-in kubelet: what becomes of a pod. Times in seconds; `after` counts from the
pod's start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from playedpod import TORCHRUN_FAILED, Pod, condition

from modelchain.api.contracts import FailureClass, LastWord

Play = Callable[[Pod], Awaitable[None]]
SIGKILLED = 137


def usual(seconds: float = 0.5) -> Play:
    """What a pod does when nothing goes wrong, by its role; `seconds` for a whole stage."""

    async def play(pod: Pod) -> None:
        if pod.role == "verify":
            await verify()(pod)
        elif pod.role == "evaluate":
            await evaluate()(pod)
        elif pod.rank:
            await follow()(pod)
        else:
            await succeed(seconds)(pod)

    return play


def succeed(after: float = 0.5) -> Play:
    """A trainer trains and reports its artifact; any other pod just ends."""

    async def play(pod: Pod) -> None:
        await pod.start()
        if pod.task is None:
            await asyncio.sleep(after)
        await pod.exit(0, await pod.train(after) if pod.task else None)

    return play


def lost_message(after: float = 0.5) -> Play:
    """The artifact is written, the termination message is empty."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after)
        await pod.exit(0)

    return play


def follow() -> Play:
    """A worker: it ends when rank 0 does, and as it does."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.exit(await asyncio.shield(pod.gang.ended))

    return play


def verify(after: float = 0.1) -> Play:
    """A verify Job's pod: the volume's artifact of this digest is reported as its trainer did, or
    is missing.
    """

    async def play(pod: Pod) -> None:
        await pod.start()
        await asyncio.sleep(after)
        if found := pod.volume.artifacts.get(pod.digest):
            await pod.exit(0, found)
        else:
            await pod.exit(
                1,
                pod.failure(
                    FailureClass.NO_ARTIFACT, "the volume holds no artifact of these inputs"
                ),
            )

    return play


def evaluate(after: float = 0.1) -> Play:
    """An evaluation Job's pod: it measures what it was asked for."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await asyncio.sleep(after)
        word = pod.evaluate()
        await pod.exit(1 if word.failure else 0, word)

    return play


def index() -> Play:
    """An index Job's pod: all data is indexed already, so it answers at once."""

    async def play(pod: Pod) -> None:
        await pod.start(0)
        await pod.exit(0, LastWord(result="Succeeded", fingerprint="f" * 64))

    return play


def index_failed(failure: FailureClass, message: str, code: int = 1) -> Play:
    """An index Job's pod finds something wrong."""

    async def play(pod: Pod) -> None:
        await pod.start(0)
        await pod.exit(code, pod.failure(failure, message))

    return play


def fail(
    failure: FailureClass | None,
    message: str = "",
    *,
    after: float = 0.5,
    share: float = 0.5,
    code: int = TORCHRUN_FAILED,
) -> Play:
    """A trainer fails after that `share` of its steps; without a failure class it leaves no last
    word.
    """

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after / share if share else after, until=share)
        await pod.exit(code, pod.failure(failure, message) if failure else None)

    return play


def user_error(message: str = "warmupSteps is not below the steps of the stage") -> Play:
    return fail(FailureClass.USER_ERROR, message, share=0)


def corrupt_predecessor() -> Play:
    return fail(
        FailureClass.CORRUPT_PREDECESSOR,
        "the predecessor's weights do not have the digest of its record",
        share=0,
    )


def nan(after: float = 0.5) -> Play:
    return fail(FailureClass.NON_FINITE, "the loss is nan", after=after)


def volume_full(after: float = 0.5) -> Play:
    return fail(FailureClass.VOLUME_FULL, "[Errno 28] No space left on device", after=after)


def killed(after: float = 0.5) -> Play:
    """SIGKILL from an unknown sender: no last word."""
    return fail(None, after=after, code=SIGKILLED)


def oom(after: float = 0.5) -> Play:
    """The container's memory limit."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after * 2, until=0.5)
        await pod.exit(SIGKILLED, reason="OOMKilled")

    return play


def evict(after: float = 0.5) -> Play:
    """The node's own eviction under pressure: the pod object stays, Failed."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after * 2, until=0.5)
        message = "The node was low on resource: ephemeral-storage."
        target = condition("DisruptionTarget", True, reason="TerminationByKubelet", message=message)
        status = {"reason": "Evicted", "message": message}
        await pod.exit(TORCHRUN_FAILED, pod.checkpointed(), conditions=[target], status=status)

    return play


def preempt(after: float = 0.5) -> Play:
    """The scheduler makes room for a pod of higher priority: the pod object goes."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after * 2, until=0.5)
        await pod.disrupt(
            "PreemptionByScheduler",
            "default-scheduler: preempting to accommodate a higher priority pod",
        )

    return play


def node_loss(after: float = 0.5) -> Play:
    """The pod's node falls silent; what it was doing is never heard of."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after * 2, until=0.5)
        pod.kubelet.lose_node(pod.node)

    return play


def waiting(reason: str = "ContainerCreating", message: str = "") -> Play:
    """Bound to a node and never started."""
    return lambda pod: pod.waiting(reason, message)


def image_error(reason: str = "ErrImagePull") -> Play:
    """ErrImagePull, then ImagePullBackOff, as a kubelet alternates; or InvalidImageName at once."""

    async def play(pod: Pod) -> None:
        image = pod.body["spec"]["containers"][0]["image"]
        message = f'failed to pull and unpack image "{image}": not found'
        await pod.waiting(reason, message)
        if reason == "ErrImagePull":
            await asyncio.sleep(0.3)
            await pod.waiting(
                "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {message}'
            )

    return play


def init_error(message: str = "") -> Play:
    """The first init container exits 1."""
    return lambda pod: pod.init_failed(1, message)


def hang() -> Play:
    """Runs, and never does a step."""
    return lambda pod: pod.start()


def stall(share: float = 0.5, after: float = 0.5) -> Play:
    """Trains up to a share of its steps, and no further."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(after / share, until=share)

    return play


def stuck() -> Play:
    """Runs without a step and outlives its deletion: Terminating until a person forces it."""

    async def play(pod: Pod) -> None:
        pod.stuck = True
        await pod.start()

    return play
