"""The chart's alerts and recording rules: promtool evaluates what Helm renders, every alert has a
page, and every metric that a rule names is served.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from alert_cases import CASES, STAGE, Case, Series, cost
from generate import CHART, REPOSITORY
from rendering import find, one, options, rendered, run

Rule = dict[str, Any]
ON = ["--set", "metrics.prometheusRule.enabled=true"]
URL = "https://docs.example.com/runbooks"
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
FILE = CHART / "files" / "rules.yaml"


def rules_of(*settings: str) -> list[Rule]:
    """The groups of the rendered PrometheusRule."""
    done = run(*ON, *settings)
    assert done.returncode == 0, done.stderr
    things = tuple(thing for thing in yaml.safe_load_all(done.stdout) if thing)
    groups: list[Rule] = one(things, "PrometheusRule")["spec"]["groups"]
    return groups


@pytest.fixture(scope="module")
def groups() -> list[Rule]:
    return rules_of("--set", f"metrics.prometheusRule.runbookUrl={URL}/")


def alerts_of(groups: list[Rule]) -> dict[str, Rule]:
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def records_of(groups: list[Rule]) -> dict[str, str]:
    return {r["record"]: r["expr"] for group in groups for r in group["rules"] if "record" in r}


def filled(template: str, labels: dict[str, str], shows: str) -> str:
    """A template of Prometheus with these labels, and with a text for the value."""
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], template)
    return re.sub(r"\{\{ \$value [^}]*\}\}", shows, text)


def expected(rule: Rule, case: Case) -> list[Rule]:
    return [
        {
            "exp_labels": {**labels, **rule["labels"]},
            "exp_annotations": {
                name: filled(text, labels, case.shows) for name, text in rule["annotations"].items()
            },
        }
        for labels in case.fires
    ]


def promtool_test(name: str, series: Series, **tests: Any) -> Rule:
    known = [{"series": key, "values": values} for key, values in series.items()]
    return {"name": name, "interval": "1m", "input_series": known, **tests}


def evaluated(promtool: Path, folder: Path, groups: list[Rule], tests: list[Rule]) -> None:
    """`promtool test rules`; all groups are evaluated in the order of the file."""
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "group_eval_order": [group["name"] for group in groups],
        "tests": tests,
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(document))
    command = [promtool, "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_only_then(
    promtool: Path, tmp_path: Path, groups: list[Rule]
) -> None:
    rules = alerts_of(groups)
    assert CASES.keys() == rules.keys()
    tests = [
        promtool_test(
            f"{alert}: {case.name}",
            case.series,
            alert_rule_test=[
                {
                    "eval_time": f"{case.at}m",
                    "alertname": alert,
                    "exp_alerts": expected(rules[alert], case),
                }
            ],
        )
        for alert, cases in CASES.items()
        for case in cases
    ]
    evaluated(promtool, tmp_path, groups, tests)


def test_each_alert_has_a_case_of_both_kinds() -> None:
    for alert, cases in CASES.items():
        assert any(case.fires for case in cases) and not all(case.fires for case in cases), alert


def test_a_wrong_expectation_is_found(promtool: Path, tmp_path: Path, groups: list[Rule]) -> None:
    """The tests above would see an alert that does not fire."""
    case = CASES["ModelChainFailed"][0]
    quiet = {"eval_time": f"{case.at}m", "alertname": "ModelChainFailed", "exp_alerts": []}
    with pytest.raises(AssertionError, match="FAILED"):
        evaluated(
            promtool, tmp_path, groups, [promtool_test("x", case.series, alert_rule_test=[quiet])]
        )


def test_a_counter_goes_on_when_another_replica_leads(
    promtool: Path, tmp_path: Path, groups: list[Rule]
) -> None:
    """Both replicas tell the same for a moment, then one of them is silent."""
    before = cost("0+0.5x30 stale")
    after = {key.replace("o-0", "o-1"): "_x28 14+0.5x32" for key in before}
    labels = {**STAGE, "source": "trained", "currency": "USD"}
    shown = "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
    name = "namespace_chain_stage_source_currency:modelchain_stage_cost:max"
    increase = {
        "expr": f"increase({name}[1h])",
        "eval_time": "60m",
        "exp_samples": [{"labels": shown, "value": 30}],
    }
    test = promtool_test("two replicas", before | after, promql_expr_test=[increase])
    evaluated(promtool, tmp_path, groups, [test])


def test_records_keep_all_labels_but_those_of_the_replica(groups: list[Rule]) -> None:
    records = records_of(groups)
    assert len(records) == 6
    for name, expr in records.items():
        level, metric, _ = name.split(":")
        by = level.replace("_", ", ")
        assert expr == f"max by ({by}) ({metric}_total)"


def test_the_file_is_what_prometheus_reads(promtool: Path) -> None:
    command = [promtool, "check", "rules", "--lint=all", "--lint-fatal", FILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def served() -> set[str]:
    """The names of all series that docs/metrics.md lists; it lists all that is served."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.M)
    parts = [f"{name}_{part}" for name, kind in rows if kind == "histogram" for part in PARTS]
    return {name for name, _ in rows} | set(parts)


