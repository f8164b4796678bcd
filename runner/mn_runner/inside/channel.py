"""The child's end of its socket: whole payloads in and out, for any number of threads, without a thread of its own.

Whoever has to wait for a frame reads for everybody: one thread holds the reader's role at a time and hands out what it reads; the others
wait for their bell, and one of them takes over when the reader has what it wanted.
"""

from __future__ import annotations

import os
import select
from _queue import Empty, SimpleQueue
from _thread import allocate_lock, get_ident
from collections import deque
from struct import error as StructError

from mn_runner.protocol import CHUNK_BYTES, HEADER, MORE, U32, WINDOW_CHUNKS, FrameReader, Kind, Violation, frames_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from mn_runner.inside.calls import Running

ACK, CALL, CHUNK, ITEM, REPLY = int(Kind.ACK), int(Kind.CALL), int(Kind.CHUNK), int(Kind.ITEM), int(Kind.REPLY)
READ_BYTES = 64 * 1024
WAIT_S = 0.25
"""Longest wait before looking again; bells and readability end waits, this bounds what a lost one costs."""
EXIT_PROTOCOL = 76
"""Exit code of a child that met a violation (EX_PROTOCOL of sysexits.h)."""


class Bell:
    """Ends a wait. Ringing costs nothing where nobody listens, may be done from a signal handler, and is never lost."""

    __slots__ = ("_rung",)

    def __init__(self) -> None:
        self._rung: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        if self._rung.empty():
            self._rung.put(None)

    def listen(self) -> None:
        try:
            self._rung.get(True, WAIT_S)
        except Empty:
            return


