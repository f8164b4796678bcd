"""The dispatcher against executors that the test plays: who is sent, who waits, and what becomes of calls that go wrong."""

from __future__ import annotations

import asyncio
import json

import pytest

from mn.formats.errors import (
    CallTimeout,
    Cancelled,
    NotFound,
    QueueFull,
    SandboxLost,
    TooLarge,
    Unavailable,
    Unschedulable,
)
from mn_nodepool.dispatch.dispatcher import RESENDS_MAX, Dispatcher
from mn_nodepool.dispatch.outcomes import Bounds
from mn_nodepool.dispatch.pending import PendingCall, Stage
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
    Recall,
    Result,
    Return,
    Slots,
    Unplaced,
)
from mn_runner.protocol import CHUNK_BYTES, WINDOW_CHUNKS, Status
from tests.support.links import RecordingLink, route
from tests.support.virtual import run_virtual, settle

V = "square#1"
RESULT_BYTES_MAX = 1 << 20


class Desk:
    """One dispatcher with one executor, `link`, that the test plays."""

    def __init__(self, calls_max: int = 1000, bytes_max: int = 1 << 20) -> None:
        self.demands: list[Demand] = []
        self.leaderless_s = 0.0
        bounds = Bounds(calls_max, bytes_max, RESULT_BYTES_MAX)
        self.dispatcher = Dispatcher(bounds, self.demands.append, lambda: self.leaderless_s)
        self.link = RecordingLink()
        self.ended: list[PendingCall] = []
        self.dispatcher.attach(self.link)

    def call(self, name: str = "a", *, timeout_s: float | None = None, payload: bytes = b"1", retries: int = 0) -> PendingCall:  # fmt: skip
        return self.dispatcher.start(
            route(retries=retries), f"inv_{name}", 0, payload, timeout_s=timeout_s, on_done=self.ended.append
        )

    def tell(self, message: object, body: bytes = b"", link: RecordingLink | None = None) -> None:
        self.dispatcher.received(link or self.link, message, body)  # type: ignore[arg-type]

    def grant(self, credits: int, slots: int = 9) -> None:
        self.tell(Slots(V, 1, slots, slots))
        self.tell(Grant(V, credits))

    def started(self) -> list[tuple[int, str]]:
        return [(call.call, call.invocation) for call in self.link.take(Call)]

    def finish(self, number: int, body: bytes = b"42", status: int = 0) -> None:
        self.tell(Result(number, status, 0, 10, 5), body)

    def outcomes(self) -> list[str]:
        done = [f"{c.invocation}:{c.error.slug if c.error else c.status}" for c in self.ended]
        self.ended.clear()
        return done


def test_a_call_waits_for_a_credit_and_says_so_to_the_leader() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        await settle()
        assert desk.demands == [Demand(V, 1)]
        assert not desk.started()
        desk.grant(1)
        [(number, invocation)] = desk.started()
        assert invocation == "inv_a"
        desk.finish(number)
        [done] = desk.ended
        assert (done.stage, done.result, done.run_us, done.node) == (Stage.DONE, b"42", 10, "node")
        assert desk.dispatcher.queued_calls == desk.dispatcher.running_calls == 0

    run_virtual(scene())


def test_calls_leave_the_queue_in_their_order_and_a_busy_one_is_next_again() -> None:
    async def scene() -> None:
        desk = Desk()
        for name in "abc":
            desk.call(name)
        desk.grant(1)
        [(number, first)] = desk.started()
        desk.tell(Busy(number))
        assert first == "inv_a"
        desk.tell(Grant(V, 3))
        assert [invocation for _, invocation in desk.started()] == ["inv_a", "inv_b", "inv_c"]

    run_virtual(scene())


def test_a_call_behind_others_never_overtakes_them() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.grant(0)
        desk.call("a")
        desk.call("b")
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.finish(number)
        desk.call("c")
        assert [invocation for _, invocation in desk.started()] == ["inv_b"]

    run_virtual(scene())


