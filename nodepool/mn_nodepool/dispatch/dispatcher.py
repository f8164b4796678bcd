"""The dispatcher: a queue per version, credits from executors, and what to do when a call does not come back.

A call leaves its queue when there is a credit for it. The executor that granted the credit has a slot for it, or answers `Busy`, and then
it is at the head of the queue again. A call is sent a second time only when the executor says that it never started, or when its function
allows retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mn.formats.errors import (
    Cancelled,
    MnError,
    NotFound,
    SandboxLost,
    Unavailable,
    error_from,
)
from mn_nodepool.dispatch.deadlines import Deadlines
from mn_nodepool.dispatch.lane import Credit, Lane
from mn_nodepool.dispatch.outcomes import Bounds, never_started, platform_error, queue_full, timed_out, too_large
from mn_nodepool.dispatch.payloads import add_chunk, first_part, forget_parts, send_chunks
from mn_nodepool.dispatch.pending import PendingCall, Stage
from mn_nodepool.dispatch.reporting import Reporter
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.messages import (
    Ack,
    Backlog,
    Busy,
    Call,
    Cancel,
    Chunk,
    Demand,
    Failed,
    Grant,
    Item,
    Message,
    Recall,
    Result,
    Return,
    Route,
    Slots,
    Unplaced,
)  # fmt: skip
from mn_runner.protocol import WINDOW_CHUNKS, Status

RESENDS_MAX = 8
"""Times that a call which never started is sent again."""
LAPSE_S = 10.0
"""After its deadline and the grace, a call whose executor says nothing is given up."""
_OK = int(Status.OK)
_FUNCTION_ERROR = int(Status.FUNCTION_ERROR)


class Dispatcher:
    """Sends calls to executors over links that its owner attaches. Not thread-safe: it belongs to one loop."""

    def __init__(
        self, bounds: Bounds, demand: Callable[[Demand], None], leaderless_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`demand` carries a Demand to the leader; `leaderless_s` tells for how many seconds there has been none."""
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._reporter = Reporter(demand, leaderless_s, self._oldest, self._fail, self._loop)
        self._time = self._loop.time
        self._lanes: dict[str, Lane] = {}
        self._calls: dict[int, PendingCall] = {}
        self._next = 0
        self._deadlines = Deadlines(self._loop, self._expired)
        self.queued_calls = 0
        self.queued_bytes = 0
        self.links: dict[Link, int] = {}
        self._handlers: dict[type, Callable[[Link, Any, bytes], None]] = {
            Result: self._on_result, Item: self._on_item, Chunk: self._on_chunk, Ack: self._on_ack, Failed: self._on_failed, Busy: self._on_busy,
            Grant: self._on_grant, Recall: self._on_recall, Slots: self._on_slots, Unplaced: self._on_unplaced,
        }  # fmt: skip

    @property
    def running_calls(self) -> int:
        return len(self._calls)

    # What callers use.

    def start(
        self,
        route: Route,
        invocation: str,
        codec: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        on_done: Callable[[PendingCall], None],
        on_item: Callable[[PendingCall, int, bytes], None] | None = None,
        depth: int = 0,
        ahead: bool = False,
    ) -> PendingCall:
        """Send the call, or queue it until there is a slot. Without `timeout_s` its function's own holds; `ahead` of those that wait, for a
        call that its caller lends a slot to.

        Raises QueueFull; then `on_done` is not called.
        """
        now = self._time()
        deadline = now + (route.spec.timeout_s if timeout_s is None else timeout_s)
        call = PendingCall(route, invocation, codec, payload, deadline, depth, on_done, on_item, now)
        lane = self._lanes.get(route.version)
        if lane is None:
            lane = self._lanes[route.version] = Lane(route.version)
        elif lane.retired:
            lane.retired = False
        call.lane = lane
        if (ahead or not lane.queue) and (credit := lane.pick()) is not None:
            self._deadlines.add(call)
            self._send(lane, credit, call, now)
            return call
        if (
            len(lane.queue) >= self._bounds.queue_calls_max
            or lane.queued_bytes + call.size > self._bounds.queue_bytes_max
        ):
            raise queue_full(call, lane, self._bounds)
        self._deadlines.add(call)
        self._enqueue(lane, call)
        return call

    def call(
        self, route: Route, invocation: str, codec: int, payload: bytes, *, timeout_s: float | None, depth: int = 0
    ) -> asyncio.Future[PendingCall]:
        """`start` with a future; cancelling it cancels the call."""
        future: asyncio.Future[PendingCall] = self._loop.create_future()

        def done(ended: PendingCall) -> None:
            if not future.done():
                future.set_result(ended)

        pending = self.start(route, invocation, codec, payload, timeout_s=timeout_s, depth=depth, on_done=done)
        future.add_done_callback(lambda ended: self.cancel(pending) if ended.cancelled() else None)
        return future

    def cancel(self, call: PendingCall) -> None:
        """The caller went away: a queued call ends at once, a running one is interrupted."""
        if call.stage is Stage.QUEUED:
            self._fail(call, Cancelled("the caller went away while the call was queued"))
        elif call.stage is Stage.SENT and not call.cancelled:
            call.cancelled = True
            call.credit.link.send(Cancel(call.number))

    def consumed(self, call: PendingCall) -> None:
        """A generator's item has been passed on: the next may come."""
        if call.stage is Stage.SENT:
            call.credit.link.send(Ack(call.number, 1, True))

    def lend(self, version: str, link: Link) -> None:
        """One more credit at an executor of this process, for a call that its caller's slot is lent to."""
        lane = self._lanes.get(version)
        if lane is None:
            lane = self._lanes[version] = Lane(version)
        lane.credit_at(link).idle += 1

    def has_idle_credit(self, version: str) -> bool:
        lane = self._lanes.get(version)
        return lane is not None and not lane.queue and lane.pick() is not None

    def retired(self, version: str, name: str) -> None:
        """A version stands for its function no longer; the function is gone altogether when `name` is empty, and then nobody waits for it.

        Its lane goes once it is empty, with the credits given back.
        """
        lane = self._lanes.get(version)
        if lane is None:
            return
        if not name:
            gone = NotFound(
                f"function {version.rpartition('#')[0]} was deleted while the call waited", may_have_run=False
            )
            for call in list(lane.queue):
                self._fail(call, gone)
        lane.retired = True
        self._drop_if_over(lane)

    def _drop_if_over(self, lane: Lane) -> None:
        if not lane.queue and not lane.running and self._lanes.get(lane.version) is lane:
            for credit in lane.credits.values():
                if credit.idle:
                    credit.link.send(Return(lane.version, credit.idle))
            del self._lanes[lane.version]

    # Links.

    def attach(self, link: Link) -> None:
        """An executor that may grant credits."""
        self.links[link] = 0
        for lane in self._lanes.values():
            lane.reported = 0
            if lane.queue:
                self._reporter.note(lane)

    def received(self, link: Link, message: Message, body: bytes) -> None:
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(link, message, body)

    def lost(self, link: Link) -> None:
        """An executor is out of reach: what it had may have run."""
        self.links.pop(link, None)
        for lane in self._lanes.values():
            credit = lane.credits.pop(link, None)
            if credit is not None:
                credit.void()
        for call in [c for c in self._calls.values() if c.credit.link is link]:
            self._leave(call)
            self._lost(
                call,
                SandboxLost(
                    f"the connection to {link.peer} was lost during the call", may_have_run=True, node=link.peer
                ),
            )

    # Queue and credits.

    def _enqueue(self, lane: Lane, call: PendingCall, *, head: bool = False) -> None:
        call.stage = Stage.QUEUED
        if head:
            lane.queue.appendleft(call)
        else:
            lane.queue.append(call)
        lane.queued_bytes += call.size
        self.queued_calls += 1
        self.queued_bytes += call.size
        self._reporter.queued(lane)

    def _dequeued(self, lane: Lane, call: PendingCall) -> None:
        lane.queued_bytes -= call.size
        self.queued_calls -= 1
        self.queued_bytes -= call.size

    def _send(self, lane: Lane, credit: Credit, call: PendingCall, now: float) -> None:
        credit.idle -= 1
        lane.running += 1
        self._next = number = self._next + 1
        call.number = number
        call.credit = credit
        call.generation = credit.generation
        call.stage = Stage.SENT
        call.sent = now
        call.attempts += 1
        call.queue_us = int((now - call.created) * 1e6)
        self._calls[number] = call
        payload, more = first_part(call)
        credit.link.send(
            Call(
                number,
                lane.version,
                call.invocation,
                call.codec,
                max(1, int((call.deadline - now) * 1000)),
                call.depth,
                more,
                call.queue_us,
            ),
            payload,
        )
        if more:
            send_chunks(call, WINDOW_CHUNKS)

    def _pump(self, lane: Lane) -> None:
        queue = lane.queue
        if not queue:
            return
        now = self._time()
        while queue and (credit := lane.pick()) is not None:
            call = queue.popleft()
            self._dequeued(lane, call)
            self._send(lane, credit, call, now)

    def _leave(self, call: PendingCall) -> Lane:
        """A sent call ends its stay at an executor; its credit is free again, or goes back."""
        del self._calls[call.number]
        lane, credit = call.lane, call.credit
        lane.running -= 1
        if call.generation == credit.generation:
            if credit.owed:
                credit.owed -= 1
                credit.link.send(Return(lane.version, 1))
            else:
                credit.idle += 1
        return lane

    def _oldest(self, lane: Lane) -> PendingCall:
        return next(call for call in self._calls.values() if call.lane is lane)

    # How calls end.

    def _finish(self, call: PendingCall) -> None:
        call.stage = Stage.DONE
        self._deadlines.remove(call)
        if call.lane.retired:
            self._drop_if_over(call.lane)
        call.on_done(call)

    def _fail(self, call: PendingCall, error: MnError) -> None:
        if call.stage is Stage.QUEUED:
            lane = call.lane
            lane.queue.remove(call)
            self._dequeued(lane, call)
        call.error = error
        self._finish(call)

    def _again(self, call: PendingCall) -> None:
        forget_parts(call)
        self._enqueue(call.lane, call, head=True)
        self._pump(call.lane)

    def _lost(self, call: PendingCall, error: MnError) -> None:
        """It came to no result: run it again where that is allowed, else tell."""
        error.extra["attempts"] = call.attempts
        started = error.extra.get("may_have_run", True)
        retry = call.attempts <= call.route.spec.retries if started else call.resends < RESENDS_MAX
        if call.cancelled or call.timed_out or call.items or not retry:
            call.error = error
            if call.timed_out:
                call.error = timed_out(call, error.extra)
            self._finish(call)
            return
        if not started:
            call.attempts -= 1
            call.resends += 1
        self._again(call)

    def _expired(self, call: PendingCall) -> None:
        if call.stage is Stage.QUEUED:
            lane = call.lane
            self._fail(call, never_started(call, lane))
        elif call.stage is Stage.SENT:
            if call.timed_out:
                self._leave(call)
                call.error = timed_out(call, {"may_have_run": True})
                self._finish(call)
                return
            call.timed_out = True
            call.credit.link.send(Cancel(call.number, True))
            call.deadline, original = self._time() + LAPSE_S, call.deadline
            self._deadlines.add(call)
            call.deadline = original

    # What executors say.

    def _on_result(self, link: Link, message: Result, body: bytes) -> None:
        call = self._calls.get(message.call)
        if call is None:
            return
        call.status = message.status
        call.result_codec = message.codec
        call.run_us = message.run_us
        call.start_us = message.start_us
        if message.more:
            call.result_parts = [body]
            return
        self._complete(call, body)

    def _complete(self, call: PendingCall, result: bytes) -> None:
        lane = self._leave(call)
        run_us = call.run_us
        lane.run_us = lane.run_us * 0.9 + run_us * 0.1 if lane.run_us else run_us or 1
        if lane.queue:
            self._pump(lane)
        status = call.status
        if status == _OK:
            call.result = result
            self._finish(call)
        elif status == _FUNCTION_ERROR:
            if call.attempts <= call.route.spec.retries and not (call.items or call.cancelled or call.timed_out):
                self._again(call)
                return
            call.result = result
            self._finish(call)
        else:
            call.error = platform_error(call, result)
            self._finish(call)

    def _on_chunk(self, link: Link, message: Chunk, body: bytes) -> None:
        call = self._calls.get(message.call)
        if call is None:
            return
        call.received += len(body)
        if call.received > self._bounds.result_bytes_max:
            self._too_large(call)
            return
        is_item = call.item_parts is not None
        if is_item or message.more:
            link.send(Ack(call.number, 1, True))
        whole = add_chunk(call, body, message.more)
        if whole is None:
            return
        if is_item:
            call.item_parts, call.received = None, 0
            self._item(call, call.item_codec, whole)
        else:
            call.result_parts = None
            self._complete(call, whole)

    def _too_large(self, call: PendingCall) -> None:
        call.credit.link.send(Cancel(call.number))
        self._leave(call)
        call.error = too_large(call, self._bounds.result_bytes_max)
        self._finish(call)

    def _on_item(self, link: Link, message: Item, body: bytes) -> None:
        call = self._calls.get(message.call)
        if call is None:
            return
        if message.more:
            call.item_parts, call.item_codec = [body], message.codec
        else:
            self._item(call, message.codec, body)

    def _item(self, call: PendingCall, codec: int, body: bytes) -> None:
        call.items += 1
        if call.on_item is not None:
            call.on_item(call, codec, body)
        else:
            self.consumed(call)

    def _on_ack(self, link: Link, message: Ack, body: bytes) -> None:
        call = self._calls.get(message.call)
        if call is not None:
            send_chunks(call, message.chunks)

    def _on_failed(self, link: Link, message: Failed, body: bytes) -> None:
        call = self._calls.get(message.call)
        if call is not None:
            self._leave(call)
            extra = {**message.extra, "may_have_run": message.may_have_run}
            error = error_from(message.slug, message.detail, extra)
            if message.slug == SandboxLost.slug:
                self._lost(call, error)
            else:
                call.error = timed_out(call, extra) if call.timed_out else error
                self._finish(call)
            self._pump(call.lane)

    def _on_busy(self, link: Link, message: Busy, body: bytes) -> None:
        call = self._calls.pop(message.call, None)
        if call is None:
            return
        call.lane.running -= 1
        call.attempts -= 1
        if call.cancelled:
            call.error = Cancelled("the caller went away while the call was queued")
            self._finish(call)
        elif call.timed_out:
            call.error = timed_out(call, {"may_have_run": False})
            self._finish(call)
        else:
            self._again(call)

    def _on_grant(self, link: Link, message: Grant, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is None:
            link.send(Return(message.version, message.credits))
            return
        lane.credit_at(link).idle += message.credits
        # The executor counts what it grants off what it was told: it has to hear when that is not the same as what waits now.
        lane.reported = max(0, lane.reported - message.credits)
        self._pump(lane)
        if bool(lane.queue) != bool(lane.reported):
            self._reporter.note(lane)

    def _on_recall(self, link: Link, message: Recall, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is None:
            return
        credit = lane.credit_at(link)
        now = min(credit.idle, message.credits)
        if now:
            credit.idle -= now
            link.send(Return(message.version, now))
        credit.owed += message.credits - now

    def _on_slots(self, link: Link, message: Slots, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is None:
            if not message.slots:
                return
            lane = self._lanes[message.version] = Lane(message.version)
        credit = lane.credit_at(link)
        credit.slots = message.slots
        if message.slots:
            lane.reason = ""
            if lane.queue:
                link.send(Backlog(lane.version, len(lane.queue)))
                lane.reported = len(lane.queue)
        else:
            credit.void()
            if lane.queue:
                self._reporter.note(lane)

    def _on_unplaced(self, link: Link, message: Unplaced, body: bytes) -> None:
        lane = self._lanes.get(message.version)
        if lane is None:
            return
        lane.reason = message.detail
        if message.final:
            error = error_from(message.slug, message.detail, message.extra)
            for call in list(lane.queue):
                self._fail(call, error)

    def close(self) -> None:
        """End every call: the process stops. What runs is cancelled, and answered as what may have run."""
        for lane in list(self._lanes.values()):
            if lane.timer is not None:
                lane.timer.cancel()
            for call in list(lane.queue):
                self._fail(call, Unavailable("this gateway is stopping", may_have_run=False))
        for call in list(self._calls.values()):
            self.cancel(call)
            self._leave(call)
            self._fail(call, Unavailable("this gateway is stopping", may_have_run=True))
