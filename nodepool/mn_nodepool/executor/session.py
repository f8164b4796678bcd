"""The host's end of the child protocol over a socket. Frames sent within one turn of the loop leave in one write."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Protocol, cast

from mn_runner.protocol import FrameReader, Violation

UNREAD_BYTES_MAX = 128 << 20
"""What may wait for a child that does not read."""
SLOW_DOWN_S = 0.05


class SessionOwner(Protocol):
    def frame(self, kind: int, flags: int, call: int, body: bytes) -> None:
        """One frame. Raises Violation when it is out of order."""

    def session_lost(self, reason: str) -> None:
        """The child closed its end."""

    def die(self, reason: str) -> None:
        """The child broke the protocol: end it now."""


class ChildSession(asyncio.Protocol):
    """Frames to and from one child."""

    __slots__ = ("_loop", "_out", "_owner", "_reader", "_transport", "closed")

    def __init__(self, owner: SessionOwner) -> None:
        self._owner = owner
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, frame: bytes) -> None:
        if self.closed:
            return
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out.append(frame)

    def _flush(self) -> None:
        out = self._out
        if out and self._transport is not None and not self.closed:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
            if self._transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
                self._violated(f"it has left {UNREAD_BYTES_MAX} bytes unread")
        out.clear()

    def data_received(self, data: bytes) -> None:
        frame = self._owner.frame
        try:
            for kind, flags, call, body in self._reader.feed(data):
                frame(kind, flags, call, body)
        except (Violation, struct.error, IndexError) as error:
            self._violated(f"it broke the protocol: {error}")

    def _violated(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._owner.die(reason)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost("it closed its connection")

    def _lost(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._owner.session_lost(reason)

    def close(self) -> None:
        self.closed = True
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()


async def open_session(owner: SessionOwner, descriptor: int) -> ChildSession:
    """Take over a connected socket's descriptor."""
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    _, session = await asyncio.get_running_loop().create_unix_connection(lambda: ChildSession(owner), sock=sock)
    return session


class OutputPipe(asyncio.Protocol):
    """What a sandbox writes to its raw stdout and stderr."""

    def __init__(self, owner: OutputOwner) -> None:
        self._owner = owner
        self.ended = asyncio.get_running_loop().create_future()
        self.transport: asyncio.ReadTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._owner.raw_output(data)

    def slow_down(self) -> None:
        """Read no more for a while: what comes is not kept, and taking it in costs as much as what is."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(SLOW_DOWN_S, self._go_on)

    def _go_on(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class OutputOwner(Protocol):
    def raw_output(self, data: bytes) -> None: ...


async def open_output(owner: OutputOwner, descriptor: int) -> OutputPipe:
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    _, protocol = await asyncio.get_running_loop().connect_read_pipe(lambda: OutputPipe(owner), pipe)
    return protocol
