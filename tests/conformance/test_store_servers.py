"""What holds when a real store is lost, full, slow, restarted or shared; and that the in-memory twin agrees with it."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mn.formats.errors import MnError, StoreFull, Unavailable
from mn_nodepool.store.base import Epoch, Op, Store, StoreUnavailable
from mn_nodepool.store.redis import RedisStore, wait_ready
from tests.support.memory_store import MemoryStore
from tests.support.servers import FaultyProxy, StoreServer, free_port, running_server

pytestmark = pytest.mark.anyio

NAMESPACES = (f"s{os.getpid()}-{number}" for number in itertools.count())
LONG_S = 600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_server(tmp_path_factory.mktemp(request.param), request.param) as running:
        yield running


Opener = Callable[..., RedisStore]


@pytest.fixture
async def open_store(server: StoreServer) -> AsyncIterator[Opener]:
    """Makes stores in namespaces of their own, and closes them."""
    opened: list[RedisStore] = []

    def open_one(**options: Any) -> RedisStore:
        opened.append(server.store(next(NAMESPACES), **options))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Opener) -> RedisStore:
    return open_store()


async def records(store: Store, kind: str) -> dict[str, tuple[int, bytes]]:
    return {record.id: (record.version, record.value) async for record in store.scan(kind)}


class TestLostReplies:
    @pytest.mark.parametrize("lost", [1, 3])
    async def test_a_create_whose_replies_were_lost_makes_one_record(
        self, server: StoreServer, open_store: Opener, lost: int
    ) -> None:
        async with FaultyProxy(server.settings.store_port) as proxy:
            store = open_store(port=proxy.port)
            create = Op("function", "square", b"v1", 0)
            await store.commit([Op("other", "x", b"")])  # loads the script, so that the lost reply is the commit's own
            for _ in range(lost):
                await store.ping()
                proxy.replies_to_drop = 1
                with pytest.raises(StoreUnavailable, match="may or may not"):
                    await store.commit([create], operation="deploy-1")
            assert await store.commit([create], operation="deploy-1") == [1]
            assert proxy.dropped == lost
            assert await records(store, "function") == {"square": (1, b"v1")}

    async def test_an_accepted_call_whose_reply_was_lost_is_queued_once(
        self, server: StoreServer, open_store: Opener
    ) -> None:
        async with FaultyProxy(server.settings.store_port) as proxy:
            store = open_store(port=proxy.port)
            await store.enqueue("other", "inv_0", b"")
            proxy.replies_to_drop = 1
            with pytest.raises(StoreUnavailable):
                await store.enqueue("q", "inv_1", b"")
            assert await store.enqueue("q", "inv_1", b"") == ("inv_1", False)
            assert await store.claim("q", "n1", 10, now_ms=0) is not None
            assert await store.claim("q", "n1", 10, now_ms=0) is None

    async def test_a_store_that_stalls_is_given_up_and_serves_again_after(
        self, server: StoreServer, open_store: Opener
    ) -> None:
        async with FaultyProxy(server.settings.store_port) as proxy:
            store = open_store(port=proxy.port, timeout_s=0.3)
            await store.ping()
            proxy.hold()
            with pytest.raises(StoreUnavailable):
                await store.get("thing", "a")
            proxy.release()
            assert await store.commit([Op("thing", "a", b"")]) == [1]

    async def test_the_answer_to_a_cancelled_call_is_never_taken_for_another(
        self, server: StoreServer, open_store: Opener
    ) -> None:
        async with FaultyProxy(server.settings.store_port) as proxy:
            store = open_store(port=proxy.port)
            await store.commit([Op("thing", "a", b"a"), Op("thing", "b", b"b")])
            proxy.hold()
            waiting = asyncio.create_task(store.get("thing", "a"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
            proxy.release()
            for id in ("b", "a", "b"):
                read = await store.get("thing", id)
                assert read is not None and read.value == id.encode()


class TestTrouble:
    async def test_no_server_is_said_with_its_address_and_without_its_password(self) -> None:
        port = free_port()
        store = RedisStore(f"redis://:sesame@127.0.0.1:{port}/0")
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}") as raised:
            await store.commit([Op("thing", "a", b"")])
        assert "sesame" not in str(raised.value)
        with pytest.raises(Unavailable, match="was not ready within"):
            await wait_ready(f"redis://127.0.0.1:{port}/0", limit_s=0.1)
        with pytest.raises(Unavailable, match="ended while it started"):
            await wait_ready(f"redis://127.0.0.1:{port}/0", alive=lambda: False)
        await store.close()

    @pytest.mark.parametrize("password", ["", "wrong"])
    async def test_strangers_are_refused(self, server: StoreServer, password: str) -> None:
        store = RedisStore(server.url, password=password)
        with pytest.raises(MnError):
            await store.get("thing", "a")
        with pytest.raises(Unavailable, match="refuses the password"):
            await wait_ready(server.url, password=password)
        await store.close()

    async def test_a_server_that_forgot_its_scripts_is_told_again(self, store: RedisStore) -> None:
        await store.commit([Op("thing", "a", b"", 0)])
        await operator(store).script_flush()
        assert await store.commit([Op("thing", "a", b"", 1)]) == [2]

    async def test_a_full_store_refuses_what_grows_and_keeps_its_leader(self, store: RedisStore) -> None:
        epoch = await store.acquire_lease("n1", LONG_S)
        assert epoch is not None
        await store.enqueue("q", "inv_1", b"")
        await store.commit([Op("thing", "old", b"")])
        await operator(store).config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreFull, match="nothing was written"):
                await store.commit([Op("thing", "a", b""), Op("thing", "b", b"")], operation="op")
            with pytest.raises(StoreFull):
                await store.enqueue("q", "inv_2", b"", dedupe="k")
            assert await store.renew_lease(epoch, LONG_S)
            await store.release_lease(epoch)
            assert await store.acquire_lease("n2", LONG_S) is not None
            claimed = await store.claim("q", "n1", 10, now_ms=0)
            assert claimed is not None and await store.finish("inv_1", claimed.token, b"done")
            assert await store.commit([Op("thing", "old", None)]) == [0]
        finally:
            await operator(store).config_set("maxmemory", 1 << 30)
        assert await records(store, "thing") == {}
        assert await store.claim("q", "n1", 10, now_ms=0) is None
        assert await store.commit([Op("thing", "a", b""), Op("thing", "b", b"")], operation="op") == [1, 1]

    async def test_an_index_that_disagrees_with_the_records_is_not_believed(self, store: RedisStore) -> None:
        for id in ("inv_leased", "inv_gone", "inv_queued"):
            await store.enqueue("q", id, b"")
        leased = await store.claim("q", "n1", LONG_S, now_ms=1000)
        assert leased is not None and leased.id == "inv_leased"
        waiting = f"{store._prefix}wait:q"
        await operator(store).zadd(waiting, {"inv_leased": 0, "inv_never": 0})
        await operator(store).hdel(f"{store._prefix}states", "inv_gone")
        claimed = await store.claim("q", "n2", 10, now_ms=2000)
        assert claimed is not None and claimed.id == "inv_queued"
        assert await store.claim("q", "n2", 10, now_ms=2000) is None
        assert await store.finish("inv_leased", leased.token, b"done")

    async def test_bursts_wait_for_a_connection_instead_of_failing(self, store: RedisStore) -> None:
        await asyncio.gather(*(store.commit([Op("thing", str(n), b"")]) for n in range(300)))
        assert len(await records(store, "thing")) == 300
        connected = await operator(store).info("clients")
        assert connected["connected_clients"] <= 32


class TestSharing:
    async def test_namespaces_share_a_server_and_nothing_else(self, store: RedisStore, open_store: Opener) -> None:
        await store.commit([Op("thing", "a", b"")], operation="op")
        await store.enqueue("q", "inv_1", b"", dedupe="k")
        assert await store.acquire_lease("n1", LONG_S)
        other = open_store()
        assert await other.acquire_lease("n2", LONG_S) == Epoch(1, "n2")
        assert await other.get("thing", "a") is None
        assert await other.commit([Op("thing", "b", b"", 0)], operation="op") == [1]
        assert await other.claim("q", "n2", 10, now_ms=0) is None
        assert await other.enqueue("q", "inv_2", b"", dedupe="k") == ("inv_2", True)

    @pytest.mark.parametrize("protocol", [2, 3])
    async def test_both_protocols_are_spoken(self, server: StoreServer, open_store: Opener, protocol: int) -> None:
        store = open_store(query=f"?protocol={protocol}")
        await store.commit([Op("thing", "a", b"1"), Op("thing", "b", b"2")])
        assert await records(store, "thing") == {"a": (1, b"1"), "b": (1, b"2")}
        assert await store.server() == server.embedded.binary.label
        await store.enqueue("q", "inv_1", b"")
        claimed = await store.claim("q", "n1", 10, now_ms=0)
        assert claimed is not None and await store.finish("inv_1", claimed.token, b"done")


@pytest.mark.parametrize("name", ["valkey", "redis"])
def test_what_was_acknowledged_survives_kill_9(name: str, tmp_path: Path) -> None:
    with running_server(tmp_path, name) as server:
        acknowledged = asyncio.run(_write_until_killed(server))
        assert len(acknowledged) >= 20
        server.start()
        found, epoch = asyncio.run(_read_back(server))
        assert acknowledged <= found
        assert epoch is not None and epoch.counter == 2


async def _write_until_killed(server: StoreServer) -> set[str]:
    acknowledged: set[str] = set()
    store = server.store()
    epoch = await store.acquire_lease("n1", LONG_S)
    assert epoch is not None
    await store.release_lease(epoch)

    async def write(writer: int) -> None:
        for n in itertools.count():
            id = f"{writer}-{n}"
            try:
                await store.commit([Op("thing", id, b"x" * 100, 0)], operation=id)
            except StoreUnavailable:
                return
            acknowledged.add(id)
            if len(acknowledged) == 20:
                server.kill()

    await asyncio.gather(*(write(n) for n in range(4)))
    await store.close()
    return acknowledged


async def _read_back(server: StoreServer) -> tuple[set[str], Epoch | None]:
    store = server.store()
    try:
        return set(await records(store, "thing")), await store.acquire_lease("n2", LONG_S)
    finally:
        await store.close()


def operator(store: RedisStore) -> Any:
    """The store's own client, for what an operator might do to the server."""
    return store._client


