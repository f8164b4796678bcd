"""Runs sandboxes and the calls in them, for any number of dispatchers and one leader at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from mn.formats.errors import MnError, NotFound, SandboxUnavailable
from mn.formats.ids import new_sandbox_id
from mn.formats.settings import Settings
from mn_nodepool.clock import Clock
from mn_nodepool.dispatch.dispatcher import Dispatcher
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.executor.calls import PAYLOAD_KEPT_BYTES_MAX, RunningCall
from mn_nodepool.executor.failures import FailureRing
from mn_nodepool.executor.fence import Fence
from mn_nodepool.executor.inventory import Inventory
from mn_nodepool.executor.lane import VersionLane
from mn_nodepool.executor.nested import NestedCall, NestedCalls
from mn_nodepool.executor.output import LogBook
from mn_nodepool.executor.replica import Replica
from mn_nodepool.executor.spares import Spares
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.control import FailureRecord
from mn_nodepool.wire.messages import (
    Ack,
    AllocationReport,
    Backlog,
    Busy,
    Call,
    Cancel,
    Chunk,
    Failed,
    Idle,
    Message,
    Observed,
    Report,
    ReportWanted,
    Return,
    Route,
    Slots,
    Start,
    Stop,
)  # fmt: skip
from mn_runner.sandbox import Driver, Shape, State

log = structlog.get_logger("executor")
STARTS_AT_ONCE_PER_CORE = 16
"""Half of a sandbox's start is waiting for the kernel (namespaces, mounts), so that many side by side take less time than one by one."""
STALL_S = 0.01
"""A call that rides behind another for longer is taken back."""
HELD_S = 0.1
"""Calls that wait here while no slot changes hands for longer go back to their dispatchers."""


class Facts(NamedTuple):
    """What a node says of itself."""

    node: str
    inventory: Inventory
    layers: tuple[str, ...]
    version: str
    started_ms: int


