"""Holding the leader lease.

The lease outlives the work done under it: a leader that cannot renew stops acting a margin before the lease can end, on its own clock that
counts sleep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from mn.formats.errors import MnError
from mn_nodepool.clock import Clock
from mn_nodepool.store.base import Epoch, Store, StoreUnavailable

log = structlog.get_logger("leader")
MARGIN = 0.25
"""Of the lease: the leader stops acting this much before it can end."""
RENEWALS = 4
"""Renewals in a lease."""


class Leadership:
    """Takes the lease when it is free, and calls `establish` and `revoke` in pairs."""

    def __init__(
        self,
        store: Store,
        holder: str,
        ttl_s: float,
        clock: Clock,
        establish: Callable[[Epoch], Awaitable[None]],
        revoke: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._holder = holder
        self._ttl_s = ttl_s
        self._clock = clock
        self._establish = establish
        self._revoke = revoke
        self._valid_until = 0.0
        self.epoch: Epoch | None = None
        self.store_ok = False
        self._fresh = True
        self._outrun = 0
        """Highest epoch that an executor has seen: a store that knows less of it was replaced."""
        self._kick = asyncio.Event()

    def acting(self) -> bool:
        """Whether this process may act as the leader at this moment."""
        return self.epoch is not None and self._clock.monotonic() < self._valid_until

    def give_up(self, seen: int = 0) -> None:
        """A write was refused as stale, or an executor has `seen` a higher epoch: look at the lease again at once."""
        self._outrun = max(self._outrun, seen)
        self._valid_until = 0.0
        self._kick.set()

    async def run(self) -> None:
        """Until cancelled; then the lease is released after `revoke`."""
        try:
            while True:
                if self.epoch is None:
                    await self._try_acquire()
                else:
                    await self._try_renew()
                await self._pause()
        finally:
            epoch = self.epoch
            if epoch is not None:
                await self._step_down()
                try:
                    await self._store.release_lease(epoch)
                except StoreUnavailable as error:
                    log.warning(
                        "the lease was not released and will run out", action="lease_not_released", reason=error.detail
                    )

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(
                self._kick.wait(), self._ttl_s / RENEWALS if self.store_ok else min(0.5, self._ttl_s / RENEWALS)
            )
        except TimeoutError:
            return
        self._kick.clear()

    async def _try_acquire(self) -> None:
        asked = self._clock.monotonic()
        try:
            if self._fresh:
                await self._end_earlier_self()
            epoch = await self._store.acquire_lease(self._holder, self._ttl_s, above=self._outrun)
        except StoreUnavailable as error:
            self._store_down(error)
            return
        self.store_ok = True
        if epoch is None:
            return
        self.epoch = epoch
        self._valid_until = asked + self._ttl_s * (1 - MARGIN)
        try:
            await self._establish(epoch)
        except StoreUnavailable as error:
            self._store_down(error)
            await self._step_down()
            return
        except MnError as error:
            log.warning("leadership was not taken up", action="leader_not_established", reason=error.detail)
            await self._step_down()
            return
        log.info("leading", action="leader_established", epoch=epoch.counter)

    async def _end_earlier_self(self) -> None:
        """A lease that an earlier leader of this node left behind ends now: what it knew is gone, so its epoch is over."""
        left = await self._store.leader()
        if left is not None and left.holder == self._holder:
            await self._store.release_lease(left)
        self._fresh = False

    async def _try_renew(self) -> None:
        assert self.epoch is not None
        asked = self._clock.monotonic()
        try:
            renewed = self._valid_until > 0 and await self._store.renew_lease(self.epoch, self._ttl_s)
        except StoreUnavailable as error:
            self._store_down(error)
            if not self.acting():
                await self._step_down()
            return
        self.store_ok = True
        if renewed:
            self._valid_until = asked + self._ttl_s * (1 - MARGIN)
        else:
            await self._step_down()
            self._kick.set()

    def _store_down(self, error: StoreUnavailable) -> None:
        if self.store_ok:
            log.warning("the store does not answer", action="store_down", reason=error.detail)
        self.store_ok = False

    async def _step_down(self) -> None:
        if self.epoch is not None:
            log.info("no longer leading", action="leader_revoked", epoch=self.epoch.counter)
            self.epoch = None
            self._valid_until = 0.0
            # The lease may still be ours, but what the next leader publishes has to be newer than what this one did.
            self._fresh = True
            await self._revoke()
