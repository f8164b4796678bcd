"""How many replicas a version should have, from what waits and how long calls run."""

from __future__ import annotations

import math

from mn.formats.manifest import Scaling

WAIT_TARGET_S = 0.2
"""A queue that the present replicas work off within this grows no new ones: starting one takes about as long."""
FIRST_REPLICAS = 2
"""Started at once for a burst of calls of unknown length; what they teach decides on more."""


def wanted_replicas(scaling: Scaling, present: int, queued: int, running: int, run_us: int) -> int:
    """Replicas wanted in all, given `present` ones and calls that wait; never fewer than there are (idle ones end by their own rule).

    `run_us`: mean run time of a call, 0 when nothing is known.
    """
    slots = scaling.concurrency
    if not queued:
        return max(present, scaling.min_replicas)
    if not run_us:
        wanted = max(present, min(FIRST_REPLICAS, math.ceil(queued / slots)))
    else:
        work_s = queued * run_us / 1e6
        for_wait = math.ceil(work_s / WAIT_TARGET_S / slots)
        wanted = max(present, 1, min(math.ceil((queued + running) / slots), for_wait))
    return min(max(wanted, scaling.min_replicas), scaling.max_replicas)
