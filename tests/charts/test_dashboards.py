"""What every dashboard keeps to, and the ConfigMaps that the chart makes of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from boards import NAMES, SERIES, board, documented, panels, queries, recorded
from generate import REPOSITORY
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from rendering import Object, find, objects, rendered

PRICE = {
    "validFrom": "2026-01-01",
    "perGpuHour": "400",
    "currency": "JPY",
    "source": "made up for the tests",
}
POOLS = {
    "a100": {"gpu": "A100", "gpusPerNode": 8},
    "h100": {"gpu": "H100", "gpusPerNode": 8, "prices": [PRICE]},
}
# Of chains and trainers: not a recorded series, and no counter of a trainer.
GAUGES = re.compile(r"(?<!:)\bmodelchain_(?!operator|trainer_\w+_total)\w+")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def test_there_are_three() -> None:
    assert NAMES == ["chain", "family", "operator"]
    assert [board(name)["uid"] for name in NAMES] == [f"modelchain-{name}" for name in NAMES]


def lost(ours: Any, read: Any, path: str = "") -> Iterator[str]:
    """What is not as it was after it was read."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for key, value in ours.items():
            yield from lost(value, read.get(key, "nothing"), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for place, (left, right) in enumerate(zip(ours, read, strict=True)):
            yield from lost(left, right, f"{path}[{place}]")
    elif ours != read:
        yield f"{path}: {ours} became {read}"


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_own_schema_has_all_of_it(name: str) -> None:
    """The types are made from the schema. They drop a key that it lacks, and add defaults."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(board(name))))
    assert not list(lost(board(name), read))
    wrong = board(name) | {"titel": "misspelt"}
    assert list(lost(wrong, read)) == [".titel: misspelt became nothing"]


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_explains_itself(name: str) -> None:
    for panel in panels(name):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"]
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_bars_have_colours_of_their_own(name: str) -> None:
    """Grafana would show everything above 80 in red."""
    for panel in panels(name):
        if panel["type"] in ("stat", "bargauge"):
            assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_pages_that_are_named_exist(name: str) -> None:
    pages = re.findall(r"docs/[\w-]+\.md", json.dumps(board(name)))
    assert not [page for page in pages if not (REPOSITORY / page).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_the_data_source_can_be_chosen(name: str) -> None:
    variables = board(name)["templating"]["list"]
    assert (variables[0]["name"], variables[0]["type"]) == ("datasource", "datasource")
    places = [*panels(name), *variables[1:], *(target for _, target in queries(name))]
    assert all(place["datasource"] == SOURCE for place in places)


@pytest.mark.parametrize("name", NAMES)
def test_several_values_or_all_can_be_chosen(name: str) -> None:
    variables = {v["name"]: v for v in board(name)["templating"]["list"][1:]}
    expected = {"operator"} if name == "operator" else {"namespace", "chain"}
    assert variables.keys() == expected
    assert all(v["multi"] and v["includeAll"] for v in variables.values())
    for title, target in queries(name):
        used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
        assert used <= variables.keys(), title


@pytest.mark.parametrize("name", NAMES)
def test_it_links_to_the_others_and_is_not_edited_by_hand(name: str) -> None:
    (link,) = board(name)["links"]
    assert (link["type"], link["tags"]) == ("dashboards", board(name)["tags"])
    assert link["includeVars"] and link["keepTime"] and not board(name)["editable"]


def test_links_of_cells_lead_to_a_dashboard_and_its_variables() -> None:
    urls = re.findall(r'"/d/([\w-]+)\?([^"]*)"', json.dumps(board("family")))
    assert urls
    for uid, query in urls:
        target = next(name for name in NAMES if board(name)["uid"] == uid)
        named = {v["name"] for v in board(target)["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", query)) == named


@pytest.mark.parametrize("name", NAMES)
def test_no_two_panels_overlap(name: str) -> None:
    places: dict[tuple[int, int], str] = {}
    for panel in board(name)["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        columns = range(at["x"], at["x"] + at["w"])
        for cell in itertools.product(columns, range(at["y"], at["y"] + at["h"])):
            assert cell not in places, (panel["title"], places[cell])
            places[cell] = panel["title"]
    # No gap either: every line of the grid is full.
    assert len(places) == 24 * (1 + max(line for _, line in places))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_documented_or_recorded(name: str) -> None:
    known = documented() | {"process_resident_memory_bytes", "process_cpu_seconds_total"}
    variables = json.dumps(board(name)["templating"])
    texts = [variables, *(target["expr"] for _, target in queries(name))]
    named = {found for text in texts for found in SERIES.findall(text)}
    assert named and not named - known - recorded().keys()


@pytest.mark.parametrize("name", NAMES)
def test_counters_of_chains_come_from_the_recording_rules(name: str) -> None:
    """Two replicas may report a chain; a sum of their own counters would count it twice."""
    for title, target in queries(name):
        assert not re.search(r"modelchain_stage_\w+_total", target["expr"]), title


@pytest.mark.parametrize("name", NAMES)
def test_gauges_are_taken_once_of_all_replicas(name: str) -> None:
    once = re.compile(r"max(?: (?:by|without) \([\w, ]+\) )?\($")
    for title, target in queries(name):
        for gauge in GAUGES.finditer(target["expr"]):
            assert once.search(target["expr"][: gauge.start()]), (title, gauge[0])


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_of_counters_over_the_interval_that_grafana_chooses(name: str) -> None:
    for title, target in queries(name):
        calls = re.findall(r"\b(rate|increase)\((\S+?)\{[^}]*\}\[([^]]+)\]", target["expr"])
        assert len(calls) == len(re.findall(r"\[", target["expr"])), title
        for _, series, window in calls:
            assert series.endswith(("_total", ":max", "_count", "_bucket")), title
            assert window in ("$__rate_interval", "$__range"), title


def config_maps(things: tuple[Object, ...]) -> dict[str, Object]:
    """By the name of the dashboard."""
    found = find(things, "ConfigMap", "-dashboard")
    return {thing["metadata"]["name"].split("-")[-2]: thing for thing in found}


def test_none_by_default() -> None:
    assert not config_maps(rendered("default"))


def test_a_config_map_of_each() -> None:
    maps = config_maps(objects("--set", "dashboards.enabled=true"))
    assert sorted(maps) == NAMES
    for name, thing in maps.items():
        assert thing["metadata"]["name"] == f"modelchain-{name}-dashboard"
        assert thing["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert thing["metadata"]["annotations"] == {"grafana_folder": "ModelChain"}
        ((file, text),) = thing["data"].items()
        assert file == f"modelchain-{name}.json" and json.loads(text) == board(name)
        assert len(json.dumps(thing)) < 2**20 / 4  # the API server takes 1 MiB


def test_each_setting() -> None:
    thing = config_maps(rendered("full"))["family"]
    assert thing["metadata"]["name"] == "chains-family-dashboard"
    labels = thing["metadata"]["labels"]
    assert labels["dashboards"] == "yes" and labels["team"] == "vision"
    assert "grafana_dashboard" not in labels
    assert thing["metadata"]["namespace"] == "monitoring"
    assert thing["metadata"]["annotations"] == {"grafana_folder": "Vision"}
    family = json.loads(thing["data"]["modelchain-family.json"])
    url = "https://git.example.com/modelchain/docs/dashboards.md"
    assert [link.get("url") for link in family["links"]] == [None, url]


def test_labels_and_annotations_may_be_null() -> None:
    """Helm removes a default that is given as null."""
    none = ("--set", "dashboards.labels=null", "--set", "dashboards.annotations=null")
    for thing in config_maps(objects("--set", "dashboards.enabled=true", *none)).values():
        assert "grafana_dashboard" not in thing["metadata"]["labels"]
        assert thing["metadata"]["labels"]["app.kubernetes.io/name"] == "modelchain"
        assert "annotations" not in thing["metadata"]


def units(text: str) -> set[str]:
    return set(re.findall(r'"currency:(.*?)"', text))


def compared(text: str) -> set[str]:
    return set(re.findall(r'currency=\\"(.*?)\\"', text))


@pytest.mark.parametrize(
    ("arguments", "currency"),
    [
        ((), "USD"),
        (("--set", "dashboards.currency=CHF"), "CHF"),
        (("--set-json", f"nodePools={json.dumps(POOLS)}"), "JPY"),
    ],
)
def test_the_currency_is_that_of_the_prices(arguments: tuple[str, ...], currency: str) -> None:
    maps = config_maps(objects("--set", "dashboards.enabled=true", *arguments))
    text = maps["family"]["data"]["modelchain-family.json"]
    assert (units(text), compared(text)) == ({f"{currency} "}, {currency})
    assert "USD" not in text or currency == "USD"
