"""Telling who waits: executors that have slots, and the leader, which may start more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mn.formats.errors import MnError, NoLeader
from mn.formats.ids import display_name
from mn_nodepool.dispatch.lane import Lane
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.wire.messages import Backlog, Demand

REPORT_EVERY_S = 0.1
"""While calls wait, executors and the leader hear of it at this pace."""
LEADERLESS_MAX_S = 2.0
"""A call that needs a new sandbox waits so long for a leader, then its caller is told."""
LONG_US = 200_000
"""A call that runs for longer than this counts with its own time when replicas are wanted, and not with the mean."""


class Reporter:
    """Reports lanes whose queue changed, once per turn of the loop, and as long as somebody waits in them."""

    def __init__(
        self,
        demand: Callable[[Demand], None],
        leaderless_s: Callable[[], float],
        oldest: Callable[[Lane], PendingCall],
        fail: Callable[[PendingCall, MnError], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`oldest` gives the call of a lane that runs longest; `fail` ends a queued call."""
        self._demand = demand
        self._leaderless_s = leaderless_s
        self._oldest = oldest
        self._fail = fail
        self._loop = loop
        self._dirty: set[Lane] = set()

    def queued(self, lane: Lane) -> None:
        """One more waits: news when nobody was known to, or when they have doubled."""
        if not lane.reported or len(lane.queue) > 2 * lane.reported:
            self.note(lane)

    def note(self, lane: Lane) -> None:
        """Report it at the end of this turn of the loop."""
        if not self._dirty:
            self._loop.call_soon(self._report_dirty)
        self._dirty.add(lane)

    def _report_dirty(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for lane in dirty:
            self._report(lane)

    def _report(self, lane: Lane) -> None:
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None
        waiting = len(lane.queue)
        if waiting or lane.reported:
            for credit in lane.credits.values():
                if credit.slots:
                    credit.link.send(Backlog(lane.version, waiting))
            lane.reported = waiting
            if not waiting:
                self._demand(Demand(lane.version, 0, lane.running))
        if waiting and not lane.has_slots() and self._leaderless_s() > LEADERLESS_MAX_S:
            self._fail_leaderless(lane)
        elif waiting:
            self._demand(Demand(lane.version, waiting, lane.running, self._run_us(lane)))
            lane.timer = self._loop.call_later(REPORT_EVERY_S, self._report, lane)

    def _fail_leaderless(self, lane: Lane) -> None:
        """Nobody can start a sandbox for what waits."""
        for call in list(lane.queue):
            name = display_name(call.route.name)
            detail = f"{name} has no sandbox and there is no leader to start one; try again in a few seconds"
            self._fail(call, NoLeader(detail, retry_after_s=2, may_have_run=False))

    def _run_us(self, lane: Lane) -> int:
        """How long a call takes: the mean, unless one is taking much longer, behind which the others must not wait.

        Where none of this dispatcher's calls runs, others' hold all slots, for as long as the first has waited here.
        """
        if lane.running:
            since = self._oldest(lane).sent
        elif lane.has_slots():
            since = lane.queue[0].created
        else:
            return int(lane.run_us)
        present_us = int((self._loop.time() - since) * 1e6)
        known = lane.run_us or not lane.running
        return present_us if present_us > LONG_US or not known else int(lane.run_us)
