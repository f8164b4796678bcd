"""`POST /v1/functions/{name}/invoke`: the path that most requests take.

It is written against raw ASGI: one look at the headers, one receive, two sends; no task, no request or response
object, no log line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any

from starlette.types import Receive, Scope, Send

from mn.formats.errors import MnError
from mn_gateway import bodies, problems
from mn_gateway.access import require
from mn_gateway.calls import CODEC_OF_MEDIA, CONTENT_TYPE_OF, JSON, InvocationIds, codec_of, route_of, timeout_of
from mn_gateway.context import Context
from mn_gateway.metrics import FunctionStats
from mn_gateway.stream import stream_generator

_INPUT = ("a call's input", "payload_bytes_max")


class Invoke:
    """The ASGI application of this one endpoint; the name has been cut from the path."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._new_id = InvocationIds()
        self._access = context.access
        self._directory = context.pool.directory
        self._dispatcher = context.pool.dispatcher
        self._hosts = context.sources.known_hosts
        self._watch = context.watch
        self._responses = context.metrics.responses
        self._limit = context.settings.payload_bytes_max

    async def __call__(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        invocation = self._new_id()
        try:
            headers = dict(scope["headers"])
            if headers.get(b"host") not in self._hosts:
                self._context.sources.check_host(headers.get(b"host"))
            key = self._access.key_of(headers.get(b"authorization"))
            if "invoke" not in key.scopes:
                require(key, "invoke")
            route = self._directory.routes.get(name)
            if route is None or route.namespace != key.namespace:
                route = route_of(self._directory, name, key.namespace)
            spec = route.spec
            codec = CODEC_OF_MEDIA.get(headers.get(b"content-type"), -1)
            if codec != JSON or spec.raw:
                codec = codec_of(headers.get(b"content-type"), route)
            timeout_s = timeout_of(headers) if b"mn-timeout" in headers else None
            body = await self._body(headers, receive)
        except MnError as error:
            await self._refuse(send, error, invocation)
            return
        except bodies.Gone:
            return
        if spec.generator:
            await stream_generator(self._context, route, invocation, codec, body, timeout_s, receive, send)
            return

        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        stats = self._context.metrics.of(name)
        try:
            call = self._dispatcher.start(
                route, invocation, codec, body, timeout_s=timeout_s, on_done=_resolving(future)
            )
        except MnError as error:
            stats.failed(error.slug)
            await self._refuse(send, error, invocation)
            return
        self._watch.recent.append((future, call, receive))
        try:
            await future
        except asyncio.CancelledError:
            self._dispatcher.cancel(call)
            raise
        await self._answer(send, call, stats, began)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        if len(headers.get(b"content-length", b"")) > 4:
            bodies.check_length(headers, self._limit, *_INPUT)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise bodies.Gone
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            return await bodies.rest_of(body, receive, self._limit, self._context.bodies)
        if len(body) > self._limit:
            raise bodies.too_large("a call's input", self._limit, "payload_bytes_max")
        return body

    async def _answer(self, send: Send, call: Any, stats: FunctionStats, began: float) -> None:
        if call.error is not None or call.status != 0:
            problem = problems.of_call(call)
            stats.failed(problems.slug_of(call))
            status, headers, body = problems.answer(problem)
        else:
            status, body = 200, call.result
            headers = [
                CONTENT_TYPE_OF[call.result_codec],
                (b"content-length", b"%d" % len(body)),
                (b"mn-invocation-id", call.invocation.encode()),
            ]
        total = perf_counter() - began
        headers.append(
            (
                b"server-timing",
                b"queue;dur=%.3f, start;dur=%.3f, run;dur=%.3f, total;dur=%.3f"
                % (call.queue_us / 1000, call.start_us / 1000, call.run_us / 1000, total * 1000),
            )
        )
        if status == 200:
            stats.observe(total)
        self._responses[status] += 1
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _refuse(self, send: Send, error: MnError, invocation: str) -> None:
        status, headers, body = problems.answer(problems.document(error, invocation))
        self._responses[status] += 1
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _resolving(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def on_done(call: Any) -> None:
        if not future.done():
            future.set_result(call)

    return on_done
