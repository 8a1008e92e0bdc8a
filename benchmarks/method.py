"""`python benchmarks/method.py`: what chain training gains, measured on Fashion-MNIST and Flickr8k.

It compares models trained alone with chains, by initialisation, distillation and epochs, with
ablations. The trainer trains all of them; for two rows one part of it is replaced
(`method_runs.replaced`). A finished stage is not run again and a stopped one resumes, so after
Ctrl-C run the same command. `--write` puts figures, tables and pictures into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import method_report
from method_runs import ArmStage, Folders, Setup, estimate, lineage, run
from modelchain.errors import EXIT_INTERRUPTED, EXIT_WORK_FAILED, InputError, WorkError

Json = dict[str, Any]
REPOSITORY = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
FRESH_SEEDS = (3, 4)
TUNING_SEED = 100
ALPHA, NO_PULL = "500", "0"


def model(
    sizes: tuple[int, int, int],
    embed: int,
    vision: tuple[int, int],
    text: tuple[int, int],
    scale: int = 1,
) -> Json:
    """An open_clip config from the sizes of picture and patch, the tokens of a caption, and towers
    as (width, layers).
    """
    image, patch, context = sizes
    return {
        "embed_dim": embed * scale,
        "vision_cfg": {
            "image_size": image,
            "patch_size": patch,
            "width": vision[0] * scale,
            "layers": vision[1],
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": context,
            "width": text[0] * scale,
            "heads": text[0] * scale // 16,
            "layers": text[1],
        },
    }


PHRASES = [
    "a t-shirt",
    "a pair of trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
]


def fashion(scale: int = 1) -> Setup:
    """Pictures of 28 x 28 in 16 patches. The longest caption has 12 tokens. Templates are those of
    the captions of val.
    """
    sizes = (28, 7, 12)
    top1 = {
        "name": "top1",
        "kind": "ZeroShot",
        "shards": "/data/val/val-{000000..000001}.tar",
        "classNames": "/data/names.json",
        "templates": "/data/prompts.json",
    }
    return Setup(
        name="fashion-mnist",
        folder="fashion-mnist",
        shards="train/train-000000.tar",
        samples=2_000,
        evaluation=(top1,),
        models={
            "s": model(sizes, 64, (32, 4), (32, 2), scale),
            "m": model(sizes, 64, (64, 4), (32, 3), scale),
            "l": model(sizes, 64, (128, 4), (64, 3), scale),
            "xs": model(sizes, 64, (16, 4), (16, 2), scale),  # these two for ablations
            "wide": model(sizes, 96, (128, 4), (64, 3), scale),
        },
        epochs=64,
        batch=64,
        captions=1,
        rate="2e-3",
        warmup=(60, 20),
        lists={"names.json": json.dumps(PHRASES), "prompts.json": json.dumps(["a photo of {}."])},
    )


def flickr(scale: int = 1, split: str = "test") -> Setup:
    """Pictures of 112 x 112 shrunk to 56, in 16 patches. Most captions have under 24 tokens."""
    sizes = (56, 14, 24)
    return Setup(
        name="flickr8k",
        folder="flickr8k",
        shards="train/train-{000000..000002}.tar",
        samples=5_999,
        evaluation=(
            {"name": "r1", "kind": "Retrieval", "shards": f"/data/{split}/{split}-000000.tar"},
        ),
        models={
            "s": model(sizes, 64, (32, 3), (32, 2), scale),
            "m": model(sizes, 64, (64, 3), (64, 2), scale),
            "l": model(sizes, 64, (112, 3), (96, 3), scale),
        },
        epochs=12,
        batch=64,
        captions=1,
        rate="1e-3",
        warmup=(60, 20),
        lists={},
    )


def smoke(scale: int = 1) -> Setup:
    """Three tiny models on fifty photos, to test all of this in seconds."""
    sizes = (16, 8, 12)
    return Setup(
        name="smoke",
        folder="coco-mini",
        shards="train/train-000000.tar",
        samples=50,
        evaluation=({"name": "r1", "kind": "Retrieval", "shards": "/data/val/val-000000.tar"},),
        models={
            "s": model(sizes, 16, (16, 1), (16, 1), scale),
            "m": model(sizes, 16, (24, 1), (16, 1), scale),
            "l": model(sizes, 24, (32, 2), (32, 1), scale),
        },
        epochs=2,
        batch=16,
        captions=1,
        rate="1e-3",
        warmup=(2, 1),
        lists={},
    )


@dataclass(frozen=True)
class Arm:
    """Models of one data set and how each is trained. `part` is its place in the report."""

    # individual, table, sweep (of epochs), two (models), fresh (seeds), ablation, tuning, choice
    part: str
    name: str
    stages: tuple[ArmStage, ...]
    ifd: bool = False


def alone(
    setup: Setup, name: str, seed: int, epochs: int | None = None, rate: str | None = None
) -> ArmStage:
    return ArmStage(setup, name, epochs or setup.epochs, seed, rate or setup.rate, setup.warmup[0])


def chain(
    part: str,
    name: str,
    setup: Setup,
    seed: int,
    epochs: Sequence[int],
    alpha: str = ALPHA,
    width: str = "Insert",
    variant: str = "",
    models: str = "s m l",
    warmup: int | None = None,
) -> Arm:
    """A chain whose first model trains as long as alone, and its successors for `epochs`."""
    first, *others = models.split()
    stages = [alone(setup, first, seed)]
    steps = setup.warmup[1] if warmup is None else warmup
    for other, few in zip(others, epochs, strict=True):
        before = stages[-1]
        # Between embeddings of one size there is no T.
        same_space = setup.models[other]["embed_dim"] == setup.models[before.model]["embed_dim"]
        own = "" if variant == "random T" and same_space else variant
        stages.append(
            ArmStage(setup, other, few, seed, setup.rate, steps, before, width, alpha, own)
        )
    return Arm(part, name, tuple(stages), ifd=alpha != NO_PULL)


def started(part: str, init: str, ifd: bool, setup: Setup, seed: int, epochs: Sequence[int]) -> Arm:
    """One cell of the table. Random weights without distillation are training alone, with fewer
    epochs.
    """
    if init != "random init":
        return chain(part, init, setup, seed, epochs, ALPHA if ifd else NO_PULL, width=init)
    if ifd:
        return chain(part, init, setup, seed, epochs, variant=init)
    short = (
        replace(alone(setup, name, seed, few), warmup=setup.warmup[1])
        for name, few in zip("ml", epochs, strict=True)
    )
    return Arm(part, init, (alone(setup, "s", seed), *short))


def individual(setup: Setup, seed: int, part: str = "individual") -> Arm:
    return Arm(part, "individual", tuple(alone(setup, name, seed) for name in "sml"))


INITS = ("random init", "Released", "Insert", "FPI", "LEMON")


def fashion_arms(scale: int) -> Iterator[Arm]:
    setup = fashion(scale)
    for seed in SEEDS:
        yield individual(setup, seed)
        for init in INITS:
            for ifd in (True, False):
                yield started("table", init, ifd, setup, seed, TABLE_EPOCHS)
        for init, lengths in SWEEP.items():
            for epochs in lengths:
                yield started("sweep", init, True, setup, seed, epochs)
        yield chain("two", "Insert", setup, seed, [8], models="m l")
        yield chain("two", "FPI", setup, seed, [3], width="FPI", models="m l")
    yield from ablations(setup, SEEDS[0])
    yield from tuning(setup)


def fresh_arms(scale: int) -> Iterator[Arm]:
    """The best chain of Fashion-MNIST's table, with seeds that did not choose it."""
    setup = fashion(scale)
    for seed in FRESH_SEEDS:
        yield individual(setup, seed, "fresh")
        yield started("fresh", "Released", True, setup, seed, TABLE_EPOCHS)


