"""Calls of an `async def`: tasks on one event loop in the main thread."""

from __future__ import annotations

import asyncio
import time
from _thread import get_ident, start_new_thread
from concurrent.futures import ThreadPoolExecutor

from mn_runner.inside.calls import Call, Seat
from mn_runner.inside.failures import PLATFORM_ERROR, interruption_payload, refuse_unless_generator
from mn_runner.inside.serve import OK
from mn_runner.inside.values import JSON, RAW, arguments, encoded
from mn_runner.protocol import CHUNK_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mn_runner.inside.serve import Child

WAITING_THREADS_MAX = 256


class Tasks:
    """Runs as many calls at once as the version allows, plus those for slots that waiting calls lend."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._loop = asyncio.new_event_loop()
        # Threads in which calls wait for calls of their own; with asyncio's few, recursion would come to a stand.
        self._loop.set_default_executor(ThreadPoolExecutor(WAITING_THREADS_MAX))
        self._ident = get_ident()
        self._parked = False
        self._finished = self._loop.create_future()

    def serve(self) -> None:
        channel = self._child.channel
        self._loop.add_reader(channel.fd, self._on_readable)
        # A signal that comes just before the loop goes to sleep would not wake it.
        self._loop.add_reader(channel.control_fd, self._child.on_control)
        channel.when_free = self._role_is_free
        asyncio.set_event_loop(self._loop)
        self._start_waiting()
        self._loop.run_until_complete(self._finished)

    def wake(self) -> None:
        """A call was queued, a slot was lent, or the end was announced. From any thread."""
        self._loop.call_soon_threadsafe(self._start_waiting)

    def run_queued(self) -> bool:
        """With the loop's own thread blocked in a call of its own, a queued call gets a thread and a loop of its own."""
        child = self._child
        if get_ident() != self._ident or not child.can_start():
            return False
        call = child.claim()
        if call is None:
            return False
        start_new_thread(self._run_aside, (call,))
        return True

    def _run_aside(self, call: Call) -> None:
        seats = self._child.running.seats
        seats[get_ident()] = Seat()
        try:
            asyncio.run(self._run(call))
        finally:
            del seats[get_ident()]

    def _start_waiting(self) -> None:
        child = self._child
        while child.queue and child.can_start() and (call := child.claim()):
            call.task = self._loop.create_task(self._run(call))
        if child.stopping and not child.running.calls and not self._finished.done():
            self._finished.set_result(None)

    async def _run(self, call: Call) -> None:
        child = self._child
        call.task = asyncio.current_task()
        child.running.task_call.set(call)
        began = time.perf_counter_ns()
        try:
            try:
                status, codec, payload = OK, *await self._value(call)
            except BaseException as error:  # user code may raise anything, SystemExit included
                if call.reason:
                    status, codec, payload = PLATFORM_ERROR, JSON, interruption_payload(call.reason)
                else:
                    status, codec, payload = child.failure(call, error)
            call.task = None
            child.flush_output(call)
            micros = (time.perf_counter_ns() - began) // 1000
            if len(payload) > CHUNK_BYTES:
                await asyncio.to_thread(child.finish, call, status, codec, payload, micros)
            else:
                child.finish(call, status, codec, payload, micros)
        finally:
            child.running.calls.pop(call.number, None)
            self.wake()

    async def _value(self, call: Call) -> tuple[int, bytes]:
        function = self._child.function
        assert function is not None
        args, kwargs = arguments(call.codec, call.payload, function.raw)
        call.payload = b""
        if call.reason:
            raise call.interruption()
        value = function.call(*args, **kwargs)
        if hasattr(type(value), "__anext__") or function.generator:
            refuse_unless_generator(function, value)
            await self._send_items(call, value, function.payload_bytes_max)
            return RAW, b""
        if hasattr(type(value), "__await__"):
            value = await value
        return encoded(value, call.codec, function.payload_bytes_max)

    async def _send_items(self, call: Call, values: Any, bytes_max: int) -> None:
        channel = self._child.channel
        window = channel.open_window(call.number)
        try:
            async for item in values:
                codec, payload = encoded(item, call.codec, bytes_max)
                if len(payload) > CHUNK_BYTES or window.is_full():
                    await asyncio.to_thread(channel.send_item, window, call.number, bytes((codec,)), payload)
                else:
                    channel.send_item(window, call.number, bytes((codec,)), payload)
        finally:
            channel.close_window(call.number)

    # The socket.
    def _on_readable(self) -> None:
        channel = self._child.channel
        if channel.read_now():
            return
        # Another thread reads; until it stops, a readable socket must not spin the loop.
        self._parked = True
        self._loop.remove_reader(channel.fd)
        if channel.read_now():
            self._watch_again()

    def _role_is_free(self) -> None:
        if self._parked:
            self._loop.call_soon_threadsafe(self._watch_again)

    def _watch_again(self) -> None:
        if self._parked:
            self._parked = False
            self._loop.add_reader(self._child.channel.fd, self._on_readable)
