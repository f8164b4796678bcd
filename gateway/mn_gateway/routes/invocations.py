"""Calls as the documentation shows them, and what calls leave behind: logs and failures."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import msgspec
from starlette.responses import Response, StreamingResponse

from mn.formats.codecs import MEDIA_FRAMES, MEDIA_JSON, MEDIA_NDJSON, MEDIA_PICKLE, MEDIA_RAW
from mn.formats.errors import NotFound
from mn_gateway.calls import TIMEOUT_S_MAX, TIMEOUT_S_MIN, route_of
from mn_gateway.context import Context
from mn_gateway.endpoints import Endpoint, Exchange, json_response
from mn_nodepool.wire.control import FailureRecord, Name

EVENTS = "text/event-stream"
LINES_MAX = 10_000
INVOCATION = re.compile(r"inv_[0-9A-Z]{1,40}(\.[0-9]{1,10}){0,64}\Z")
"""Anything shorter would match, and so parse, most lines of all logs."""
DRAIN_POLL_S = 0.5
TIMEOUT_HEADER = ("seconds until the deadline", {"type": "number", "minimum": TIMEOUT_S_MIN, "maximum": TIMEOUT_S_MAX})
CALL_ERRORS = (400, 404, 413, 415, 422, 429, 499, 502, 504)


class LogQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    follow: Annotated[bool, msgspec.Meta(description="go on with new lines, as server-sent events")] = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=LINES_MAX, description="last lines to begin with")] = 1000


async def function_logs(exchange: Exchange) -> Response:
    name = exchange.part("name")
    route_of(exchange.context.pool.directory, name, exchange.namespace)
    return await _logs(exchange, name, "")


async def invocation_logs(exchange: Exchange) -> Response:
    invocation = exchange.part("id")
    if not INVOCATION.match(invocation):
        raise NotFound(f"{invocation[:100]!r} is no invocation's id, which begins with inv_", near=[])
    return await _logs(exchange, "", invocation)


async def _logs(exchange: Exchange, function: str, invocation: str) -> Response:
    query = exchange.query
    batches = exchange.context.pool.tail(function, invocation, query.follow, query.limit)
    headers = {"cache-control": "no-store"}
    if query.follow:
        return StreamingResponse(_events(exchange.context, batches), media_type=EVENTS, headers=headers)
    first = await anext(batches, None)  # so that an error still becomes a problem
    return StreamingResponse(_lines(first, batches), media_type=MEDIA_NDJSON, headers=headers)


async def _events(context: Context, batches: AsyncGenerator[list[dict[str, Any]], None]) -> AsyncIterator[bytes]:
    """Lines until the reader goes away or this gateway drains."""
    yield b": lines follow\n\n"
    following = asyncio.ensure_future(anext(batches, None))
    async with contextlib.aclosing(batches):
        while not context.draining:
            done, _ = await asyncio.wait([following], timeout=DRAIN_POLL_S)
            if not done:
                continue
            batch = following.result()
            if batch is None:
                return
            yield b"".join(b"data: %b\n\n" % msgspec.json.encode(line) for line in batch)
            following = asyncio.ensure_future(anext(batches, None))
        following.cancel()
        await asyncio.wait([following])


async def _lines(
    first: list[dict[str, Any]] | None, batches: AsyncIterator[list[dict[str, Any]]]
) -> AsyncIterator[bytes]:
    if first is None:
        return
    yield b"".join(msgspec.json.encode(line) + b"\n" for line in first)
    async for batch in batches:
        yield b"".join(msgspec.json.encode(line) + b"\n" for line in batch)


async def failure(exchange: Exchange) -> Response:
    return json_response(await exchange.ask("failures.get", Name(exchange.part("id"), exchange.principal)))


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/functions/{name}/invoke", None, "Call a function", "invoke",
        {200: ("Its result; of a generator, its values as NDJSON or frames",
               (MEDIA_JSON, MEDIA_RAW, MEDIA_PICKLE, MEDIA_NDJSON, MEDIA_FRAMES))},
        body_media=(MEDIA_JSON, MEDIA_RAW, MEDIA_PICKLE), body_required=False, headers={"MN-Timeout": TIMEOUT_HEADER},
        errors=CALL_ERRORS, tag="calls",
    ),
    Endpoint(
        "POST", "/v1/functions/{name}/map", None, "Call a function once per item of a stream", "invoke",
        {200: ("The results as they come", (MEDIA_NDJSON, MEDIA_FRAMES))},
        body_media=(MEDIA_NDJSON, MEDIA_FRAMES), body_required=False,
        headers={
            "MN-Timeout": TIMEOUT_HEADER,
            "MN-Item-Codec": ("how items are encoded", {"type": "string", "enum": ["json", "raw", "pickle"]}),
        },
        errors=CALL_ERRORS, tag="calls",
    ),
    Endpoint(
        "GET", "/v1/functions/{name}/logs", function_logs, "Read a function's output", "read",
        {200: ("The lines", (MEDIA_NDJSON, EVENTS))}, query=LogQuery, errors=(404,), tag="logs",
    ),
    Endpoint(
        "GET", "/v1/invocations/{id}/logs", invocation_logs, "Read a call's output", "read",
        {200: ("The lines", (MEDIA_NDJSON, EVENTS))}, query=LogQuery, errors=(404,), tag="logs",
    ),
    Endpoint(
        "GET", "/v1/invocations/{id}/failure", failure, "Get a failed call with its input, to debug it", "read",
        {200: ("The record", FailureRecord)}, errors=(404,), tag="logs",
    ),
)  # fmt: skip