def flickr_arms(scale: int) -> Iterator[Arm]:
    setup = flickr(scale)
    for seed in SEEDS:
        yield individual(setup, seed)
        for init, ifd in (("Released", True), ("Insert", False), ("Insert", True)):
            yield started("table", init, ifd, setup, seed, FLICKR_EPOCHS)
    for rate in ("1e-3", "2e-3"):
        yield Arm("tuning", "m", (alone(flickr(scale, "val"), "m", TUNING_SEED, rate=rate),))


def ablations(setup: Setup, seed: int) -> Iterator[Arm]:
    """Chains that change one thing of the paper's chain, Insert with distillation."""
    for alpha in ("60", "4000"):
        yield chain("ablation", f"α = {alpha}", setup, seed, TABLE_EPOCHS, alpha)
    for steps in (0, 100):
        yield chain(
            "ablation", f"warm-up of {steps} steps, not 20", setup, seed, TABLE_EPOCHS, warmup=steps
        )
    yield chain(
        "ablation", "a first model half as wide", setup, seed, TABLE_EPOCHS, models="xs m l"
    )
    yield chain("ablation", "without m", setup, seed, TABLE_EPOCHS[1:], models="s l")
    wider = "l's embedding grows to 96, T(·) starts"
    yield chain(
        "ablation",
        f"{wider} as the insertion's inverse",
        setup,
        seed,
        TABLE_EPOCHS,
        models="s m wide",
    )
    yield chain(
        "ablation",
        f"{wider} at random",
        setup,
        seed,
        TABLE_EPOCHS,
        variant="random T",
        models="s m wide",
    )


