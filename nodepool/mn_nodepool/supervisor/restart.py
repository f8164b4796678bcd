"""When a child that ended is started again: decided from how long it ran and how long the wait before was."""

from __future__ import annotations

DELAY_FIRST_S = 0.1
DELAY_MAX_S = 10.0
STEADY_S = 30.0
"""A child that ran this long is taken for healthy: its next restart is quick again."""


def next_delay_s(previous_s: float, uptime_s: float) -> float:
    """Seconds to wait before a restart.

    `previous_s` is the wait before the run that has just ended (0 for the first), `uptime_s` how long that run was.
    """
    if previous_s <= 0 or uptime_s >= STEADY_S:
        return DELAY_FIRST_S
    return min(previous_s * 2, DELAY_MAX_S)
