"""Holding the lease: pairs of establish and revoke, an end before the lease's own, and a new epoch each time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from mn.formats.errors import Internal
from mn_nodepool.control.leadership import Leadership
from mn_nodepool.store.base import Epoch, StoreUnavailable
from tests.support.memory_store import MemoryStore
from tests.support.virtual import run_virtual, settle

TTL_S = 8.0


class LoopClock:
    """The virtual loop's time as a clock."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now_ms(self) -> int:
        return int(self.monotonic() * 1000)


class Flaky(MemoryStore):
    """A store that can stop answering, or answer late."""

    def __init__(self) -> None:
        super().__init__(LoopClock().monotonic)
        self.down = False
        self.late_s = 0.0

    async def renew_lease(self, epoch: Epoch, ttl_s: float) -> bool:
        await self._answer()
        return await super().renew_lease(epoch, ttl_s)

    async def acquire_lease(self, holder: str, ttl_s: float, **more: Any) -> Epoch | None:
        await self._answer()
        return await super().acquire_lease(holder, ttl_s, **more)

    async def leader(self) -> Epoch | None:
        await self._answer()
        return await super().leader()

    async def _answer(self) -> None:
        await asyncio.sleep(self.late_s)
        if self.down:
            raise StoreUnavailable("the store does not answer")


class Candidate:
    """One process that would lead; `log` is what it did."""

    def __init__(self, store: MemoryStore, holder: str = "n1") -> None:
        self.log: list[str] = []
        self.refuse: Exception | None = None
        self.leadership = Leadership(store, holder, TTL_S, LoopClock(), self._establish, self._revoke)
        self.task = asyncio.ensure_future(self.leadership.run())

    async def _establish(self, epoch: Epoch) -> None:
        self.log.append(f"establish {epoch.counter}")
        if self.refuse is not None:
            raise self.refuse

    async def _revoke(self) -> None:
        self.log.append("revoke")

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    def kill(self) -> None:
        """Die without saying goodbye."""
        self.leadership.epoch = None
        self.task.cancel()


def play(scene: Callable[[Flaky], Awaitable[None]]) -> None:
    async def run() -> None:
        await scene(Flaky())

    run_virtual(run())


def test_it_leads_renews_and_gives_the_lease_back() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        assert first.leadership.acting()
        await asyncio.sleep(10 * TTL_S)
        assert first.leadership.acting()
        assert first.log == ["establish 1"]
        await first.stop()
        assert first.log == ["establish 1", "revoke"]
        assert await store.leader() is None

    play(scene)


def test_it_stops_acting_before_its_lease_can_end() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        store.down = True
        moment = 0.0
        while first.leadership.acting():
            await asyncio.sleep(0.1)
            moment += 0.1
        assert moment < TTL_S
        store.down = False
        assert await store.leader() == Epoch(1, "n1"), "the lease was still held when it stopped acting"
        store.down = True
        await asyncio.sleep(TTL_S)
        assert first.log == ["establish 1", "revoke"]

    play(scene)


def test_it_stops_acting_although_the_store_hangs() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        store.late_s = 1000.0
        await asyncio.sleep(TTL_S)
        assert not first.leadership.acting()

    play(scene)


def test_a_slow_answer_does_not_lengthen_the_lease() -> None:
    async def scene(store: Flaky) -> None:
        store.late_s = TTL_S
        first = Candidate(store)
        await asyncio.sleep(3 * TTL_S + 0.1)
        assert not first.leadership.acting(), "a lease asked for so long ago may be over"

    play(scene)


def test_it_leads_again_after_an_outage_under_a_newer_epoch() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        for wait_s in (0.8 * TTL_S, 3 * TTL_S):
            store.down = True
            await asyncio.sleep(wait_s)
            store.down = False
            await asyncio.sleep(TTL_S)
            assert first.leadership.acting()
        assert first.log == ["establish 1", "revoke", "establish 2", "revoke", "establish 3"]

    play(scene)


def test_a_lease_that_was_taken_away_revokes() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        store.drop_lease()
        assert await store.acquire_lease("n2", 4 * TTL_S) == Epoch(2, "n2")
        await asyncio.sleep(TTL_S)
        assert first.log == ["establish 1", "revoke"]
        assert not first.leadership.acting()
        await asyncio.sleep(4 * TTL_S)
        assert first.log == ["establish 1", "revoke", "establish 3"]

    play(scene)


def test_one_of_two_leads_and_the_other_follows_it() -> None:
    async def scene(store: Flaky) -> None:
        first, second = Candidate(store, "n1"), Candidate(store, "n2")
        await asyncio.sleep(3 * TTL_S)
        assert [first.leadership.acting(), second.leadership.acting()] == [True, False]
        await first.stop()
        await asyncio.sleep(TTL_S)
        assert second.leadership.acting()
        assert second.log == ["establish 2"]

    play(scene)


def test_a_node_that_was_killed_leads_again_at_once_and_under_a_newer_epoch() -> None:
    async def scene(store: Flaky) -> None:
        before = Candidate(store)
        await settle()
        before.kill()
        after = Candidate(store)
        await settle()
        assert after.log == ["establish 2"]

    play(scene)


def test_a_stale_write_makes_it_look_at_the_lease_at_once() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        await settle()
        first.leadership.give_up()
        assert not first.leadership.acting()
        await settle(50)
        assert first.log == ["establish 1", "revoke", "establish 2"]

    play(scene)


def test_what_hinders_establishing_is_tried_again() -> None:
    async def scene(store: Flaky) -> None:
        first = Candidate(store)
        first.refuse = Internal("a record cannot be read")
        await asyncio.sleep(TTL_S)
        assert not first.leadership.acting()
        assert first.log.count("revoke") == len([line for line in first.log if line.startswith("establish")])
        first.refuse = None
        await asyncio.sleep(TTL_S)
        assert first.leadership.acting()

    play(scene)