def smoke_arms(scale: int) -> Iterator[Arm]:
    setup = smoke(scale)
    yield individual(setup, 0)
    for init in ("random init", "Insert"):
        for ifd in (False, True):
            yield started("table", init, ifd, setup, 0, [1, 1])
    yield chain("ablation", "T(·) starts at random", setup, 0, [1, 1], variant="random T")


def tuning(setup: Setup) -> Iterator[Arm]:
    """The trainings that chose the epochs, with a seed that the report does not use."""
    for name, epochs in (
        ("s", setup.epochs),
        ("m", setup.epochs // 2),
        ("m", setup.epochs),
        ("l", setup.epochs),
    ):
        yield Arm("tuning", name, (alone(setup, name, TUNING_SEED, epochs),))
    yield individual(setup, TUNING_SEED, "choice")
    for few in (TABLE_EPOCHS, (24, 8)):
        yield started("choice", "Insert", True, setup, TUNING_SEED, few)


# Epochs of m and l. The first are those that `allocation: {targetAcceleration: "4"}` gives.
TABLE_EPOCHS, FLICKR_EPOCHS = (17, 10), (2, 2)
SWEEP = {
    "Released": ((8, 8), TABLE_EPOCHS),
    "Insert": ((4, 4), (8, 8), TABLE_EPOCHS, (24, 8), (24, 24)),
}


def figures(arm: Arm, results: dict[ArmStage, Json]) -> Json:
    """Of each stage of an arm: its model, how it was trained, and what it reached."""
    kept = ("digest", "macs", "seconds", "initial", "final", "failure")
    stages = []
    for stage in arm.stages:
        result = results[stage]
        about: Json = {
            "model": stage.model,
            "epochs": stage.epochs,
            "rate": stage.rate,
            "warmup": stage.warmup,
        }
        stages.append(about | {name: result[name] for name in kept if name in result})
    first = arm.stages[0]
    about = {
        "setup": first.setup.name,
        "part": arm.part,
        "name": arm.name,
        "ifd": arm.ifd,
        "seed": first.seed,
    }
    return about | {"stages": stages}


PARTS = {
    "fashion-mnist": fashion_arms,
    "flickr8k": flickr_arms,
    "fresh": fresh_arms,
    "smoke": smoke_arms,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=REPOSITORY.parent / "shared" / "data",
        help="folder of the shards",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs/method"), help="where everything trained is kept"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="one thread each"
    )
    parser.add_argument("--only", choices=list(PARTS), help="default: the first two")
    parser.add_argument("--scale", type=int, default=1, help="times the widths of all models")
    parser.add_argument("--estimate", action="store_true", help="only say how much there is to do")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=REPOSITORY / "docs", help="into this folder (docs/)"
    )
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    chosen = [given.only] if given.only else ["fashion-mnist", "flickr8k"]
    arms = [arm for name in chosen for arm in PARTS[name](given.scale)]
    stages = [stage for arm in arms for stage in arm.stages]
    if given.estimate:
        wanted = {s for stage in stages for s in lineage(stage)}
        minutes = sum(map(estimate, wanted)) / 60 / given.workers
        print(
            f"{len(arms)} arms, {len(wanted)} stages, about {minutes:.0f} minutes with"
            f" {given.workers} workers"
        )
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folders = Folders(given.data, given.root.absolute())
        results = run(stages, folders, given.workers, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)  # the workers write a checkpoint and end
    except BrokenProcessPool:
        print("a worker has died; run the same command to resume", file=sys.stderr, flush=True)
        os._exit(EXIT_WORK_FAILED)
    except (InputError, WorkError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    report = method_report.document([figures(arm, results) for arm in arms], given.workers)
    print("\n\n".join(method_report.tables(report).values()))
    if given.write:
        method_report.write(report, given.write)


if __name__ == "__main__":
    main()
