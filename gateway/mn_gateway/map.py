"""`POST /v1/functions/{name}/map`: many calls in one request, answered as they end.

One task reads the body (and so notices a client that leaves), one coroutine admits items and writes results. Results
that arrive in one turn of the loop leave in one write.

Clients that send all before they read anything would deadlock with a server that stops reading while its answers are
not taken: so the reader goes on beyond its usual buffer while a write is blocked, up to `BLOCKED_BYTES_MAX`, and only
then gives up on such a client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from starlette.types import Receive, Scope, Send

from mn.formats.codecs import MEDIA_FRAMES, MEDIA_JSON, MEDIA_NDJSON, Codec, ItemStatus
from mn.formats.errors import CallTimeout, InvalidRequest, MnError, QueueFull, UnsupportedMedia
from mn.formats.ids import new_invocation_id
from mn_gateway import problems
from mn_gateway.access import require
from mn_gateway.bodies import Gone
from mn_gateway.calls import route_of, timeout_of
from mn_gateway.context import Context
from mn_gateway.items import CODEC_OF_NAME, CUTTERS
from mn_gateway.lines import encoder_of, ended_item
from mn_nodepool.wire.messages import Route

ITEMS_IN_FLIGHT_MAX = 2000
ITEMS_ADMITTED_PER_TURN = 256
"""So that one large map leaves turns of the loop to everything else."""
BUFFER_BYTES = 4 << 20
"""Input that is read ahead of admission."""
BUFFER_ITEMS = 20_000
BLOCKED_BYTES_MAX = 256 << 20
OUTPUT_BYTES = 4 << 20
"""Results waiting to be written beyond which no item is admitted."""
BLOCKED_S_MAX = 60.0
FULL_RETRY_S = 0.05
ITEM_OVERHEAD_BYTES = 64


MEDIA_LINES = frozenset({MEDIA_NDJSON, "application/jsonl", MEDIA_JSON, "application/x-www-form-urlencoded", ""})


class Map:
    """The ASGI application of this one endpoint. Raises MnError before its answer begins, Gone after that."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        context = self._context
        headers = dict(scope["headers"])
        context.sources.check_host(headers.get(b"host"))
        key = context.access.key_of(headers.get(b"authorization"))
        require(key, "invoke")
        route = route_of(context.pool.directory, name, key.namespace)
        if route.spec.generator:
            raise InvalidRequest(f"{name} is a generator; a map takes functions with one result: use invoke", path="")
        media = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if media != MEDIA_FRAMES and media not in MEDIA_LINES:
            raise UnsupportedMedia(
                f"a map takes {MEDIA_FRAMES} or {MEDIA_NDJSON}, not {media[:100]!r}",
                supported=[MEDIA_FRAMES, MEDIA_NDJSON],
            )
        codec = item_codec(headers.get(b"mn-item-codec", b"json"), route, media == MEDIA_FRAMES)
        request = MapRequest(context, route, new_invocation_id(), codec, media == MEDIA_FRAMES)
        request.timeout_s = timeout_of(headers)
        await request.run(receive, send)


def item_codec(name: bytes, route: Route, framed: bool) -> int:
    """The codec that `MN-Item-Codec` names. Raises InvalidRequest."""
    codec = CODEC_OF_NAME.get(name.strip().lower())
    if codec is None:
        raise InvalidRequest(f"MN-Item-Codec: {name[:50]!r} is not json, raw or pickle", path="MN-Item-Codec")
    if codec == Codec.PICKLE:
        if not framed:
            raise InvalidRequest(f"pickles need {MEDIA_FRAMES}: they may contain newlines", path="MN-Item-Codec")
        return codec
    if codec == Codec.RAW and not route.spec.raw:
        raise InvalidRequest(f"{route.name} has no parameter annotated `bytes` and takes JSON", path="MN-Item-Codec")
    return int(Codec.RAW) if route.spec.raw else codec