class Channel:
    """Frames to and from the node. `on_frame(kind, number, body)` gets whole payloads, in the thread that reads."""

    def __init__(self, fd: int, control_fd: int, running: Running) -> None:
        self.fd = fd
        self.control_fd = control_fd
        self.forked = False
        self.on_frame: Callable[[int, int, bytes], None] = _nothing_expected
        self.on_control: Callable[[], None] = _nothing_to_control
        """Takes what is in the control pipe, in the main thread, where no signal did."""
        self.when_free: Callable[[], None] | None = None
        """Told when the reader's role is free, so that an event loop can watch the socket again."""
        self._running = running
        self._main = get_ident()
        self._reader = FrameReader()
        self._parts: dict[int, tuple[int, list[bytes]]] = {}
        self._windows: dict[int, Window] = {}
        self._write_lock = allocate_lock()
        self._deferred: deque[bytes] = deque()
        self._role = allocate_lock()
        self._bells: list[Bell] = []
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN)
        self._poller.register(control_fd, select.POLLIN)

    # Out.
    def send(self, data: bytes) -> None:
        """Write whole frames."""
        with self._running.seat():
            with self._write_lock:
                self._write(data)
            if self._deferred:
                self._flush_deferred()

    def send_when_possible(self, data: bytes) -> None:
        """Like `send`, for a signal handler: never waits for the lock that the interrupted code may hold."""
        self._deferred.append(data)
        self._flush_deferred()

    def send_payload(self, kind: int, number: int, head: bytes, payload: bytes) -> None:
        """A payload of any size; waits for ACKs where it exceeds the window."""
        if len(payload) <= CHUNK_BYTES:
            self.send(HEADER.pack(len(head) + len(payload), kind, 0, number) + head + payload)
            return
        window = self._windows[number] = Window()
        try:
            self._send_pieces(window, kind, number, head, payload)
        finally:
            del self._windows[number]

    def open_window(self, number: int) -> Window:
        """The window of a call that sends items; stays until `close_window`."""
        window = self._windows[number] = Window()
        return window

    def close_window(self, number: int) -> None:
        self._windows.pop(number, None)

    def send_item(self, window: Window, number: int, head: bytes, payload: bytes) -> None:
        """One value of a generator. Waits, where the call can be interrupted, until its reader has taken enough of those before."""
        if window.is_full():
            self.wait(lambda: not window.is_full(), window.bell)
        window.sent += 1
        self._send_pieces(window, ITEM, number, head, payload)

    def _send_pieces(self, window: Window, kind: int, number: int, head: bytes, payload: bytes) -> None:
        for index, piece in enumerate(frames_of(kind, number, head, payload)):
            if index:
                if window.is_full():
                    self.wait(lambda: not window.is_full(), window.bell, interruptible=False)
                window.sent += 1
            self.send(piece)

    def _write(self, data: bytes) -> None:
        if self.forked:
            os._exit(0)
        try:
            sent = os.write(self.fd, data)
            while sent < len(data):
                data = data[sent:]
                sent = os.write(self.fd, data)
        except OSError:
            # The node is gone, and nobody is left to tell.
            os._exit(0)

    def _flush_deferred(self) -> None:
        while self._deferred and self._write_lock.acquire(False):
            try:
                while self._deferred:
                    self._write(self._deferred.popleft())
            finally:
                self._write_lock.release()

    # In.
    def wait(
        self,
        done: Callable[[], Any],
        bell: Bell,
        interruptible: bool = True,
        meanwhile: Callable[[], bool] | None = None,
    ) -> None:
        """Return when `done()`; read while nobody else does.

        `meanwhile` is run between frames and says whether it did something: a waiting call lends its slot there. `bell` is rung by whoever
        makes `done()` true. With `interruptible`, the caller's interruption is raised here, where no frame can be torn.
        """
        seat = self._running.seat()
        self._bells.append(bell)
        try:
            while not done():
                if meanwhile is not None and meanwhile():
                    continue
                if self._role.acquire(False):
                    try:
                        if interruptible:
                            self._await_readable(seat)
                        else:
                            self._poller.poll(int(WAIT_S * 1000))
                        self._read_available()
                    finally:
                        self._role.release()
                elif interruptible:
                    _outside_shield(seat, bell.listen)
                else:
                    bell.listen()
        finally:
            self._bells.remove(bell)
            self._role_is_free()

    def read_idle(self, calls_run: bool = False) -> bool:
        """Block for frames; False when another thread is reading.

        With `calls_run` in other threads it looks at the control pipe as well: a signal that comes just before a system call does not end it.
        """
        if not self._role.acquire(False):
            return False
        try:
            if calls_run:
                self._poller.poll()
                self._read_available()
            else:
                self._read()
        finally:
            self._role.release()
        if self._bells:
            self._role_is_free()
        return True

    def read_now(self) -> bool:
        """Hand out what has arrived, without waiting; False when another thread is reading."""
        if not self._role.acquire(False):
            return False
        try:
            self._read_available()
        finally:
            self._role.release()
        return True

    def _role_is_free(self) -> None:
        bells = self._bells
        if bells:
            bells[0].ring()
        elif self.when_free is not None:
            self.when_free()

    def _await_readable(self, seat: Any) -> None:
        _outside_shield(seat, lambda: self._poller.poll(int(WAIT_S * 1000)))

    def _read_available(self) -> None:
        for fd, _ in self._poller.poll(0):
            if fd == self.fd:
                self._read()
            elif get_ident() == self._main:
                self.on_control()

    def _read(self) -> None:
        try:
            data = os.read(self.fd, READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            os._exit(0)
        try:
            taken = 0
            for kind, flags, number, body in self._reader.feed(data):
                if not flags and kind != CHUNK and kind != ACK:
                    self.on_frame(kind, number, body)
                else:
                    taken = self._take_part(kind, flags, number, body)
                    if taken:
                        self._acknowledge(number)
        except (Violation, StructError, ValueError, IndexError) as error:
            self._broken(error)

    def _take_part(self, kind: int, flags: int, number: int, body: bytes) -> int:
        """Collect a payload of many frames; how many CHUNK frames are to be acknowledged."""
        if kind == ACK:
            window = self._windows.get(number)
            if window is not None:
                window.acknowledged += U32.unpack(body)[0]
                window.bell.ring()
            return 0
        if kind != CHUNK:
            if kind not in (CALL, REPLY, ITEM) or number in self._parts:
                raise Violation(f"frame {kind} can't go on in chunks")
            self._parts[number] = (kind, [body])
            return 0
        if number not in self._parts:
            raise Violation("a chunk of nothing")
        first, parts = self._parts[number]
        parts.append(body)
        if not flags & MORE:
            del self._parts[number]
            self.on_frame(first, number, b"".join(parts))
        return 1

    def _acknowledge(self, number: int) -> None:
        self.send(HEADER.pack(4, ACK, 0, number) + U32.pack(1))

    def _broken(self, error: Exception) -> NoReturn:
        os.write(2, f"protocol violation by the node: {error}\n".encode())
        os._exit(EXIT_PROTOCOL)


class Window:
    """CHUNK and ITEM frames sent and taken, of one call in one direction."""

    __slots__ = ("acknowledged", "bell", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.bell: Bell = Bell()

    def is_full(self) -> bool:
        return self.sent - self.acknowledged >= WINDOW_CHUNKS


def _outside_shield(seat: Any, wait: Callable[[], Any]) -> None:
    """Wait with the shield down by one, so that an interruption ends the wait."""
    try:
        seat.__exit__(None, None, None)
        wait()
    finally:
        seat.__enter__()


def _nothing_to_control() -> None:
    """Before there are calls."""


def _nothing_expected(kind: int, number: int, body: bytes) -> None:
    raise Violation(f"frame {kind} before the child was ready")
