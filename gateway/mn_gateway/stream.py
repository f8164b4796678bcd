"""A generator's values, sent as they come."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from starlette.types import Receive, Send

from mn.formats.codecs import Codec, ItemStatus
from mn.formats.errors import MnError
from mn_gateway import problems
from mn_gateway.context import Context
from mn_gateway.lines import encoder_of, ended_item
from mn_nodepool.wire.messages import Route


class _Values:
    """Collects what the dispatcher hands over; the coroutine that sends is woken once per turn of the loop."""

    def __init__(self) -> None:
        self.items: list[tuple[int, bytes]] = []
        self.done = False
        self.wake = asyncio.Event()

    def on_item(self, _: Any, codec: int, value: bytes) -> None:
        self.items.append((codec, value))
        self.wake.set()

    def on_done(self, _: Any) -> None:
        self.done = True
        self.wake.set()


async def stream_generator(
    context: Context,
    route: Route,
    invocation: str,
    codec: int,
    body: bytes,
    timeout_s: float | None,
    receive: Receive,
    send: Send,
) -> None:
    """Run a generator function and answer with its values; a failure before the first value is an ordinary problem."""
    began = perf_counter()
    stats = context.metrics.of(route.name)
    dispatcher, values = context.pool.dispatcher, _Values()
    try:
        call = dispatcher.start(
            route, invocation, codec, body, timeout_s=timeout_s, on_done=values.on_done, on_item=values.on_item
        )
    except MnError as error:
        stats.failed(error.slug)
        await _send_problem(context, send, problems.document(error, invocation))
        return
    watcher = asyncio.create_task(_cancel_when_gone(context, call, values, receive))
    try:
        await values.wake.wait()
        if values.done and not values.items and (slug := problems.slug_of(call)):
            stats.failed(slug)
            await _send_problem(context, send, problems.of_call(call))
            return
        await _send_values(context, values, call, codec == Codec.PICKLE, send)
        if slug := problems.slug_of(call):
            stats.failed(slug)
        else:
            stats.observe(perf_counter() - began)
    finally:
        watcher.cancel()
        if not values.done:
            dispatcher.cancel(call)


async def _send_values(context: Context, values: _Values, call: Any, framed: bool, send: Send) -> None:
    encode, media = encoder_of(framed)
    headers = [(b"content-type", media), (b"mn-invocation-id", call.invocation.encode())]
    context.metrics.responses[200] += 1
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    sent = 0
    while True:
        values.wake.clear()
        done, items = values.done, values.items
        values.items = []
        pieces = [encode(sent + i, ItemStatus.OK, item_codec, value) for i, (item_codec, value) in enumerate(items)]
        sent += len(items)
        if done:
            if problems.slug_of(call):
                pieces.append(ended_item(encode, sent, call)[0])
            pieces.append(encode(sent, ItemStatus.END, 0, b""))
        if pieces:
            await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": not done})
        if done:
            return
        for _ in items:
            context.pool.dispatcher.consumed(call)
        await values.wake.wait()


async def _cancel_when_gone(context: Context, call: Any, values: _Values, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    if not values.done:
        context.pool.dispatcher.cancel(call)


async def _send_problem(context: Context, send: Send, problem: dict[str, Any]) -> None:
    status, headers, body = problems.answer(problem)
    context.metrics.responses[status] += 1
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
