"""One version at this executor: its replicas, the calls that wait for one, and who holds credits for them.

More credits than slots are given for functions that end within a millisecond: the next calls wait here, a memory copy away from a slot,
instead of a round trip away. They are never promised to one replica until it is free, except for a few that ride in its socket
while calls keep ending quickly (`PIPELINE`); those are withdrawn when one turns out to be slow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from mn_nodepool.executor.calls import RunningCall
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.messages import Grant, Recall, Slots, Start

if TYPE_CHECKING:
    from mn_nodepool.executor.replica import Replica

AHEAD_S = 0.01
"""Work, in seconds of run time per slot, that may wait here beyond the slots."""
AHEAD_CALLS_MAX = 64
PIPELINE = 3
FAST_US = 500
"""Calls that end within this may ride in a replica's socket behind another."""


class Holder:
    """What one dispatcher holds of a version."""

    __slots__ = ("backlog", "granted", "recalled", "turn")

    def __init__(self) -> None:
        self.granted = 0
        self.recalled = 0
        self.backlog = 0
        self.turn = 0
        """Grows with each grant: who was served longest ago comes first."""

    @property
    def held(self) -> int:
        """Credits that it has and may keep."""
        return self.granted - self.recalled


def water_level(capacity: int, demands: list[int]) -> int:
    """The share up to which demands can be met when none gets more than another that lacks: max-min fairness in whole numbers.

    >>> water_level(10, [1, 100, 100])
    4
    """
    left = capacity
    for position, demand in enumerate(sorted(demands)):
        share = left // (len(demands) - position)
        if demand > share:
            return share
        left -= demand
    return max(demands, default=0)


