"""CONTRIBUTING.md's lists of files hold: an existing example of each change is named in the files
that its list has, and in no other file.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from named import words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ROOMS = ("core", "data", "trainer", "operator")
# By heading of a list: what code calls its example.
EXAMPLES = {
    "A growth method, as `LEMON` is:": r"LEMON|lemon",
    "A runner, as `PyTorchJob` is:": r"PyTorchJob|pytorchjob",
    "A spec field, as `rerun` is:": r"rerun",
    "A metric, as `modelchain_stage_retries_total` is:": r"modelchain_stage_retries_total|retried",
    "A model family, as Swin is:": r"[Ss]win|SWIN",
}
# Files that use an example for another purpose than to add one like it.
USES = {
    "A spec field, as `rerun` is:": {
        # advice that names the field
        "core/modelchain/api/reasons.py",
        "operator/modelchain_operator/explain/clues.py",
        "operator/modelchain_operator/reconcile/attempt.py",
        "operator/modelchain_operator/reconcile/observe.py",
    },
    "A metric, as `modelchain_stage_retries_total` is:": {
        # where the number comes from
        "core/modelchain/api/status.py",
        "core/modelchain/decide/decide.py",
        "core/modelchain/decide/attempt.py",
        "core/modelchain/decide/change.py",
        "core/modelchain/decide/outcome.py",
        "core/modelchain/decide/transitions.py",
        # it is shown in another way as well
        "operator/modelchain_operator/cli/tree.py",
    },
}


def listed(heading: str) -> set[str]:
    """The files of one list."""
    items = PAGE.partition(heading)[2].strip().partition("\n\n")[0]
    return set(re.findall(r"^- `([^`]+)`: ", items, re.M))


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_is_named_where_its_list_says(heading: str) -> None:
    named = {
        str(file.relative_to(ROOT))
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if any(re.search(EXAMPLES[heading], word) for word in words(file))
    }
    code = {file for file in listed(heading) if file.split("/")[0] in ROOMS}
    assert named - USES.get(heading, set()) == code


@pytest.mark.parametrize("heading", EXAMPLES)
def test_every_file_of_a_list_exists_and_speaks_of_it(heading: str) -> None:
    files = listed(heading)
    assert len(files) >= 4
    for file in files:
        assert re.search(EXAMPLES[heading], (ROOT / file).read_text()), file


def test_the_files_of_the_tour_exist() -> None:
    tour = re.findall(r"^\d\. `([^`]+)`", PAGE, re.M)
    assert len(tour) == 6 and all((ROOT / file).is_file() for file in tour)
