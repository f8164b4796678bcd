"""Brings the replicas that run to the number that is wanted: collects demand and reports, asks `scheduling` for a plan, commits it, and only then
tells executors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import structlog

from mn.formats.errors import CapacityError, Conflict, MnError, error_from
from mn.formats.ids import AllocationId, NodeId, VersionId, display_name, new_allocation_id
from mn.formats.manifest import FunctionSpec
from mn_nodepool.clock import Clock
from mn_nodepool.control.catalog import Catalog
from mn_nodepool.control.records import Kind
from mn_nodepool.mesh.transport import Link
from mn_nodepool.model import AllocationState, End, NodeState, Plan, Snapshot, Unmet, Want
from mn_nodepool.scheduling.plan import plan
from mn_nodepool.scheduling.scale import wanted_replicas
from mn_nodepool.store.base import Epoch, Op, StaleEpoch, Store, StoreUnavailable
from mn_nodepool.wire.control import VersionRecord
from mn_nodepool.wire.messages import Demand, Idle, Observed, Report, ReportWanted, Start, Stop, Unplaced

log = structlog.get_logger("placer")
REPORT_WAIT_S = 1.0
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 30.0
PLATFORM_TRIES = 3
"""Starts of a version that fail for the platform's reasons before its callers are told."""
DEMAND_FRESH_S = 1.0
"""A demand that is not repeated within this is over."""


class AllocationRecord(msgspec.Struct, frozen=True):
    id: str
    version: str
    node: str
    epoch: int
    created_ms: int


ALLOCATIONS = Kind("allocation", AllocationRecord)


class Failure(NamedTuple):
    """Why a version does not start, and until when nobody tries again."""

    error: MnError
    until: float
    delay_s: float
    tries: int


class Crash(NamedTuple):
    """Until when a version's minimum is not kept up, since its replicas die."""

    until: float
    delay_s: float


class ExecutorAt(NamedTuple):
    link: Link
    report: Report


