"""The store's in-memory twin: the same answers as a real server, for tests and for the simulation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mn_nodepool.store.base import Claimed, Epoch, Op, Record, StaleEpoch, VersionMismatch, check_ops

OPERATION_S = 86400.0

T = TypeVar("T")


@dataclass
class _Invocation:
    queue: str
    sequence: int
    value: bytes
    attempt: int = 0
    token: str = ""
    until_ms: int = 0


class _Expiring(Generic[T]):
    """A mapping whose entries go at their time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._entries: dict[str, tuple[float, T]] = {}

    def get(self, key: str) -> T | None:
        until_s, value = self._entries.get(key, (0.0, None))
        if until_s > self._now():
            return value
        self._entries.pop(key, None)
        return None

    def put(self, key: str, value: T, keep_s: float) -> None:
        self._entries[key] = (self._now() + keep_s, value)

    def drop(self, key: str) -> None:
        self._entries.pop(key, None)


class MemoryStore:
    """`base.Store` in one process. `clock` gives seconds that only grow: leases and what expires go by it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._records: dict[str, dict[str, Record]] = {}
        self._operations: _Expiring[list[int]] = _Expiring(clock)
        self._leases: _Expiring[Epoch] = _Expiring(clock)
        self._counter = 0
        self._invocations: dict[str, _Invocation] = {}
        self._accepted = 0
        self._attempts = 0
        self._outcomes: _Expiring[bytes] = _Expiring(clock)
        self._dedupe: _Expiring[str] = _Expiring(clock)

    async def get(self, kind: str, id: str) -> Record | None:
        return self._records.get(kind, {}).get(id)

    async def scan(self, kind: str) -> AsyncIterator[Record]:
        for record in list(self._records.get(kind, {}).values()):
            yield record

    async def commit(self, ops: Sequence[Op], *, fence: Epoch | None = None, operation: str = "") -> list[int]:
        check_ops(ops)
        if fence is not None and fence != self._leases.get("leader"):
            raise StaleEpoch(f"a write under {fence} was refused: the lease is {self._leases.get('leader')}")
        if operation and (answer := self._operations.get(operation)) is not None:
            return list(answer)
        found = [self._version(op) for op in ops]
        for op, version in zip(ops, found, strict=True):
            if op.expect not in (-1, version):
                detail = f"{op.kind} {op.id!r} is at version {version}, not {op.expect} (0: absent)"
                raise VersionMismatch(detail, kind=op.kind, id=op.id, found=version)
        versions = [self._apply(op, version) for op, version in zip(ops, found, strict=True)]
        if operation:
            self._operations.put(operation, versions, OPERATION_S)
        return list(versions)

    def _version(self, op: Op) -> int:
        record = self._records.get(op.kind, {}).get(op.id)
        return record.version if record else 0

    def _apply(self, op: Op, version: int) -> int:
        records = self._records.setdefault(op.kind, {})
        if op.value is None:
            records.pop(op.id, None)
            return 0
        records[op.id] = Record(op.id, version + 1, op.value)
        return version + 1

    async def acquire_lease(self, holder: str, ttl_s: float, *, above: int = 0) -> Epoch | None:
        current = self._leases.get("leader")
        if current is None:
            self._counter = max(self._counter, above) + 1
            current = Epoch(self._counter, holder)
        elif current.holder != holder:
            return None
        self._leases.put("leader", current, ttl_s)
        return current

    async def renew_lease(self, epoch: Epoch, ttl_s: float) -> bool:
        if self._leases.get("leader") != epoch:
            return False
        self._leases.put("leader", epoch, ttl_s)
        return True

    async def release_lease(self, epoch: Epoch) -> None:
        if self._leases.get("leader") == epoch:
            self.drop_lease()

    async def leader(self) -> Epoch | None:
        return self._leases.get("leader")

    def drop_lease(self) -> None:
        """The lease vanishes, as when an operator deletes its key; its counter stays."""
        self._leases.drop("leader")

    async def enqueue(
        self, queue: str, id: str, value: bytes, *, dedupe: str = "", dedupe_s: float = 86400.0
    ) -> tuple[str, bool]:
        if dedupe and (first := self._dedupe.get(dedupe)) is not None:
            return first, False
        if id in self._invocations or self._outcomes.get(id) is not None:
            return id, False
        self._accepted += 1
        self._invocations[id] = _Invocation(queue, self._accepted, value)
        if dedupe:
            self._dedupe.put(dedupe, id, dedupe_s)
        return id, True

    async def claim(self, queue: str, holder: str, lease_s: float, *, now_ms: int) -> Claimed | None:
        free = [id for id, it in self._invocations.items() if it.queue == queue and it.until_ms <= now_ms]
        if not free:
            return None
        id = min(free, key=lambda id: self._invocations[id].sequence)
        invocation = self._invocations[id]
        self._attempts += 1
        invocation.attempt += 1
        invocation.token = f"{holder}/{self._attempts}"
        invocation.until_ms = now_ms + round(lease_s * 1000)
        return Claimed(id, invocation.value, invocation.attempt, invocation.token)

    async def finish(self, id: str, token: str, outcome: bytes, *, keep_s: float = 86400.0) -> bool:
        invocation = self._invocations.get(id)
        if invocation is None or not token or invocation.token != token:
            return False
        del self._invocations[id]
        self._outcomes.put(id, outcome, keep_s)
        return True

    async def outcome(self, id: str) -> bytes | None:
        return self._outcomes.get(id)

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        return None
