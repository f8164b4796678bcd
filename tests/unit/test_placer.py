"""The placer with executors and callers that the test plays: what is started where, once, and after it was written down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from mn.formats.manifest import FunctionSpec, Resources, Scaling
from mn_nodepool.control.catalog import Catalog
from mn_nodepool.control.placer import ALLOCATIONS, PLATFORM_TRIES, Placer
from mn_nodepool.store.base import Epoch, Op, StoreUnavailable
from mn_nodepool.wire.control import BundlePut, Deploy, Principal
from mn_nodepool.wire.messages import (
    AllocationReport,
    Demand,
    Idle,
    Observed,
    Report,
    ReportWanted,
    Start,
    Stop,
    Unplaced,
)
from tests.support.links import RecordingLink, spec
from tests.support.memory_store import MemoryStore
from tests.support.virtual import run_virtual, settle
from tests.unit.test_leadership import LoopClock

ANN = Principal("key_a", "ann")


class Watched(MemoryStore):
    """A store that notes what is committed, and can fail."""

    def __init__(self) -> None:
        super().__init__(LoopClock().monotonic)
        self.down = False
        self.before_commit: Callable[[], None] = lambda: None

    async def commit(self, ops: Sequence[Op], *, fence: Epoch | None = None, operation: str = "") -> list[int]:
        await asyncio.sleep(0)
        self.before_commit()
        if self.down:
            raise StoreUnavailable("the store does not answer")
        return await super().commit(ops, fence=fence, operation=operation)

    async def allocations(self) -> set[str]:
        return {record.id async for record in self.scan(ALLOCATIONS.name)}


class Executor:
    """One node's executor by the rules of the protocol."""

    def __init__(self, pool: Pool, node: str, cpu: float = 4.0) -> None:
        self.pool = pool
        self.node = node
        self.cpu = cpu
        self.link = RecordingLink(node)
        self.running: dict[str, AllocationReport] = {}
        self.starts: list[Start] = []
        self.stops: list[Stop] = []
        self.broken: Observed | None = None

    async def report(self) -> None:
        report = Report(self.node, 1, self.cpu, 4096, 0, "fake", ("3.11",), (), 0, tuple(self.running.values()))
        await self.pool.placer.report(self.link, report)

    async def work(self) -> None:
        """Do what the leader says."""
        for message, _ in list(self.link.sent):
            self.link.sent.pop(0)
            if isinstance(message, Start):
                self.starts.append(message)
                await self._start(message)
            elif isinstance(message, Stop):
                self.stops.append(message)
                if self.running.pop(message.allocation, None) is not None:
                    await self._observed(Observed(message.allocation, "", "gone"))
            elif isinstance(message, ReportWanted):
                await self.report()

    async def _start(self, start: Start) -> None:
        if self.broken is not None:
            failed = self.broken
            await self._observed(
                Observed(start.allocation, start.version, "failed", failed.slug, failed.detail, failed.extra)
            )
            return
        self.running[start.allocation] = AllocationReport(start.allocation, start.version, "sbx", "ready", 1, 1, 0)
        await self._observed(Observed(start.allocation, start.version, "ready"))

    async def _observed(self, message: Observed) -> None:
        self.pool.spawn(self.pool.placer.observed(message))

    def idle(self, allocation: str, idle_ms: int = 60_000) -> None:
        old = self.running[allocation]
        self.running[allocation] = AllocationReport(allocation, old.version, old.sandbox, "ready", 1, 0, idle_ms)


class Pool:
    def __init__(self) -> None:
        self.store = Watched()
        self.caller = RecordingLink("gateway-1")
        self.executors: list[Executor] = []
        self.stale = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def lead(self, holder: str = "n1") -> None:
        epoch = await self.store.acquire_lease(holder, 1e9)
        assert epoch is not None
        self.epoch = epoch
        self.catalog = Catalog(self.store, epoch, 10)
        await self.catalog.load()
        self.placer = Placer(
            self.store, epoch, self.catalog, LoopClock(), cpu_overcommit=1.0, slots_max=0, stale=self._stale
        )
        await self.placer.load()
        self.spawn(self.placer.run())

    def _stale(self) -> None:
        self.stale += 1

    def spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

    async def node(self, name: str = "n1", cpu: float = 4.0) -> Executor:
        executor = Executor(self, name, cpu)
        self.executors.append(executor)
        await executor.report()
        return executor

    async def deploy(self, *specs: FunctionSpec) -> None:
        digest = f"sha256:{specs[0].name}{specs[0].timeout_s}"
        await self.catalog.put_bundle(BundlePut(digest, specs, 1, 1, ANN), 1, "n1")
        _, change = await self.catalog.deploy(Deploy(digest, ANN, f"op {digest}"), 1)
        await self.placer.retire(change.retired)
        self.placer.look_again()

    async def turn(self, seconds: float = 0.0, **demands: int) -> None:
        """Callers repeat their demand ten times a second, as dispatchers do; executors work."""
        for _ in range(max(1, round(seconds * 10))):
            for name, queued in demands.items():
                self.placer.demand(self.caller, Demand(f"{name}#1", queued))
            for _ in range(8):
                await settle(5)
                for executor in self.executors:
                    await executor.work()
            if seconds:
                await asyncio.sleep(0.1)


