"""Allocations: what the leader wants to run here, from its command to the sandbox's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import structlog

from mn.formats.errors import MnError, NotFound, SandboxUnavailable
from mn.formats.ids import new_sandbox_id
from mn.formats.settings import Settings
from mn_nodepool.executor.fence import Fence
from mn_nodepool.executor.inventory import Facts
from mn_nodepool.executor.lane import VersionLane
from mn_nodepool.executor.nested import Gate, NestedCalls
from mn_nodepool.executor.replica import Replica, ReplicaOwner
from mn_nodepool.executor.spares import Spares
from mn_nodepool.wire.messages import AllocationReport, Idle, Message, Observed, Report, ReportWanted, Start, Stop
from mn_runner.sandbox import Driver, Shape, State

log = structlog.get_logger("executor")
STARTS_AT_ONCE_PER_CORE = 16
"""Half of a sandbox's start is waiting for the kernel (namespaces, mounts), so that many side by side take less time than one by one."""


class AllocationHost(ReplicaOwner, Gate, Protocol):
    """The executor that the replicas serve."""

    lanes: dict[str, VersionLane]

    def lane_grew(self, lane: VersionLane) -> None:
        """A replica is ready for calls."""

    def lane_shrank(self, lane: VersionLane) -> None:
        """A replica takes no more calls, or is gone."""


