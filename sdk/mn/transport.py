"""Calls over HTTP: what `mn.call.transport()` is outside a sandbox."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

import h11
import httpx

from mn import failures
from mn.client import Client, async_http, connection_error
from mn.config import current_context
from mn.duplex import Duplex, Feed, ReadyFeed, ThreadFeed
from mn.formats.codecs import (
    MEDIA_FRAMES,
    MEDIA_JSON,
    MEDIA_OF_CODEC,
    MEDIA_PICKLE,
    REQUEST_ITEM,
    RESPONSE_ITEM,
    Codec,
    ItemStatus,
)
from mn.formats.errors import InvalidRequest, ProtocolError, Unavailable

if TYPE_CHECKING:
    Answer = tuple[int, int, bytes]
    Item = tuple[int, int, int, bytes]
    _LoopConnections = weakref.WeakKeyDictionary[
        asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, AsyncGenerator[None, None]]
    ]

_CODEC_OF_MEDIA = {MEDIA_JSON: Codec.JSON, MEDIA_PICKLE: Codec.PICKLE}
FRAME_BYTES_MAX = 1 << 30
_FUNCTION_ERROR_TYPE = "/problems/function-error"


class FrameCutter:
    """Cuts a response of frames into items.

    Raises ProtocolError for a frame that can't be.
    """

    __slots__ = ("_buffer", "count")

    def __init__(self) -> None:
        self._buffer = b""
        self.count: int | None = None
        """How many items there were, once the last has come."""

    def feed(self, data: bytes) -> list[Item]:
        buffer = self._buffer + data if self._buffer else data
        items: list[Item] = []
        head, position, size = RESPONSE_ITEM.size, 0, len(buffer)
        while size - position >= head:
            index, status, codec, _, length = RESPONSE_ITEM.unpack_from(buffer, position)
            if length > FRAME_BYTES_MAX or self.count is not None:
                raise ProtocolError(f"the gateway's stream is out of step at a frame of {length} bytes")
            end = position + head + length
            if end > size:
                break
            if status == ItemStatus.END:
                self.count = index
            else:
                items.append((index, status, codec, buffer[position + head : end]))
            position = end
        self._buffer = buffer[position:] if position < size else b""
        return items


class HttpTransport:
    """Carries calls to a gateway. Safe to share between threads; not across a fork."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.pid = os.getpid()
        self._async: _LoopConnections = weakref.WeakKeyDictionary()

    def call(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> Answer:
        try:
            answer = self.client.http.post(
                _path(name, "invoke"), content=payload, headers=_headers(codec, timeout_s), timeout=_FOR_CALLS
            )
        except httpx.TransportError as error:
            raise connection_error(self.client.url, error) from error
        return _answer(name, answer)

    async def acall(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> Answer:
        """Like `call`; cancelling the task cancels the call."""
        http = await self._async_http()
        try:
            answer = await http.post(
                _path(name, "invoke"), content=payload, headers=_headers(codec, timeout_s), timeout=_FOR_CALLS
            )
        except httpx.TransportError as error:
            raise connection_error(self.client.url, error) from error
        return _answer(name, answer)

    async def _async_http(self) -> httpx.AsyncClient:
        """The connections of the running loop."""
        loop = asyncio.get_running_loop()
        known = self._async.get(loop)
        if known is None:
            http = async_http(self.client.context)
            known = self._async[loop] = http, self._until_loop_ends(http)
            await anext(known[1])
        return known[0]

    async def _until_loop_ends(self, http: httpx.AsyncClient) -> AsyncGenerator[None, None]:
        """A loop ends by closing its asynchronous generators, and this one closes the loop's connections."""
        try:
            yield
        finally:
            self._async.pop(asyncio.get_running_loop(), None)
            await http.aclose()

    def stream(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> Iterator[Answer]:
        cutter = FrameCutter()
        try:
            with self.client.http.stream(
                "POST", _path(name, "invoke"), content=payload, headers=_headers(codec, timeout_s), timeout=_FOR_CALLS
            ) as answer:
                if answer.status_code != 200:
                    answer.read()
                    yield _answer(name, answer)
                    return
                if _media(answer) != MEDIA_FRAMES:
                    raise InvalidRequest(f"{name.partition('~')[0]} is no generator: call .remote(…)")
                for data in answer.iter_bytes():
                    for _, status, item_codec, item in cutter.feed(data):
                        yield status, item_codec, item
        except httpx.TransportError as error:
            raise connection_error(self.client.url, error) from error
        if cutter.count is None:
            raise Unavailable("the stream of values was cut off before its end", may_have_run=True)

    def map(
        self, name: str, codec: int, payloads: Iterable[bytes], timeout_s: float | None, window: int
    ) -> Iterator[Item]:
        feed: Feed = ReadyFeed(payloads) if getattr(payloads, "ready", False) else ThreadFeed(payloads)
        headers = [
            *_headers(codec, timeout_s).items(),
            ("MN-Item-Codec", Codec(codec).name.lower()),
            ("Connection", "close"),
        ]
        headers = [(key, MEDIA_FRAMES if key == "Content-Type" else value) for key, value in headers]
        headers += [("Authorization", f"Bearer {self.client.key}")]
        try:
            duplex = Duplex(self.client.url, _path(name, "map"), headers, self.client.context.ca)
            try:
                yield from _mapped(duplex, feed, window)
            finally:
                duplex.close()
        finally:
            feed.close()


def _mapped(duplex: Duplex, feed: Feed, window: int) -> Iterator[Item]:
    """Send inputs while there is room, yield answers as they come, and end with the last frame."""
    cutter, problem = FrameCutter(), bytearray()
    status = sent = answered = 0
    input_error: BaseException | None = None
    input_ended = False
    while True:
        wants = not input_ended and sent - answered < window and not duplex.congested
        took = False
        if wants:
            try:
                batch = feed.take(window - (sent - answered))
                input_ended = feed.ended
            except BaseException as error:
                if not isinstance(error, Exception):
                    raise
                batch, input_error, input_ended = [], error, True
            if batch:
                duplex.send(b"".join([part for item in batch for part in (REQUEST_ITEM.pack(len(item)), item)]))
                sent += len(batch)
                took = True
            if input_ended:
                duplex.end()
        wake = feed.fileno() if wants and not input_ended else -1
        for event in duplex.exchange(wake, block=not took):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                if status != 200:
                    problem += event.data
                    continue
                items = cutter.feed(bytes(event.data))
                answered += len(items)
                yield from items
            elif isinstance(event, h11.EndOfMessage):
                _check_end(status, bytes(problem), cutter, answered)
                if input_error is not None:
                    raise input_error
                return


def _check_end(status: int, problem: bytes, cutter: FrameCutter, answered: int) -> None:
    if status != 200:
        raise failures.error_of(failures.problem_from(problem))
    if cutter.count is None:
        raise Unavailable(
            "the stream of results was cut off before its end; calls without a result may have run", may_have_run=True
        )
    if cutter.count != answered:
        raise ProtocolError(f"the gateway answered {answered} calls and counts {cutter.count}")


_FOR_CALLS = httpx.Timeout(None, connect=5.0)
"""How long a call may take is for its deadline to say, which the gateway keeps."""


def _path(name: str, verb: str) -> str:
    return f"/v1/functions/{quote(name)}/{verb}"


def _headers(codec: int, timeout_s: float | None) -> dict[str, str]:
    headers = {"Content-Type": MEDIA_OF_CODEC[Codec(codec)]}
    if timeout_s is not None:
        headers["MN-Timeout"] = f"{timeout_s:g}"
    return headers


def _media(answer: httpx.Response) -> str:
    return str(answer.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _answer(name: str, answer: httpx.Response) -> Answer:
    if answer.status_code == 200:
        media = _media(answer)
        if media == MEDIA_FRAMES:
            raise InvalidRequest(f"{name.partition('~')[0]} is a generator: iterate over .remote_gen(…)")
        return ItemStatus.OK, _CODEC_OF_MEDIA.get(media, Codec.RAW), answer.content
    problem = failures.problem_from(answer.content)
    raised = failures.slug_of(problem) == "function-error"
    return (ItemStatus.FUNCTION_ERROR if raised else ItemStatus.PLATFORM_ERROR), Codec.JSON, answer.content


_default: HttpTransport | None = None
_lock = threading.Lock()


def default_transport() -> HttpTransport:
    """The one of this process, to the current context. A forked child gets its own, to its parent's."""
    global _default
    found = _default
    if found is None or found.pid != os.getpid():
        with _lock:
            found = _default
            if found is None or found.pid != os.getpid():
                context = current_context() if found is None else found.client.context
                found = _default = HttpTransport(Client.of(context))
    return found


def use(client: Client | None) -> None:
    """Make calls through this client from now on; None: as the environment and the configuration say."""
    global _default
    with _lock:
        _default = None if client is None else HttpTransport(client)


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
