"""One HTTP request whose body and answer stream at the same time, on a plain socket, in the caller's own thread.

The client library sends a whole body before it reads; a map must read results while it still takes inputs. One loop
writes what the socket takes and reads what it has, so an exception (Ctrl-C, too) ends it at once and closes the
socket, which cancels the calls.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

import h11

from mn.formats.errors import Unavailable

CONNECT_S = 5.0
READ_BYTES = 256 * 1024
UNSENT_BYTES_MAX = 256 * 1024
"""Above it no more input is taken until the socket has taken some."""
BATCH_BYTES = 64 * 1024
BATCH_ITEMS = 1024
BATCH_S = 0.002
"""What is encoded together before it is sent, at most."""
FEED_ITEMS_MAX = 1024
FEED_BYTES_MAX = 8 << 20
"""Inputs that a feeding thread prepares ahead."""

KEEPALIVE: list[tuple[int, int, int]] = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
]
"""A call may take hours; what finds a dead peer meanwhile is the kernel's probes."""
for _name, _value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
    if hasattr(socket, _name):
        KEEPALIVE.append((socket.IPPROTO_TCP, getattr(socket, _name), _value))


class Feed(Protocol):
    """Inputs, taken in batches without blocking."""

    ended: bool
    """All were taken."""

    def take(self, items_max: int) -> list[bytes]: ...
    def fileno(self) -> int:
        """Readable when `take` has something new; -1: it always has."""

    def close(self) -> None: ...


class ReadyFeed:
    """Inputs that are in memory: the loop itself takes and encodes them."""

    def __init__(self, payloads: Iterable[bytes]) -> None:
        self.ended = False
        self._payloads = iter(payloads)

    def take(self, items_max: int) -> list[bytes]:
        batch: list[bytes] = []
        size, until = 0, time.monotonic() + BATCH_S
        for payload in self._payloads:
            batch.append(payload)
            size += len(payload)
            if len(batch) >= items_max or size >= BATCH_BYTES or time.monotonic() >= until:
                return batch
        self.ended = True
        return batch

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Nothing is held."""


class ThreadFeed:
    """Inputs that may take their time: a thread takes them, so that results are not held up meanwhile."""

    def __init__(self, payloads: Iterable[bytes]) -> None:
        self.ended = False
        self._ready: deque[bytes] = deque()
        self._size = 0
        self._finished = self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(payloads,), name="mn-map-inputs", daemon=True)
        self._thread.start()

    def _run(self, payloads: Iterable[bytes]) -> None:
        error: BaseException | None = None
        try:
            for payload in payloads:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._has_room())
                    if self._closed:
                        return
                    if not self._ready:
                        self._wake_writer.send(b"\0")
                    self._ready.append(payload)
                    self._size += len(payload)
        except BaseException as caught:  # raised again in the thread that asked for the map
            error = caught
        with self._changed:
            self._finished, self._error = True, error
            if not self._closed:
                self._wake_writer.send(b"\0")

    def _has_room(self) -> bool:
        return len(self._ready) < FEED_ITEMS_MAX and self._size < FEED_BYTES_MAX

    def take(self, items_max: int) -> list[bytes]:
        with self._changed:
            batch: list[bytes] = []
            size = 0
            while self._ready and len(batch) < items_max and size < BATCH_BYTES:
                batch.append(self._ready.popleft())
                size += len(batch[-1])
            self._size -= size
            self._changed.notify()
            if not self._ready and not self._finished:
                self._drain()
            elif not self._ready and (self._error is None or not batch):
                self.ended = True
                if self._error is not None:
                    raise self._error
            return batch

    def _drain(self) -> None:
        """Forget wake-ups that are dealt with; at most two can wait."""
        if select.select([self._wake_reader], [], [], 0)[0]:
            self._wake_reader.recv(64)

    def fileno(self) -> int:
        return self._wake_reader.fileno()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._wake_writer.close()
            self._wake_reader.close()


class Duplex:
    """One POST on a connection of its own."""

    def __init__(self, url: str, path: str, headers: list[tuple[str, str]], ca: str | None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "localhost", parts.port or (443 if secure else 80)
        try:
            self._socket = socket.create_connection((host, port), CONNECT_S)
        except OSError as error:
            raise unreachable(url, error) from error
        for option in KEEPALIVE:
            self._socket.setsockopt(*option)
        if secure:
            self._socket = ssl.create_default_context(cafile=ca).wrap_socket(self._socket, server_hostname=host)
        self._socket.setblocking(False)
        self._http = h11.Connection(h11.CLIENT)
        self._unsent = bytearray()
        head = [("Host", parts.netloc.rpartition("@")[2]), ("Transfer-Encoding", "chunked"), *headers]
        self._send(h11.Request(method="POST", target=parts.path.rstrip("/") + path, headers=head))

    def close(self) -> None:
        self._socket.close()

    def _send(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        data = self._http.send(event)
        assert data is not None
        self._unsent += data

    def send(self, data: bytes) -> None:
        self._send(h11.Data(data=data))

    def end(self) -> None:
        self._send(h11.EndOfMessage())

    @property
    def congested(self) -> bool:
        return len(self._unsent) >= UNSENT_BYTES_MAX

    def exchange(self, wake: int, block: bool) -> list[h11.Event]:
        """Write and read what is possible, waiting for something when `block`; the events of the answer.

        `wake` is a descriptor whose readability ends the wait, or -1.
        """
        pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        poller, own = select.poll(), self._socket.fileno()
        poller.register(own, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if wake >= 0:
            poller.register(wake, select.POLLIN)
        ready = dict(poller.poll(None if block and not pending else 0)).get(own, 0)
        if ready & select.POLLOUT:
            self._write()
        return self._read() if pending or ready & ~select.POLLOUT else []

    def _write(self) -> None:
        try:
            del self._unsent[: self._socket.send(memoryview(self._unsent)[:READ_BYTES])]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            # The answer may tell why the server stopped reading; when there is none, reading finds that out.
            self._unsent.clear()

    def _read(self) -> list[h11.Event]:
        try:
            self._http.receive_data(self._socket.recv(READ_BYTES))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return []
        except OSError as error:
            raise _cut(error) from error
        events: list[h11.Event] = []
        try:
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                assert isinstance(event, h11.Event)
                if isinstance(event, h11.ConnectionClosed):
                    raise _cut("it closed the connection")
                events.append(event)
                if isinstance(event, h11.EndOfMessage):
                    break
        except h11.RemoteProtocolError as error:
            raise _cut(error) from error
        return events


def unreachable(url: str, error: object) -> Unavailable:
    """The error of a server that can't be connected to."""
    why = str(getattr(error, "strerror", None) or error)
    return Unavailable(
        f"cannot reach {url} ({why}): start a runtime with mn runtime start, or name another with MN_URL or mn login"
    )


def _cut(error: object) -> Unavailable:
    return Unavailable(
        f"the connection to the gateway was lost before the answer ({error}); the call may have run", may_have_run=True
    )
