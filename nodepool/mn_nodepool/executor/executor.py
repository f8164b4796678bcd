"""Runs sandboxes and the calls in them, for any number of dispatchers and one leader at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from mn.formats.errors import NotFound
from mn.formats.settings import Settings
from mn_nodepool.clock import Clock
from mn_nodepool.dispatch.dispatcher import Dispatcher
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.executor.allocations import Allocations
from mn_nodepool.executor.calls import PAYLOAD_KEPT_BYTES_MAX, RunningCall
from mn_nodepool.executor.failures import FailureRing
from mn_nodepool.executor.fence import Fence
from mn_nodepool.executor.inventory import Facts
from mn_nodepool.executor.lane import VersionLane
from mn_nodepool.executor.nested import NestedCall
from mn_nodepool.executor.output import LogBook
from mn_nodepool.executor.replica import Replica
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.control import FailureRecord
from mn_nodepool.wire.messages import (
    Ack,
    Backlog,
    Busy,
    Call,
    Cancel,
    Chunk,
    Failed,
    Message,
    Return,
    Route,
    Slots,
)  # fmt: skip
from mn_runner.sandbox import Driver

log = structlog.get_logger("executor")
STALL_S = 0.01
"""A call that rides behind another for longer is taken back."""
HELD_S = 0.1
"""Calls that wait here while no slot changes hands for longer go back to their dispatchers."""


class Executor:
    """The executor of one node. Receives from dispatchers (`received`); its `allocations` receive from the leader."""

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
        self.lanes: dict[str, VersionLane] = {}
        self._links: dict[Link, dict[int, RunningCall]] = {}
        self.allocations = Allocations(settings, facts, driver, fence, self)
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
        await self.allocations.begin()

    def attach(self, link: Link) -> None:
        """A dispatcher."""
        self._links[link] = {}
        for lane in self.lanes.values():
            link.send(Slots(lane.version, lane.seq, lane.slots, len(lane.free)))

    def attach_nested(self, dispatcher: Dispatcher, uplink: Link, downlink: Link) -> None:
        """The dispatcher for nested calls: it sends by `uplink`, what it sends arrives here as from `downlink`."""
        self._dispatcher, self._uplink, self._downlink = dispatcher, uplink, downlink
        dispatcher.attach(uplink)
        self.attach(downlink)

    async def close(self) -> None:
        """End every sandbox and answer every call."""
        await self.allocations.close()
        self.logs.flush()

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
        for lane in self.lanes.values():
            if lane.holders.pop(link, None) is not None:
                lane.share()

    def _on_call(self, link: Link, message: Call, body: bytes) -> None:
        lane = self.lanes.get(message.version)
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
        lane = self.lanes.get(message.version)
        if lane is not None and link in self._links:
            lane.holder(link).backlog = message.queued
            lane.share()

    def _on_return(self, link: Link, message: Return, body: bytes) -> None:
        lane = self.lanes.get(message.version)
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
        self.allocations.died(replica, reason)

    # What allocations need (AllocationHost).

    def lane_grew(self, lane: VersionLane) -> None:
        lane.announce(list(self._links))

    def lane_shrank(self, lane: VersionLane) -> None:
        lane.announce(list(self._links))
        while lane.queue and not lane.offered:
            call = lane.queue.popleft()
            self.ended(call)
            call.link.send(Busy(call.number))
        lane.shrink()
        if not lane.replicas:
            lane.stop_timers()
            lane.idle_timer = lane.stall_timer = None
        if not lane.replicas and not self.allocations.has_version(lane.version):
            self.lanes.pop(lane.version, None)

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
            lane = self.lanes.get(route.version)
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
