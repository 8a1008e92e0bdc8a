"""The one way to the API server: a thin layer over `kubernetes.aio`.

Objects are plain dicts, and every kind of failure has its own exception.

GET and LIST name no resourceVersion, so they are quorum reads. A read that fails is repeated here
for a few seconds. A write never is: after `Ambiguous` the caller reads whether it happened.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
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
# Seconds after which the server ends a watch; a stream that is silent for longer is dead.
WATCH_SECONDS = 290
STREAM = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=WATCH_SECONDS + 30)
# Objects in one page of a LIST.
CHUNK = 100
# The most open connections. All workers together use fewer, and each costs 250 KB for TLS.
CONNECTIONS = 40
# Seconds in which a failed read is tried again.
READ_PATIENCE = 8.0
# Seconds before the second try; doubled before each further one.
READ_BACKOFF = 0.2
# How many of our own writes are remembered, so as to recognise their watch events.
REMEMBERED = 4096
# Our clock and the API server's are taken for the same if they differ by no more seconds than this.
# A smaller difference cannot be measured: an answer's date has whole seconds, and is read late.
SAME_CLOCK = 10.0


@dataclass(frozen=True)
class Resource:
    """A kind of object, by the parts of its URL. The core group is the empty string."""

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
NODES = Resource("", "v1", "nodes")


class ApiError(Exception):
    """A call that did not succeed.

    `reason` and `causes` are those of the API server's answer, and empty without one.
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
    """404: the object, its namespace or its kind does not exist."""


class Conflict(ApiError):
    """409: the object has another resourceVersion or UID than we sent. Read it again."""


class AlreadyExists(ApiError):
    """409 on create: an object of that name exists."""


class Gone(ApiError):
    """410: a continue token or a resourceVersion is too old for the server."""


class Forbidden(ApiError):
    """401 or 403: a right or quota is missing, or an admission plugin refused; see the message."""

    @property
    def namespace_terminating(self) -> bool:
        """Whether the call failed because the namespace is being deleted."""
        return "NamespaceTerminating" in self.causes or "being terminated" in str(self)


class Invalid(ApiError):
    """400, 413, 415 or 422: the object will never be accepted as it is."""


class Throttled(ApiError):
    """429: the server did nothing. The call may be repeated after `retry_after` seconds."""

    retry_after: float


class Unavailable(ApiError):
    """No connection could be made, so a write was certainly not sent.

    For a read also: the answer was lost, or was a 5xx.
    """


class Ambiguous(Unavailable):
    """A write that may or may not have happened: its answer was lost, or was a 5xx.

    Never repeat such a write without reading first whether it happened.
    """


