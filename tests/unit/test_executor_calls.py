"""The executor with real children of `host_local`: values, errors, output, deadlines, deaths, and calls within calls."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mn.formats.codecs import Codec
from mn.formats.errors import CallTimeout, NotFound, SandboxLost
from mn.formats.manifest import FunctionSpec, Scaling
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.wire.messages import Route
from mn_runner.drivers.host_local import HostLocal
from mn_runner.protocol import Status
from tests.support.executors import Pool, until
from tests.support.links import spec

SOURCE = """
import os, signal, sys, time
import mn

def square(x):
    print("squaring", x)
    return x * x

def fails(x):
    print("about to fail", file=sys.stderr)
    raise ValueError(f"no {x}")

def sleeps(s):
    print("asleep")
    time.sleep(s)

def stubborn():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            print("not me")

def exits(code):
    os._exit(code)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def echo(data: bytes):
    return data

def counts(n):
    for i in range(n):
        yield i

def fib(n):
    return n if n < 2 else mn.lookup("fib").remote(n - 1) + mn.lookup("fib").remote(n - 2)

def ping(n):
    return n if n == 0 else mn.lookup("pong").remote(n - 1)

def pong(n):
    return n if n == 0 else mn.lookup("ping").remote(n - 1)

def deeper(n):
    return mn.lookup("deeper").remote(n + 1)

def asks_nobody():
    return mn.lookup("nobody").remote()

def waits_for(s):
    return mn.lookup("sleeps").remote(s)

def large(n):
    return len(mn.lookup("echo").remote(b"x" * n))
