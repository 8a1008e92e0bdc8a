"""docs/metrics.md lists what is served, and what is served keeps Prometheus' conventions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
import metrics_table  # noqa: E402

SERVED = {"operator": metrics_table.of_operator, "trainer": metrics_table.of_trainer}


def lint(text: str) -> Iterator[str]:
    """The rules of `promtool check metrics` that bear on us."""
    for family in text_string_to_metric_families(text):
        names = {sample.name for sample in family.samples}
        if not names or not family.documentation:
            yield f"{family.name}: no sample, or no help"
        if family.type not in ("gauge", "counter", "histogram"):
            yield f"{family.name}: {family.type}"
        if family.type == "gauge" and re.search(r"_(total|count|sum|bucket)$", family.name):
            yield f"{family.name}: a gauge by another's name"
        if family.type == "counter" and not all(name.endswith("_total") for name in names):
            yield f"{family.name}: a counter without _total"
        if re.search(
            r"[A-Z:]|(milli|micro|nano)seconds|minutes|hours|percent|kilo|mega|_(gauge|counter)",
            family.name,
        ):
            yield f"{family.name}: not a base unit, or no snake_case"


@pytest.mark.parametrize("who", SERVED)
def test_names_keep_the_conventions(who: str, promtool: Path) -> None:
    text = SERVED[who]()
    assert list(lint(text)) == [] and text.count("# TYPE modelchain_") > 10
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_rules_themselves() -> None:
    assert len(list(lint("# TYPE modelchain_x_total gauge\nmodelchain_x_total 1\n"))) == 2


def test_the_table_is_that_of_what_is_served() -> None:
    page = metrics_table.PAGE.read_text()
    assert page == metrics_table.with_table(page), "run benchmarks/metrics_table.py --write"


def test_queries_name_what_is_there() -> None:
    page = metrics_table.PAGE.read_text()
    (queries,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    named = set(re.findall(r"modelchain_\w+", queries))
    assert len(named) == 4 and all(f"| `{name}` |" in page for name in named)