class Kube:
    """The calls that this operator makes. Use `connect` to make a `Kube`.

    Every call may raise any `ApiError`.
    """

    def __init__(self, api: Any):
        self.api = api
        # Requests by verb, plural and status. The status is 0 if no answer came.
        self.calls: Counter[tuple[str, str, int]] = Counter()
        # Seconds that our clock is behind the API server's, by the dates of its answers.
        self._behind = 0.0
        # The UID and resourceVersion that each of our last writes gave its object.
        self._written: OrderedDict[tuple[str, str], None] = OrderedDict()
        api.user_agent = f"modelchain-operator/{version('modelchain')}"
        # By default aiohttp sends a PUT or DELETE again when a kept-alive connection breaks. The
        # first one may have arrived, so that would hide an `Ambiguous`.
        api.rest_client.pool_manager._retry_connection = False
        # `trust_env` takes proxies from the environment. It also reads ~/.netrc for each request,
        # in a thread, so it is off where no proxy is set.
        api.rest_client.pool_manager._trust_env = any(scheme != "no" for scheme in getproxies())

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object, as it is in etcd now."""
        return await self._read("get", resource, resource.path(namespace, name))

    async def pages(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> AsyncIterator[list[Object]]:
        """All objects of a kind, page by page, as they were at one moment.

        Without a namespace, those of all namespaces. Each item gets its `apiVersion` and `kind`,
        which the server leaves out in a list. Raises `Gone` if the caller takes too long between
        two pages.
        """
        async for page in self._pages(resource, namespace, selector, fields):
            yield _items(page)

    async def _pages(
        self, resource: Resource, namespace: str | None, selector: str, fields: str
    ) -> AsyncIterator[Object]:
        """The pages of a LIST, as the server sends them."""
        token = ""
        while True:
            query = {
                "limit": str(CHUNK),
                "labelSelector": selector,
                "fieldSelector": fields,
                "continue": token,
            }
            page = await self._read("list", resource, resource.path(namespace), query)
            yield page
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def list_at(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """The objects of all pages, and the resourceVersion of that moment, for `watch`.

        If a page comes too late, the list is begun again.
        """
        for _ in range(3):
            found: list[Object] = []
            try:
                async for page in self._pages(resource, namespace, selector, fields):
                    found += _items(page)
                return found, str(page["metadata"].get("resourceVersion", ""))
            except Gone as error:
                gone = error
        raise gone

    async def list(
        self, resource: Resource, namespace: str | None = None, selector: str = "", fields: str = ""
    ) -> list[Object]:
        """As `list_at`, without the resourceVersion."""
        return (await self.list_at(resource, namespace, selector, fields))[0]

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        version: str,
        selector: str = "",
        fields: str = "",
    ) -> AsyncIterator[tuple[str, Object]]:
        """Each change since a resourceVersion: its type, such as MODIFIED, and the object.

        It ends when the server ends the stream, which it does after `WATCH_SECONDS` at the latest.
        Raises `Gone` if the resourceVersion is too old, and `Unavailable` if the stream breaks.
        """
        path = resource.path(namespace)
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
            "labelSelector": selector,
            "fieldSelector": fields,
        }
        async for line in self._lines("watch", resource, path, query):
            event = _parsed("GET", path, 200, line)
            if event["type"] == "ERROR":
                status = event["object"]
                raise _error("GET", path, int(status.get("code") or 500), status, None)
            yield event["type"], event["object"]

    async def log(
        self, namespace: str, pod: str, container: str, query: Mapping[str, str]
    ) -> AsyncIterator[str]:
        """The lines of a container's log, each with the time at which it was written.

        With `follow` in the query, the stream ends with the container, or when it breaks: then it
        raises `Unavailable`. Raises `Invalid` if the container has not started.
        """
        whole = {"container": container, "timestamps": "true", **query}
        path = PODS.path(namespace, pod, "log")
        async for line in self._lines("log", PODS, path, whole):
            yield line.decode(errors="replace")

    async def create(self, resource: Resource, obj: Object) -> Object:
        """POST; `AlreadyExists` when the name is taken. Returns the object with its UID."""
        return await self._write("create", "POST", resource, resource.path(_namespace(obj)), obj)

    async def replace(self, resource: Resource, obj: Object) -> Object:
        """PUT of the whole object, with the resourceVersion that it was read with.

        Raises `Conflict` if the object has changed since.
        """
        return await self._write("update", "PUT", resource, _own_path(resource, obj), obj)

    async def replace_status(self, resource: Resource, obj: Object) -> Object:
        """PUT of the status alone, with the resourceVersion that the object was read with.

        Raises `Conflict` if the object has changed since.
        """
        return await self._write(
            "update", "PUT", resource, _own_path(resource, obj) + "/status", obj
        )

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        """JSON merge patch.

        A `metadata.uid` or `metadata.resourceVersion` in it is a precondition. Raises `Conflict` if
        the object has another one.
        """
        return await self._patch(resource, resource.path(namespace, name), body)

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, body: Object
    ) -> Object:
        """JSON merge patch of the status alone, with preconditions as in `patch`."""
        return await self._patch(resource, resource.path(namespace, name, "status"), body)

    async def _patch(self, resource: Resource, path: str, body: Object) -> Object:
        return await self._write(
            "patch", "PATCH", resource, path, body, "application/merge-patch+json"
        )

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str,
        propagation: str = "Foreground",
    ) -> None:
        """DELETE of the object with this UID. Raises `Conflict` if another one has its name now."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": propagation}
        await self._write("delete", "DELETE", resource, resource.path(namespace, name), options)

    def now(self) -> float:
        """Seconds since the epoch, by the API server's clock if ours differs by some seconds.

        Ages are reckoned with it, since the API server dates all objects.
        """
        return time.time() + self._behind

    def _dated(self, answered: str | None) -> None:
        """Compare our clock with the `Date` header of an answer."""
        try:
            apart = parsedate_to_datetime(answered or "").timestamp() - time.time()
        except ValueError:
            return  # the answer of a proxy, which has no date
        self._behind = apart if abs(apart) > SAME_CLOCK else 0.0

    def wrote(self, obj: Object) -> bool:
        """Whether `obj` is exactly as one of our own writes left it.

        A watch event that shows such an object brings no news.
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
        """Send a read. While the server throttles or is away, repeat it for a few seconds."""
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
        """Send a write, once, and remember the version of the object that it made."""
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
        """The answer to one request. It is counted under `verb` and `resource`."""
        status = 0
        try:
            status, retry_after, text = await self._request(method, path, query, body, content)
        finally:
            self.calls[verb, resource.plural, status] += 1
        answer = _parsed(method, path, status, text)
        if status < 300:
            return answer
        raise _error(method, path, status, answer, retry_after)

    async def _lines(
        self, verb: str, resource: Resource, path: str, query: Mapping[str, str]
    ) -> AsyncIterator[bytes]:
        """The lines of an answer that may have no end, as they come. It is sent once."""
        status = 0
        try:
            response: aiohttp.ClientResponse = await self.api.call_api(
                path,
                "GET",
                query_params={key: value for key, value in query.items() if value},
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=STREAM,
            )
            status = response.status
            async with response:
                if status >= 300:
                    answer = _parsed("GET", path, status, await response.read())
                    raise _error("GET", path, status, answer, response.headers.get("Retry-After"))
                async for line in _split(response.content.iter_any()):
                    yield line
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"GET {path}: {str(error) or type(error).__name__}") from error
        finally:
            self.calls[verb, resource.plural, status] += 1

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
                # First, since a large body may take seconds to arrive.
                self._dated(response.headers.get("Date"))
                text = await response.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unavailable(f"{method} {path}: {error}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _lost(method)(f"{method} {path}: {str(error) or type(error).__name__}") from error
        return response.status, response.headers.get("Retry-After"), text


@asynccontextmanager
async def connect(kubeconfig: Path | None = None) -> AsyncIterator[Kube]:
    """A `Kube` for the given kubeconfig.

    Without one, the pod's service account is used, and outside a cluster $KUBECONFIG or
    ~/.kube/config. Raises InputError if that cannot be used.
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


