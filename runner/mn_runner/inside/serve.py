"""The child's life: READY, LOAD, then calls one after another in the main thread, or in as many threads as the version allows."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from _thread import get_ident as _ident
from _thread import get_native_id as _native_id
from collections import deque
from struct import Struct

from mn_runner.inside.calls import WITHDRAWN, Call, Interrupted, Running, Seat
from mn_runner.inside.channel import Bell, Channel
from mn_runner.inside.failures import (
    FUNCTION_ERROR,
    PLATFORM_ERROR,
    Refusal,
    function_error,
    interruption_payload,
    problem,
    refuse_unless_generator,
    wrong_arguments,
)
from mn_runner.inside.loading import Function, load_error, load_function
from mn_runner.inside.output import Output
from mn_runner.inside.transport import Transport
from mn_runner.inside.values import JSON, PICKLE, RAW, arguments, encoded, pickled
from mn_runner.protocol import CALL_HEAD, CONTROL, CONTROL_FD, HEADER, PROTOCOL_FD, RESULT_HEAD, Kind, Violation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

    from mn_runner.inside.tasks import Tasks
    from mn_runner.inside.threads import Threads

LOAD, CALL, REPLY, STOP, ITEM = int(Kind.LOAD), int(Kind.CALL), int(Kind.REPLY), int(Kind.STOP), int(Kind.ITEM)
READY, LOADED, RESULT = int(Kind.READY), int(Kind.LOADED), int(Kind.RESULT)
OK = 0
OWNER = Struct("ii")
STRAY_CANCELS_MAX = 1024
GENERATOR_TYPE = type(_ for _ in ())


class Child:
    """All of one child's state. Frames come in through `on_frame` in whichever thread reads."""

    def __init__(self) -> None:
        self.running = Running()
        self.channel = Channel(PROTOCOL_FD, CONTROL_FD, self.running)
        self.channel.on_frame = self.on_frame
        self.channel.on_control = self.on_control
        self.seat = self.running.seats.setdefault(_ident(), Seat(main=True))
        self.queue: deque[Call] = deque()
        self.bell: Bell = Bell()
        self.function: Function | None = None
        self.stopping = False
        self.crew: Tasks | Threads | None = None
        """Who runs the calls, unless the main thread does it one after another."""
        self.outputs = (Output(1, self.channel, self.running), Output(2, self.channel, self.running))
        self._load: dict[str, Any] | None = None
        self._highest = 0
        self._early: dict[int, int] = {}
        """Cancellations that came before their call did, by number."""
        self._missed: dict[int, int] = {}
        """Cancellations of calls that are over, or just between queue and start."""

    # Frames.
    def on_frame(self, kind: int, number: int, body: bytes) -> None:
        if kind == CALL:
            self._on_call(number, body)
        elif kind in (REPLY, ITEM):
            self.transport.on_frame(kind, number, body)
        elif kind == STOP:
            self.stopping = True
            self._wake()
        elif kind == LOAD and self._load is None:
            self._load = json.loads(body)
        else:
            raise Violation(f"frame {kind} is not expected")

    def _on_call(self, number: int, body: bytes) -> None:
        if self.function is None:
            raise Violation("a call before LOADED")
        seconds, codec, depth, id_size = CALL_HEAD.unpack_from(body)
        start = CALL_HEAD.size + id_size
        deadline = time.monotonic() + seconds if seconds else 0.0
        call = Call(
            number,
            deadline,
            codec,
            depth,
            body[CALL_HEAD.size : start].decode(),
            body[start:],
            self.function.output_bytes_max,
        )
        self._highest = max(self._highest, number)
        if self._early and self._early.pop(number, 0):
            # Its answer went out when the cancellation came.
            return
        self.queue.append(call)
        self._wake()

    def _wake(self) -> None:
        if self.crew is not None:
            self.crew.wake()
        else:
            self.bell.ring()

    def can_start(self) -> bool:
        """Whether a slot is free: one that no call has, or one that a waiting call lends."""
        assert self.function is not None
        calls = self.running.calls
        return not calls or len(calls) - self.running.lent() < self.function.concurrency

    # Interruptions.
    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The control pipe has something. Runs in the main thread, between any two instructions of it."""
        self.on_control()

    def on_control(self) -> None:
        try:
            data = os.read(CONTROL_FD, 4096)
        except BlockingIOError:
            return
        if not data:
            os._exit(0)
        for number, reason in CONTROL.iter_unpack(data[: len(data) // 8 * 8]):
            self._interrupt(number, reason)

    def _interrupt(self, number: int, reason: int) -> None:
        call = self.running.calls.get(number)
        if call is not None:
            if reason == WITHDRAWN:
                return
            call.reason = call.reason or reason
            if call.task is not None:
                call.task.get_loop().call_soon_threadsafe(call.task.cancel)
            elif call.seat is not None:
                call.seat.interrupt(call)
            return
        for waiting in list(self.queue):
            if waiting.number == number:
                self.queue.remove(waiting)
                self._answer_unstarted(number, reason)
                return
        if reason == WITHDRAWN and number <= self._highest:
            return
        table = self._early if number > self._highest else self._missed
        while len(table) >= STRAY_CANCELS_MAX:
            del table[next(iter(table))]
        table[number] = reason
        if table is self._early:
            self._answer_unstarted(number, reason)

    def claim(self) -> Call | None:
        """Take the next call from the queue and count it as running; None when another thread was faster."""
        try:
            call = self.queue.popleft()
        except IndexError:
            return None
        self.running.calls[call.number] = call
        # A cancellation that came between those two lines found it in neither place.
        call.reason = self._missed.pop(call.number, 0)
        return call

    def _answer_unstarted(self, number: int, reason: int) -> None:
        payload = interruption_payload(reason, started=False)
        head = RESULT_HEAD.pack(PLATFORM_ERROR, JSON, 0)
        self.channel.send_when_possible(HEADER.pack(len(head) + len(payload), RESULT, 0, number) + head + payload)

    # Life.
    def main(self) -> NoReturn:
        self.running.follow_threads()
        preload()
        fcntl.fcntl(CONTROL_FD, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        ready = json.dumps({"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "pid": os.getpid()}).encode()
        self.channel.send(HEADER.pack(len(ready), READY, 0, 0) + ready)
        while self._load is None and not self.stopping:
            self.channel.read_idle()
        if self._load is not None:
            self._become(self._load)
            self._serve()
        self.exit()

    def _become(self, load: dict[str, Any]) -> None:
        sys.stdout, sys.stderr = self.outputs
        answer: dict[str, Any] = {}
        try:
            self.transport = Transport(
                self.channel, self.running, int(load.get("depth_max") or 16), self.run_queued, self._slot_lent
            )
            _give_transport(self.transport)
            self.function = load_function(load)
            self.transport.loading = False
            self.crew = crew_for(self)
        except BaseException as error:  # importing user code may raise SystemExit as well
            answer = {"error": load_error(error, load)}
        self.flush_output(None)
        body = json.dumps(answer).encode()
        self.channel.send(HEADER.pack(len(body), LOADED, 0, 0) + body)
        if answer:
            self.exit()

    def _serve(self) -> None:
        assert self.function is not None
        if self.crew is not None:
            self.crew.serve()
        else:
            while not self.stopping or self.queue:
                if call := self.claim():
                    self.run(call, self.seat)
                elif not self.channel.read_idle():
                    self.channel.wait(lambda: self.queue or self.stopping, self.bell, interruptible=False)

    def _slot_lent(self) -> None:
        if self.queue:
            self._wake()

    def run_queued(self) -> bool:
        """Run a queued call in this thread, which waits for an answer of its own; False when there is none to run here."""
        if not self.queue:
            return False
        if self.crew is not None:
            return self.crew.run_queued()
        if not self.can_start():
            return False
        call = self.claim()
        if call is None:
            return False
        ident = _ident()
        seat = self.running.seats.get(ident)
        if seat is not None:
            self.run(call, seat)
            return True
        self.running.seats[ident] = seat = Seat()
        try:
            self.run(call, seat)
        finally:
            del self.running.seats[ident]
        return True

    def in_fork(self) -> None:
        """In a process forked by user code: it keeps no way to the node."""
        self.channel.forked = True
        for fd in (PROTOCOL_FD, CONTROL_FD):
            os.close(fd)

    def exit(self) -> NoReturn:
        import atexit

        atexit._run_exitfuncs()
        self.flush_output(None)
        os._exit(0)

    # One call.
    def run(self, call: Call, seat: Seat) -> None:
        """Run a claimed call to its RESULT in this thread."""
        outer, shield = seat.call, seat.shield
        call.seat = seat
        seat.call = call
        began = time.perf_counter_ns()
        try:
            status, codec, payload = self._outcome(call, seat)
        finally:
            seat.shield = 1
            micros = (time.perf_counter_ns() - began) // 1000
            self.flush_output(call)
            del self.running.calls[call.number]
            seat.call, seat.shield = outer, shield
        self.finish(call, status, codec, payload, micros)

    def _outcome(self, call: Call, seat: Seat) -> tuple[int, int, bytes]:
        function = self.function
        assert function is not None
        try:
            try:
                args, kwargs = arguments(call.codec, call.payload, function.raw)
                call.payload = b""
                seat.arm()
                value = function.call(*args, **kwargs)
                if type(value) is GENERATOR_TYPE or function.generator:
                    seat.disarm()
                    self._send_items(call, seat, function, value)
                    value, codec, payload = None, RAW, b""
                else:
                    if hasattr(type(value), "__await__"):
                        value = self._awaited(value)
                    codec, payload = encoded(value, call.codec, function.payload_bytes_max)
            finally:
                seat.disarm()
        except BaseException as error:  # user code may raise anything, SystemExit and Interrupted included
            return self.failure(call, error)
        if call.raised:
            return PLATFORM_ERROR, JSON, interruption_payload(call.reason)
        return OK, codec, payload

    def _send_items(self, call: Call, seat: Seat, function: Function, values: Any) -> None:
        refuse_unless_generator(function, values)
        iterator = iter(values)
        window = self.channel.open_window(call.number)
        try:
            while True:
                seat.arm()
                try:
                    value = next(iterator)
                except StopIteration:
                    return
                codec, payload = encoded(value, call.codec, function.payload_bytes_max)
                seat.disarm()
                self.channel.send_item(window, call.number, bytes((codec,)), payload)
        finally:
            self.channel.close_window(call.number)

    def _awaited(self, value: Any) -> Any:
        """An awaitable that a plain function returned, as decorated coroutines do."""
        import asyncio

        async def wait() -> Any:
            return await value

        return asyncio.run(wait())

    def failure(self, call: Call, error: BaseException) -> tuple[int, int, bytes]:
        """Status, codec and payload for a call that ended with `error`."""
        if self.channel.forked:
            os._exit(1)
        if call.raised or isinstance(error, Interrupted):
            return PLATFORM_ERROR, JSON, interruption_payload(call.reason)
        if isinstance(error, Refusal):
            if error.slug == "function-error":
                told = TypeError(error.detail)
                return FUNCTION_ERROR, JSON, function_error(told, pickled if call.codec == PICKLE else None)
            return PLATFORM_ERROR, JSON, error.payload()
        if type(error) is TypeError and call.codec != PICKLE:
            detail = wrong_arguments(self.function, error)
            if detail:
                return PLATFORM_ERROR, JSON, problem("invalid-request", detail)
        return FUNCTION_ERROR, JSON, function_error(error, pickled if call.codec == PICKLE else None)

    def finish(self, call: Call, status: int, codec: int, payload: bytes, micros: int) -> None:
        head = RESULT_HEAD.pack(status, codec, min(micros, 0xFFFF_FFFF))
        self.channel.send_payload(RESULT, call.number, head, payload)

    def flush_output(self, call: Call | None) -> None:
        for output in self.outputs:
            output.end_of(call)


def crew_for(child: Child) -> Tasks | Threads | None:
    """Tasks for an `async def`, threads for `concurrency` above one, and nobody for what the main thread runs by itself."""
    function = child.function
    assert function is not None
    if function.is_async:
        from mn_runner.inside.tasks import Tasks

        return Tasks(child)
    if function.concurrency > 1:
        from mn_runner.inside.threads import Threads

        return Threads(child)
    return None


def serve() -> NoReturn:
    """Run the child until its node lets it go."""
    child = Child()
    signal.signal(signal.SIGIO, child.on_signal)
    _own_signals(CONTROL_FD)
    os.register_at_fork(after_in_child=child.in_fork)
    child.main()


def _own_signals(fd: int) -> None:
    """Have the kernel signal the main thread, whose system calls an interruption has to end, when `fd` becomes readable."""
    set_owner_ex, owner_thread = 15, 0
    if sys.platform == "linux":
        fcntl.fcntl(fd, set_owner_ex, OWNER.pack(owner_thread, _native_id()))
    else:
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())


def preload() -> None:
    """Import while nobody waits what nearly every function needs: a spare has time, a cold call has not."""
    import mn.functions  # noqa: F401


def _give_transport(transport: Transport) -> None:
    from mn.call import set_transport

    set_transport(transport)
