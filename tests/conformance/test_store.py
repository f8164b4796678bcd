"""What every store does alike: the in-memory twin, Valkey 9 and Redis 7.0."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mn_nodepool.store.base import OPS_MAX, Epoch, Op, StaleEpoch, Store, VersionMismatch
from tests.support.memory_store import MemoryStore
from tests.support.servers import StoreServer, running_server

pytestmark = pytest.mark.anyio

NAMESPACES = (f"t{os.getpid()}-{number}" for number in itertools.count())
LONG_S = 600.0


class MemoryRig:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.store = MemoryStore(lambda: self.now_s)

    async def delete_lease(self) -> None:
        self.store.drop_lease()

    async def until_expired(self, ttl_s: float) -> None:
        self.now_s += ttl_s

    async def close(self) -> None:
        await self.store.close()


class ServerRig:
    def __init__(self, server: StoreServer) -> None:
        self.namespace = next(NAMESPACES)
        self.store = server.store(self.namespace)
        self._operator: Any = self.store._client

    async def delete_lease(self) -> None:
        assert await self._operator.delete(f"mn:{{{self.namespace}}}:lease") == 1

    async def until_expired(self, ttl_s: float) -> None:
        """By the server's own clock: a key that is made now goes after everything that was to go."""
        await self._operator.set(f"{self.namespace}-later", b"", px=max(1, round(ttl_s * 1000)) + 1)
        while await self._operator.exists(f"{self.namespace}-later"):
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self.store.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=["memory", "valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer | None]:
    if request.param == "memory":
        yield None
        return
    with running_server(tmp_path_factory.mktemp(request.param), request.param) as running:
        yield running


@pytest.fixture
async def rig(server: StoreServer | None) -> AsyncIterator[MemoryRig | ServerRig]:
    rig = ServerRig(server) if server else MemoryRig()
    yield rig
    await rig.close()


@pytest.fixture
async def store(rig: MemoryRig | ServerRig) -> Store:
    return rig.store


async def records(store: Store, kind: str) -> dict[str, tuple[int, bytes]]:
    return {record.id: (record.version, record.value) async for record in store.scan(kind)}


class TestRecords:
    async def test_any_bytes_come_back_with_their_version(self, store: Store) -> None:
        values = {"empty": b"", "colons": b"7:8:9", "binary": bytes(range(256)), "ünïcode": b"x" * 100_000}
        assert await store.commit([Op("thing", id, value, 0) for id, value in values.items()]) == [1] * len(values)
        assert await records(store, "thing") == {id: (1, value) for id, value in values.items()}
        read = await store.get("thing", "binary")
        assert read is not None and (read.id, read.version, read.value) == ("binary", 1, bytes(range(256)))

    async def test_versions_grow_by_one_and_start_anew_after_a_delete(self, store: Store) -> None:
        assert [await store.commit([Op("thing", "a", b"")]) for _ in range(12)] == [[n] for n in range(1, 13)]
        assert await store.commit([Op("thing", "a", None, 12)]) == [0]
        assert await store.get("thing", "a") is None
        assert await store.commit([Op("thing", "a", b"", 0)]) == [1]

    async def test_kinds_are_apart(self, store: Store) -> None:
        await store.commit([Op("function", "a", b"f"), Op("version", "a", b"v")])
        await store.commit([Op("version", "a", None)])
        assert await records(store, "function") == {"a": (1, b"f")}
        assert await records(store, "version") == {}

    async def test_every_record_of_a_large_kind_is_scanned_once(self, store: Store) -> None:
        await store.commit([Op("thing", str(n), b"x" * 100) for n in range(3000)])
        ids = [record.id async for record in store.scan("thing")]
        assert sorted(ids, key=int) == [str(n) for n in range(3000)]


class TestCommit:
    async def test_one_failed_expectation_applies_nothing(self, store: Store) -> None:
        await store.commit([Op("thing", "there", b"1")])
        wrong = [Op("thing", "there", b"2", 0), Op("thing", "there", b"2", 2), Op("thing", "absent", b"2", 1)]
        for op in [*wrong, Op("thing", "absent", None, 1)]:
            with pytest.raises(VersionMismatch) as raised:
                await store.commit([Op("other", "x", b"new", 0), op, Op("thing", "y", b"new")], operation="op")
            assert (raised.value.kind, raised.value.id) == ("thing", op.id)
            assert await records(store, "other") == {}
            assert await records(store, "thing") == {"there": (1, b"1")}

    async def test_repeating_an_operation_gives_the_first_answer_and_changes_nothing(self, store: Store) -> None:
        ops = [Op("thing", "a", b"1", 0), Op("thing", "b", b"1", 0), Op("thing", "c", None)]
        assert await store.commit(ops, operation="deploy-1") == [1, 1, 0]
        await store.commit([Op("thing", "a", b"2", 1)], operation="deploy-2")
        assert await store.commit(ops, operation="deploy-1") == [1, 1, 0]
        assert await records(store, "thing") == {"a": (2, b"2"), "b": (1, b"1")}

    async def test_a_refused_operation_can_succeed_later(self, store: Store) -> None:
        with pytest.raises(VersionMismatch):
            await store.commit([Op("thing", "a", b"2", 1)], operation="op")
        await store.commit([Op("thing", "a", b"1", 0)])
        assert await store.commit([Op("thing", "a", b"2", 1)], operation="op") == [2]

    async def test_of_many_writers_one_wins_each_version(self, store: Store) -> None:
        async def write(n: int) -> bool:
            try:
                await store.commit([Op("thing", "a", b"%d" % n, 0)])
            except VersionMismatch:
                return False
            return True

        assert sum(await asyncio.gather(*(write(n) for n in range(20)))) == 1
        assert (await records(store, "thing"))["a"][0] == 1

    async def test_what_no_store_takes_is_refused_before_it_is_sent(self, store: Store) -> None:
        assert await store.commit([]) == []
        with pytest.raises(ValueError, match="twice"):
            await store.commit([Op("thing", "a", b"1"), Op("thing", "a", b"2")])
        with pytest.raises(ValueError, match="at most"):
            await store.commit([Op("thing", str(n), b"") for n in range(OPS_MAX + 1)])
        assert await records(store, "thing") == {}


class TestFence:
    async def test_only_the_lease_in_force_may_write(self, store: Store) -> None:
        nobody = Epoch(1, "n1")
        with pytest.raises(StaleEpoch):
            await store.commit([Op("thing", "a", b"")], fence=nobody)
        epoch = await store.acquire_lease("n1", LONG_S)
        assert epoch is not None
        assert await store.commit([Op("thing", "a", b"")], fence=epoch) == [1]
        for stale in (Epoch(epoch.counter - 1, "n1"), Epoch(epoch.counter + 1, "n1"), Epoch(epoch.counter, "n2")):
            with pytest.raises(StaleEpoch):
                await store.commit([Op("thing", "a", b"")], fence=stale)
        assert await records(store, "thing") == {"a": (1, b"")}

    async def test_a_new_epoch_exceeds_what_an_executor_has_seen(self, store: Store) -> None:
        epoch = await store.acquire_lease("n1", LONG_S, above=41)
        assert epoch is not None
        assert epoch.counter == 42
        await store.release_lease(epoch)
        later = await store.acquire_lease("n1", LONG_S, above=7)
        assert later is not None
        assert later.counter == 43

    async def test_a_leader_that_was_replaced_writes_nothing(self, store: Store) -> None:
        old = await store.acquire_lease("n1", LONG_S)
        assert old is not None
        await store.release_lease(old)
        with pytest.raises(StaleEpoch):
            await store.commit([Op("thing", "a", b"old")], fence=old)
        new = await store.acquire_lease("n2", LONG_S)
        assert new is not None and new > old
        with pytest.raises(StaleEpoch):
            await store.commit([Op("thing", "a", b"old")], fence=old)
        await store.commit([Op("thing", "a", b"new")], fence=new)
        assert await records(store, "thing") == {"a": (1, b"new")}

    async def test_an_operation_is_completed_by_the_next_leader(self, store: Store) -> None:
        old = await store.acquire_lease("n1", LONG_S)
        assert old is not None
        assert await store.commit([Op("thing", "a", b"1", 0)], fence=old, operation="op") == [1]
        await store.release_lease(old)
        new = await store.acquire_lease("n2", LONG_S)
        with pytest.raises(StaleEpoch):
            await store.commit([Op("thing", "a", b"1", 0)], fence=old, operation="op")
        assert await store.commit([Op("thing", "a", b"1", 0)], fence=new, operation="op") == [1]


class TestLease:
    async def test_one_holder_at_a_time(self, store: Store) -> None:
        assert await store.leader() is None
        epochs = await asyncio.gather(*(store.acquire_lease(f"n{n}", LONG_S) for n in range(10)))
        (epoch,) = [epoch for epoch in epochs if epoch]
        assert await store.leader() == epoch
        assert await store.acquire_lease(epoch.holder, LONG_S) == epoch
        assert await store.renew_lease(epoch, LONG_S)
        assert not await store.renew_lease(Epoch(epoch.counter, "another"), LONG_S)
        assert not await store.renew_lease(Epoch(epoch.counter + 1, epoch.holder), LONG_S)

    async def test_it_ends_by_itself_and_renewing_keeps_it(self, rig: MemoryRig | ServerRig) -> None:
        store = rig.store
        epoch = await store.acquire_lease("n1", 0.05)
        assert epoch is not None
        await rig.until_expired(0.05)
        assert await store.leader() is None
        assert not await store.renew_lease(epoch, LONG_S)
        again = await store.acquire_lease("n1", 0.5)
        assert again is not None and again.counter == epoch.counter + 1
        assert await store.renew_lease(again, LONG_S)
        await rig.until_expired(0.5)
        assert await store.leader() == again

    async def test_releasing_an_old_lease_leaves_the_new_one(self, store: Store) -> None:
        old = await store.acquire_lease("n1", LONG_S)
        assert old is not None
        await store.release_lease(old)
        new = await store.acquire_lease("n1", LONG_S)
        await store.release_lease(old)
        assert await store.leader() == new

    async def test_epochs_increase_when_the_lease_key_is_deleted(self, rig: MemoryRig | ServerRig) -> None:
        counters = []
        for holder in ("n1", "n2", "n1", "n1"):
            epoch = await rig.store.acquire_lease(holder, LONG_S)
            assert epoch is not None
            counters.append(epoch.counter)
            await rig.delete_lease()
            with pytest.raises(StaleEpoch):
                await rig.store.commit([Op("thing", "a", b"")], fence=epoch)
        assert counters == [1, 2, 3, 4]

    async def test_a_holder_may_have_colons_in_its_name(self, store: Store) -> None:
        epoch = await store.acquire_lease("mirror_neuron@a:b:c", LONG_S)
        assert epoch == Epoch(1, "mirror_neuron@a:b:c") == await store.leader()
        assert await store.acquire_lease("b:c", LONG_S) is None


class TestInvocations:
    async def test_first_accepted_first_claimed(self, store: Store) -> None:
        for n in range(5):
            assert await store.enqueue("q", f"inv_{9 - n}", b"%d" % n) == (f"inv_{9 - n}", True)
        await store.enqueue("other", "inv_x", b"")
        claims = [await store.claim("q", "n1", 10, now_ms=1000) for _ in range(6)]
        assert [claim and (claim.id, claim.value, claim.attempt) for claim in claims] == [
            *((f"inv_{9 - n}", b"%d" % n, 1) for n in range(5)),
            None,
        ]

    async def test_a_dedupe_key_accepts_once(self, rig: MemoryRig | ServerRig) -> None:
        store = rig.store
        answers = await asyncio.gather(*(store.enqueue("q", f"inv_{n}", b"", dedupe="job-42") for n in range(100)))
        assert sum(new for _, new in answers) == 1
        (first,) = {id for id, _ in answers}
        claimed = await store.claim("q", "n1", 10, now_ms=0)
        assert claimed is not None and claimed.id == first
        assert await store.claim("q", "n1", 10, now_ms=0) is None
        assert await store.finish(first, claimed.token, b"done")
        assert await store.enqueue("q", "inv_later", b"", dedupe="job-42") == (first, False)

    async def test_a_dedupe_key_is_forgotten_in_time(self, rig: MemoryRig | ServerRig) -> None:
        await rig.store.enqueue("q", "inv_1", b"", dedupe="job", dedupe_s=0.05)
        await rig.until_expired(0.05)
        assert await rig.store.enqueue("q", "inv_2", b"", dedupe="job") == ("inv_2", True)

    async def test_accepting_the_same_id_again_changes_nothing(self, store: Store) -> None:
        assert await store.enqueue("q", "inv_1", b"first") == ("inv_1", True)
        assert await store.enqueue("q", "inv_1", b"second") == ("inv_1", False)
        claimed = await store.claim("q", "n1", 10, now_ms=0)
        assert claimed is not None and claimed.value == b"first"
        assert await store.finish("inv_1", claimed.token, b"done")
        assert await store.enqueue("q", "inv_1", b"third") == ("inv_1", False)
        assert await store.claim("q", "n1", 10, now_ms=99_999) is None

    async def test_claimers_never_share_an_invocation(self, store: Store) -> None:
        for n in range(40):
            await store.enqueue("q", f"inv_{n}", b"")

        async def drain(holder: str) -> list[str]:
            mine = []
            while claimed := await store.claim("q", holder, 10, now_ms=0):
                mine.append(claimed.id)
            return mine

        one, two = await asyncio.gather(drain("n1"), drain("n2"))
        assert sorted(one + two) == sorted(f"inv_{n}" for n in range(40))

    async def test_a_lapsed_lease_is_a_second_attempt_and_the_first_can_not_finish(self, store: Store) -> None:
        await store.enqueue("q", "inv_1", b"v")
        await store.enqueue("q", "inv_2", b"v")
        first = await store.claim("q", "n1", 10, now_ms=1000)
        assert first is not None
        between = await store.claim("q", "n2", 600, now_ms=10_999)
        assert between is not None and between.id == "inv_2"
        assert await store.claim("q", "n2", 10, now_ms=10_999) is None
        second = await store.claim("q", "n2", 10, now_ms=11_000)
        assert second is not None and (second.id, second.value, second.attempt) == ("inv_1", b"v", 2)
        assert not await store.finish("inv_1", first.token, b"from the first")
        assert await store.outcome("inv_1") is None
        assert await store.finish("inv_1", second.token, b"from the second")
        assert await store.outcome("inv_1") == b"from the second"

    async def test_a_late_attempt_may_finish_while_nobody_else_took_over(self, store: Store) -> None:
        await store.enqueue("q", "inv_1", b"")
        claimed = await store.claim("q", "n1", 1, now_ms=0)
        assert claimed is not None
        assert await store.finish("inv_1", claimed.token, b"late")
        assert await store.claim("q", "n1", 1, now_ms=10_000) is None

    async def test_there_is_one_outcome(self, store: Store) -> None:
        await store.enqueue("q", "inv_1", b"")
        assert not await store.finish("inv_1", "", b"never claimed")
        claimed = await store.claim("q", "n1", 10, now_ms=0)
        assert claimed is not None
        assert not await store.finish("inv_1", "", b"no token")
        assert await store.finish("inv_1", claimed.token, b"first")
        assert not await store.finish("inv_1", claimed.token, b"second")
        assert await store.outcome("inv_1") == b"first"
        assert not await store.finish("inv_unknown", claimed.token, b"")

    async def test_an_outcome_is_kept_as_long_as_asked(self, rig: MemoryRig | ServerRig) -> None:
        await rig.store.enqueue("q", "inv_1", b"")
        claimed = await rig.store.claim("q", "n1", 10, now_ms=0)
        assert claimed is not None
        assert await rig.store.finish("inv_1", claimed.token, b"done", keep_s=0.05)
        await rig.until_expired(0.05)
        assert await rig.store.outcome("inv_1") is None