# Random histories: what the twin answers, a server answers too.

IDS = st.sampled_from(["a", "b", "c"])
HOLDERS = st.sampled_from(["n1", "n2"])
QUEUES = st.sampled_from(["q", "r"])
VALUES = st.binary(max_size=3)
OPS = st.builds(Op, st.sampled_from(["k", "l"]), IDS, st.none() | VALUES, st.integers(-1, 3))
COMMANDS = st.one_of(
    st.tuples(
        st.just("commit"),
        st.lists(OPS, max_size=4, unique_by=lambda op: (op.kind, op.id)),
        st.none() | st.builds(Epoch, st.integers(1, 3), HOLDERS),
        st.sampled_from(["", "", "o1", "o2"]),
    ),
    st.tuples(st.just("acquire"), HOLDERS),
    st.tuples(st.just("release"), st.builds(Epoch, st.integers(1, 3), HOLDERS)),
    st.tuples(st.just("renew"), st.builds(Epoch, st.integers(1, 3), HOLDERS)),
    st.tuples(st.just("enqueue"), QUEUES, IDS, VALUES, st.sampled_from(["", "d1", "d2"])),
    st.tuples(st.just("claim"), QUEUES, HOLDERS, st.integers(1, 5), st.integers(0, 12)),
    st.tuples(st.just("finish"), IDS, st.integers(0, 5), VALUES),
)


