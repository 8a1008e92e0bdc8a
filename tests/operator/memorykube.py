"""An API server in memory. It has what passes of the operator need. It fails only on request."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from specs import with_changes

from modelchain_operator.api.kube import (
    AlreadyExists,
    ApiError,
    Conflict,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.runners.template import ROLE, TRAINING, TRAINS

MOMENT = "2026-01-01T00:00:00Z"
IMAGE = "registry.example/trainer@sha256:" + "0" * 64


def chain() -> Object:
    """A chain of two stages on claims that exist."""
    spec = with_changes(
        {
            "metadata": {"name": "vit", "namespace": "team", "uid": "c" * 36, "generation": 1},
            "spec.runner": {"nodePool": "a100-80gb", "image": IMAGE},
            "spec.storage.claimName": "artifacts",
            "spec.data.volume.claimName": "data",
        }
    )
    return {**spec, "metadata": {**spec["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z"}}


class MemoryKube:
    """Stands in for `Kube`. `wrote_status` is called with each status that is written.

    A write whose verb and kind are in `refuse` raises the error that is given there.
    """

    def __init__(self, wrote_status: Callable[[Object], None] = lambda status: None) -> None:
        self.refuse: dict[tuple[str, str], ApiError] = {}
        # Index Jobs end well as soon as they are made. Otherwise a test has to end them.
        self.indexes_at_once = True
        self.objects: dict[tuple[str, str], Object] = {}
        self.calls: Counter[Any] = Counter()
        # How often an object of a kind and name was created.
        self.made: Counter[tuple[str, str]] = Counter()
        self.wrote_status = wrote_status
        self._version = 0

    def put(self, resource: Resource, obj: Object) -> Object:
        """Stores an object and returns it as stored, with a UID and a new version."""
        self._version += 1
        meta = obj["metadata"]
        meta |= {
            "resourceVersion": str(self._version),
            "uid": meta.get("uid") or f"u{meta['name']}",
        }
        meta.setdefault("creationTimestamp", MOMENT)
        self.objects[resource.plural, meta["name"]] = copy.deepcopy(obj)
        return copy.deepcopy(obj)

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if (resource.plural, name) not in self.objects:
            raise NotFound(f"{resource.plural} {name}", code=404)
        return copy.deepcopy(self.objects[resource.plural, name])

    async def list(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> list[Object]:
        found = [obj for (plural, _), obj in self.objects.items() if plural == resource.plural]
        return copy.deepcopy([obj for obj in found if _selected(obj, selector)])

    def _check(self, verb: str, resource: Resource) -> None:
        if (verb, resource.plural) in self.refuse:
            raise self.refuse[verb, resource.plural]

    async def create(self, resource: Resource, obj: Object) -> Object:
        self._check("create", resource)
        if (resource.plural, obj["metadata"]["name"]) in self.objects:
            raise AlreadyExists(f"{resource.plural} {obj['metadata']['name']}", code=409)
        key = resource.plural, obj["metadata"]["name"]
        self.made[key] += 1
        if self.made[key] > 1:  # another object than the one before of this name
            obj["metadata"]["uid"] = f"u{obj['metadata']['name']}-{self.made[key]}"
        labels = obj["metadata"].get("labels") or {}
        if self.indexes_at_once and labels.get("modelchain.dev/role") == "index":
            obj = obj | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
        return self.put(resource, obj)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        self._check("patch", resource)
        return self.put(resource, _merged(self.objects[resource.plural, name], body))

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, body: Object
    ) -> Object:
        self._check("status", resource)
        stored, known = self.objects[resource.plural, name], body["metadata"]["resourceVersion"]
        if stored["metadata"]["resourceVersion"] != known:
            raise Conflict(f"{resource.plural} {name} has changed", code=409)
        return self.put(resource, _merged(stored, {"status": body["status"]}))

    async def replace_status(self, resource: Resource, obj: Object) -> Object:
        self._check("status", resource)
        stored = self.objects[resource.plural, obj["metadata"]["name"]]
        if stored["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            raise Conflict(f"{resource.plural} {obj['metadata']['name']}", code=409)
        if stored.get("status") == obj.get("status"):
            return copy.deepcopy(stored)
        self.wrote_status(obj["status"])
        return self.put(resource, stored | {"status": obj["status"]})

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str, propagation: str = ""
    ) -> None:
        self._check("delete", resource)
        del self.objects[resource.plural, name]

    def wrote(self, obj: Object) -> bool:
        return False


def _selected(obj: Object, selector: str) -> bool:
    labels = obj["metadata"].get("labels") or {}
    if TRAINS in selector:
        selector = selector.replace(TRAINS, "")
        if labels.get(ROLE) not in TRAINING:
            return False
    for term in filter(None, selector.split(",")):
        key, _, value = term.partition("=")
        if key.endswith("!"):
            if labels.get(key[:-1]) == value:
                return False
        elif labels.get(key) != value:
            return False
    return True


def _merged(old: Object, patch: Object) -> Object:
    """The object after a merge patch (RFC 7386)."""
    out = dict(old)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            out[key] = _merged(out.get(key) or {}, value)
        else:
            out[key] = value
    return out
