"""`f.aio`: the calls of a handle, to be awaited. Cancelling the task cancels the call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mn import call

if TYPE_CHECKING:
    from mn.functions import Function

AHEAD_MAX = 1024
"""Values that a background thread brings ahead of the loop."""
_END: Any = object()


class AioFunction:
    """What `f.aio` is."""

    def __init__(self, function: Function[Any, Any]) -> None:
        self._function = function

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Function.remote`."""
        function = self._function
        if call.inside_sandbox():
            return await asyncio.to_thread(function.remote, *args, **kwargs)
        from mn.formats.errors import InvalidRequest
        from mn.transport import default_transport

        if function.is_generator:
            raise InvalidRequest(f"{function.name} is a generator: iterate over {function.name}.aio.remote_gen(…)")
        # The first call deploys, which may take a while; the loop goes on meanwhile.
        name = function.name if function.raw_function is None else await asyncio.to_thread(function.pool_name)
        payload = call.encode(function, args, kwargs)
        return call.decode(function, *await default_transport().acall(name, call.PICKLE, payload, function.timeout))

    def remote_gen(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Like `Function.remote_gen`."""
        return _from_thread(lambda: self._function.remote_gen(*args, **kwargs))

    def map(
        self, *iterables: Iterable[Any], order_outputs: bool = True, return_exceptions: bool = False
    ) -> AsyncIterator[Any]:
        """Like `Function.map`."""
        options = {"order_outputs": order_outputs, "return_exceptions": return_exceptions}
        return _from_thread(lambda: self._function.map(*iterables, **options))

    def starmap(
        self, rows: Iterable[tuple[Any, ...]], *, order_outputs: bool = True, return_exceptions: bool = False
    ) -> AsyncIterator[Any]:
        """Like `Function.starmap`."""
        options = {"order_outputs": order_outputs, "return_exceptions": return_exceptions}
        return _from_thread(lambda: self._function.starmap(rows, **options))


async def _from_thread(start: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
    """The values of a blocking iterator, which a thread of its own runs, at most `AHEAD_MAX` ahead."""
    import contextvars

    loop = asyncio.get_running_loop()
    pump = _Pump(loop)
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(pump.run, start), name="mn-aio", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = await pump.next_batch()
            for value in batch:
                yield value
            if error is not None:
                if error is _END:
                    return
                raise error
    finally:
        pump.stop()


class _Pump:
    """Carries values from a thread to a loop in batches, with a bound on what waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = threading.Condition()
        self._values: list[Any] = []
        self._ended: Any = None
        self._stopped = False
        self._arrived = asyncio.Event()

    def run(self, start: Callable[[], Iterator[Any]]) -> None:
        ended = _END
        try:
            values = start()
            try:
                for value in values:
                    if not self._put(value):
                        return
            finally:
                getattr(values, "close", lambda: None)()
        except BaseException as error:  # raised again in the task that awaits
            ended = error
        with self._changed:
            self._ended = ended
            if not self._stopped:
                self._loop.call_soon_threadsafe(self._arrived.set)

    def _put(self, value: Any) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._values) < AHEAD_MAX)
            if self._stopped:
                return False
            self._values.append(value)
            if len(self._values) == 1:
                self._loop.call_soon_threadsafe(self._arrived.set)
            return True

    async def next_batch(self) -> tuple[list[Any], Any]:
        """Values, and how it ended once it has: an exception, or `_END`."""
        await self._arrived.wait()
        self._arrived.clear()
        with self._changed:
            batch, self._values = self._values, []
            self._changed.notify()
            if self._ended is not None:
                self._arrived.set()
            return batch, self._ended

    def stop(self) -> None:
        """The loop wants no more. The thread ends when its current value has come."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