PARTS = ("bucket", "count", "sum")


def test_every_metric_that_a_rule_names_is_served(groups: list[Rule]) -> None:
    records = records_of(groups)
    for group in groups:
        for rule in group["rules"]:
            named = set(re.findall(r"[a-z_]+:[a-z_]+:\w+|modelchain_\w+", rule["expr"]))
            assert named and named <= served() | records.keys(), rule


def test_each_alert_has_a_page_and_each_page_an_alert(groups: list[Rule]) -> None:
    rules = alerts_of(groups)
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == rules.keys()
    for alert, rule in rules.items():
        assert rule["annotations"]["runbook_url"] == f"{URL}/{alert}.md"
        text = (RUNBOOKS / f"{alert}.md").read_text()
        assert text.startswith(f"# {alert}\n"), alert
        assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS, alert
        diagnosis = text.partition("## Diagnosis")[2].partition("## Mitigation")[0]
        assert re.search(r"^```(sh|text)\n", diagnosis, re.M), f"{alert}: no command to type"


def test_the_table_of_alerts_is_complete(groups: list[Rule]) -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(runbooks/(\w+)\.md\) \| (\w+) \|", page, re.M)
    rules = alerts_of(groups)
    assert [name for name, *_ in rows] == list(rules)
    for name, link, severity in rows:
        assert link == name and severity == rules[name]["labels"]["severity"]


def test_each_alert_says_what_to_type(groups: list[Rule]) -> None:
    for alert, rule in alerts_of(groups).items():
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        command = r"Type: (modelchain (explain|cost)|kubectl (get|logs)) "
        assert re.search(command, rule["annotations"]["description"]), alert


def test_it_is_off_by_default_and_an_alert_can_be_left_out() -> None:
    assert not find(rendered("default"), "PrometheusRule")
    full = one(rendered("full"), "PrometheusRule")
    assert full["metadata"]["labels"]["release"] == "prometheus"
    rules = alerts_of(full["spec"]["groups"])
    assert "ModelChainQueuedTooLong" not in rules and len(rules) == len(CASES) - 1
    assert len(records_of(full["spec"]["groups"])) == 6
    without = json.dumps(list(CASES))
    groups = rules_of("--set-json", f"metrics.prometheusRule.disabled={without}")
    assert [group["name"] for group in groups] == ["modelchain.records"], "no group is empty"


def test_no_alert_is_left_out_by_null() -> None:
    groups = rules_of("--set", "metrics.prometheusRule.disabled=null")
    assert alerts_of(groups).keys() == CASES.keys()


def test_without_an_address_alerts_have_no_link() -> None:
    for rule in alerts_of(rules_of()).values():
        assert "runbook_url" not in rule["annotations"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('disabled=["ModelChainFail"]', "ModelChainFail is not among the alerts: ModelChainArti"),
        ('runbookUrl="docs/runbooks"', "runbookUrl"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(setting: str, said: str) -> None:
    done = run(*ON, *options("full"), "--set-json", f"metrics.prometheusRule.{setting}")
    assert done.returncode != 0 and said in done.stderr
