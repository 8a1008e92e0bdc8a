"""`make chart`: write all files that are made from the chart or copied into it. A test fails when
one is not current.

They are copies of the CRDs, the schema of the operator's configuration, the README's table, the
dashboards of Grafana, manifests for `kubectl apply`, and what Argo CD has to know of chains.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import dashboards
import yaml

from modelchain.plan.pools import PoolFile

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "charts" / "modelchain"
ARGO = REPOSITORY / "deploy" / "gitops" / "argocd"
HOME = "modelchain-system"
SERVED = "team-a"  # the namespace in the manifests that serve one
# Labels that say Helm manages the object, which is not so after `kubectl apply`.
HELM_LINES = re.compile(r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n", re.M)
LABELS = re.compile(r"^  labels:\n(    .*\n)+", re.M)
MAY_BE_NULL = {"labels", "annotations", "disabled"}
Schema = dict[str, Any]


def helm(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Helm: that of $HELM, else the one that the tests build."""
    given = os.environ.get("HELM")
    if not given:
        from build import program  # not needed with $HELM

        given = str(program("helm"))
    done = subprocess.run([given, *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"helm {' '.join(arguments)}: {done.stderr}")
    return done


def inside() -> dict[Path, str]:
    """The content of each generated file in the chart."""
    files = {
        CHART / "files" / "crds" / crd.name: crd.read_text()
        for crd in (REPOSITORY / "crds").iterdir()
    }
    files |= {CHART / "files" / "dashboards" / n: text for n, text in dashboards.files().items()}
    return files | {
        CHART / "values.schema.json": schema(),
        CHART / "README.md": readme(),
        CHART / "files" / "argocd-cm.yaml": argocd(),
    }


def schema() -> str:
    """The chart's schema. It is written by hand, except for the operator's configuration."""
    whole = json.loads((CHART / "values.schema.json").read_text())
    types = PoolFile.model_json_schema(by_alias=True)
    for name, inner in types["properties"].items():
        whole["properties"][name] = _strict(inner, types["$defs"])
    whole["properties"]["nodePools"].pop("minProperties")  # none: the operator's defaults
    whole |= _required(whole, yaml.safe_load((CHART / "values.yaml").read_text()))
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _strict(source: Schema, defs: dict[str, Schema]) -> Schema:
    """A schema without references, titles, defaults, nulls, and keys not of a map's pattern."""
    if "anyOf" in source:
        (choice,) = (choice for choice in source["anyOf"] if choice != {"type": "null"})
        source = choice | {key: value for key, value in source.items() if key != "anyOf"}
    if "$ref" in source:
        source = defs[source["$ref"].rsplit("/", 1)[1]] | {
            k: v for k, v in source.items() if k != "$ref"
        }
    out = {key: value for key, value in source.items() if key not in ("title", "default")}
    if "description" in out:
        out["description"] = out["description"].split("\n\n")[0].replace("\n", " ")
    for key in ("properties", "patternProperties"):
        if key in out:
            out[key] = {name: _strict(inner, defs) for name, inner in out[key].items()}
    if "patternProperties" in out:
        out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = _strict(out[key], defs)
    if str(out.get("pattern")).startswith("^[0-9]{1,"):  # a quantity, and `cpu: 96` is one
        out["type"] = ["string", "integer"]
    return out


def _required(schema: Schema, defaults: dict[str, Any]) -> Schema:
    """A schema that requires the keys that have a default. Helm removes keys that are given as
    null, and a template may not notice. `resources` may lack keys, since users may want no limits;
    and null stands for no labels, no annotations, and no alerts that are left out.
    """
    out = {key: value for key, value in schema.items() if key != "required"} | {
        "required": sorted(defaults.keys() - MAY_BE_NULL)
    }
    inner = {
        name: (
            _required(of, defaults[name])
            if "properties" in of and defaults.get(name) and name != "resources"
            else of
        )
        for name, of in schema["properties"].items()
    }
    return out | {"properties": inner}


def readme() -> str:
    """The README, with the table of values between its two marks."""
    path = CHART / "README.md"
    table = "".join(f"| `{key}` | {about} | `{default}` |\n" for key, about, default in values())
    table = f"<!-- values -->\n| value | | default |\n|---|---|---|\n{table}<!-- end -->"
    return re.sub(r"<!-- values -->.*<!-- end -->", lambda _: table, path.read_text(), flags=re.S)


def values() -> Iterator[tuple[str, str, str]]:
    """Of every value its path, the comment above it, and its default."""
    text = (CHART / "values.yaml").read_text()
    yield from _values(yaml.compose(text), text.splitlines(), "", "")


def _values(node: Any, lines: list[str], path: str, above: str) -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        comment: list[str] = []
        while lines[key.start_mark.line - 1 - len(comment)].lstrip().startswith("# "):
            comment.insert(0, lines[key.start_mark.line - 1 - len(comment)].strip(" #"))
        about = " ".join(comment) or above
        name = f"{path}.{key.value}" if path else key.value
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _values(value, lines, name, about)
        else:
            default = yaml.safe_load(yaml.serialize(value))
            yield name, about.replace("|", "\\|"), json.dumps(default, ensure_ascii=False)


def argocd() -> str:
    """What Argo CD's ConfigMap has to have, made from the Lua beside its copy in deploy/gitops."""
    lua = {file.stem: file.read_text() for file in (ARGO / "actions").glob("*.lua")}
    offered = _text("discovery.lua", lua.pop("discovery"))
    defined = "".join(
        f"- name: {name}\n" + indent(_text("action.lua", lua[name]), "  ") for name in sorted(lua)
    )
    actions = f"{offered}definitions:\n{defined}"
    parts = {"health": (ARGO / "health.lua").read_text(), "actions": actions}
    customizations = "".join(
        _text(f"resource.customizations.{what}.modelchain.dev_ModelChain", text)
        for what, text in parts.items()
    )
    return "data:\n" + indent(customizations, "  ")


def _text(key: str, text: str) -> str:
    """A key whose value is a text of several lines."""
    return f"{key}: |\n" + indent(text, "  ")


def manifests() -> dict[Path, str]:
    """Manifests for `kubectl apply -f`, from the chart's templates and nothing else; and the patch
    of Argo CD's ConfigMap.
    """
    whole, one = _template(), _template(f"namespaces={{{SERVED}}}")
    nodes = [text for text in _template("rbac.nodes=true") if "-nodes\n" in text]
    patch = {ARGO / "argocd-cm.yaml": ABOUT_ARGOCD + argocd()}
    return _rights(whole, one, nodes) | _deployments(whole, one) | patch


ABOUT_ARGOCD = """# How Argo CD shows chains, and what it offers for them:
#   kubectl patch configmap argocd-cm -n argocd --patch-file deploy/gitops/argocd/argocd-cm.yaml
# Made from the Lua in this folder by `make chart`.
"""


ABOUT = {
    "account": (
        "The operator's account and its Lease of leader election: needed once, whether it serves a"
        " cluster or some namespaces."
    ),
    "cluster": (
        "Rights to serve every namespace. Beside account.yaml: kubectl apply -f account.yaml -f"
        " cluster.yaml"
    ),
    "namespaced": (
        "Rights to serve one namespace: kubectl apply -f account.yaml, then for each: kubectl apply"
        " -f namespaced.yaml -n NAMESPACE"
    ),
    "nodes": (
        "The right to read nodes, for prices by capacity. Beside the others, if a node pool has a"
        " capacityLabel: kubectl apply -f nodes.yaml"
    ),
}


def _rights(whole: list[str], one: list[str], nodes: list[str]) -> dict[Path, str]:
    """Accounts and roles, without labels: of the objects that serve the whole cluster, of those
    that serve one namespace, and of the right to read nodes.
    """
    account = [
        text
        for text in whole
        if text.startswith("apiVersion: v1\nkind: ServiceAccount") or "-leader\n" in text
    ]
    cluster = [
        text
        for text in whole
        if re.search(r"^kind: ClusterRole", text, re.M) and "name: modelchain-operator" in text
    ]
    served = f"  namespace: {SERVED}\n"
    namespaced = [text.replace(served, "") for text in one if served in text]
    files = {
        "account": [NAMESPACE, *account],
        "cluster": cluster,
        "namespaced": namespaced,
        "nodes": nodes,
    }
    return {
        REPOSITORY / "operator" / "rbac" / f"{name}.yaml": _file(ABOUT[name], texts, labels=False)
        for name, texts in files.items()
    }


def _deployments(whole: list[str], one: list[str]) -> dict[Path, str]:
    folder = REPOSITORY / "deploy"
    return {
        folder / "cluster.yaml": _file(
            "The operator, for every namespace: kubectl apply -f crds/ -f deploy/cluster.yaml",
            [NAMESPACE, *whole],
        ),
        folder / "namespaced.yaml": _file(
            f"The operator, for the namespace {SERVED} alone; with yours in its place:\n"
            f"#   sed s/{SERVED}/YOURS/ deploy/namespaced.yaml | kubectl apply -f crds/ -f -",
            [NAMESPACE, *one],
        ),
    }


NAMESPACE = f"""apiVersion: v1
kind: Namespace
metadata:
  name: {HOME}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


def _template(*settings: str) -> list[str]:
    """The objects that the chart renders, without the CRDs, which lie in crds/."""
    options = [
        option for setting in ("crds.enabled=false", *settings) for option in ("--set", setting)
    ]
    text = helm("template", "modelchain", str(CHART), "--namespace", HOME, *options).stdout
    return [
        HELM_LINES.sub("", part).strip() + "\n"
        for part in re.split(r"^---\n(?:# Source.*\n)?", text, flags=re.M)[1:]
    ]


def _file(about: str, objects: list[str], *, labels: bool = True) -> str:
    text = "---\n".join(text if labels else LABELS.sub("", text) for text in objects)
    return f"# {about}\n# Made from charts/modelchain by `make chart`.\n{text}"


if __name__ == "__main__":
    sys.path.append(str(REPOSITORY / "tests" / "cluster"))
    # In this order, since the chart must be current before it is rendered.
    for files in (inside, manifests):
        for path, text in files().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