def _items(page: Object) -> list[Object]:
    """The objects of a page, with the `apiVersion` and `kind` that the server leaves out there."""
    kind = {"apiVersion": page["apiVersion"], "kind": page["kind"].removesuffix("List")}
    return [kind | item for item in page["items"]]


async def _split(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream. They may be long: an object has up to 1.5 MB."""
    begun: list[bytes] = []
    async for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _namespace(obj: Object) -> str:
    return str(obj["metadata"]["namespace"])


def _version(obj: Object) -> tuple[str, str]:
    """What identifies one state of one object.

    The resourceVersion alone would not: two kinds may be kept in two etcds that count apart.
    """
    meta = obj.get("metadata", {})
    return meta.get("uid", ""), meta.get("resourceVersion", "")


def _own_path(resource: Resource, obj: Object) -> str:
    if not obj["metadata"].get("resourceVersion"):
        raise ValueError(f"a PUT of {resource.plural} without the resourceVersion it was read with")
    return resource.path(_namespace(obj), obj["metadata"]["name"])


def _lost(method: str) -> type[Unavailable]:
    """The exception for an answer that was lost or cannot be read: only a read may be repeated."""
    return Unavailable if method == "GET" else Ambiguous


def _parsed(method: str, path: str, status: int, text: bytes) -> Object:
    """The answer's JSON. An error of a proxy is a page of text, which becomes the message."""
    try:
        return dict(json.loads(text))
    except ValueError:
        page = text[:500].decode(errors="replace").strip().removeprefix(f"{status} ")
    if status < 300:
        raise _lost(method)(f"{method} {path}: the answer is not JSON: {page}")
    return {"message": page}


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
    if kind is Throttled and seconds is None:  # `Retry-After` may also be a date, or be missing
        seconds = 1.0
    causes = ((status.get("details") or {}).get("causes")) or []
    return kind(
        f"{method} {path}: {code} {status.get('message') or reason}",
        code=code,
        reason=reason,
        causes=[str(cause.get("reason")) for cause in causes],
        retry_after=seconds,
    )
