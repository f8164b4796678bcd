"""The executor over children that the test plays, in virtual time: who gets a slot, what rides behind what, and who is told of an end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mn.formats.errors import CallTimeout, SandboxLost
from mn.formats.manifest import Scaling
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.wire.messages import Idle, Route
from mn_runner.protocol import (
    CHUNK_BYTES,
    HEADER,
    REASON_CANCELLED,
    REASON_TIMEOUT,
    REASON_WITHDRAWN,
    RESULT_HEAD,
    Kind,
    Status,
    frame,
)
from mn_runner.sandbox import Death
from tests.support.executors import FakeChild, FakeDriver, Front, Pool, until
from tests.support.links import spec
from tests.support.virtual import run_virtual, settle

Scene = Callable[[Pool, FakeDriver, Route], Awaitable[None]]


def play(tmp_path: Path, scene: Scene, *, scaling: Scaling | None = None, **settings: object) -> None:
    async def run() -> None:
        driver = FakeDriver()
        async with Pool(tmp_path, driver, **settings) as pool:
            [route] = pool.deploy("", spec(scaling=scaling or Scaling()))
            await scene(pool, driver, route)

    run_virtual(run())


def calling(front: Front, route: Route, *names: str, timeout_s: float = 30.0) -> list[asyncio.Task[PendingCall]]:
    return [asyncio.ensure_future(front.call(route, invocation=f"inv_{name}", timeout_s=timeout_s)) for name in names]


async def quick_calls(pool: Pool, front: Front, child: FakeChild, route: Route, count: int = 5) -> None:
    """Calls that end at once, so that the next ones may ride ahead."""
    for _ in range(count):
        [task] = calling(front, route, "quick")
        await until(lambda: child.calls)
        child.answer(run_us=10)
        await task


def test_a_call_of_each_slot_runs_and_the_next_waits(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        tasks = calling(front, route, "a", "b", "c")
        await settle(50)
        [child] = driver.live
        assert list(child.calls.values()) == ["inv_a", "inv_b"]
        child.answer(1, run_us=1_000_000)
        await until(lambda: len(child.calls) == 2)
        assert list(child.calls.values()) == ["inv_b", "inv_c"]
        child.answer(2)
        child.answer(3)
        assert [task.result for task in await asyncio.gather(*tasks)] == [b"1", b"2", b"3"]

    play(tmp_path, scene, scaling=Scaling(concurrency=2))


def test_two_gateways_share_one_slot_in_turn(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        first, second = pool.front("gateway-1"), pool.front("gateway-2")
        tasks = calling(first, route, *(f"a{n}" for n in range(6)))
        await settle(50)
        tasks += calling(second, route, *(f"b{n}" for n in range(6)))
        [child] = driver.live
        order = []
        for _ in range(12):
            await until(lambda: child.calls)
            order.append(child.answer(run_us=500_000)[4])
        await asyncio.gather(*tasks)
        assert order[:8].count("b") >= 3, order

    play(tmp_path, scene)


def test_a_gateway_that_comes_late_finds_the_slots_of_another(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        [child] = driver.live
        await quick_calls(pool, pool.front("gateway-1"), child, route)
        await quick_calls(pool, pool.front("gateway-2"), child, route)

    play(tmp_path, scene)


def test_quick_calls_ride_behind_each_other_and_come_back_from_a_slow_one(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [slow] = driver.live
        await quick_calls(pool, front, slow, route)
        tasks = calling(front, route, "a", "b", "c", "d")
        await until(lambda: len(slow.calls) > 1)
        riding = list(slow.calls)[1:]
        await until(lambda: slow.cancels)
        assert sorted(slow.cancels) == [(number, REASON_WITHDRAWN) for number in riding], (
            "the one that runs is left alone"
        )
        for number, _ in slow.cancels:
            slow.answer({"slug": "withdrawn", "detail": "…"}, number=number, status=Status.PLATFORM_ERROR)
        await pool.up(route)
        quick = driver.live[1]
        for name in "bcd":
            await until(lambda: quick.calls)
            assert quick.answer(name) == f"inv_{name}", "in their order"
        slow.answer("a")
        assert [task.result for task in await asyncio.gather(*tasks)] == [b'"a"', b'"b"', b'"c"', b'"d"']

    play(tmp_path, scene)


def test_a_call_that_had_started_when_it_was_wanted_back_is_answered_once(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        await quick_calls(pool, front, child, route)
        tasks = calling(front, route, "a", "b")
        await until(lambda: len(child.calls) == 2)
        await until(lambda: child.cancels)
        child.answer("a")
        child.answer({"slug": "invalid-request", "detail": "x"}, status=Status.PLATFORM_ERROR)
        results = await asyncio.gather(*tasks)
        assert results[1].error.slug == "invalid-request"
        await settle()
        assert not child.calls, "it was run a second time"

    play(tmp_path, scene)


def test_cancelling_a_call_that_is_wanted_back_ends_it(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        await quick_calls(pool, front, child, route)
        a, b = calling(front, route, "a", "b", timeout_s=20.0)
        await until(lambda: child.cancels)
        [(number, _)] = child.cancels
        b.cancel()
        await until(lambda: len(child.cancels) == 2)
        child.answer({"slug": "withdrawn", "detail": "…"}, number=number, status=Status.PLATFORM_ERROR)
        child.answer("a")
        await a
        await settle()
        assert not child.calls
        assert front.dispatcher.running_calls == 0

    play(tmp_path, scene)


def test_calls_behind_one_that_killed_its_sandbox_did_not_run(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        await quick_calls(pool, front, child, route)
        a, b, c = calling(front, route, "a", "b", "c")
        await until(lambda: len(child.calls) == 3)
        child.exit(Death(None, "SIGSEGV"))
        lost = (await a).error
        assert isinstance(lost, SandboxLost)
        assert (lost.may_have_run, lost.signal, lost.cause) == (True, "SIGSEGV", "it was killed by SIGSEGV")
        await pool.up(route)
        [other] = driver.live
        for _ in "bc":
            await until(lambda: other.calls)
            other.answer("done")
        assert [(await task).result for task in (b, c)] == [b'"done"'] * 2

    play(tmp_path, scene)


def test_a_deadline_interrupts_and_then_kills(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        [allocation] = await pool.up(route)
        front = pool.front()
        [task] = calling(front, route, "a", timeout_s=2.0)
        [child] = driver.live
        await until(lambda: child.cancels)
        assert child.cancels[0][1] == REASON_TIMEOUT
        error = (await task).error
        assert isinstance(error, CallTimeout)
        assert error.may_have_run is True
        assert "could not be interrupted" in error.cause
        assert (await pool.observed(allocation)).state == "gone"
        assert not driver.live

    play(tmp_path, scene)


def test_an_interrupted_call_that_ends_leaves_its_sandbox_alive(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        [task] = calling(front, route, "a")
        await until(lambda: child.calls)
        task.cancel()
        await until(lambda: child.cancels)
        assert child.cancels[0][1] == REASON_CANCELLED
        child.answer({"slug": "cancelled", "detail": "…"}, status=Status.PLATFORM_ERROR)
        await asyncio.sleep(10)
        assert driver.live == [child]
        await quick_calls(pool, front, child, route, 1)

    play(tmp_path, scene)


def test_a_waiting_call_that_is_cancelled_never_reaches_a_sandbox(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        await quick_calls(pool, front, child, route)
        payload = b"x" * (3 * CHUNK_BYTES)  # what comes in chunks never rides behind another
        [a] = calling(front, route, "a")
        await until(lambda: child.calls)
        waiting = asyncio.ensure_future(front.call(route, payload, timeout_s=0.5, invocation="inv_b"))
        error = (await waiting).error
        assert isinstance(error, CallTimeout)
        assert error.may_have_run is False
        child.answer()
        await a
        await settle()
        assert not child.calls

    play(tmp_path, scene)


def test_a_gateway_that_goes_away_takes_its_calls_and_credits_with_it(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        gone, stays = pool.front("gateway-1"), pool.front("gateway-2")
        [child] = driver.live
        [lost] = calling(gone, route, "a")
        await until(lambda: child.calls)
        [waiting] = calling(stays, route, "b")
        gone.link.close()
        assert isinstance((await lost).error, SandboxLost)
        await until(lambda: child.cancels)
        child.answer({"slug": "cancelled", "detail": "…"}, status=Status.PLATFORM_ERROR)
        await until(lambda: child.calls)
        child.answer("b")
        assert (await waiting).result == b'"b"'

    play(tmp_path, scene)


def test_stopping_lets_what_runs_end_and_gives_the_rest_back(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        [allocation] = await pool.up(route)
        front = pool.front()
        [child] = driver.live
        await quick_calls(pool, front, child, route)
        tasks = calling(front, route, *"abcdef")
        await until(lambda: len(child.calls) > 2)
        pool.stop(allocation)
        await pool.up(route)
        other = next(each for each in driver.live if each is not child)
        await until(lambda: other.calls)
        ran = {child.answer("old") for _ in list(child.calls)}
        while len(ran) < 6:
            await until(lambda: other.calls)
            ran.add(other.answer("new"))
        assert [done.error for done in await asyncio.gather(*tasks)] == [None] * 6
        assert (await pool.observed(allocation)).state == "gone"
        assert driver.live == [other]

    play(tmp_path, scene)


def test_stopping_what_has_not_started_yet_is_not_forgotten(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        allocation = pool.start(route)
        pool.stop(allocation)
        assert (await pool.observed(allocation)).state == "gone"
        await until(lambda: not driver.live)
        assert pool.executor.allocations.report().allocations == ()

    play(tmp_path, scene)


def test_a_sandbox_that_dies_while_it_starts_is_a_failed_start(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        driver.loaded = {"error": {"slug": "function-error", "detail": "importing app raised ZeroDivisionError"}}
        failed = await pool.observed(pool.start(route))
        assert (failed.state, failed.slug) == ("failed", "function-error")
        assert "ZeroDivisionError" in failed.detail
        await until(lambda: not driver.live)
        driver.ready = False
        allocation = pool.start(route)
        await until(lambda: driver.live)
        driver.live[0].exit(Death(137, None))
        failed = await pool.observed(allocation)
        assert (failed.state, failed.slug) == ("failed", "sandbox-unavailable")

    play(tmp_path, scene)


def test_idle_replicas_are_reported_and_busy_ones_are_not(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        idle, busy = await pool.up(route, 2)
        front = pool.front()
        [task] = calling(front, route, "a", timeout_s=1000)
        await asyncio.sleep(25)
        reported = {message.allocation for message in pool.told if isinstance(message, Idle)}
        assert len(reported) == 1
        child = next(child for child in driver.live if child.calls)
        child.answer()
        await task
        await asyncio.sleep(25)
        assert {message.allocation for message in pool.told if isinstance(message, Idle)} == {idle, busy}

    play(tmp_path, scene, scaling=Scaling(idle_s=10))


@pytest.mark.parametrize(
    "broken",
    [
        frame(Kind.RESULT, 99, RESULT_HEAD.pack(0, 0, 0)),
        frame(Kind.RESULT, 1, b"\0"),
        frame(Kind.ACK, 1, b"\0"),
        frame(Kind.ITEM, 1, b""),
        frame(Kind.LOG, 1, b""),
        frame(Kind.LOADED, 0, b"{}"),
        frame(99, 1, b""),
        frame(Kind.NESTED, 0x8000_0001, b"short"),
        frame(Kind.RESULT, 1, RESULT_HEAD.pack(0, 0, 0) + b"x" * (CHUNK_BYTES + 1)),
        frame(Kind.RESULT, 1, RESULT_HEAD.pack(1, 0, 0) + b"[" * 60_000),
        HEADER.pack(1 << 31, Kind.RESULT, 0, 1),
    ],
)
def test_a_child_that_breaks_the_protocol_is_ended_and_its_call_told_why(tmp_path: Path, broken: bytes) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [task] = calling(front, route, "a")
        [child] = driver.live
        await until(lambda: child.calls)
        child.send(broken)
        error = (await task).error
        assert isinstance(error, SandboxLost)
        assert "broke the protocol" in error.cause
        assert not driver.live

    play(tmp_path, scene)


def test_an_error_that_grows_when_it_is_told_on_still_fits_a_frame(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [task] = calling(front, route, "a")
        [child] = driver.live
        await until(lambda: child.calls)
        text = "{" + '"type": "E", "message": "' + "é" * 30_000 + '"}'
        head = RESULT_HEAD.pack(Status.FUNCTION_ERROR, 0, 1)
        child.send(frame(Kind.RESULT, 1, head + text.encode()))
        done = await task
        assert len(done.result) <= CHUNK_BYTES
        assert b'"type"' in done.result

    play(tmp_path, scene)


def test_output_belongs_to_its_call_and_output_between_calls_to_none(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        front = pool.front()
        [child] = driver.live
        [task] = calling(front, route, "a")
        await until(lambda: child.calls)
        child.send(frame(Kind.LOG, 1, b"\1of a\n"))
        child.answer()
        await task
        child.send(frame(Kind.LOG, 0, b"\2of nobody\n"))
        await settle(50)
        pool.executor.logs.flush()
        lines = (pool.settings.logs_dir / "functions" / "square.log").read_text().splitlines()
        assert ['"i": "inv_a"' in line for line in lines] == [True, False]
        assert '"s": 2' in lines[1]

    play(tmp_path, scene)


def test_a_node_that_stops_answers_every_call_and_leaves_no_descriptor(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        before = _descriptors()
        for _ in range(5):
            [allocation] = await pool.up(route)
            pool.stop(allocation)
            await pool.observed(allocation, "gone")
        await settle(50)
        assert _descriptors() == before
        await pool.up(route)
        [task] = calling(pool.front(), route, "a")
        await until(lambda: driver.live[0].calls)
        await pool.executor.close()
        error = (await task).error
        assert isinstance(error, SandboxLost)
        assert not driver.live

    play(tmp_path, scene)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_calls_are_answered_even_when_their_sandbox_cannot_be_removed(tmp_path: Path) -> None:
    async def scene(pool: Pool, driver: FakeDriver, route: Route) -> None:
        await pool.up(route)
        [task] = calling(pool.front(), route, "a")
        [child] = driver.live
        await until(lambda: child.calls)
        driver.stuck = True
        child.exit(Death(1, None))
        assert isinstance((await task).error, SandboxLost)

    play(tmp_path, scene)
