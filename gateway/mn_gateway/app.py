"""The gateway's ASGI application: calls go ahead of the router, everything else through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mn.formats.errors import Internal, MnError, NotFound
from mn_gateway import problems
from mn_gateway.access import is_loopback, require
from mn_gateway.bodies import Gone
from mn_gateway.context import Context
from mn_gateway.endpoints import Endpoint, Exchange, read_json, read_query
from mn_gateway.invoke import Invoke
from mn_gateway.map import Map
from mn_gateway.routes import ENDPOINTS

log = structlog.get_logger("gateway")
FUNCTIONS = "/v1/functions/"
INVOKE, MAP = "/invoke", "/map"
EXPOSED_SCOPE = "read"
METRICS = "/metrics"


class App:
    """One gateway process's application."""

    def __init__(self, context: Context, endpoints: Iterable[Endpoint] = ENDPOINTS) -> None:
        self._context = context
        self._invoke = Invoke(context)
        self._map = Map(context)
        self._router = Router(_routes(context, endpoints), redirect_slashes=False, default=_no_such_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        for name, _ in scope["headers"]:
            if name == b"origin":
                await self._from_page(scope, receive, send)
                return
        await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        invoked = path.endswith(INVOKE)
        if scope["method"] != "POST" or not path.startswith(FUNCTIONS) or not (invoked or path.endswith(MAP)):
            await self._guarded(self._routed, scope, receive, send)
        elif invoked:
            await self._invoke(path[len(FUNCTIONS) : -len(INVOKE)], scope, receive, send)
        else:
            await self._guarded(self._mapped, scope, receive, send)

    async def _mapped(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._map(scope["path"][len(FUNCTIONS) : -len(MAP)], scope, receive, send)

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._context.sources.check_host(dict(scope["headers"]).get(b"host"))
        await self._router(scope, receive, send)

    async def _guarded(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run `app`; an error becomes a problem, if the answer has not begun."""
        begun = False

        async def counting_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
            await send(message)

        try:
            await app(scope, receive, counting_send)
        except (Gone, ClientDisconnect):
            return
        except MnError as error:
            if begun:
                raise
            await self._send_problem(send, error)
        except Exception:
            log.exception("a request failed", action="request.failed", path=scope["path"][:500])
            if begun:
                raise
            await self._send_problem(send, Internal("this is a bug of the gateway's; its log has the traceback"))

    async def _send_problem(self, send: Send, error: MnError) -> None:
        status, headers, body = problems.answer(problems.document(error))
        self._context.metrics.responses[status] += 1
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _from_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request from a browser's page: its origin must be configured, and is told so in the answer."""
        headers = dict(scope["headers"])
        sources = self._context.sources
        try:
            sources.check_host(headers.get(b"host"))
            sources.check_origin(headers[b"origin"])
        except MnError as error:
            await self._send_problem(send, error)
            return
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            self._context.metrics.responses[204] += 1
            await send({"type": "http.response.start", "status": 204, "headers": sources.preflight_headers(headers)})
            await send({"type": "http.response.body", "body": b""})
            return
        allowed = sources.cors_headers(headers)

        async def cors_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *allowed]}
            await send(message)

        await self._serve(scope, receive, cors_send)


class _PathApp:
    """All methods of one path."""

    def __init__(self, context: Context, methods: Mapping[str, Endpoint]) -> None:
        self._context = context
        self._methods = dict(methods)
        if "GET" in methods:
            self._methods.setdefault("HEAD", methods["GET"])
        self._allow = ", ".join(sorted(self._methods))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._methods.get(scope["method"])
        if endpoint is None or endpoint.handler is None:
            status, headers, body = problems.answer(problems.not_allowed(scope["method"], self._allow))
            response = Response(body, status, {k.decode(): v.decode() for k, v in headers} | {"allow": self._allow})
        else:
            response = await self._answer(endpoint, Request(scope, receive))
        self._context.metrics.responses[response.status_code] += 1
        await response(scope, receive, send)

    async def _answer(self, endpoint: Endpoint, request: Request) -> Response:
        context, key = self._context, None
        scope = endpoint.scope
        if endpoint.path == METRICS and not is_loopback(context.settings.api_host):
            scope = EXPOSED_SCOPE
        if scope:
            key = context.access.key_of(dict(request.scope["headers"]).get(b"authorization"))
            require(key, scope)
        query = read_query(request, endpoint.query)
        body = await read_json(request, endpoint.body, endpoint.body_required) if endpoint.body else None
        if endpoint.handler is None:
            raise Internal(f"{endpoint.path} has no handler")
        return await endpoint.handler(Exchange(context, request, key, query, body))


def _routes(context: Context, endpoints: Iterable[Endpoint]) -> list[BaseRoute]:
    paths: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    return [Route(path, _PathApp(context, methods), include_in_schema=False) for path, methods in paths.items()]


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"there is nothing at {scope['path'][:200]!r}; /docs lists what there is", near=[])