def test_recalled_credits_go_back_at_once_or_when_their_call_ends() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call("a")
        desk.grant(2)
        [(number, _)] = desk.started()
        desk.tell(Recall(V, 2))
        assert desk.link.take(Return) == [Return(V, 1)]
        desk.call("b")
        desk.finish(number)
        assert desk.link.take(Return) == [Return(V, 1)]
        assert not desk.started(), "the recalled credit was used once more"

    run_virtual(scene())


def test_credits_are_void_when_the_executor_has_no_slots_left() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call("a")
        desk.grant(2)
        [(number, _)] = desk.started()
        desk.tell(Slots(V, 2, 0, 0))
        desk.call("b")
        desk.finish(number)
        assert not desk.started(), "a credit of before is not one of now"
        desk.grant(1)
        assert [invocation for _, invocation in desk.started()] == ["inv_b"]

    run_virtual(scene())


def test_slots_announced_before_the_first_call_are_found_by_it() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.tell(Slots(V, 1, 3, 3))
        desk.call()
        await settle()
        assert desk.link.take(Backlog) == [Backlog(V, 1)]

    run_virtual(scene())


def test_an_executor_hears_of_the_rest_when_it_granted_less_than_waits() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.tell(Slots(V, 1, 3, 3))
        desk.call("a")
        await settle()
        assert desk.link.take(Backlog) == [Backlog(V, 1)]
        desk.call("b")
        desk.tell(Grant(V, 1))
        await settle()
        assert desk.link.take(Backlog) == [Backlog(V, 1)], "b waits and the executor believes that nobody does"

    run_virtual(scene())


def test_an_executor_hears_at_once_when_its_credits_find_nobody_waiting() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.tell(Slots(V, 1, 9, 9))
        calls = [desk.call(name) for name in "abcdef"]
        await settle()
        desk.link.take(Backlog)
        for call in calls[1:]:
            desk.dispatcher.cancel(call)
        desk.tell(Grant(V, 2))
        await settle()
        assert desk.link.take(Backlog)[-1:] == [Backlog(V, 0)]

    run_virtual(scene())


def test_waiting_calls_are_told_again_for_as_long_as_they_wait() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.tell(Slots(V, 1, 1, 0))
        desk.call()
        await asyncio.sleep(1.05)
        assert len(desk.demands) >= 10
        assert len(desk.link.take(Backlog)) >= 10

    run_virtual(scene())


def test_a_lost_link_fails_what_may_have_run_and_repeats_what_may_be_repeated() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call("once")
        desk.call("again", retries=1)
        desk.grant(2)
        desk.started()
        other = RecordingLink("node-2")
        desk.dispatcher.attach(other)
        desk.dispatcher.lost(desk.link)
        [failed] = desk.ended
        assert isinstance(failed.error, SandboxLost)
        assert failed.error.may_have_run is True
        assert (failed.error.node, failed.invocation) == ("node", "inv_once")
        desk.tell(Slots(V, 1, 1, 1), link=other)
        desk.tell(Grant(V, 1), link=other)
        [(_, invocation)] = [(call.call, call.invocation) for call in other.take(Call)]
        assert invocation == "inv_again"
        desk.dispatcher.lost(other)
        assert isinstance(desk.ended[-1].error, SandboxLost), "one retry is one retry"

    run_virtual(scene())


def test_a_call_that_never_started_is_sent_again_a_bounded_number_of_times() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        desk.grant(1)
        for _ in range(RESENDS_MAX):
            [(number, _)] = desk.started()
            desk.tell(Failed(number, "sandbox-lost", "it died before the call started", {}, False))
        [(number, _)] = desk.started()
        assert not desk.ended
        desk.tell(Failed(number, "sandbox-lost", "it died before the call started", {}, False))
        [done] = desk.ended
        assert isinstance(done.error, SandboxLost)
        assert done.error.may_have_run is False

    run_virtual(scene())