def play(scene: Callable[[Pool], Awaitable[None]]) -> None:
    async def run() -> None:
        pool = Pool()
        await pool.lead()
        await scene(pool)

    run_virtual(run())


def cpus(name: str, cpu: float, **scaling: int) -> FunctionSpec:
    return spec(name, scaling=Scaling(**scaling), resources=Resources(cpu=cpu))


def test_a_demand_is_met_once_however_often_it_is_said() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f"))
        await pool.turn(2.0, f=1)
        [start] = node.starts
        assert (start.version, start.epoch, start.leader) == ("f#1", 1, "n1")
        assert await pool.store.allocations() == {start.allocation}

    play(scene)


def test_executors_hear_of_a_plan_only_after_it_is_written() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f"))
        told_early = []
        pool.store.before_commit = lambda: told_early.extend(node.link.take(Start))
        await pool.turn(f=1)
        assert (told_early, len(node.starts)) == ([], 1)
        pool.store.down = True
        await pool.turn(2.0, f=100)
        assert len(node.starts) == 1, "a start that nobody wrote down"
        pool.store.down = False
        await pool.turn(3.0, f=100)
        assert len(node.starts) > 1

    play(scene)


def test_replicas_go_where_there_is_most_room() -> None:
    async def scene(pool: Pool) -> None:
        small, large = await pool.node("small", 2.0), await pool.node("large", 8.0)
        await pool.deploy(cpus("f", 1.0, min_replicas=5))
        await pool.turn()
        assert (len(small.starts), len(large.starts)) == (1, 4)

    play(scene)


def test_code_that_does_not_load_is_told_at_once_and_tried_again_later() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f"))
        node.broken = Observed("", "", "failed", "function-error", "importing f raised ImportError", {"k": 1})
        await pool.turn(f=1)
        [told] = pool.caller.take(Unplaced)
        assert (told.slug, told.final, told.extra) == ("function-error", True, {"k": 1})
        await pool.turn(f=1)
        assert pool.caller.take(Unplaced)[0].final, "until it is tried again everybody is told the same"
        assert len(node.starts) == 1
        await pool.turn(10.0, f=1)
        tried = len(node.starts)
        assert 2 <= tried <= 5, "each time after twice as long"
        node.broken = None
        await pool.turn(31.0, f=1)
        assert len(node.running) == 1
        assert len(node.starts) == tried + 1

    play(scene)


def test_the_platforms_own_failures_are_tried_some_times_before_callers_hear() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f"))
        node.broken = Observed("", "", "failed", "sandbox-unavailable", "no sandbox could be started", {})
        await pool.turn(0.5, f=1)
        assert len(node.starts) == PLATFORM_TRIES
        assert pool.caller.take(Unplaced)[0].slug == "sandbox-unavailable"

    play(scene)


def test_an_idle_replica_makes_room_and_a_busy_or_promised_one_does_not() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node(cpu=2.0)
        await pool.deploy(cpus("old", 1.0))
        await pool.deploy(cpus("promised", 1.0, min_replicas=1))
        await pool.turn(old=1, promised=1)
        by_version = {each.version: each.allocation for each in node.running.values()}
        await pool.deploy(cpus("new", 1.0))
        await pool.turn(0.3, new=1)
        assert not node.stops, "nobody ends while busy"
        [waits] = {(told.final, told.slug) for told in pool.caller.take(Unplaced)}
        assert waits == (False, "unschedulable")
        node.idle(by_version["promised#1"], 90_000)
        node.idle(by_version["old#1"], 10_000)
        await pool.turn(0.5, new=1)
        assert [stop.allocation for stop in node.stops] == [by_version["old#1"]]
        assert {each.version for each in node.running.values()} == {"promised#1", "new#1"}

    play(scene)