class MapRequest:
    """One map, from its first item to its end."""

    def __init__(self, context: Context, route: Route, invocation: str, codec: int, framed: bool) -> None:
        self._context, self._route, self._invocation, self._codec = context, route, invocation, codec
        self._dispatcher = context.pool.dispatcher
        self._stats = context.metrics.of(route.name)
        self._encode, self.media = encoder_of(framed)
        self._cutter = CUTTERS[framed](context.settings.payload_bytes_max)
        self.timeout_s: float | None = None
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._in_flight: dict[int, Any] = {}
        self._results: list[bytes] = []
        self._results_bytes = 0
        self._read = 0
        self._read_all = False
        self._broken: Exception | None = None
        self._write_blocked = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self, receive: Receive, send: Send) -> None:
        """Answer the request. Raises Gone when the client leaves; what runs by then is cancelled."""
        headers = [(b"content-type", self.media), (b"mn-invocation-id", self._invocation.encode())]
        reader = asyncio.create_task(self._reading(receive))
        try:
            await self._first_sign()
            self._context.metrics.responses[200] += 1
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while not self._finished():
                self._wake.clear()
                admitted_all = self._admit()
                await self._flush(send)
                if self._broken is not None:
                    await self._cut(send, self._broken)
                if not admitted_all:
                    await asyncio.sleep(0)
                elif not (self._results or self._finished()):
                    await self._pause()
            self._results.append(self._encode(self._read, ItemStatus.END, 0, b""))
            await send({"type": "http.response.body", "body": b"".join(self._results)})
        finally:
            reader.cancel()
            for call in list(self._in_flight.values()):
                self._dispatcher.cancel(call)

    async def _cut(self, send: Send, broken: Exception) -> None:
        """Say why, where there is somebody to tell, and leave the answer without its end."""
        if isinstance(broken, MnError):
            problem = problems.encode(problems.document(broken, self._invocation))
            piece = self._encode(self._read, ItemStatus.PLATFORM_ERROR, Codec.JSON, problem)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            raise Gone
        raise broken

    async def _first_sign(self) -> None:
        """A body that is wrong from its start is refused as a whole, before the answer has begun."""
        while not (self._read or self._read_all or self._broken):
            await self._wake.wait()
            self._wake.clear()
        if self._broken is not None:
            raise self._broken

    def _finished(self) -> bool:
        return self._read_all and not self._waiting and not self._in_flight

    async def _pause(self) -> None:
        """Sleep until something happens; where others' calls fill the queue, none of ours will tell: look again."""
        if self._in_flight or not self._waiting:
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(FULL_RETRY_S):
                await self._wake.wait()
        except TimeoutError:
            return

    def _admit(self) -> bool:
        """Start items while there is room. False: this turn's share was used up, there is more to do."""
        for _ in range(ITEMS_ADMITTED_PER_TURN):
            room = len(self._in_flight) < ITEMS_IN_FLIGHT_MAX and self._results_bytes < OUTPUT_BYTES
            if not (self._waiting and room):
                self._room.set()
                return True
            index, payload = self._waiting[0]
            try:
                self._start(index, payload)
            except QueueFull:
                return True
            self._waiting.popleft()
            self._waiting_bytes -= len(payload) + ITEM_OVERHEAD_BYTES
        self._room.set()
        return False

    def _start(self, index: int, payload: bytes) -> None:
        ended = False

        def on_done(call: Any) -> None:
            nonlocal ended
            ended = True
            self._in_flight.pop(index, None)
            self._ended(index, call)

        call = self._dispatcher.start(
            self._route, f"{self._invocation}.{index}", self._codec, payload, timeout_s=self.timeout_s, on_done=on_done
        )
        if not ended:
            self._in_flight[index] = call

    def _ended(self, index: int, call: Any) -> None:
        self._wake.set()
        if isinstance(call.error, CallTimeout) and call.attempts == 0 and self._broken is None:
            # An item's time is for its run: one that only waited behind the others of its map waits again.
            self._waiting.appendleft((index, call.payload))
            self._waiting_bytes += len(call.payload) + ITEM_OVERHEAD_BYTES
            return
        piece, slug = ended_item(self._encode, index, call)
        if slug:
            self._stats.failed(slug)
        else:
            self._stats.observe((call.queue_us + call.start_us + call.run_us) / 1e6)
        self._context.metrics.items += 1
        self._results.append(piece)
        self._results_bytes += len(piece)

    async def _flush(self, send: Send) -> None:
        if not self._results:
            return
        body = b"".join(self._results)
        self._results, self._results_bytes = [], 0
        self._write_blocked = True
        self._room.set()
        try:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self._write_blocked = False

    async def _reading(self, receive: Receive) -> None:
        try:
            while not self._read_all:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self._broken = Gone()
                    return
                self._take(self._cutter.feed(message.get("body", b"")))
                if not message.get("more_body", False):
                    self._take(self._cutter.end())
                    self._read_all = True
                self._wake.set()
                await self._until_room()
            while (await receive())["type"] != "http.disconnect":
                continue
            self._broken = Gone()
        except Exception as error:  # whatever it is, the coroutine that answers has to raise it
            self._broken = error
        finally:
            self._wake.set()

    def _take(self, items: list[bytes]) -> None:
        for item in items:
            self._waiting.append((self._read, item))
            self._read += 1
            self._waiting_bytes += len(item) + ITEM_OVERHEAD_BYTES

    async def _until_room(self) -> None:
        while not self._read_all and (self._waiting_bytes > BUFFER_BYTES or len(self._waiting) > BUFFER_ITEMS):
            if self._write_blocked and self._waiting_bytes <= BLOCKED_BYTES_MAX:
                return
            self._room.clear()
            try:
                async with asyncio.timeout(BLOCKED_S_MAX if self._write_blocked else None):
                    await self._room.wait()
            except TimeoutError:
                raise Gone from None