def test_what_may_have_run_is_not_repeated_without_leave() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.tell(Failed(number, "sandbox-lost", "killed by SIGKILL", {"signal": "SIGKILL"}, True))
        [done] = desk.ended
        assert done.error is not None
        assert (done.error.signal, done.error.may_have_run, desk.started()) == ("SIGKILL", True, [])

    run_virtual(scene())


def test_a_function_that_raises_is_tried_again_as_often_as_it_says() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call(retries=2)
        desk.grant(1)
        for _ in range(3):
            [(number, _)] = desk.started()
            desk.finish(number, b'{"type": "ValueError"}', Status.FUNCTION_ERROR)
        [done] = desk.ended
        assert (done.status, done.attempts, done.result) == (Status.FUNCTION_ERROR, 3, b'{"type": "ValueError"}')

    run_virtual(scene())


def test_a_deadline_passes_in_the_queue() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call(timeout_s=2.0)
        desk.tell(Unplaced(V, "unschedulable", "needs 8 GPUs", {}, False))
        await asyncio.sleep(1.9)
        assert not desk.ended
        await asyncio.sleep(0.2)
        [done] = desk.ended
        assert isinstance(done.error, CallTimeout)
        assert "needs 8 GPUs" in done.error.detail
        assert (done.error.may_have_run, done.error.timeout_s) == (False, 2.0)
        assert desk.dispatcher.queued_bytes == 0

    run_virtual(scene())


def test_a_deadline_passes_while_the_call_runs() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call(timeout_s=2.0)
        desk.grant(1)
        [(number, _)] = desk.started()
        await asyncio.sleep(2.1)
        assert desk.link.take(Cancel) == [Cancel(number, True)]
        assert not desk.ended, "the executor is given the time to interrupt it"
        problem = {"slug": "timeout", "detail": "…", "output": "step 1\n", "may_have_run": True}
        desk.finish(number, json.dumps(problem).encode(), Status.PLATFORM_ERROR)
        [done] = desk.ended
        assert isinstance(done.error, CallTimeout)
        assert (done.error.timeout_s, done.output) == (2.0, "step 1\n")

    run_virtual(scene())


def test_an_executor_that_never_answers_is_given_up() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call(timeout_s=2.0)
        desk.grant(1)
        await asyncio.sleep(60)
        [done] = desk.ended
        assert isinstance(done.error, CallTimeout)
        assert done.error.may_have_run is True
        assert desk.dispatcher.running_calls == 0

    run_virtual(scene())


def test_far_deadlines_pass_at_their_time_and_cost_no_timer_each() -> None:
    async def scene() -> None:
        desk = Desk()
        loop = asyncio.get_running_loop()
        began = loop.time()
        desk.call("far", timeout_s=3600.0)
        for index in range(2000):
            desk.dispatcher.cancel(desk.call(str(index), timeout_s=4000.0 + index))
        assert len(loop._scheduled) < 100  # type: ignore[attr-defined]
        desk.ended.clear()
        while not desk.ended:
            await asyncio.sleep(60)
        assert 3600 <= loop.time() - began < 3661

    run_virtual(scene())


def test_a_caller_that_leaves_ends_a_queued_call_and_interrupts_a_running_one() -> None:
    async def scene() -> None:
        desk = Desk()
        running, queued = desk.call("running"), desk.call("queued")
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.dispatcher.cancel(queued)
        assert isinstance(desk.ended[0].error, Cancelled)
        desk.dispatcher.cancel(running)
        desk.dispatcher.cancel(running)
        assert desk.link.take(Cancel) == [Cancel(number)]
        desk.tell(Failed(number, "cancelled", "the caller went away", {}, True))
        assert desk.outcomes() == ["inv_queued:cancelled", "inv_running:cancelled"]

    run_virtual(scene())


