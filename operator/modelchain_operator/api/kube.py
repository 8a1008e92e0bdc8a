"""The one way to the API server: a thin port over `kubernetes.aio`, plain dicts in and out, every
failure with a name.

GET and LIST name no resourceVersion, so they are quorum reads. Reads are repeated here for a few
seconds; a write never
is: whether it happened is for the caller to read again (`Ambiguous`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import aiohttp
from kubernetes.aio import client, config

from modelchain.errors import InputError

Object = dict[str, Any]

TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=5)
CHUNK = 100  # objects in one page of a LIST
CONNECTIONS = 40  # at most, more than all workers use; each holds a quarter of a MB for TLS
READ_PATIENCE = 8.0  # seconds in which a failed read is tried again
READ_BACKOFF = 0.2  # seconds before the second try; doubled each time
REMEMBERED = 4096  # writes
SAME_CLOCK = 10.0  # seconds: an answer's date is whole seconds, and may be read late


@dataclass(frozen=True)
class Resource:
    """A kind of object, as its URL names it; the core group is the empty string."""

    group: str
    version: str
    plural: str

    @property
    def qualified(self) -> str:
        """As `kubectl` and a CRD name it: the plural, and the group if it has one."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, *parts: str) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return "/".join(
            [root, *(["namespaces", namespace] if namespace else []), self.plural, *parts]
        )


CHAINS = Resource("modelchain.dev", "v1alpha1", "modelchains")
ARTIFACTS = Resource("modelchain.dev", "v1alpha1", "stageartifacts")
PODS = Resource("", "v1", "pods")
CLAIMS = Resource("", "v1", "persistentvolumeclaims")
EVENTS = Resource("", "v1", "events")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
JOBS = Resource("batch", "v1", "jobs")


class ApiError(Exception):
    """A call that did not succeed. `reason` and `causes` are the API server's own words, empty
    where it said none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int = 0,
        reason: str = "",
        causes: Iterable[str] = (),
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.causes = frozenset(causes)
        self.retry_after = retry_after


class NotFound(ApiError):
    """404: the object, its namespace or its kind is not there."""


class Conflict(ApiError):
    """409: the resourceVersion or UID we hold is not the object's any more. Read again."""


class AlreadyExists(ApiError):
    """409 on create: an object of that name is there."""


class Gone(ApiError):
    """410: the server no longer has what a token or version stands for."""


class Forbidden(ApiError):
    """401 or 403: no right, no quota, or an admission plugin's no; the message quotes it."""

    @property
    def namespace_terminating(self) -> bool:
        """The namespace is being deleted: nothing more is to be created in it."""
        return "NamespaceTerminating" in self.causes or "being terminated" in str(self)


class Invalid(ApiError):
    """400, 413, 415 or 422: the object will never be accepted as it is."""


class Throttled(ApiError):
    """429: not done; come back after `retry_after` seconds."""

    retry_after: float


class Unavailable(ApiError):
    """No connection, or a read without an answer, or 5xx to a read. For a write: surely not
    sent.
    """


class Ambiguous(Unavailable):
    """A write that may or may not have happened: the answer was lost, or was a 5xx. Never repeat it
    without a read.
    """