class VersionLane:
    """Slots and credits of one version."""

    def __init__(self, start: Start, loop: asyncio.AbstractEventLoop) -> None:
        self.start = start
        self.version = start.version
        self.function = start.version.rpartition("#")[0]
        self.replicas: dict[str, Replica] = {}
        self.free: list[Replica] = []
        """Replicas with an idle slot; the last used is used next."""
        self.queue: deque[RunningCall] = deque()
        self.holders: dict[Link, Holder] = {}
        self.run_us = 0.0
        self.fast = False
        self.seq = 0
        self.offered = 0
        """Slots as announced last."""
        self._turn = 0
        self.lent = 0
        """Credits given beyond the capacity, for calls that run on top of one that waits for them."""
        self.idle_timer: asyncio.TimerHandle | None = None
        self.stall_timer: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        taking = sum(1 for replica in self.replicas.values() if not replica.stop_when_idle)
        return taking * self.start.spec.scaling.concurrency

    def capacity(self) -> int:
        """Credits that may be out: the slots, and for quick functions some calls ahead of them."""
        slots = self.slots
        if not slots or not self.run_us:
            return slots
        ahead = min(AHEAD_CALLS_MAX, int(AHEAD_S * 1e6 / max(self.run_us, 1.0)))
        return slots + slots * ahead

    def ended(self, run_us: int) -> None:
        self.run_us = self.run_us * 0.9 + run_us * 0.1 if self.run_us else run_us or 1
        self.fast = self.run_us < FAST_US

    # Calls.

    def submit(self, call: RunningCall) -> None:
        free = self.free
        if free:
            free[-1].run(call)
        elif "." in call.invocation and (replica := self.ancestor(call.invocation)) is not None:
            replica.run(call)
        else:
            self.queue.append(call)
            if self.fast:
                self.feed_ahead()

    def feed(self, replica: Replica) -> None:
        """A replica has an idle slot: give it what waits."""
        queue = self.queue
        while queue and replica.idle_slots > 0:
            replica.run(queue.popleft())
        if queue and self.fast and replica.idle_slots > -PIPELINE and queue[0].chunks is None:
            replica.run(queue.popleft())

    def feed_ahead(self) -> None:
        queue = self.queue
        for replica in self.replicas.values():
            if replica.stop_when_idle or not replica.pipelines:
                continue
            while queue and replica.idle_slots > -PIPELINE and queue[0].chunks is None:
                replica.run(queue.popleft())

    def held_s(self, now: float) -> float:
        """How long no call has begun or ended in any of the slots; 0 while one is idle."""
        if self.free or not self.replicas:
            return 0.0
        begun = (next(iter(replica.running.values()), None) for replica in self.replicas.values())
        moved = [max(call.received, call.replica.last_used) for call in begun if call is not None and call.replica]
        return now - max(moved, default=now)

    def hand_back(self, run_us: int) -> list[RunningCall]:
        """The calls that wait here, the last first, with their credits; `run_us` is what calls take at least, as it turns out."""
        waiting = list(reversed(self.queue))
        self.queue.clear()
        self.run_us, self.fast = max(self.run_us, run_us), False
        for call in waiting:
            holder = self.holder(call.link)
            holder.granted = max(0, holder.granted - 1)
        self.shrink()
        return waiting

    def ancestor(self, invocation: str) -> Replica | None:
        """A replica in which a call waits that made this invocation, directly or not: it lends its slot."""
        for replica in self.replicas.values():
            for call in replica.running.values():
                if call.nested and invocation.startswith(call.invocation + "."):
                    return replica
        return None

    # Credits.

    def announce(self, links: list[Link]) -> None:
        self.seq += 1
        self.offered = self.slots
        message = Slots(self.version, self.seq, self.offered, len(self.free))
        for link in links:
            link.send(message)
        if not self.offered:
            for holder in self.holders.values():
                holder.granted = holder.recalled = 0
        self.share()

    def holder(self, link: Link) -> Holder:
        holder = self.holders.get(link)
        if holder is None:
            holder = self.holders[link] = Holder()
        return holder

    def share(self) -> None:
        """Give free credits to who has calls waiting, max-min fair; recall from who has more than its share while others lack theirs."""
        capacity = self.capacity()
        if not capacity or not any(holder.backlog for holder in self.holders.values()):
            return
        demands = {link: self._demand(link, holder) for link, holder in self.holders.items()}
        level = water_level(capacity, list(demands.values()))
        free = capacity - sum(holder.granted for holder in self.holders.values())
        wanting = [pair for pair in self.holders.items() if pair[1].backlog]
        wanting.sort(key=lambda pair: (pair[1].held, pair[1].turn))
        for link, holder in wanting:
            free -= self._grant(link, holder, min(demands[link], level) - holder.held, free)
        for link, holder in wanting:
            free -= self._grant(link, holder, 1, free)
        fair = max(1, level)
        lacking = sum(max(0, min(demands[link], fair) - holder.held) for link, holder in wanting)
        self._recall(lacking, {link: min(demand, level) for link, demand in demands.items()})

    def _demand(self, link: Link, holder: Holder) -> int:
        """Credits that a dispatcher has use for."""
        if holder.backlog:
            return holder.held + holder.backlog
        running = (call for replica in self.replicas.values() for call in replica.running.values())
        busy = sum(call.link is link for call in running) + sum(call.link is link for call in self.queue)
        return min(holder.held, busy)

    def _grant(self, link: Link, holder: Holder, credits: int, free: int) -> int:
        give = min(credits, free, holder.backlog)
        if give <= 0:
            return 0
        self._turn += 1
        holder.turn = self._turn
        holder.granted += give
        holder.backlog -= give
        link.send(Grant(self.version, give))
        return give

    def _recall(self, lacking: int, keep: dict[Link, int]) -> None:
        lacking -= sum(holder.recalled for holder in self.holders.values())
        for link, holder in sorted(self.holders.items(), key=lambda pair: (-pair[1].held, pair[1].turn)):
            take = min(lacking, holder.held - keep[link])
            if take > 0:
                holder.recalled += take
                lacking -= take
                link.send(Recall(self.version, take))

    def returned(self, link: Link, credits: int) -> None:
        holder = self.holder(link)
        holder.granted = max(0, holder.granted - credits)
        holder.recalled = max(0, holder.recalled - credits)
        self.share()

    def shrink(self) -> None:
        """Slots went away: recall what is out beyond them."""
        excess = sum(holder.held for holder in self.holders.values()) - self.capacity()
        for link, holder in self.holders.items():
            take = min(excess, holder.held)
            if take > 0:
                holder.recalled += take
                excess -= take
                link.send(Recall(self.version, take))

    def stop_timers(self) -> None:
        for timer in (self.idle_timer, self.stall_timer):
            if timer is not None:
                timer.cancel()
