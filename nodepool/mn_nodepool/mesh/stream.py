"""Links over sockets. Frames sent within one turn of the loop leave in one write."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog

from mn.formats.errors import ProtocolError
from mn_nodepool.mesh.transport import Receiver
from mn_nodepool.wire.codec import MessageReader, encode
from mn_nodepool.wire.messages import Hello, Message

log = structlog.get_logger("mesh")


class StreamLink(asyncio.Protocol):
    """A link over a stream socket. Says hello first; what comes before the peer's hello closes it."""

    def __init__(self, hello: Hello, receiver: Receiver, on_ready: Callable[[StreamLink], None] | None = None) -> None:
        self.peer = ""
        self.role = ""
        self.closed = False
        self._hello = hello
        self._receiver = receiver
        self._on_ready = on_ready
        self._reader = MessageReader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.send(self._hello)

    def send(self, message: Message, body: bytes | memoryview = b"") -> None:
        if self.closed:
            return
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out.append(encode(message, body))

    def _flush(self) -> None:
        out = self._out
        if out and self._transport is not None and not self.closed:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        out.clear()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
            for message, body in messages:
                if self.closed:
                    return
                if self.peer:
                    self._receiver.received(self, message, body)
                else:
                    self._greet(message)
        except ProtocolError as error:
            log.warning(
                "link closed: the peer broke the protocol", action="mesh_violation", peer=self.peer, reason=error.detail
            )
            self.close()
        except Exception:
            log.exception("link closed: handling a message failed", action="mesh_failed", peer=self.peer)
            self.close()

    def _greet(self, message: Message) -> None:
        if not isinstance(message, Hello) or not message.peer:
            raise ProtocolError(f"the first message is {type(message).__name__}, not Hello")
        if message.version.split(".")[:1] != self._hello.version.split(".")[:1]:
            raise ProtocolError(f"{message.peer} speaks version {message.version}, this is {self._hello.version}")
        self.peer, self.role = message.peer, message.role
        if self._on_ready is not None:
            self._on_ready(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._out.clear()
        self._receiver.lost(self)

    def close(self) -> None:
        if not self.closed:
            self._flush()
            self.closed = True
            if self._transport is not None:
                self._transport.close()


LinkFactory = Callable[[], StreamLink]


async def serve_unix(path: Path, factory: LinkFactory) -> asyncio.AbstractServer:
    """Listen on a Unix socket that only this user can open; what a dead process left at `path` is replaced."""
    path.unlink(missing_ok=True)
    server = await asyncio.get_running_loop().create_unix_server(factory, str(path))
    path.chmod(0o600)
    return server


async def dial_unix(path: Path, factory: LinkFactory) -> StreamLink:
    """Connect to a peer on this host.

    Raises OSError when nobody listens there.
    """
    _, link = await asyncio.get_running_loop().create_unix_connection(factory, str(path))
    return link


async def serve_tcp(
    host: str, port: int, factory: LinkFactory, tls: ssl.SSLContext | None = None
) -> asyncio.AbstractServer:
    """Listen on TCP; with `tls` only peers that it accepts get through."""
    return await asyncio.get_running_loop().create_server(factory, host, port, ssl=tls)


async def dial_tcp(host: str, port: int, factory: LinkFactory, tls: ssl.SSLContext | None = None) -> StreamLink:
    """Connect to a peer over TCP.

    Raises OSError or ssl.SSLError when there is none that is accepted.
    """
    _, link = await asyncio.get_running_loop().create_connection(factory, host, port, ssl=tls)
    return link