def test_cancelling_the_future_cancels_the_call() -> None:
    async def scene() -> None:
        desk = Desk()
        future = desk.dispatcher.call(route(), "inv_a", 0, b"", timeout_s=None)
        desk.grant(1)
        [(number, _)] = desk.started()
        future.cancel()
        await settle()
        assert desk.link.take(Cancel) == [Cancel(number)]

    run_virtual(scene())


def test_a_large_input_goes_in_chunks_within_a_window() -> None:
    async def scene() -> None:
        desk = Desk(bytes_max=8 << 20)
        payload = bytes(range(256)) * 256 * (WINDOW_CHUNKS + 4) + b"end"
        desk.call(payload=payload)
        desk.grant(1)
        [call] = [message for message, _ in desk.link.sent if isinstance(message, Call)]
        assert call.more
        assert len(desk.link.bodies(Chunk)) == WINDOW_CHUNKS
        desk.tell(Ack(call.call, 3, False))
        assert len(desk.link.bodies(Chunk)) == WINDOW_CHUNKS + 3
        desk.tell(Ack(call.call, 9, False))
        chunks = [message for message, _ in desk.link.sent if isinstance(message, Chunk)]
        assert [chunk.more for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        assert b"".join(body for _, body in desk.link.sent) == payload

    run_virtual(scene())


def test_a_repeated_call_sends_its_whole_input_again() -> None:
    async def scene() -> None:
        desk = Desk(bytes_max=8 << 20)
        payload = b"x" * (CHUNK_BYTES * 3)
        desk.call(payload=payload)
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.link.sent.clear()
        desk.tell(Failed(number, "sandbox-lost", "before it started", {}, False))
        assert b"".join(body for _, body in desk.link.sent) == payload

    run_virtual(scene())


def test_a_large_result_comes_in_acknowledged_chunks() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.tell(Result(number, 0, 1, 10, 5, True), b"one ")
        desk.tell(Chunk(number, True, False), b"two ")
        assert desk.link.take(Ack) == [Ack(number, 1, True)]
        assert not desk.ended
        desk.tell(Chunk(number, False, False), b"three")
        assert desk.ended[0].result == b"one two three"

    run_virtual(scene())


def test_a_generators_values_come_one_by_one_and_then_its_end() -> None:
    async def scene() -> None:
        desk = Desk()
        values: list[tuple[int, bytes]] = []
        call = desk.dispatcher.start(
            route(generator=True), "inv_g", 0, b"", timeout_s=None, on_done=desk.ended.append,
            on_item=lambda _, codec, value: values.append((codec, value)),
        )  # fmt: skip
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.tell(Item(number, 0), b"1")
        desk.tell(Item(number, 1, True), b"large ")
        desk.tell(Chunk(number, False, False), b"value")
        assert values == [(0, b"1"), (1, b"large value")]
        desk.link.take(Ack)
        desk.dispatcher.consumed(call)
        assert desk.link.take(Ack) == [Ack(number, 1, True)]
        desk.finish(number, b"")
        assert (desk.ended[0].items, desk.ended[0].error) == (2, None)

    run_virtual(scene())


def test_a_generator_that_has_yielded_is_not_started_over() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call(retries=5)
        desk.grant(1)
        [(number, _)] = desk.started()
        desk.tell(Item(number, 0), b"1")
        desk.tell(Failed(number, "sandbox-lost", "died", {}, True))
        assert desk.outcomes() == ["inv_a:sandbox-lost"]

    run_virtual(scene())


def test_what_can_never_be_placed_fails_and_what_cannot_now_waits() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        desk.tell(Unplaced(V, "unschedulable", "no room at the moment", {}, False))
        assert not desk.ended
        desk.tell(Unplaced(V, "unschedulable", "no node has a GPU", {"reasons": {"n": "has no GPU"}}, True))
        [done] = desk.ended
        assert isinstance(done.error, Unschedulable)
        assert done.error.reasons == {"n": "has no GPU"}

    run_virtual(scene())


def test_queues_are_bounded_by_calls_and_by_bytes() -> None:
    async def scene() -> None:
        desk = Desk(calls_max=2, bytes_max=100)
        desk.call("a", payload=b"x" * 60)
        with pytest.raises(QueueFull) as full:
            desk.call("b", payload=b"x" * 60)
        assert full.value.retry_after_s >= 1
        desk.call("c")
        with pytest.raises(QueueFull):
            desk.call("d")
        desk.grant(2)
        desk.call("e")
        assert [invocation for _, invocation in desk.started()] == ["inv_a", "inv_c"]
        assert desk.dispatcher.queued_bytes == 1

    run_virtual(scene())


def test_closing_answers_what_waits() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call()
        desk.dispatcher.close()
        assert isinstance(desk.ended[0].error, Unavailable)

    run_virtual(scene())


def test_calls_of_a_deleted_function_are_told_and_its_credits_go_back() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.call("runs")
        desk.grant(1)
        desk.call("waits")
        [(number, _)] = desk.started()
        desk.dispatcher.retired(V, "")
        assert isinstance(desk.ended[0].error, NotFound)
        desk.finish(number)
        assert desk.ended[1].error is None, "what runs may end"
        assert desk.link.take(Return) == [Return(V, 1)]
        desk.tell(Grant(V, 1))
        assert desk.link.take(Return) == [Return(V, 1)], "nobody here wants credits for it any more"

    run_virtual(scene())


def test_an_answer_that_is_no_problem_document_is_the_sandboxes_fault() -> None:
    async def scene() -> None:
        desk = Desk()
        for body in (b"[]", b"\xff", b"{}", b'{"slug": "no-such-slug", "detail": "x"}'):
            desk.call()
            desk.grant(1)
            [(number, _)] = desk.started()
            desk.finish(number, body, Status.PLATFORM_ERROR)
        slugs = [done.error.slug for done in desk.ended if done.error]
        assert slugs == ["sandbox-lost", "sandbox-lost", "sandbox-lost", "internal"]

    run_virtual(scene())


def test_a_result_beyond_the_limit_is_cancelled_instead_of_kept() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.grant(1)
        desk.call()
        [(number, _)] = desk.started()
        desk.tell(Result(number, 0, 0, 10, 5, True), b"x" * CHUNK_BYTES)
        for _ in range(RESULT_BYTES_MAX // CHUNK_BYTES + 1):
            desk.tell(Chunk(number, True, False), b"x" * CHUNK_BYTES)
        [done] = desk.ended
        assert isinstance(done.error, TooLarge)
        assert done.error.extra["limit_bytes"] == RESULT_BYTES_MAX
        assert desk.link.take(Cancel) == [Cancel(number)]
        assert not done.result_parts or sum(map(len, done.result_parts)) <= RESULT_BYTES_MAX + CHUNK_BYTES

    run_virtual(scene())


def test_a_call_that_needs_a_sandbox_is_told_when_there_is_no_leader() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.leaderless_s = 3.0
        desk.call("cold")
        await settle()
        assert desk.outcomes() == ["inv_cold:no-leader"]
        desk.grant(1)
        desk.call("warm")
        desk.finish(desk.started()[0][0])
        assert desk.outcomes() == ["inv_warm:0"]

    run_virtual(scene())


def test_a_call_waits_for_slots_that_are_there_even_without_a_leader() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.grant(1)
        desk.call("a")
        desk.leaderless_s = 3.0
        desk.call("b")
        await settle()
        assert desk.outcomes() == []

    run_virtual(scene())


def test_closing_answers_what_is_queued_and_what_runs() -> None:
    async def scene() -> None:
        desk = Desk()
        desk.grant(1)
        desk.call("running")
        desk.call("queued")
        desk.dispatcher.close()
        assert sorted(desk.outcomes()) == ["inv_queued:unavailable", "inv_running:unavailable"]
        assert len(desk.link.take(Cancel)) == 1

    run_virtual(scene())