class Kube:
    """The calls this operator makes. `calls` counts requests by verb, plural and status, which is 0
    without an answer.

    Every call may raise any `ApiError`. Make one with `connect`.
    """

    def __init__(self, api: Any):
        self.api = api
        self.calls: Counter[tuple[str, str, int]] = Counter()
        self._behind = 0.0  # our clock, in seconds, as the answers' dates tell
        # UIDs and resourceVersions.
        self._written: OrderedDict[tuple[str, str], None] = OrderedDict()
        api.user_agent = f"modelchain-operator/{version('modelchain')}"
        # aiohttp repeats a PUT or DELETE once when a kept connection dies, which would hide an
        # `Ambiguous`
        api.rest_client.pool_manager._retry_connection = False
        # without a proxy only ~/.netrc would be read, in a thread and for each request
        api.rest_client.pool_manager._trust_env = any(scheme != "no" for scheme in getproxies())

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object as etcd has it now."""
        return await self._read("get", resource, resource.path(namespace, name))

    async def pages(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> AsyncIterator[list[Object]]:
        """All objects of a kind, of all namespaces when None, as of one moment, a page at a time.

        The items carry `apiVersion` and `kind`, which the server leaves out. Raises `Gone` when a
        page was asked for too long after the last.
        """
        token = ""
        while True:
            query = {
                "limit": str(CHUNK),
                "labelSelector": selector,
                "fieldSelector": fields,
                "continue": token,
            }
            page = await self._read("list", resource, resource.path(namespace), query)
            kind = {"apiVersion": page["apiVersion"], "kind": page["kind"].removesuffix("List")}
            yield [kind | item for item in page["items"]]
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def list(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> list[Object]:
        """All `pages` together."""
        for _ in range(3):
            try:
                return [
                    item
                    async for page in self.pages(resource, namespace, selector, fields)
                    for item in page
                ]
            except Gone as error:
                gone = error
        raise gone

    async def create(self, resource: Resource, obj: Object) -> Object:
        """POST; `AlreadyExists` when the name is taken. Returns the object with its UID."""
        return await self._write("create", "POST", resource, resource.path(_namespace(obj)), obj)

    async def replace(self, resource: Resource, obj: Object) -> Object:
        """PUT of the whole object, which must hold the resourceVersion it was read with; else
        `Conflict`.
        """
        return await self._write("update", "PUT", resource, _own_path(resource, obj), obj)

    async def replace_status(self, resource: Resource, obj: Object) -> Object:
        """PUT of the status alone, which must hold the resourceVersion it was read with; else
        `Conflict`.
        """
        return await self._write(
            "update", "PUT", resource, _own_path(resource, obj) + "/status", obj
        )

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        """JSON merge patch. `metadata.uid` and `metadata.resourceVersion` in it are preconditions;
        else `Conflict`.
        """
        return await self._write(
            "patch",
            "PATCH",
            resource,
            resource.path(namespace, name),
            body,
            "application/merge-patch+json",
        )

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str,
        propagation: str = "Foreground",
    ) -> None:
        """DELETE of the object with that UID; `Conflict` when another object has the name now."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": propagation}
        await self._write("delete", "DELETE", resource, resource.path(namespace, name), options)

    def now(self) -> float:
        """Seconds since the epoch by the API server's clock, which dates all objects, if ours is
        seconds off.
        """
        return time.time() + self._behind

    def _dated(self, answered: str | None) -> None:
        try:
            apart = parsedate_to_datetime(answered or "").timestamp() - time.time()
        except ValueError:
            return  # a proxy's answer without a date
        self._behind = apart if abs(apart) > SAME_CLOCK else 0.0

    def wrote(self, obj: Object) -> bool:
        """Whether `obj` is just as a write of ours left it: a watch event that shows it so is no
        news.
        """
        return _version(obj) in self._written

    async def resource_exists(self, resource: Resource) -> bool:
        """Whether the API server serves this kind, for instance whether a CRD is installed."""
        root = (
            f"/apis/{resource.group}/{resource.version}"
            if resource.group
            else f"/api/{resource.version}"
        )
        try:
            found = await self._read("discover", resource, root)
        except NotFound:
            return False
        return any(item["name"] == resource.plural for item in found["resources"])

    async def _read(
        self, verb: str, resource: Resource, path: str, query: Mapping[str, str] | None = None
    ) -> Object:
        deadline, pause = time.monotonic() + READ_PATIENCE, READ_BACKOFF
        while True:
            try:
                return await self._send(
                    verb, resource, "GET", path, {k: v for k, v in (query or {}).items() if v}
                )
            except (Throttled, Unavailable) as error:
                wait = max(pause * random.uniform(0.5, 1.5), error.retry_after or 0.0)
                if time.monotonic() + wait > deadline:
                    raise
                await asyncio.sleep(wait)
                pause *= 2

    async def _write(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        body: Object,
        content: str = "application/json",
    ) -> Object:
        answer = await self._send(verb, resource, method, path, {}, body, content)
        if verb != "delete":
            self._written[_version(answer)] = None
            while len(self._written) > REMEMBERED:
                self._written.popitem(last=False)
        return answer

    async def _send(
        self,
        verb: str,
        resource: Resource,
        method: str,
        path: str,
        query: dict[str, str],
        body: Object | None = None,
        content: str = "",
    ) -> Object:
        """The answer to one request. `verb` and `resource` are what it is counted as."""
        status = 0
        try:
            status, retry_after, text = await self._request(method, path, query, body, content)
        finally:
            self.calls[verb, resource.plural, status] += 1
        answer = _parsed(method, path, status, text)
        if status < 300:
            return answer
        raise _error(method, path, status, answer, retry_after)

    async def _request(
        self, method: str, path: str, query: dict[str, str], body: Object | None, content: str
    ) -> tuple[int, str | None, bytes]:
        """Status, `Retry-After` and body of the answer. Raises `Unavailable` if none came."""
        headers = {"Accept": "application/json"} | ({"Content-Type": content} if content else {})
        try:
            response: aiohttp.ClientResponse = await self.api.call_api(
                path,
                method,
                query_params=query,
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=TIMEOUT,
            )
            async with response:
                self._dated(response.headers.get("Date"))  # before a large body has taken its time
                text = await response.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unavailable(f"{method} {path}: {error}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _lost(method)(f"{method} {path}: {str(error) or type(error).__name__}") from error
        return response.status, response.headers.get("Retry-After"), text


@asynccontextmanager
async def connect(kubeconfig: Path | None = None) -> AsyncIterator[Kube]:
    """A `Kube` for the given kubeconfig, else the pod's service account, else $KUBECONFIG or
    ~/.kube/config.

    Raises InputError when none of them can be used.
    """
    settings = client.Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            path = str(kubeconfig) if kubeconfig else None
            await config.load_kube_config(config_file=path, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise InputError(f"no API server to talk to: {error}", file=kubeconfig) from error
    settings.connection_pool_maxsize = CONNECTIONS
    async with client.ApiClient(settings) as api:
        yield Kube(api)


def _namespace(obj: Object) -> str:
    return str(obj["metadata"]["namespace"])


def _version(obj: Object) -> tuple[str, str]:
    """What names one state of one object: two kinds may be kept in two etcds, whose revisions are
    not the same.
    """
    meta = obj.get("metadata", {})
    return meta.get("uid", ""), meta.get("resourceVersion", "")


def _own_path(resource: Resource, obj: Object) -> str:
    if not obj["metadata"].get("resourceVersion"):
        raise ValueError(f"a PUT of {resource.plural} without the resourceVersion it was read with")
    return resource.path(_namespace(obj), obj["metadata"]["name"])


def _lost(method: str) -> type[Unavailable]:
    """What an answer that did not come, or cannot be read, means for a request of this method."""
    return Unavailable if method == "GET" else Ambiguous


def _parsed(method: str, path: str, status: int, text: bytes) -> Object:
    """The answer's JSON; of an error whose body is a proxy's page, that page as its message."""
    try:
        return dict(json.loads(text))
    except ValueError:
        said = text[:500].decode(errors="replace").strip().removeprefix(f"{status} ")
    if status < 300:
        raise _lost(method)(f"{method} {path}: the answer is not JSON: {said}")
    return {"message": said}


def _error(method: str, path: str, code: int, status: Object, retry_after: str | None) -> ApiError:
    """The exception for a `metav1.Status` answer."""
    reason = str(status.get("reason") or "")
    kind: type[ApiError]
    match code:
        case 404:
            kind = NotFound
        case 409:
            kind = AlreadyExists if reason == "AlreadyExists" else Conflict
        case 410:
            kind = Gone
        case 401 | 403:
            kind = Forbidden
        case 400 | 413 | 415 | 422:
            kind = Invalid
        case 429:
            kind = Throttled
        case _ if code >= 500:
            kind = _lost(method)
        case _:
            kind = ApiError
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    if kind is Throttled and seconds is None:
        seconds = 1.0
    causes = ((status.get("details") or {}).get("causes")) or []
    return kind(
        f"{method} {path}: {code} {status.get('message') or reason}",
        code=code,
        reason=reason,
        causes=[str(cause.get("reason")) for cause in causes],
        retry_after=seconds,
    )
