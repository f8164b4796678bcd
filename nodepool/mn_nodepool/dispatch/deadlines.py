"""Deadlines of many calls with one timer per tick in use, whatever their number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mn_nodepool.dispatch.pending import PendingCall

TICKS_PER_S = 20
HORIZON_TICKS = 60 * TICKS_PER_S
"""Calls with a later deadline are looked at again then, so that timers stay few however far deadlines reach."""


class Deadlines:
    """Calls `expired(call)` once, within a tick (50 ms) after a call's deadline, unless it is removed before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[PendingCall], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._buckets: dict[int, dict[int, PendingCall]] = {}

    def add(self, call: PendingCall) -> None:
        bucket = min(int(call.deadline * TICKS_PER_S), int(self._loop.time() * TICKS_PER_S) + HORIZON_TICKS) + 1
        call.bucket = bucket
        calls = self._buckets.get(bucket)
        if calls is None:
            calls = self._buckets[bucket] = {}
            self._loop.call_at(bucket / TICKS_PER_S, self._fire, bucket)
        calls[id(call)] = call

    def remove(self, call: PendingCall) -> None:
        calls = self._buckets.get(call.bucket)
        if calls is not None:
            calls.pop(id(call), None)

    def _fire(self, bucket: int) -> None:
        for call in list(self._buckets.pop(bucket).values()):
            if call.deadline * TICKS_PER_S >= bucket:
                self.add(call)
            else:
                self._expired(call)
