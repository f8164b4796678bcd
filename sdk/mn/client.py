"""The HTTP API as methods: one per row of its table. What the SDK deploys with, and the CLI does everything with.

No method repeats a request by itself, since a lost answer does not tell whether something was created. All raise the
errors of `mn.errors`.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import quote

import httpx

from mn import failures
from mn.config import Context, current_context
from mn.duplex import KEEPALIVE, unreachable
from mn.formats.codecs import MEDIA_JSON, MEDIA_NDJSON
from mn.formats.errors import MnError, ProtocolError, Unavailable

CONNECT_S = 5.0
ANSWER_S = 120.0
CONNECTIONS_MAX = 128
UPLOAD_CHUNK_BYTES = 256 * 1024


class Client:
    """A runtime's API.

    >>> Client().functions()                                                                         # doctest: +SKIP
    """

    def __init__(self, url: str | None = None, key: str | None = None, *, ca: str | None = None) -> None:
        """Without arguments: the context in force (see `mn.config`)."""
        if url is None:
            context = current_context()
            self.context = Context(context.url, context.key if key is None else key, ca or context.ca, context.name)
        else:
            self.context = Context(url.rstrip("/"), key or "", ca)
        self._http: httpx.Client | None = None
        self._pid = 0

    @classmethod
    def of(cls, context: Context) -> Client:
        return cls(context.url, context.key, ca=context.ca)

    @property
    def url(self) -> str:
        return self.context.url

    @property
    def key(self) -> str:
        return self.context.key

    @property
    def http(self) -> httpx.Client:
        """The connections of this process; a forked child gets its own."""
        if self._http is None or self._pid != os.getpid():
            self._http, self._pid = _http(self.context), os.getpid()
        return self._http

    def close(self) -> None:
        if self._http is not None and self._pid == os.getpid():
            self._http.close()
        self._http = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests.
    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, whatever its kind. Raises the error that its problem document tells of."""
        try:
            answer = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise connection_error(self.url, error) from error
        raise_for_problem(answer)
        return answer

    def _json(self, method: str, path: str, **options: Any) -> Any:
        answer = self.request(method, path, **options)
        if not answer.content:
            return {}
        try:
            return answer.json()
        except ValueError:
            raise ProtocolError(f"{self.url}{path} did not answer with JSON: is that a MirrorNeuron gateway?") from None

    # Bundles.
    def push_bundle(
        self, archive: bytes | IO[bytes], *, deploy: bool = False, replace: bool = False, scope: str = ""
    ) -> dict[str, Any]:
        """Upload a tar.gz or zip, and deploy its functions when told: `{"digest", "functions"}`."""
        flags = {"deploy": deploy, "replace": replace}
        query = {**{name: "true" for name, value in flags.items() if value}, **({"scope": scope} if scope else {})}
        return dict(
            self._json(
                "POST",
                "/v1/bundles",
                params=query,
                content=_chunks(archive),
                headers={"Content-Type": "application/octet-stream", **_length(archive)},
                timeout=httpx.Timeout(None, connect=CONNECT_S),
            )
        )

    def bundles(self) -> list[dict[str, Any]]:
        return _listed(self._json("GET", "/v1/bundles"), "bundles")

    def bundle(self, digest: str) -> dict[str, Any]:
        return dict(self._json("GET", f"/v1/bundles/{quote(digest)}"))

    def bundle_content(self, digest: str) -> Iterator[bytes]:
        """The bundle as a tar.gz, in pieces."""
        with self._stream("GET", f"/v1/bundles/{quote(digest)}/content") as answer:
            yield from answer.iter_raw()

    def delete_bundle(self, digest: str) -> None:
        self.request("DELETE", f"/v1/bundles/{quote(digest)}")

    # Functions.
    def functions(self) -> list[dict[str, Any]]:
        return _listed(self._json("GET", "/v1/functions"), "functions")

    def function(self, name: str) -> dict[str, Any]:
        return dict(self._json("GET", f"/v1/functions/{quote(name)}"))

    def put_function(
        self, name: str, bundle: str, *, function: str = "", replace: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """Deploy a function of an uploaded bundle under a name; `settings` override the manifest's."""
        body = {"bundle": bundle, "replace": replace, **({"function": function} if function else {}), **settings}
        return dict(self._json("PUT", f"/v1/functions/{quote(name)}", json=body))

    def delete_function(self, name: str) -> None:
        self.request("DELETE", f"/v1/functions/{quote(name)}")

    def versions(self, name: str) -> dict[str, Any]:
        """`{"live": n, "versions": […]}`."""
        return dict(self._json("GET", f"/v1/functions/{quote(name)}/versions"))

    def rollback(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Make a version live again; None: the one before the live one."""
        body = b"" if version is None else json.dumps({"version": version}).encode()
        path = f"/v1/functions/{quote(name)}/rollback"
        return dict(self._json("POST", path, content=body, headers={"Content-Type": MEDIA_JSON}))

    def invoke(
        self, name: str, body: bytes, *, media: str = MEDIA_JSON, timeout_s: float | None = None
    ) -> httpx.Response:
        """One call, its body as it is; the answer's body is the result, its headers have the invocation's id and
        timing.
        """
        headers = {"Content-Type": media, **({"MN-Timeout": f"{timeout_s:g}"} if timeout_s is not None else {})}
        path = f"/v1/functions/{quote(name)}/invoke"
        return self.request("POST", path, content=body, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S))

    # Logs and failures.
    def logs(self, name: str, *, follow: bool = False, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Log records of a function, or of an invocation when the name is `inv_…`. With `follow` it goes on until
        closed.
        """
        kind = "invocations" if name.startswith("inv_") else "functions"
        query: dict[str, str] = {
            **({"follow": "1"} if follow else {}),
            **({"limit": str(limit)} if limit is not None else {}),
        }
        media = "text/event-stream" if follow else MEDIA_NDJSON
        with self._stream("GET", f"/v1/{kind}/{quote(name)}/logs", params=query, headers={"Accept": media}) as answer:
            events = answer.headers.get("content-type", "").startswith("text/event-stream")
            for line in answer.iter_lines():
                data = (
                    line.removeprefix("data:").strip()
                    if events and line.startswith("data:")
                    else ""
                    if events
                    else line.strip()
                )
                if data:
                    yield json.loads(data)

    def failure(self, invocation: str) -> dict[str, Any]:
        """The kept record of a failed call."""
        return dict(self._json("GET", f"/v1/invocations/{quote(invocation)}/failure"))

    # Ephemeral scopes.
    def contact_scope(self, scope: str) -> None:
        self.request("POST", f"/v1/scopes/{quote(scope)}/contact")

    def delete_scope(self, scope: str, *, timeout_s: float = ANSWER_S) -> None:
        self.request("DELETE", f"/v1/scopes/{quote(scope)}", timeout=timeout_s)

    # Keys, nodes, health.
    def keys(self) -> list[dict[str, Any]]:
        return _listed(self._json("GET", "/v1/keys"), "keys")

    def create_key(
        self, name: str, scopes: list[str], expires_s: float | None = None, owner: str | None = None
    ) -> dict[str, Any]:
        """The new key, whose secret is shown this once. What it deploys belongs to `owner`, by default the key's name."""
        body: dict[str, Any] = {
            "name": name,
            "scopes": scopes,
            **({"expires_s": expires_s} if expires_s is not None else {}),
            **({"owner": owner} if owner is not None else {}),
        }
        return dict(self._json("POST", "/v1/keys", json=body))

    def revoke_key(self, key_id: str) -> None:
        self.request("DELETE", f"/v1/keys/{quote(key_id)}")

    def nodes(self) -> dict[str, Any]:
        """`{"nodes": […], "executor_pools": […]}`."""
        return dict(self._json("GET", "/v1/nodes"))

    def healthy(self) -> bool:
        """Whether the gateway answers and takes calls. Raises Unavailable when it can't be reached."""
        return self._probe("/healthz") and self._probe("/readyz")

    def _probe(self, path: str) -> bool:
        try:
            return self.http.get(path).is_success
        except httpx.TransportError as error:
            raise connection_error(self.url, error) from error

    def metrics(self) -> str:
        return self.request("GET", "/metrics").text

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        try:
            with self.http.stream(method, path, timeout=httpx.Timeout(None, connect=CONNECT_S), **options) as answer:
                if not answer.is_success:
                    answer.read()
                raise_for_problem(answer)
                yield answer
        except httpx.TransportError as error:
            raise connection_error(self.url, error) from error


def raise_for_problem(answer: httpx.Response) -> None:
    """Raise the error of an answer that is not a success; a function's own exception comes as itself."""
    if answer.is_success:
        return
    if not answer.headers.get("content-type", "").startswith("application/problem+json"):
        raise ProtocolError(
            f"{answer.request.url} answered {answer.status_code} without a problem document: "
            "is that a MirrorNeuron gateway?"
        )
    problem = failures.problem_from(answer.content)
    raised = failures.slug_of(problem) == "function-error"
    raise failures.exception_of(str(problem.get("function", "")), raised, answer.content)


def connection_error(url: str, error: httpx.TransportError) -> MnError:
    """What a failed connection means, and what to do."""
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return unreachable(url, (error.__cause__ and error.__cause__.__cause__) or error)
    if isinstance(error, httpx.TimeoutException):
        return Unavailable(
            f"{url} did not answer within {ANSWER_S:.0f} s; what was asked may have happened", may_have_run=True
        )
    why = str(error) or type(error).__name__
    return Unavailable(
        f"the connection to {url} was lost before the answer ({why}); what was asked may have happened",
        may_have_run=True,
    )


def _options(context: Context) -> dict[str, Any]:
    return {
        "base_url": context.url,
        "headers": {
            "User-Agent": "mirrorneuron",
            **({"Authorization": f"Bearer {context.key}"} if context.key else {}),
        },
        "timeout": httpx.Timeout(ANSWER_S, connect=CONNECT_S),
    }


def _transport_options(context: Context) -> dict[str, Any]:
    verify: ssl.SSLContext | bool = (
        ssl.create_default_context(cafile=context.ca) if context.url.startswith("https") else False
    )
    limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX // 4)
    return {"verify": verify, "limits": limits, "socket_options": KEEPALIVE}


def _http(context: Context) -> httpx.Client:
    # A runtime is on this machine or in its own network: a proxy for the web is not on the way to it.
    return httpx.Client(
        **_options(context), transport=httpx.HTTPTransport(**_transport_options(context)), trust_env=False
    )


def async_http(context: Context) -> httpx.AsyncClient:
    """Connections for one event loop."""
    return httpx.AsyncClient(
        **_options(context), transport=httpx.AsyncHTTPTransport(**_transport_options(context)), trust_env=False
    )


def _chunks(archive: bytes | IO[bytes]) -> Iterator[bytes]:
    if isinstance(archive, bytes):
        view = memoryview(archive)
        yield from (
            bytes(view[start : start + UPLOAD_CHUNK_BYTES]) for start in range(0, len(view), UPLOAD_CHUNK_BYTES)
        )
        return
    while chunk := archive.read(UPLOAD_CHUNK_BYTES):
        yield chunk


def _length(archive: bytes | IO[bytes]) -> dict[str, str]:
    return {"Content-Length": str(len(archive))} if isinstance(archive, bytes) else {}


def _listed(answer: Any, name: str) -> list[dict[str, Any]]:
    return list(answer[name] if isinstance(answer, dict) else answer)
