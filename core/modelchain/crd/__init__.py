"""The CustomResourceDefinitions, made from the API types. No file is read or written here."""

from __future__ import annotations

from modelchain.api.artifact import StageArtifactSpec, StageArtifactStatus
from modelchain.api.spec import API_VERSION, ChainSpec
from modelchain.api.status import ChainStatus
from modelchain.cel import Rule
from modelchain.crd.rules import ARTIFACT, CHAIN
from modelchain.crd.schema import MAX_KEYS, Schema, nodes, structural

GROUP, VERSION = API_VERSION.split("/")
CATEGORIES = ["modelchain", "ml"]
# The status is written apart from the rest of the object, with a right of its own.
_STATUS: Schema = {"subresources": {"status": {}}}


def definitions() -> dict[str, Schema]:
    """Every CRD, by the name of its file."""
    return {"modelchains.yaml": _modelchain(), "stageartifacts.yaml": _stageartifact()}


def _modelchain() -> Schema:
    spec = structural(ChainSpec, nullable=False)
    for name in ("stages", "evaluation"):
        spec["properties"][name] |= {
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        }
    status = _status()
    schema = _object(
        "A family of models, each grown from the one before.",
        {"spec": spec, "status": status},
        CHAIN,
    )
    ready = '.status.conditions[?(@.type=="Ready")]'
    columns = [
        _column("Stage", ".status.summary.stage"),
        _column("State", ".status.summary.state"),
        _column("Progress", ".status.summary.progress"),
        _column("Accuracy", ".status.summary.accuracy"),
        _column("Cost", ".status.total.cost"),
        _column("Ready", f"{ready}.status", wide=True),
        _column("Reason", f"{ready}.reason", wide=True),
        _column("Gate", ".status.summary.gate", wide=True),
        _column("Queue", ".spec.runner.queueName", wide=True),
        _column("GPU-Seconds", ".status.total.gpuSeconds", kind="number", wide=True),
        _column("Message", f"{ready}.message", wide=True),
        _AGE,
    ]
    return _definition("ModelChain", "mchain", schema, columns, _STATUS)


def _status() -> Schema:
    status = structural(ChainStatus, nullable=True)
    status["properties"]["conditions"] |= {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    }
    # Removed stages are as stages. To describe them once is enough, since plain `kubectl apply`
    # copies the whole CRD into an annotation.
    removed = status["properties"]["removed"]["items"]["properties"]
    for _, part in nodes(status["properties"]["removed"]):
        part.pop("description", None)
    stages = status["properties"]["stages"]["items"]["properties"]
    for listed in (removed["attempts"], stages["unmeasured"]):
        listed["items"] = {
            "type": "object",
            "maxProperties": MAX_KEYS,
            "x-kubernetes-preserve-unknown-fields": True,
        }
    # A baseline is as a stage.
    status["properties"]["baselines"]["items"] = removed["attempts"]["items"]
    # By kstatus's rule a chain is in progress until the operator has seen it.
    status["default"] = {"observedGeneration": -1}
    return status


def _stageartifact() -> Schema:
    spec = structural(StageArtifactSpec, nullable=False)
    status = structural(StageArtifactStatus, nullable=True)
    schema = _object(
        "The record of one finished stage, which outlives its chain.",
        {"spec": spec, "status": status},
        ARTIFACT,
    )
    columns = [
        _column("Chain", ".spec.chain"),
        _column("Stage", ".spec.stage"),
        _column("Model", ".spec.model"),
        _column("Epochs", ".spec.epochs", kind="integer"),
        _column("Accuracy", ".spec.accuracy"),
        # Of training and of what was measured since, either may be missing, and a chain may ask for
        # either. So both are shown.
        _column("Later", ".status.accuracy"),
        _column("Cost", ".spec.cost"),
        _column("Digest", ".spec.artifactDigest", wide=True),
        _column("Claim", ".spec.claimName", wide=True),
        _column("Path", ".spec.path", wide=True),
        _AGE,
    ]
    return _definition("StageArtifact", "sart", schema, columns, _STATUS)


def _object(description: str, properties: Schema, rules: list[Rule]) -> Schema:
    """The schema of a whole object, with each rule at its path."""
    # Declared so that a rule can name metadata.name as the field at fault.
    metadata = {"type": "object", "properties": {"name": {"type": "string"}}}
    base = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata}
    schema = {
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": base | properties,
    }
    places = dict(nodes(schema))
    for rule in rules:
        places[rule.path].setdefault("x-kubernetes-validations", []).append(rule.validation())
    return schema


def _column(name: str, path: str, *, kind: str = "string", wide: bool = False) -> Schema:
    return {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide else {})


_AGE = _column("Age", ".metadata.creationTimestamp", kind="date")


def _definition(
    kind: str, short: str, schema: Schema, columns: list[Schema], more: Schema
) -> Schema:
    plural = f"{kind.lower()}s"
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
        "shortNames": [short],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": names | {"categories": CATEGORIES},
            "versions": [version | more | {"additionalPrinterColumns": columns}],
        },
    }
