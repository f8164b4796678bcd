"""Commands that calls cause in the store: those that came beyond what an idle runtime sends by the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import redis

from loadtest.scratch import Runtime

Counts = Mapping[str, int]
OURS = {"info": 1}
"""What a reading itself adds to the next one."""


class Window(NamedTuple):
    """Commands between two readings."""

    counts: Counts
    seconds: float


def between(before: Counts, after: Counts) -> dict[str, int]:
    """Commands from one reading to the next, without the reading itself.

    >>> between({"get": 3, "info": 1}, {"get": 5, "info": 2})
    {'get': 2}
    """
    grown = {name: count - before.get(name, 0) - OURS.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in grown.items() if count > 0}


def caused(idle: Window, load: Window, period_s: float) -> dict[str, int]:
    """Commands of the load's window beyond the idle rate. What comes by the clock once in `period_s` may fall into a window once
    more or once less, so one period's worth at each end is the clock's.

    >>> caused(Window({"evalsha": 4}, 5.0), Window({"evalsha": 9, "xadd": 2}, 10.0), 1.25)
    {'xadd': 2}
    """
    beyond = {}
    for name, count in load.counts.items():
        rate = idle.counts.get(name, 0) / idle.seconds
        by_clock = math.ceil(rate * (load.seconds + 2 * period_s))
        if count > by_clock:
            beyond[name] = count - by_clock
    return beyond


@dataclass(slots=True)
class Reading:
    """Counters at one moment."""

    counts: dict[str, int]
    at: float


class StoreCommands:
    """Reads a runtime's store over one connection. Leaving the context closes it."""

    def __init__(self, runtime: Runtime) -> None:
        self._redis = redis.Redis.from_url(runtime.endpoints["store"], password=runtime.store_password())

    def __enter__(self) -> StoreCommands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redis.close()

    def read(self) -> Reading:
        told: dict[str, Any] = self._redis.info("commandstats")
        return Reading({name.removeprefix("cmdstat_"): it["calls"] for name, it in told.items()}, time.monotonic())

    def since(self, before: Reading) -> Window:
        after = self.read()
        return Window(between(before.counts, after.counts), after.at - before.at)
