"""The images, as built from the Dockerfile: how large, whose, and what is not in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

import images
import machine
import pytest
from images import BASE, OPERATOR, TRAINER, Buildah
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MB = 10**6


@pytest.fixture(scope="module")
def buildah(lab: object) -> Buildah:
    return images.build(machine.cache())


@pytest.fixture(scope="module")
def installed(buildah: Buildah) -> Iterator[dict[str, Distribution]]:
    """What the trainer's image holds, by name."""
    with buildah.mounted(TRAINER) as root:
        (site,) = root.glob("opt/modelchain/lib/python3.*/site-packages")
        yield {
            canonicalize_name(found.metadata["Name"]): found
            for found in distributions(path=[str(site)])
        }


def size(distribution: Distribution) -> int:
    return sum(
        Path(str(file.locate())).stat().st_size
        for file in distribution.files or ()
        if _there(file.locate())
    )


def _there(file: object) -> bool:
    return Path(str(file)).exists()


def closure(name: str, installed: dict[str, Distribution]) -> set[str]:
    """A distribution and all it needs, of what is installed; extras that are asked for included."""
    found: set[str] = set()
    stack: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while stack:
        at, extras = stack.pop()
        if (at, extras) in seen or at not in installed:
            continue
        seen.add((at, extras))
        found.add(at)
        for text in installed[at].requires or ():
            needed = Requirement(text)
            asked = [{"extra": extra} for extra in extras or {""}]
            if needed.marker is None or any(
                needed.marker.evaluate(environment) for environment in asked
            ):
                stack.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return found


def test_the_operator_is_small_and_without_torch(buildah: Buildah) -> None:
    above = buildah.size_of(OPERATOR) - buildah.size_of(BASE)
    print(f"operator: {above / MB:.0f} MB above its base")
    assert above <= 200 * MB
    with buildah.mounted(OPERATOR) as root:
        names = {
            folder.name for folder in root.glob("opt/modelchain/lib/python3.*/site-packages/*")
        }
    assert (
        "modelchain_operator" in names
        and not {"torch", "torchvision", "open_clip", "numpy"} & names
    )


def test_the_trainer_is_torch_and_little_more(
    buildah: Buildah, installed: dict[str, Distribution]
) -> None:
    torch = sum(size(installed[name]) for name in closure("torch", installed))
    above = buildah.size_of(TRAINER) - buildah.size_of(BASE)
    print(
        f"trainer: {above / MB:.0f} MB above its base, {(above - torch) / MB:.0f} MB of them not"
        " torch's own"
    )
    assert above - torch <= 300 * MB


@pytest.mark.parametrize("name", [OPERATOR, TRAINER])
def test_any_user_may_run_it(buildah: Buildah, name: str) -> None:
    """A numeric user who is not root; nothing in it belongs to that user; labels say what it is."""
    config = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    assert config["User"] == "65532:65532"
    labels = {label.removeprefix("org.opencontainers.image.") for label in config["Labels"]}
    assert {"title", "description", "licenses", "version", "revision"} <= labels
    with buildah.mounted(name) as root:
        assert not [file for file in (root / "opt").rglob("*") if file.lstat().st_uid != 0]
        assert all(file.lstat().st_mode & 0o004 for file in (root / "opt").rglob("*.py"))