class Placer:
    """Belongs to one leader for one epoch."""

    def __init__(
        self,
        store: Store,
        epoch: Epoch,
        catalog: Catalog,
        clock: Clock,
        *,
        cpu_overcommit: float,
        slots_max: int,
        stale: Callable[[], None],
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._catalog = catalog
        self._clock = clock
        self._cpu_overcommit = cpu_overcommit
        self._slots_max = slots_max
        self._stale = stale
        self.executors: dict[NodeId, ExecutorAt] = {}
        self.allocations: dict[AllocationId, AllocationState] = {}
        self._demands: dict[str, dict[Link, tuple[Demand, float]]] = {}
        self._failures: dict[str, Failure] = {}
        self._crashes: dict[str, Crash] = {}
        self._wake = asyncio.Event()
        self._report_waiters: list[asyncio.Future[None]] = []
        self._changing = asyncio.Lock()
        """Held from looking at allocations until what was decided is committed, so that two decisions never count on the same replica."""

    async def load(self) -> None:
        """Forget allocations of earlier epochs: executors report what really runs."""
        leftover = [record async for record in self._store.scan(ALLOCATIONS.name)]
        if leftover:
            await self._store.commit([Op(ALLOCATIONS.name, r.id, None) for r in leftover], fence=self._epoch)

    # What others tell.

    def demand(self, link: Link, demand: Demand) -> None:
        record = self._catalog.versions.get(demand.version)
        if record is None:
            name = demand.version.rpartition("#")[0]
            link.send(Unplaced(demand.version, "not-found", f"function {name} was deleted", {}, True))
            return
        if not demand.queued:
            self._demands.get(demand.version, {}).pop(link, None)
            return
        now = self._clock.monotonic()
        failure = self._failures.get(demand.version)
        if failure is not None and now < failure.until and failure.tries == 0:
            link.send(_unplaced(demand.version, failure.error, final=True))
            return
        self._demands.setdefault(demand.version, {})[link] = (demand, now)
        self._wake.set()

    def forget_link(self, link: Link) -> None:
        for demands in self._demands.values():
            demands.pop(link, None)
        for node, executor in list(self.executors.items()):
            if executor.link is link:
                del self.executors[node]
                for allocation in [a for a in self.allocations.values() if a.node == node]:
                    del self.allocations[allocation.id]

    async def report(self, link: Link, report: Report) -> None:
        """What an executor has is the truth about what runs; allocations that nobody committed are ended."""
        node = NodeId(report.node)
        self.executors[node] = ExecutorAt(link, report)
        for item in report.allocations:
            id_ = AllocationId(item.allocation)
            known = self.allocations.get(id_)
            version = self._catalog.versions.get(item.version)
            if version is None:
                link.send(Stop(self._epoch.counter, self._epoch.holder, item.allocation, "its function is gone", False))
                continue
            self.allocations[id_] = AllocationState(
                id_, VersionId(item.version), node, version.spec, item.state == "ready", known.stopping if known else False, item.idle_ms, item.lent
            )  # fmt: skip
        for waiter in self._report_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._wake.set()

    async def observed(self, message: Observed) -> None:
        """What became of an allocation."""
        id_ = AllocationId(message.allocation)
        known = self.allocations.get(id_)
        if message.state == "ready":
            self._failures.pop(message.version, None)
            if known is not None:
                self.allocations[id_] = msgspec.structs.replace(known, ready=True)
            return
        if message.state == "failed":
            self._failed(message)
        elif message.state == "gone" and known is not None and known.ready and not known.stopping:
            self._crashed(message.version)
        self._wake.set()
        if known is not None:
            del self.allocations[id_]
            await self._store.commit([Op(ALLOCATIONS.name, id_, None)], fence=self._epoch)

    def _failed(self, message: Observed) -> None:
        before = self._failures.get(message.version)
        theirs = message.slug in ("function-error", "invalid-request", "not-found")
        tries = 0 if theirs else (before.tries if before else 0) + 1
        delay = min(RETRY_MAX_S, before.delay_s * 2 if before else RETRY_FIRST_S)
        error = error_from(message.slug, message.detail, message.extra)
        final = theirs or tries >= PLATFORM_TRIES
        wait = delay if final else 0.0
        self._failures[message.version] = Failure(error, self._clock.monotonic() + wait, delay, 0 if final else tries)
        if final:
            for link in self._demands.pop(message.version, {}):
                link.send(_unplaced(message.version, error, final=True))
            # Minimum replicas have no callers whose demand would wake the loop.
            asyncio.get_running_loop().call_later(wait, self._wake.set)

    def _crashed(self, version: str) -> None:
        """A replica died by itself: callers get another one at once, a minimum that nobody calls is kept up at a falling pace."""
        now = self._clock.monotonic()
        before = self._crashes.get(version)
        again = before is not None and now < before.until + RETRY_MAX_S
        delay = min(RETRY_MAX_S, before.delay_s * 2) if before is not None and again else RETRY_FIRST_S
        self._crashes[version] = Crash(now + delay, delay)
        asyncio.get_running_loop().call_later(delay, self._wake.set)

    async def idle(self, message: Idle) -> None:
        """An idle replica above the minimum ends."""
        async with self._changing:
            allocation = self.allocations.get(AllocationId(message.allocation))
            if allocation is None or allocation.stopping:
                return
            present = sum(1 for a in self.allocations.values() if a.version == allocation.version and not a.stopping)
            least = allocation.spec.scaling.min_replicas if self._catalog.is_live(allocation.version) else 0
            if present > least:
                await self._commit(Plan(ends=(End(allocation.id, "no calls for a while"),)))

    async def retire(self, versions: Iterable[str]) -> None:
        """Versions that are live no longer: their replicas end when their calls have."""
        leaving = set(versions)
        for version in leaving:
            self._failures.pop(version, None)
            # What was asked for before must not bring back what ends now; what still waits asks again.
            self._demands.pop(version, None)
            self._crashes.pop(version, None)
        async with self._changing:
            ends = tuple(
                End(a.id, "its version is no longer live")
                for a in self.allocations.values()
                if a.version in leaving and not a.stopping
            )
            await self._commit(Plan(ends=ends))

    def look_again(self) -> None:
        """Something changed that minimum replicas may depend on."""
        self._wake.set()

    # The loop.

    async def run(self) -> None:
        """Plan whenever there is a reason to, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._round()
            except StaleEpoch:
                self._stale()
                return
            except CapacityError as error:
                log.warning("the store is full", action="plan_not_committed", reason=error.detail)
                for version, demands in self._demands.items():
                    for link in demands:
                        link.send(_unplaced(version, error, final=True))
                self._demands.clear()
            except StoreUnavailable as error:
                log.warning("a plan could not be committed", action="plan_not_committed", reason=error.detail)
                await asyncio.sleep(RETRY_FIRST_S)
                self._wake.set()

    async def _round(self) -> None:
        wants = self._wants()
        if not wants:
            return
        if plan(self._snapshot(), wants).unmet:
            await self.fresh_reports()
        async with self._changing:
            proposed = plan(self._snapshot(), self._wants())
            await self._commit(proposed)
        for unmet in proposed.unmet:
            self._tell_unmet(unmet)

    def _wants(self) -> list[Want]:
        now = self._clock.monotonic()
        present: dict[str, int] = {}
        for allocation in self.allocations.values():
            if not allocation.stopping:
                present[allocation.version] = present.get(allocation.version, 0) + 1
        wants: list[Want] = []
        for version in self._candidates():
            record = self._catalog.versions.get(version)
            failure = self._failures.get(version)
            if record is None or (failure is not None and now < failure.until):
                continue
            demands = self._demands.get(version, {})
            for link in [link for link, (_, at) in demands.items() if now - at > DEMAND_FRESH_S]:
                del demands[link]
            if not demands:
                self._demands.pop(version, None)
            scaling = record.spec.scaling
            crash = self._crashes.get(version)
            if not self._catalog.is_live(version) or (crash is not None and now < crash.until):
                scaling = msgspec.structs.replace(scaling, min_replicas=0)
            there = present.get(version, 0)
            queued = sum(d.queued for d, _ in demands.values())
            running = sum(d.running for d, _ in demands.values())
            run_us = max((d.run_us for d, _ in demands.values()), default=0)
            wanted = wanted_replicas(scaling, there, queued, running, run_us)
            if wanted > there:
                wants.append(Want(VersionId(version), record.spec, wanted))
        return wants

    def _candidates(self) -> list[str]:
        with_minimum = [
            v.id for v in self._catalog.versions.values() if v.spec.scaling.min_replicas and self._catalog.is_live(v.id)
        ]  # fmt: skip
        return list(dict.fromkeys([*self._demands, *with_minimum]))

    def _snapshot(self) -> Snapshot:
        return Snapshot({node: self._state(at.report) for node, at in self.executors.items()}, dict(self.allocations))

    def _state(self, report: Report) -> NodeState:
        return NodeState(
            NodeId(report.node),
            report.cpu * self._cpu_overcommit,
            report.memory_mb,
            report.gpus,
            report.driver,
            report.python,
            self._slots_max,
        )

    async def fresh_reports(self) -> None:
        """Ask every executor what it runs, and wait for the answers for at most a second."""
        waiting = []
        for executor in list(self.executors.values()):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._report_waiters.append(waiter)
            waiting.append(waiter)
            executor.link.send(ReportWanted())
        if waiting:
            await asyncio.wait(waiting, timeout=REPORT_WAIT_S)
        self._report_waiters = [w for w in self._report_waiters if not w.done()]

    async def _commit(self, proposed: Plan) -> None:
        """Write the plan under the epoch, then act on it."""
        now_ms = self._clock.now_ms()
        starts: list[tuple[AllocationRecord, VersionRecord]] = []
        for place in proposed.places:
            record = AllocationRecord(new_allocation_id(), place.version, place.node, self._epoch.counter, now_ms)
            starts.append((record, self._catalog.versions[place.version]))
        ops = [Op(ALLOCATIONS.name, r.id, ALLOCATIONS.dump(r), expect=0) for r, _ in starts]
        ops += [Op(ALLOCATIONS.name, end.allocation, None) for end in proposed.ends]
        if not ops:
            return
        try:
            await self._store.commit(ops, fence=self._epoch)
        except Conflict as error:
            log.warning("a plan was refused by the store", action="plan_refused", reason=error.detail)
            self._wake.set()
            return
        for end in proposed.ends:
            known = self.allocations.get(end.allocation)
            executor = self.executors.get(known.node) if known else None
            if known is not None:
                self.allocations[end.allocation] = msgspec.structs.replace(known, stopping=True)
            if executor is not None:
                executor.link.send(Stop(self._epoch.counter, self._epoch.holder, end.allocation, end.reason, True))
        for record, version in starts:
            self._start(record, version)

    def _start(self, record: AllocationRecord, version: VersionRecord) -> None:
        node = NodeId(record.node)
        self.allocations[AllocationId(record.id)] = AllocationState(
            AllocationId(record.id), VersionId(record.version), node, version.spec
        )
        executor = self.executors.get(node)
        if executor is not None:
            executor.link.send(
                Start(
                    self._epoch.counter,
                    self._epoch.holder,
                    record.id,
                    version.id,
                    version.digest,
                    version.spec,
                    version.siblings,
                    version.owner,
                    version.namespace,
                )
            )

    def _tell_unmet(self, unmet: Unmet) -> None:
        """Callers hear why; only what no node could ever run is answered at once, the rest goes on waiting."""
        record = self._catalog.versions.get(unmet.version)
        if record is None:  # deleted while the plan was committed
            return
        needs = _needs(record.spec)
        nodes = "; ".join(f"{node} {reason}" for node, reason in unmet.reasons.items()) or "no node is healthy"
        detail = f"no node can run {display_name(record.function)} v{record.number} ({needs}): {nodes}"
        present = any(a.version == unmet.version for a in self.allocations.values())
        for link in self._demands.get(unmet.version, {}):
            link.send(
                Unplaced(
                    unmet.version,
                    "unschedulable",
                    detail,
                    {"reasons": dict(unmet.reasons)},
                    unmet.permanent and not present,
                )
            )


def _needs(spec: FunctionSpec) -> str:
    resources = spec.resources
    parts = [f"needs {resources.cpu:g} CPU", f"{resources.memory_mb} MiB memory"]
    if resources.gpu:
        parts.append(f"{resources.gpu} GPU")
    if spec.environment.python:
        parts.append(f"Python {spec.environment.python}")
    return ", ".join(parts)


def _unplaced(version: str, error: MnError, *, final: bool) -> Unplaced:
    return Unplaced(version, error.slug, error.detail, error.extra, final)
