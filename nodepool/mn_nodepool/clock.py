"""Time, as an argument: who decides by time is given a clock, so that tests and the simulation can turn it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ms(self) -> int:
        """Milliseconds since the epoch. For records and people; it can jump."""

    def monotonic(self) -> float:
        """Seconds that never go back and count sleep. For deciding."""


class SystemClock:
    """This machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime(clock)
