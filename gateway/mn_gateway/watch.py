"""Cancels calls whose clients went away.

A call that ends at once is not watched: watching costs a task. The sweep looks at those that were there at the sweep
before, and starts to watch them; the server remembers a client that left earlier, so nothing is missed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive

from mn_gateway.pool import Dispatcher

SWEEP_S = 0.05
Waiting = tuple["asyncio.Future[Any]", Any, Receive]


class DisconnectWatch:
    """`recent.append((future, call, receive))` is all that a call costs."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.recent: list[Waiting] = []
        self._older: list[Waiting] = []
        self._dispatcher = dispatcher
        self._watchers: set[asyncio.Task[None]] = set()

    def sweep(self) -> None:
        """To be called every `SWEEP_S`."""
        for future, call, receive in self._older:
            if not future.done():
                task = asyncio.create_task(self._watch(future, call, receive))
                self._watchers.add(task)
                task.add_done_callback(self._watchers.discard)
        self._older, self.recent = self.recent, []

    async def _watch(self, future: asyncio.Future[Any], call: Any, receive: Receive) -> None:
        # The server also says "disconnect" when the answer has been sent, which ends this task.
        while (await receive())["type"] != "http.disconnect":
            continue
        if not future.done():
            self._dispatcher.cancel(call)

    async def close(self) -> None:
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
