"""The store's port.

A record is bytes under (kind, id) with a version that starts at 1 and grows by one at each write; one that was deleted
starts anew. All writes go through five scripts, each atomic: `commit` (any number of creates, compare-and-sets and
deletes, all or none, under an optional fence), the lease, and `enqueue`, `claim`, `finish` for invocations.

A **fence** is the epoch of the leader on whose behalf a write is made: the script compares it with the lease's and
refuses any other. No method retries by itself: a lost answer leaves the outcome unknown, which is raised as
`StoreUnavailable`; creates can be repeated safely, because they carry an operation id.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from mn.formats.errors import Conflict, PlatformError


class Epoch(msgspec.Struct, frozen=True, order=True):
    """One period of leadership. Ordered by counter, then by holder, so that no two leaders share one."""

    counter: int
    holder: str


class Record(msgspec.Struct, frozen=True):
    id: str
    version: int
    value: bytes


class Op(msgspec.Struct, frozen=True):
    """One change of a commit.

    `expect` 0: the record must not exist (create); n > 0: it must have version n; -1: whatever is there. `value` None
    deletes.
    """

    kind: str
    id: str
    value: bytes | None
    expect: int = -1


OPS_MAX = 10_000
"""Changes in one commit: its script holds up the store while it runs."""


def check_ops(ops: Sequence[Op]) -> None:
    """Raise ValueError for a commit that no store takes: two changes of one record, or more than OPS_MAX."""
    if len(ops) > OPS_MAX:
        raise ValueError(f"a commit has at most {OPS_MAX} changes, not {len(ops)}")
    seen: set[tuple[str, str]] = set()
    for op in ops:
        if (op.kind, op.id) in seen:
            raise ValueError(f"{op.kind} {op.id!r} is changed twice in one commit")
        seen.add((op.kind, op.id))


class Claimed(msgspec.Struct, frozen=True):
    """One attempt of one accepted invocation. Only the current token can finish it."""

    id: str
    value: bytes
    attempt: int
    token: str


class StaleEpoch(PlatformError):
    """A leader wrote under an epoch that is no longer the lease's."""

    slug = "no-leader"


class VersionMismatch(Conflict):
    """A record is not at the expected version; `kind` and `id` name it. Nothing of the commit was applied."""


class StoreUnavailable(PlatformError):
    """The store did not answer; a write may or may not have happened."""

    slug = "unavailable"


class Store(Protocol):
    """What the leader needs. Every method may raise StoreUnavailable."""

    async def get(self, kind: str, id: str) -> Record | None: ...

    def scan(self, kind: str) -> AsyncIterator[Record]:
        """All records of a kind, in no order; one that is written meanwhile may come in either state."""

    async def commit(self, ops: Sequence[Op], *, fence: Epoch | None = None, operation: str = "") -> list[int]:
        """Apply all ops or none; the new version of each (0 for a delete).

        With an `operation` id, a repetition within a day returns the first answer and changes nothing; its fence is
        compared all the same. Raises VersionMismatch or StaleEpoch; ValueError for ops that `check_ops` refuses.
        """

    async def acquire_lease(self, holder: str, ttl_s: float, *, above: int = 0) -> Epoch | None:
        """Take the leader lease when it is free or already the holder's own; its epoch, with a counter higher than all
        before, and than `above`, when newly taken. None: somebody else holds it."""

    async def renew_lease(self, epoch: Epoch, ttl_s: float) -> bool:
        """Extend it; False when it is no longer ours."""

    async def release_lease(self, epoch: Epoch) -> None:
        """Give it up, if it is still ours. The counter stays."""

    async def leader(self) -> Epoch | None:
        """Who holds the lease."""

    async def enqueue(
        self, queue: str, id: str, value: bytes, *, dedupe: str = "", dedupe_s: float = 86400.0
    ) -> tuple[str, bool]:
        """Record an accepted invocation and queue it, in one step.

        (its id, True), or with a `dedupe` key seen before (the first one's id, False). An id that is there already
        changes nothing, (id, False): so a repetition after a lost answer is safe.
        """

    async def claim(self, queue: str, holder: str, lease_s: float, *, now_ms: int) -> Claimed | None:
        """Take the oldest invocation that is queued or whose lease ended, count the attempt, and lease it.

        None: there is none."""

    async def finish(self, id: str, token: str, outcome: bytes, *, keep_s: float = 86400.0) -> bool:
        """Commit the one outcome and leave the queue.

        False: the token is not the current one, or it is finished already; nothing changed."""

    async def outcome(self, id: str) -> bytes | None:
        """The outcome of an accepted invocation, or None while it has none."""

    async def ping(self) -> None:
        """Return when the store answers."""

    async def close(self) -> None: ...
