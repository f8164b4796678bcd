"""HTTP/1.1 as uvicorn speaks it, with bounded heads, problem documents, and one system call per answer."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mn_gateway.problems import encode

HEAD_BYTES_MAX = 64 * 1024
CORKED_BYTES_MAX = 64 * 1024


class Corked:
    """A transport that writes at the end of an answer, or of the turn of the loop: head and body leave together.

    What is held back stays below `CORKED_BYTES_MAX`, so that the transport's own flow control still works.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._held: list[bytes] = []
        self._held_bytes = 0
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.set_protocol = transport.set_protocol

    def write(self, data: bytes) -> None:
        held = self._held
        if not held:
            self._call_soon(self.flush)
        held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > CORKED_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        held = self._held
        if held:
            self._held, self._held_bytes = [], 0
            self._transport.write(b"".join(held) if len(held) > 1 else held[0])

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Http(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _seen_waiting: object = None

    def close_if_slow(self) -> None:
        """To be called now and then: a connection whose request's head is not there from one time to the next is closed.

        This costs the requests themselves nothing; an idle connection that has had an answer has the server's own timer.
        """
        scope: object = self.scope or self
        if scope is not self and "method" in self.scope:
            self._seen_waiting = None
        elif self._seen_waiting is scope:
            self.transport.close()
        else:
            self._seen_waiting = scope

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._corked = Corked(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, self._corked))

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX:
            raise ValueError("the request's head is too large")

    def on_response_complete(self) -> None:
        self._corked.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        problem = {
            "type": "/problems/invalid-request",
            "title": "The request is not valid",
            "status": 400,
            "detail": f"this is not an HTTP/1.1 request, or its head is over {HEAD_BYTES_MAX} bytes",
        }
        body = encode(problem)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
