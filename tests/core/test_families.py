"""Families of towers: the registry is complete, and TOUCHED lists the files a new one touches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from named import words

from modelchain.api.modelconfig import VisionConfig
from modelchain.api.zoo import MODELS
from modelchain.families import registry
from modelchain.families.registry import FAMILIES, family_of

ROOT = Path(__file__).parents[2]
FOLDER = Path(registry.__file__).parent
COMMON = {"__init__", "registry", "tower"}

# The files that name a family. A new family touches them: its own file, the registry, and in the
# trainer the growth rules of its parameters, the layers to compile, and the export.
TOUCHED = {
    "core/modelchain/families/registry.py",
    "core/modelchain/families/swin.py",
    "core/modelchain/families/vit.py",
    "trainer/modelchain_trainer/export.py",
    "trainer/modelchain_trainer/growth/rules.py",
    "trainer/modelchain_trainer/models.py",
}
ROOMS = ("core", "data", "trainer", "operator", "benchmarks/modelchain_bench")


def test_the_registry_holds_every_file_of_the_folder() -> None:
    files = {file.stem for file in FOLDER.glob("*.py")} - COMMON
    assert {family.__name__.rpartition(".")[2] for family in FAMILIES} == files


def _knows_a_family(file: Path) -> bool:
    """Whether the code names a family. Models of Table G do not count; they serve as examples."""
    text = " ".join(words(file))
    for model in MODELS:
        text = re.sub(rf"\b{model}\b", "", text)
    stems = [file.stem for file in FOLDER.glob("*.py") if file.stem not in COMMON]
    names = [*stems, *map(str.upper, stems), *(family.NAME for family in FAMILIES)]
    return re.search(rf"(?<![A-Za-z])({'|'.join(names)})(?![a-z])", text) is not None


def test_only_these_files_know_a_family() -> None:
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    assert {str(file.relative_to(ROOT)) for file in files if _knows_a_family(file)} == TOUCHED


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_is_of_one_family(name: str) -> None:
    vision = MODELS[name].config.vision_cfg
    [family] = [family for family in FAMILIES if family.is_of(vision)]
    assert vision.family is family is family_of(vision) and name in family.MODELS
    assert VisionConfig.model_validate(vision.model_dump(exclude_unset=True)) == vision
