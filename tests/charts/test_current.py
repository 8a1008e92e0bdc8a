"""All that is made from the chart or copied into it is as `make chart` makes it. Versions and
commands agree.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate import CHART, REPOSITORY, helm, inside, manifests, values
from rendering import ALL, HOME, options

FILES = [
    "deploy/cluster.yaml",
    "deploy/namespaced.yaml",
    *(f"operator/rbac/{n}.yaml" for n in ("account", "cluster", "nodes")),
]


def test_generated_files_are_current() -> None:
    wrong = [
        str(path) for path, text in (inside() | manifests()).items() if path.read_text() != text
    ]
    assert not wrong, "type: make chart"


def test_the_chart_carries_the_crds_byte_by_byte() -> None:
    ours, copies = REPOSITORY / "crds", CHART / "files" / "crds"
    assert sorted(path.name for path in ours.iterdir()) == sorted(
        path.name for path in copies.iterdir()
    )
    for path in ours.iterdir():
        assert path.read_bytes() == (copies / path.name).read_bytes()


def test_the_version_is_that_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == chart["version"] == project["version"]


def test_every_value_has_a_text() -> None:
    assert not [name for name, about, _ in values() if not about]


def test_every_value_of_the_schema_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def missing(schema: Any, defaults: Any, path: str = "") -> list[str]:
        names = schema.get("properties", {}) if isinstance(defaults, dict) and defaults else {}
        return [
            found
            for name, inner in names.items()
            for found in (
                [f"{path}{name}"]
                if name not in defaults
                else missing(inner, defaults[name], f"{path}{name}.")
            )
        ]

    assert missing(schema, defaults) == ["global"]


@pytest.mark.parametrize("name", ALL)
def test_lint(name: str) -> None:
    helm("lint", "--strict", str(CHART), *options(name))


@pytest.mark.parametrize("file", FILES)
def test_plain_manifests_hold_nothing_of_helm(file: str) -> None:
    text = (REPOSITORY / file).read_text()
    assert "helm" not in text.replace("charts/modelchain", "").lower()
    assert all(
        thing["metadata"].get("namespace", HOME) in (HOME, "team-a")
        for thing in yaml.safe_load_all(text)
    )


@pytest.mark.parametrize(
    ("settings", "namespace"), [((), HOME), (("--set", "namespaces={vision,language}"), "vision")]
)
def test_notes_name_the_next_commands(settings: tuple[str, ...], namespace: str) -> None:
    command = [
        "install",
        "modelchain",
        str(CHART),
        "--dry-run=client",
        "--namespace",
        HOME,
        *settings,
    ]
    notes = helm(*command).stdout.split("\nNOTES:\n")[1]
    commands = [line.strip() for line in notes.splitlines() if line.startswith("  ")]
    assert commands == [
        f"kubectl rollout status deployment/modelchain-operator -n {HOME}",
        f"kubectl apply -f examples/quickstart-cluster.yaml -n {namespace}",
        f"kubectl get mchain -n {namespace} --watch",
        f"modelchain explain quickstart -n {namespace}",
    ]
    assert (REPOSITORY / "examples" / "quickstart-cluster.yaml").is_file()


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (CHART / "README.md").read_text()
    links = [Path(link) for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert links
    assert not [str(link) for link in links if not (CHART / link).exists()]