class Executor:
    """The executor of one node. Receives from dispatchers (`received`), and from the leader (`command`)."""

    def __init__(
        self,
        settings: Settings,
        facts: Facts,
        driver: Driver,
        clock: Clock,
        fence: Fence,
        resolve: Callable[[str], Route | None],
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._driver = driver
        self._clock = clock
        self._fence = fence
        self._resolve = resolve
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._lanes: dict[str, VersionLane] = {}
        self._links: dict[Link, dict[int, RunningCall]] = {}
        self._allocations: dict[str, Replica | None] = {}
        self._allocation_versions: dict[str, str] = {}
        self._unwanted: dict[str, str] = {}
        """Allocations that were stopped before they were ready, and why."""
        self._replicas: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        starts_at_once = STARTS_AT_ONCE_PER_CORE * max(1, int(facts.inventory.cpu))
        self._spares = Spares(settings.spares, self._start_sandbox, starts_at_once)
        self._leader: Callable[[Message], None] = lambda _: None
        self._dispatcher: Dispatcher
        self._uplink: Link
        self._downlink: Link
        self.logs = LogBook(
            settings.logs_dir / "functions",
            file_bytes_max=settings.log_file_bytes_max,
            files_max=settings.log_files_max,
            now_ms=clock.now_ms,
        )
        self.failures = FailureRing(
            settings.home / "failures",
            count_max=settings.failures_max,
            bytes_max=settings.failures_bytes_max,
            keep_s=settings.failures_s,
        )
        self._handlers: dict[type, Callable[[Link, Any, bytes], None]] = {
            Call: self._on_call, Chunk: self._on_chunk, Ack: self._on_ack, Cancel: self._on_cancel, Backlog: self._on_backlog,
            Return: self._on_return,
        }  # fmt: skip

    # The owner's side.

    async def begin(self) -> None:
        """Clear what an earlier process left, and start spares."""
        reaped = await self._driver.reap()
        if reaped:
            log.info("removed sandboxes of an earlier run", action="sandboxes_reaped", count=reaped)
        self._spares.refill()

    def attach(self, link: Link) -> None:
        """A dispatcher."""
        self._links[link] = {}
        for lane in self._lanes.values():
            link.send(Slots(lane.version, lane.seq, lane.slots, len(lane.free)))

    def attach_nested(self, dispatcher: Dispatcher, uplink: Link, downlink: Link) -> None:
        """The dispatcher for nested calls: it sends by `uplink`, what it sends arrives here as from `downlink`."""
        self._dispatcher, self._uplink, self._downlink = dispatcher, uplink, downlink
        dispatcher.attach(uplink)
        self.attach(downlink)

    def attach_leader(self, send: Callable[[Message], None]) -> None:
        """Whom to tell what becomes of allocations."""
        self._leader = send
        send(self.report())

    async def close(self) -> None:
        """End every sandbox and answer every call."""
        for task in list(self._tasks):
            task.cancel()
        await self._spares.close()
        for replica in list(self._replicas):
            replica.die("the node stops")
        for replica in list(self._replicas):
            await replica.gone()
        self.logs.flush()
        await self._driver.close()

    # Dispatchers.

    def received(self, link: Link, message: Message, body: bytes) -> bool:
        """Handle a message of the data path; False when it is none."""
        handler = self._handlers.get(type(message))
        if handler is None:
            return False
        handler(link, message, body)
        return True

    def lost(self, link: Link) -> None:
        """A dispatcher went away: nobody wants the answers to its calls."""
        for call in list(self._links.pop(link, {}).values()):
            self._cancel(call, timed_out=False)
        for lane in self._lanes.values():
            if lane.holders.pop(link, None) is not None:
                lane.share()

    def _on_call(self, link: Link, message: Call, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        calls = self._links.get(link)
        if lane is None or calls is None or not (lane.offered or lane.ancestor(message.invocation)):
            if lane is not None and link in lane.holders:
                lane.holders[link].granted = max(0, lane.holders[link].granted - 1)
            link.send(Busy(message.call))
            return
        call = RunningCall(
            link,
            message.call,
            lane,
            message.invocation,
            message.codec,
            body,
            message.timeout_ms,
            message.depth,
            self._time(),
        )
        if message.more:
            call.input_complete = False
            call.chunks = []
        calls[message.call] = call
        lane.submit(call)
        if (lane.fast or lane.queue) and lane.stall_timer is None:
            lane.stall_timer = self._loop.call_later(STALL_S, self._check_stall, lane)

    def _on_chunk(self, link: Link, message: Chunk, body: bytes) -> None:
        call = self._links.get(link, {}).get(message.call)
        if call is None:
            return
        call.input_complete = not message.more
        if call.replica is not None:
            call.replica.send_chunk(call, body, more=message.more)
        if call.chunks is not None:
            call.kept += len(body)
            if call.kept <= PAYLOAD_KEPT_BYTES_MAX or call.replica is None:
                call.chunks.append(body)
            else:
                call.chunks, call.kept = None, -1

    def _on_ack(self, link: Link, message: Ack, body: bytes) -> None:
        call = self._links.get(link, {}).get(message.call)
        if call is not None and call.replica is not None:
            call.replica.send_ack(call, message.chunks)

    def _on_cancel(self, link: Link, message: Cancel, body: bytes) -> None:
        call = self._links.get(link, {}).get(message.call)
        if call is not None:
            self._cancel(call, timed_out=message.timed_out)

    def _cancel(self, call: RunningCall, *, timed_out: bool) -> None:
        if call.replica is not None:
            call.replica.interrupt(call, timed_out=timed_out)
        elif call in call.lane.queue:
            call.lane.queue.remove(call)
            slug = "timeout" if timed_out else "cancelled"
            call.link.send(Failed(call.number, slug, "the call was still waiting for a slot", {}, False))
            self.ended(call)

    def _on_backlog(self, link: Link, message: Backlog, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is not None and link in self._links:
            lane.holder(link).backlog = message.queued
            lane.share()

    def _on_return(self, link: Link, message: Return, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is not None and link in self._links:
            lane.returned(link, message.credits)

    def _check_stall(self, lane: VersionLane) -> None:
        lane.stall_timer = None
        now = self._time()
        riding = False
        for replica in lane.replicas.values():
            if replica.idle_slots < 0:
                riding = True
                oldest = next(iter(replica.running.values()))
                if now - max(oldest.received, replica.last_used) > STALL_S:
                    replica.withdraw_queued()
        if lane.queue and lane.held_s(now) > HELD_S:
            self._hand_back(lane)
        if riding or lane.queue:
            lane.stall_timer = self._loop.call_later(STALL_S, self._check_stall, lane)

    def _hand_back(self, lane: VersionLane) -> None:
        """Dispatchers ask for more replicas for what waits with them; what waits here, they count as running."""
        waiting = lane.hand_back(int(HELD_S * 1e6))
        for call in waiting:
            self.ended(call)
            call.link.send(Busy(call.number))

    # What replicas tell (ReplicaOwner).

    def ended(self, call: RunningCall) -> None:
        calls = self._links.get(call.link)
        if calls is not None:
            calls.pop(call.number, None)
        lane = call.lane
        lane.last_used = call.received
        if call.nested and call.replica is not None:
            call.replica.nested.parent_ended(call)
        if lane.lent:
            lane.lent -= 1
            lane.shrink()

    def failed(self, call: RunningCall, problem: dict[str, Any]) -> None:
        payload = call.whole_payload()
        start = call.lane.start
        if payload is None or len(payload) > PAYLOAD_KEPT_BYTES_MAX:
            return
        record = FailureRecord(
            call.invocation, call.lane.function, start.version, start.digest, self._facts.node, self._clock.now_ms(), call.codec, payload, problem,
            call.output_tail(), start.spec,
        )  # fmt: skip
        try:
            self.failures.add(record)
        except OSError as error:
            log.warning("a failed call could not be kept", action="failure_not_kept", reason=str(error))

    def write_output(self, call: RunningCall | None, lane: VersionLane | None, stream: int, text: bytes) -> None:
        if lane is None:
            log.warning(
                "a sandbox without a function wrote output",
                action="spare_output",
                text=text[:1000].decode("utf-8", "replace"),
            )
            return
        if call is not None:
            call.add_output(text)
        self.logs.write(lane.function, call.invocation if call else "", stream or 1, text.decode("utf-8", "replace"))

    def died(self, replica: Replica, reason: str) -> None:
        self._replicas.discard(replica)
        self._spares.lost(replica)
        lane = replica.lane
        if lane is None:
            return
        ready = self._allocations.get(replica.allocation) is replica
        if ready:
            del self._allocations[replica.allocation], self._allocation_versions[replica.allocation]
        lane.replicas.pop(replica.sandbox, None)
        self._lane_shrank(lane)
        if ready:
            self._leader(Observed(replica.allocation, lane.version, "gone", detail=reason))

    def _lane_shrank(self, lane: VersionLane) -> None:
        lane.announce(list(self._links))
        while lane.queue and not lane.offered:
            call = lane.queue.popleft()
            self.ended(call)
            call.link.send(Busy(call.number))
        lane.shrink()
        if not lane.replicas:
            lane.stop_timers()
            lane.idle_timer = lane.stall_timer = None
        if not lane.replicas and lane.version not in self._allocation_versions.values():
            self._lanes.pop(lane.version, None)

    # Allocations (the leader's commands).

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
            elif message.allocation not in self._allocations:
                self._allocations[message.allocation] = None
                self._allocation_versions[message.allocation] = message.version
                task = self._loop.create_task(self._allocate(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Stop) and self._fence.admits(message.epoch, message.leader):
            self._stop(message)

    def _stop(self, message: Stop) -> None:
        replica = self._allocations.get(message.allocation)
        if replica is not None and not message.drain:
            replica.die(message.reason)
        elif replica is not None:
            replica.stop(message.reason)
            if replica.lane is not None:
                self._lane_shrank(replica.lane)
        elif message.allocation in self._allocations:
            self._unwanted[message.allocation] = message.reason
        else:
            self._leader(Observed(message.allocation, "", "gone"))

    async def _start_sandbox(self) -> Replica:
        sandbox = new_sandbox_id()
        replica = Replica(sandbox, self._driver, self, self._settings.interrupt_grace_s)
        handle = await self._driver.start(sandbox, Shape(self._driver.name, self._facts.inventory.python[0]))
        self._replicas.add(replica)
        handle.extra["node"] = self._facts.node
        replica.nested = NestedCalls(replica, self, self._settings.payload_bytes_max, self._settings.call_depth_max)
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
            lane = self._lanes.get(start.version)
            if lane is None:
                lane = self._lanes[start.version] = VersionLane(start, self._loop)
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
        self._allocations[start.allocation] = replica
        if start.allocation in self._unwanted:
            replica.die(self._unwanted.pop(start.allocation))
            return
        lane.replicas[replica.sandbox] = replica
        lane.announce(list(self._links))
        self._arm_idle(lane)
        self._leader(Observed(start.allocation, start.version, "ready"))

    def _not_allocated(self, start: Start, replica: Replica | None, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            error = SandboxUnavailable(f"{start.spec.name} did not load within {self._settings.start_timeout_s:g} s")
        elif isinstance(error, OSError):
            error = SandboxUnavailable(f"the payload could not be provided: {error}")
        assert isinstance(error, MnError)
        self._unwanted.pop(start.allocation, None)
        self._allocations.pop(start.allocation, None)
        self._allocation_versions.pop(start.allocation, None)
        lane = self._lanes.get(start.version)
        if lane is not None and not lane.replicas and start.version not in self._allocation_versions.values():
            del self._lanes[start.version]
        if replica is not None:
            replica.allocation = ""
            replica.die("its function did not load")
        self._leader(Observed(start.allocation, start.version, "failed", error.slug, error.detail, error.extra))

    def _payload(self, digest: str) -> Path:
        folder = self._settings.bundles_dir / digest.replace(":", "-") / "payloads"
        if not folder.is_dir():
            raise NotFound(f"bundle {digest} is not on this node")
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
        now, idle_s = self._time(), lane.start.spec.scaling.idle_s
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
        now = self._time()
        allocations = []
        for allocation, replica in self._allocations.items():
            version = self._allocation_versions[allocation]
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

    # Nested calls (Gate).

    def start_nested(
        self,
        parent: RunningCall,
        name: str,
        invocation: str,
        codec: int,
        payload: bytes,
        timeout_s: float,
        nested: NestedCall,
    ) -> PendingCall:
        start = parent.lane.start
        route = self._resolve(start.siblings.get(name, name))
        if route is None or route.namespace != start.namespace:
            raise NotFound(f"there is no function {name[:200]!r} to call from {start.spec.name}")
        left = parent.deadline_ms / 1000 - (self._time() - parent.received)
        timeout = min(timeout_s or route.spec.timeout_s, max(0.001, left))
        dispatcher = self._dispatcher
        ahead = False
        if not dispatcher.has_idle_credit(route.version):
            lane = self._lanes.get(route.version)
            if lane is not None and lane.ancestor(invocation) is not None:
                ahead = True
                lane.lent += 1
                lane.holder(self._downlink).granted += 1
                dispatcher.lend(route.version, self._uplink)
        return dispatcher.start(
            route, invocation, codec, payload, timeout_s=timeout, on_done=nested.on_done, on_item=nested.on_item if nested.mode else None,
            depth=parent.depth + 1, ahead=ahead,
        )  # fmt: skip

    def cancel_nested(self, call: PendingCall) -> None:
        self._dispatcher.cancel(call)

    def item_taken(self, call: PendingCall) -> None:
        self._dispatcher.consumed(call)