def test_what_no_node_can_ever_run_fails_and_before_there_is_a_node_it_waits() -> None:
    async def scene(pool: Pool) -> None:
        await pool.deploy(cpus("f", 64.0))
        await pool.turn(0.5, f=1)
        assert {told.final for told in pool.caller.take(Unplaced)} == {False}
        await pool.node(cpu=2.0)
        await pool.turn(0.5, f=1)
        told = pool.caller.take(Unplaced)[-1]
        assert told.final
        assert "needs 64 CPU" in told.detail
        assert "n1 has 2 cores" in told.detail

    play(scene)


def test_idle_replicas_end_down_to_the_minimum_even_when_all_say_so_at_once() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f", scaling=Scaling(min_replicas=1)))
        await pool.turn(1.0, f=100)
        count = len(node.running)
        assert count > 1
        await asyncio.sleep(5)
        for allocation in list(node.running):
            pool.spawn(pool.placer.idle(Idle(allocation, "f#1")))
        await pool.turn(1.0)
        assert len(node.stops) == count - 1
        assert len(node.running) == 1

    play(scene)


def test_minimum_replicas_come_without_a_call_and_come_back() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f", scaling=Scaling(min_replicas=2)))
        await pool.turn()
        assert len(node.running) == 2
        gone = next(iter(node.running))
        del node.running[gone]
        await pool.placer.observed(Observed(gone, "f#1", "gone"))
        await pool.turn(31.0)
        assert len(node.running) == 2

    play(scene)


def test_minimum_replicas_are_tried_again_after_they_failed() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        node.broken = Observed("", "", "failed", "sandbox-unavailable", "no", {})
        await pool.deploy(spec("f", scaling=Scaling(min_replicas=1)))
        await pool.turn(0.5)
        assert len(node.starts) == PLATFORM_TRIES
        node.broken = None
        await pool.turn(60.0)
        assert len(node.running) == 1

    play(scene)


def test_a_new_version_ends_the_old_ones_replicas() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f", scaling=Scaling(min_replicas=1)))
        await pool.turn()
        await pool.deploy(spec("f", scaling=Scaling(min_replicas=1), timeout_s=7.0))
        await pool.turn()
        assert [each.version for each in node.running.values()] == ["f#2"]
        assert node.stops[0].drain

    play(scene)


def test_calls_of_a_deleted_function_are_told() -> None:
    async def scene(pool: Pool) -> None:
        await pool.turn(gone=1)
        [told] = pool.caller.take(Unplaced)
        assert (told.slug, told.final) == ("not-found", True)

    play(scene)


def test_a_takeover_clears_what_was_written_and_keeps_what_runs() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        await pool.deploy(spec("f"))
        await pool.turn(f=1)
        before = dict(node.running)
        pool.store.drop_lease()
        old = pool.placer
        await pool.lead("n2")
        assert await pool.store.allocations() == set()
        await node.report()
        await pool.turn(1.0, f=1)
        assert node.running == before, "healthy replicas outlive their leader"
        assert len(node.starts) == 1
        old.demand(pool.caller, Demand("f#1", 100))
        await settle(50)
        assert pool.stale == 1
        assert not node.link.take(Start), "the old leader started something"

    play(scene)


def test_what_runs_for_a_function_that_is_gone_is_ended() -> None:
    async def scene(pool: Pool) -> None:
        node = await pool.node()
        node.running["alc_old"] = AllocationReport("alc_old", "gone#4", "sbx", "ready", 1, 0, 1)
        await node.report()
        await pool.turn()
        assert [stop.allocation for stop in node.stops] == ["alc_old"]

    play(scene)


def test_a_caller_that_went_away_wants_nothing_more() -> None:
    async def scene(pool: Pool) -> None:
        await pool.deploy(spec("f"))
        await pool.turn(f=5)
        pool.placer.forget_link(pool.caller)
        node = await pool.node()
        await pool.turn(0.5)
        assert not node.starts

    play(scene)


def test_a_demand_that_is_not_repeated_is_over() -> None:
    async def scene(pool: Pool) -> None:
        await pool.deploy(spec("f"))
        await pool.turn(f=5)
        await asyncio.sleep(5)
        node = await pool.node()
        await pool.turn(0.5)
        assert not node.starts

    play(scene)