class Player:
    """Plays commands against one store. Tokens differ between stores, so a command names one by when it was given."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._tokens: list[str] = []

    async def play(self, command: tuple[Any, ...]) -> object:
        verb, *args = command
        handlers: dict[str, Callable[..., Any]] = {
            "commit": lambda ops, fence, operation: self.store.commit(ops, fence=fence, operation=operation),
            "acquire": lambda holder: self.store.acquire_lease(holder, LONG_S),
            "release": self.store.release_lease,
            "renew": lambda epoch: self.store.renew_lease(epoch, LONG_S),
            "enqueue": lambda queue, id, value, key: self.store.enqueue(queue, id, value, dedupe=key),
            "claim": self._claim,
            "finish": self._finish,
        }
        try:
            return await handlers[verb](*args)
        except MnError as error:
            return type(error).__name__, error.extra

    async def _claim(self, queue: str, holder: str, lease_s: int, now_s: int) -> object:
        claimed = await self.store.claim(queue, holder, lease_s, now_ms=1000 * now_s)
        if claimed is None:
            return None
        self._tokens.append(claimed.token)
        return claimed.id, claimed.value, claimed.attempt

    async def _finish(self, id: str, number: int, outcome: bytes) -> bool:
        token = self._tokens[-1 - number] if number < len(self._tokens) else ""
        return await self.store.finish(id, token, outcome)

    async def ending(self) -> object:
        outcomes = [await self.store.outcome(id) for id in ("a", "b", "c")]
        return await records(self.store, "k"), await records(self.store, "l"), await self.store.leader(), outcomes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=st.lists(COMMANDS, max_size=30))
def test_memory_and_server_agree(server: StoreServer, commands: list[tuple[Any, ...]]) -> None:
    async def compare() -> None:
        real_store = server.store(next(NAMESPACES))
        real, memory = Player(real_store), Player(MemoryStore(lambda: 0.0))
        try:
            for command in commands:
                assert await real.play(command) == await memory.play(command), command
            assert await real.ending() == await memory.ending()
        finally:
            await real_store.close()

    asyncio.run(compare())
