"""Calls from inside a call: what `mn.call.set_transport` is given in a sandbox.

Any thread and any task may use it. A caller that waits reads for everybody and lends its slot: a call that arrives meanwhile runs right there,
so that a function with one replica can call itself.
"""

from __future__ import annotations

import sys
import time
from _thread import allocate_lock
from collections import deque

from mn_runner.inside.channel import Bell
from mn_runner.inside.failures import PLATFORM_ERROR, Refusal, problem
from mn_runner.protocol import HEADER, NESTED_BIT, NESTED_HEAD, TAKEN, U32, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from mn_runner.inside.calls import Call, Running
    from mn_runner.inside.channel import Channel

ACK, NESTED, CANCEL, ITEM = int(Kind.ACK), int(Kind.NESTED), int(Kind.CANCEL), int(Kind.ITEM)
MODE_CALL, MODE_STREAM = 0, 1
OK, JSON = 0, 0
BATCHED_BYTES = 16 * 1024
"""Payloads up to this size are written together with others."""
BATCH_BYTES_MAX = 64 * 1024


class Transport:
    """The node as user code reaches it. Payloads and answers are opaque here."""

    def __init__(
        self,
        channel: Channel,
        running: Running,
        depth_max: int,
        lend: Callable[[], bool],
        slot_lent: Callable[[], None],
    ) -> None:
        """`lend` runs a queued call in the waiting thread and says whether there was one; `slot_lent` is told when a call starts waiting."""
        self.channel = channel
        self.running = running
        self.lend = lend
        self.slot_lent = slot_lent
        self.loading = True
        """The function's module is being imported, and no call runs yet."""
        self.exchanges: dict[int, Exchange] = {}
        self.lock = allocate_lock()
        self._depth_max = depth_max
        self._numbers = 0

    def call(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> tuple[int, int, bytes]:
        """Call a function and wait: status, codec and payload of its answer."""
        for _, status, answer_codec, data in self._exchange(name, "remote", codec, (payload,), timeout_s, 1, MODE_CALL):
            return status, answer_codec, data
        raise AssertionError("a call has one answer")

    def stream(
        self, name: str, codec: int, payload: bytes, timeout_s: float | None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Call a generator: its values with status OK, as they come; an answer with another status is the last."""
        for _, status, answer_codec, data in self._exchange(
            name, "remote_gen", codec, (payload,), timeout_s, 1, MODE_STREAM
        ):
            yield status, answer_codec, data

    def map(
        self, name: str, codec: int, payloads: Iterable[bytes], timeout_s: float | None, window: int = 64
    ) -> Iterator[tuple[int, int, int, bytes]]:
        """Call once per payload, at most `window` at a time: (index, status, codec, payload) in the order of completion."""
        return self._exchange(name, "map", codec, payloads, timeout_s, max(1, window), MODE_CALL)

    def on_frame(self, kind: int, number: int, body: bytes) -> None:
        """A REPLY or ITEM, from whoever reads. Those of an abandoned call are dropped."""
        exchange = self.exchanges.get(number)
        if exchange is not None:
            exchange.take(kind, number, body)

    def next_number(self) -> int:
        with self.lock:
            self._numbers += 1
            return NESTED_BIT | self._numbers & 0x7FFF_FFFF

    def _exchange(
        self,
        name: str,
        verb: str,
        codec: int,
        payloads: Iterable[bytes],
        timeout_s: float | None,
        window: int,
        mode: int,
    ) -> Iterator[tuple[int, int, int, bytes]]:
        call = self.running.current()
        if self.channel.forked:
            raise RuntimeError(
                f"{name} was called in a forked process, which has no way to the node; call it in the parent"
            )
        if call is None:
            raise self._outside_calls(name, verb)
        if call.depth + 1 > self._depth_max:
            detail = (
                f"{name}: calls nest deeper than {self._depth_max}; end the recursion earlier, or raise call_depth_max"
            )
            yield 0, PLATFORM_ERROR, JSON, problem("invalid-request", detail, limit=self._depth_max)
            return
        encoded = name.encode()
        seconds = _seconds_left(timeout_s, call)
        head = NESTED_HEAD.pack(call.number, codec, mode, seconds, len(encoded)) + encoded
        exchange = Exchange(self, call, head, iter(payloads), window, mode)
        try:
            yield from exchange.answers()
        finally:
            exchange.abandon()

    def _outside_calls(self, name: str, verb: str) -> Exception:
        """What to raise where there is no running call that the new one would belong to."""
        if not self.loading:
            return RuntimeError(
                f"{name}.{verb} was called in a thread that belongs to no running call; start the thread in the call "
                "that waits for it"
            )
        main_thread = next(seat.ident for seat in self.running.seats.values() if seat.main)
        file, line = _importing_line(main_thread) or ("the module", 0)
        where = f" (line {line})" if line else ""
        advice = 'put that under `if __name__ == "__main__":`'
        return Refusal("invalid-request", f"{file} calls {name}.{verb} while it is imported{where}: {advice}")


def _importing_line(main_thread: int) -> tuple[str, int] | None:
    """File name and line of the module that the main thread is importing, the innermost one."""
    frame: FrameType | None = sys._current_frames().get(main_thread)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return frame.f_code.co_filename.rpartition("/")[2], frame.f_lineno
        frame = frame.f_back
    return None


def _seconds_left(timeout_s: float | None, call: Call) -> float:
    """Seconds that a nested call has: its own limit or what its parent has left; 0: no deadline."""
    limits = [] if timeout_s is None else [timeout_s]
    if call.deadline:
        limits.append(call.deadline - time.monotonic())
    return max(0.001, min(limits)) if limits else 0.0


class Exchange:
    """One `call`, `stream` or `map` on its way: what is out, and what has come back."""

    __slots__ = (
        "_bell",
        "_call",
        "_finished",
        "_head",
        "_mode",
        "_payloads",
        "_ready",
        "_started",
        "_transport",
        "_window",
        "out",
    )

    def __init__(
        self, transport: Transport, call: Call, head: bytes, payloads: Iterator[bytes], window: int, mode: int
    ) -> None:
        self._transport, self._call, self._head, self._payloads = transport, call, head, payloads
        self._window, self._mode = window, mode
        self._bell: Bell = Bell()
        self._ready: deque[tuple[int, int, int, bytes, bool]] = deque()
        self._started = 0
        self._finished = False
        self.out: dict[int, int] = {}
        """Number → index of what has no last answer yet."""

    def take(self, kind: int, number: int, body: bytes) -> None:
        if kind == ITEM:
            self._ready.append((number, OK, body[0], body[1:], False))
        else:
            self._ready.append((number, body[0], body[1], body[2:], True))
        self._bell.ring()

    def answers(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            if not self._finished and len(self.out) <= self._window // 2:
                self._fill()
            if not self.out:
                return
            if not self._ready:
                self._wait()
            number, status, codec, payload, last = self._ready.popleft()
            index = self.out[number]
            if last:
                del self.out[number]
                self._transport.exchanges.pop(number, None)
            else:
                self._transport.channel.send(HEADER.pack(U32.size, ACK, TAKEN, number) + U32.pack(1))
            if not (last and self._mode == MODE_STREAM and status == OK):
                yield index, status, codec, payload

    def abandon(self) -> None:
        """Tell the node what is no longer wanted."""
        numbers, exchanges = list(self.out), self._transport.exchanges
        self.out.clear()
        for number in numbers:
            exchanges.pop(number, None)
        if numbers:
            self._transport.channel.send(b"".join(HEADER.pack(0, CANCEL, 0, number) for number in numbers))

    def _fill(self) -> None:
        """Start calls until the window is full. Small ones are written together."""
        batch: list[bytes] = []
        size = 0
        send = self._transport.channel.send
        while len(self.out) < self._window:
            payload = next(self._payloads, None)
            if payload is None:
                self._finished = True
                break
            number = self._transport.next_number()
            self._transport.exchanges[number] = self
            self.out[number] = self._started
            self._started += 1
            if len(payload) > BATCHED_BYTES:
                self._transport.channel.send_payload(NESTED, number, self._head, payload)
                continue
            batch.append(HEADER.pack(len(self._head) + len(payload), NESTED, 0, number) + self._head + payload)
            size += len(payload)
            if size > BATCH_BYTES_MAX:
                send(b"".join(batch))
                batch.clear()
                size = 0
        if batch:
            send(b"".join(batch))

    def _wait(self) -> None:
        transport, call = self._transport, self._call
        with transport.running.seat():
            with transport.lock:
                call.nested += 1
            try:
                transport.slot_lent()
                transport.channel.wait(lambda: self._ready, self._bell, meanwhile=transport.lend)
            finally:
                with transport.lock:
                    call.nested -= 1