"""
ONE = Scaling(min_replicas=1, max_replicas=1)
Scene = Callable[[Pool, list[Route]], Awaitable[None]]


def play(tmp_path: Path, scene: Scene, *specs: FunctionSpec, **settings: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Pool(tmp_path, HostLocal, **settings) as pool:
            routes = pool.deploy(SOURCE, *specs)
            for route in routes:
                await pool.up(route)
            await scene(pool, routes)
        assert not list((pool.settings.run_dir / "sandboxes").iterdir())

    asyncio.run(run())


def value(done: PendingCall) -> Any:
    assert done.error is None, done.error
    assert done.status == Status.OK, done.result
    return json.loads(done.result)


def lines(pool: Pool, function: str) -> list[dict[str, Any]]:
    pool.executor.logs.flush()
    text = (pool.settings.logs_dir / "functions" / f"{function}.log").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_value_comes_back_and_output_is_filed_under_its_call(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        done = [await front.call(routes[0], {"x": n}, invocation=f"inv_{n}") for n in (3, 4)]
        assert [value(each) for each in done] == [9, 16]
        await until(lambda: len(lines(pool, "square")) == 2)
        assert [(line["i"], line["m"], line["s"]) for line in lines(pool, "square")] == [
            ("inv_3", "squaring 3", 1),
            ("inv_4", "squaring 4", 1),
        ]

    play(tmp_path, scene, spec("square"))


def test_an_exception_is_an_answer_with_its_output_and_is_kept(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        done = await pool.front().call(routes[0], 7, invocation="inv_failed")
        problem = json.loads(done.result)
        assert done.status == Status.FUNCTION_ERROR
        assert (problem["type"], problem["message"], problem["output"]) == ("ValueError", "no 7", "about to fail\n")
        assert problem["node"] == "node"
        kept = pool.executor.failures.get("inv_failed")
        assert (kept.payload, kept.function, kept.output) == (b"7", "fails", "about to fail\n")

    play(tmp_path, scene, spec("fails"))


def test_a_deadline_interrupts_user_code_and_the_sandbox_lives_on(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        done = await front.call(routes[0], 60, timeout_s=0.4)
        assert isinstance(done.error, CallTimeout)
        assert done.output == "asleep\n"
        before = pool.executor.allocations.report().allocations
        assert value(await front.call(routes[0], 0)) is None
        assert [each.sandbox for each in pool.executor.allocations.report().allocations] == [
            each.sandbox for each in before
        ]

    play(tmp_path, scene, spec("sleeps"))


def test_user_code_that_will_not_end_is_killed(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        done = await pool.front().call(routes[0], {}, timeout_s=0.3)
        assert isinstance(done.error, CallTimeout)
        assert "could not be interrupted within" in done.error.cause
        await until(lambda: not pool.executor.allocations.report().allocations)

    play(tmp_path, scene, spec("stubborn"))


def test_a_death_is_told_with_its_cause(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        done = await front.call(routes[0], 3)
        assert isinstance(done.error, SandboxLost)
        assert (done.error.exit_code, done.error.cause) == (3, "it exited with code 3")
        assert done.error.may_have_run is True
        done = await front.call(routes[1], {})
        assert isinstance(done.error, SandboxLost)
        assert (done.error.signal, done.error.cause) == ("SIGKILL", "it was killed by SIGKILL")

    play(tmp_path, scene, spec("exits"), spec("killed"))


def test_large_inputs_and_results_pass_whole(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        data = base64.b64encode(bytes(range(256)) * 12_000)
        done = await pool.front().call(routes[0], data, codec=Codec.RAW)
        assert done.result == data

    play(tmp_path, scene, spec("echo", raw=True))


def test_a_generators_items_come_in_order_as_they_are_taken(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        ended: asyncio.Future[PendingCall] = asyncio.get_running_loop().create_future()
        items: list[bytes] = []
        call = front.dispatcher.start(
            routes[0], "inv_g", Codec.JSON, b"100", timeout_s=30, on_done=ended.set_result,
            on_item=lambda _, codec, item: items.append(item),
        )  # fmt: skip
        taken = 0
        while not ended.done():
            while taken < len(items):
                taken += 1
                front.dispatcher.consumed(call)
            await asyncio.sleep(0.001)
        assert (await ended).error is None
        assert items == [str(n).encode() for n in range(100)]

    play(tmp_path, scene, spec("counts", generator=True))


def test_recursion_with_one_replica_ends(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        assert value(await pool.front().call(routes[0], 6)) == 8
        assert value(await pool.front("gateway-2").call(routes[0], 5)) == 5

    play(tmp_path, scene, spec("fib", scaling=ONE))


def test_functions_that_call_each_other_with_one_replica_each_end(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        calls = [front.call(routes[0], 7, invocation=f"inv_{n}") for n in range(4)]
        assert [value(done) for done in await asyncio.gather(*calls)] == [0] * 4

    play(tmp_path, scene, spec("ping", scaling=ONE), spec("pong", scaling=ONE))


def test_calls_nest_only_so_deep(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        done = await pool.front().call(routes[0], 0)
        assert done.status != Status.OK or done.error
        assert b"deeper than 4" in done.result or "deeper than 4" in str(done.error)

    play(tmp_path, scene, spec("deeper", scaling=ONE), call_depth_max=4)


def test_a_call_of_nobody_and_a_nested_call_out_of_time_are_told(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        done = await front.call(routes[0], {})
        assert NotFound.slug in str(done.error or done.result) or "nobody" in str(done.error or done.result)
        done = await front.call(routes[1], 60, timeout_s=0.5)
        assert isinstance(done.error, CallTimeout)
        await until(lambda: all(not each.busy for each in pool.executor.allocations.report().allocations))

    play(tmp_path, scene, spec("asks_nobody"), spec("waits_for"), spec("sleeps"))


def test_large_values_pass_between_functions(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        assert value(await pool.front().call(routes[0], 3_000_000)) == 3_000_000

    play(tmp_path, scene, spec("large"), spec("echo", raw=True))


def test_a_slow_call_gives_back_the_quick_ones_behind_it_and_each_runs_once(tmp_path: Path) -> None:
    async def scene(pool: Pool, routes: list[Route]) -> None:
        front = pool.front()
        for _ in range(20):
            await front.call(routes[0], 0)
        calls = [front.call(routes[0], s, invocation=f"inv_{n}") for n, s in enumerate([1.0, 0, 0, 0, 0])]
        assert [value(done) for done in await asyncio.gather(*calls)] == [None] * 5
        await until(lambda: len(lines(pool, "sleeps")) == 25)
        assert sorted(line["i"] for line in lines(pool, "sleeps"))[:5] == [f"inv_{n}" for n in range(5)]

    play(tmp_path, scene, spec("sleeps", scaling=ONE))


def test_a_started_spare_is_claimed_and_replaced(tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Pool(tmp_path, HostLocal, spares=1) as pool:
            await until(lambda: pool.executor.allocations.report().spares == 1)
            [route] = pool.deploy(SOURCE, spec("square"))
            await pool.up(route)
            await until(lambda: pool.executor.allocations.report().spares == 1)
            assert value(await pool.front().call(route, 3)) == 9

    asyncio.run(run())


def test_a_later_node_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            crashed = Pool(tmp_path, HostLocal)
            [route] = crashed.deploy(SOURCE, spec("square"))
            await crashed.up(route)
            [left] = crashed.executor.allocations.report().allocations
            async with Pool(tmp_path, HostLocal) as pool:
                assert not list((pool.settings.run_dir / "sandboxes").iterdir())
                await until(lambda: not Path(f"/proc/{left.pid}").exists())
            await crashed.executor.close()

    asyncio.run(run())
