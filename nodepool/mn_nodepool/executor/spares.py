"""Spares: sandboxes started before anybody asks for them, each without a function yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from mn.formats.errors import MnError
from mn_nodepool.executor.replica import Replica
from mn_runner.sandbox import State

log = structlog.get_logger("executor")
RETRY_S = 5.0
SETTLE_S = 0.05
"""A claimed spare is replaced after this, so that the call which claimed it comes first."""


class Spares:
    """Keeps `wanted` sandboxes of one shape ready."""

    def __init__(self, wanted: int, start: Callable[[], Awaitable[Replica]], starts_at_once: int) -> None:
        self._wanted = wanted
        self._start = start
        self._ready: deque[Replica] = deque()
        self._filling: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._limit = asyncio.Semaphore(starts_at_once)
        self._claims_waiting = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._ready)

    async def claim(self) -> Replica:
        """A started sandbox: a spare, or a new one where there is none.

        Raises SandboxUnavailable or Refused.
        """
        while self._ready:
            replica = self._ready.pop()
            if replica.state is State.SPARE:
                self._refill_later()
                return replica
        self._claims_waiting += 1
        try:
            async with self._limit:
                return await self._start()
        finally:
            self._claims_waiting -= 1
            self._refill_later()

    def lost(self, replica: Replica) -> None:
        """A spare died."""
        if replica in self._ready:
            self._ready.remove(replica)
            self._refill_later(RETRY_S)

    def _refill_later(self, delay_s: float = SETTLE_S) -> None:
        if not self._closed:
            asyncio.get_running_loop().call_later(delay_s, self.refill)

    def refill(self) -> None:
        """Start what is missing, one at a time, once nobody waits for a sandbox."""
        if self._closed or self._starting or len(self._ready) >= self._wanted:
            return
        if self._claims_waiting:
            self._refill_later()
            return
        self._starting += 1
        task = asyncio.get_running_loop().create_task(self._fill())
        self._filling.add(task)
        task.add_done_callback(self._filling.discard)

    async def _fill(self) -> None:
        delay_s = 0.0
        try:
            async with self._limit:
                replica = await self._start()
            self._ready.appendleft(replica)
        except MnError as error:
            log.warning("a spare could not be started", action="spare_failed", reason=error.detail)
            delay_s = RETRY_S
        finally:
            self._starting -= 1
        if self._closed:
            self._drain()
        else:
            self._refill_later(delay_s)

    def _drain(self) -> None:
        while self._ready:
            self._ready.pop().die("the node stops")

    async def close(self) -> None:
        self._closed = True
        self._drain()
        if self._filling:
            await asyncio.wait(self._filling)