class Allocations:
    """Starts and ends sandboxes as the leader says, re-checking its epoch, and tells it what became of them."""

    def __init__(self, settings: Settings, facts: Facts, driver: Driver, fence: Fence, host: AllocationHost) -> None:
        self._settings = settings
        self._facts = facts
        self._driver = driver
        self._fence = fence
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._replicas_of: dict[str, Replica | None] = {}
        """By allocation; None while it starts."""
        self._versions: dict[str, str] = {}
        self._unwanted: dict[str, str] = {}
        """Allocations that were stopped before they were ready, and why."""
        self._replicas: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        starts_at_once = STARTS_AT_ONCE_PER_CORE * max(1, int(facts.inventory.cpu))
        self._spares = Spares(settings.spares, self._start_sandbox, starts_at_once)
        self._leader: Callable[[Message], None] = lambda _: None

    async def begin(self) -> None:
        """Clear what an earlier process left, and start spares."""
        reaped = await self._driver.reap()
        if reaped:
            log.info("removed sandboxes of an earlier run", action="sandboxes_reaped", count=reaped)
        self._spares.refill()

    def attach_leader(self, send: Callable[[Message], None]) -> None:
        """Whom to tell what becomes of allocations."""
        self._leader = send
        send(self.report())

    def detach_leader(self) -> None:
        self._leader = lambda _: None

    def has_version(self, version: str) -> bool:
        return version in self._versions.values()

    async def close(self) -> None:
        """End every sandbox and answer every call in them."""
        for task in list(self._tasks):
            task.cancel()
        await self._spares.close()
        for replica in list(self._replicas):
            replica.die("the node stops")
        for replica in list(self._replicas):
            await replica.gone()
        await self._driver.close()

    def command(self, message: Message) -> None:
        """Start or Stop, of the newest epoch seen; an older leader's are refused."""
        if isinstance(message, ReportWanted):
            self._leader(self.report())
        elif isinstance(message, Start):
            if not self._fence.admits(message.epoch, message.leader):
                self._leader(
                    Observed(
                        message.allocation,
                        message.version,
                        "refused",
                        "no-leader",
                        f"epoch {message.epoch} of {message.leader} is over",
                    )
                )
            elif message.allocation not in self._replicas_of:
                self._replicas_of[message.allocation] = None
                self._versions[message.allocation] = message.version
                task = self._loop.create_task(self._allocate(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Stop) and self._fence.admits(message.epoch, message.leader):
            self._stop(message)

    def _stop(self, message: Stop) -> None:
        replica = self._replicas_of.get(message.allocation)
        if replica is not None and not message.drain:
            replica.die(message.reason)
        elif replica is not None:
            replica.stop(message.reason)
            if replica.lane is not None:
                self._host.lane_shrank(replica.lane)
        elif message.allocation in self._replicas_of:
            self._unwanted[message.allocation] = message.reason
        else:
            self._leader(Observed(message.allocation, "", "gone"))

    async def _start_sandbox(self) -> Replica:
        sandbox = new_sandbox_id()
        replica = Replica(sandbox, self._driver, self._host, self._settings.interrupt_grace_s)
        handle = await self._driver.start(sandbox, Shape(self._driver.name, self._facts.inventory.python[0]))
        self._replicas.add(replica)
        handle.extra["node"] = self._facts.node
        replica.nested = NestedCalls(
            replica, self._host, self._settings.payload_bytes_max, self._settings.call_depth_max
        )
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await replica.open(handle)
        except TimeoutError:
            replica.die("it was not ready in time")
            raise SandboxUnavailable(f"a sandbox was not ready within {self._settings.start_timeout_s:g} s") from None
        if replica.state is not State.SPARE:
            raise SandboxUnavailable("a sandbox died while it started")
        return replica

    async def _allocate(self, start: Start) -> None:
        replica: Replica | None = None
        try:
            payload = self._payload(start.digest)
            replica = await self._spares.claim()
            replica.allocation = start.allocation
            assert replica.handle is not None
            await self._driver.provide(replica.handle, payload)
            lane = self._host.lanes.get(start.version)
            if lane is None:
                lane = self._host.lanes[start.version] = VersionLane(start, self._loop)
            # A function that was deleted and deployed again may have the number of one whose last calls still end here.
            lane.start = start
            async with asyncio.timeout(self._settings.start_timeout_s):
                await replica.load(lane, start.allocation, self._description(start, replica.handle.code_root))
        except (MnError, TimeoutError, OSError) as error:
            self._not_allocated(start, replica, error)
            return
        except asyncio.CancelledError:
            if replica is not None:
                replica.die("the node stops")
            raise
        self._replicas_of[start.allocation] = replica
        if start.allocation in self._unwanted:
            replica.die(self._unwanted.pop(start.allocation))
            return
        lane.replicas[replica.sandbox] = replica
        self._host.lane_grew(lane)
        self._arm_idle(lane)
        self._leader(Observed(start.allocation, start.version, "ready"))

    def _not_allocated(self, start: Start, replica: Replica | None, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            error = SandboxUnavailable(f"{start.spec.name} did not load within {self._settings.start_timeout_s:g} s")
        elif isinstance(error, OSError):
            error = SandboxUnavailable(f"the payload could not be provided: {error}")
        assert isinstance(error, MnError)
        self._unwanted.pop(start.allocation, None)
        self._replicas_of.pop(start.allocation, None)
        self._versions.pop(start.allocation, None)
        lane = self._host.lanes.get(start.version)
        if lane is not None and not lane.replicas and not self.has_version(start.version):
            del self._host.lanes[start.version]
        if replica is not None:
            replica.allocation = ""
            replica.die("its function did not load")
        self._leader(Observed(start.allocation, start.version, "failed", error.slug, error.detail, error.extra))

    def _payload(self, digest: str) -> Path:
        folder = self._settings.bundles_dir / digest.replace(":", "-") / "payloads"
        if not folder.is_dir():
            raise NotFound(f"the files of bundle {digest[:19]}… are gone from this node; deploy the function again")
        return folder

    def _description(self, start: Start, root: str) -> dict[str, Any]:
        spec = start.spec
        return {
            "version": start.version, "name": spec.name, "entry": spec.entry, "main": spec.main, "root": root, "python": spec.environment.python,
            "requires_modules": list(spec.environment.requires_modules), "env": spec.env, "concurrency": spec.scaling.concurrency,
            "cpu": spec.resources.cpu, "generator": spec.generator, "raw": spec.raw, "output_bytes_max": self._settings.output_bytes_max,
            "payload_bytes_max": self._settings.payload_bytes_max, "depth_max": self._settings.call_depth_max,
        }  # fmt: skip

    def _arm_idle(self, lane: VersionLane) -> None:
        if lane.idle_timer is None:
            lane.idle_timer = self._loop.call_later(max(0.05, lane.start.spec.scaling.idle_s), self._check_idle, lane)

    def _check_idle(self, lane: VersionLane) -> None:
        """Tell the leader which replicas had no call for `idle_s`; look again when the next could be due."""
        lane.idle_timer = None
        if not lane.replicas:
            return
        now, idle_s = self._loop.time(), lane.start.spec.scaling.idle_s
        due = idle_s
        for replica in lane.replicas.values():
            left = idle_s - (now - replica.last_used)
            if not replica.running and left <= 0:
                self._leader(Idle(replica.allocation, lane.version))
            elif not replica.running:
                due = min(due, left)
        lane.idle_timer = self._loop.call_later(max(0.05, due), self._check_idle, lane)

    def report(self) -> Report:
        """All that runs here, and what the machine has."""
        now = self._loop.time()
        allocations = []
        for allocation, replica in self._replicas_of.items():
            version = self._versions[allocation]
            if replica is None:
                allocations.append(AllocationReport(allocation, version, "", "starting", 0, 0, 0))
                continue
            busy = len(replica.running)
            lent = bool(busy) and all(call.nested for call in replica.running.values())
            idle_ms = 0 if busy else int((now - replica.last_used) * 1000)
            slots = replica.lane.start.spec.scaling.concurrency if replica.lane else 1
            pid = replica.handle.pid if replica.handle else 0
            allocations.append(
                AllocationReport(allocation, version, replica.sandbox, replica.state, slots, busy, idle_ms, pid, lent)
            )
        facts, inventory = self._facts, self._facts.inventory
        return Report(
            facts.node, self._fence.counter, inventory.cpu, inventory.memory_mb, inventory.gpus, self._driver.name, inventory.python, facts.layers,
            len(self._spares), tuple(allocations), 0, facts.started_ms, facts.version,
        )  # fmt: skip

    def died(self, replica: Replica, reason: str) -> None:
        self._replicas.discard(replica)
        self._spares.lost(replica)
        lane = replica.lane
        if lane is None:
            return
        ready = self._replicas_of.get(replica.allocation) is replica
        if ready:
            del self._replicas_of[replica.allocation], self._versions[replica.allocation]
        lane.replicas.pop(replica.sandbox, None)
        self._host.lane_shrank(lane)
        if ready:
            self._leader(Observed(replica.allocation, lane.version, "gone", detail=reason))
