"""A child whose user code took over its socket: it loses its sandbox, and nobody else loses anything."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import pytest

from mn.formats.codecs import Codec
from mn.formats.errors import MnError, SandboxLost
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.executor.allowance import CUT, LINE_COST_BYTES, SLACK, OutputAllowance
from mn_runner.protocol import (
    CHUNK_BYTES,
    HEADER,
    MORE,
    NESTED_BIT,
    NESTED_HEAD,
    RESULT_HEAD,
    WINDOW_CHUNKS,
    Kind,
    Status,
    frame,
)
from tests.support.executors import FakeDriver, Pool, until
from tests.support.links import spec

ONE = 1
PAYLOAD_MAX = 4 * CHUNK_BYTES


def result(payload: bytes, *, status: int = Status.OK, codec: int = Codec.JSON, flags: int = 0) -> bytes:
    head = RESULT_HEAD.pack(status, codec, 5)
    return HEADER.pack(len(head) + len(payload), Kind.RESULT, flags, ONE) + head + payload


def nested(number: int, seconds: float = 0.0, payload: bytes = b"", flags: int = 0, parent: int = ONE) -> bytes:
    head = NESTED_HEAD.pack(parent, Codec.JSON, 0, seconds, 6) + b"square"
    return frame(Kind.NESTED, NESTED_BIT | number, head + payload, flags)


def problem(text: str) -> bytes:
    return result(b'{"slug": "timeout", "detail": "x", "more": %b}' % text.encode(), status=Status.PLATFORM_ERROR)


BREACHES = {
    "no text in a LOG": frame(Kind.LOG, ONE),
    "an ITEM without its codec": frame(Kind.ITEM, ONE),
    "an ACK of three bytes": frame(Kind.ACK, ONE, b"abc"),
    "a result of another call": frame(Kind.RESULT, 99, RESULT_HEAD.pack(0, 0, 0)),
    "a second result": result(b"1", flags=MORE) + result(b"1"),
    "an unknown codec": result(b"1", codec=77),
    "an unknown status": result(b"{}", status=99),
    "an item of an unknown codec": frame(Kind.ITEM, ONE, b"\x4d1"),
    "an item after the result": result(b"1", flags=MORE) + frame(Kind.ITEM, ONE, b"\x001"),
    "items that nobody took": frame(Kind.ITEM, ONE, b"\x001") * (WINDOW_CHUNKS + 1),
    "an error that is no JSON": result(b"{", status=Status.FUNCTION_ERROR),
    "an error that nests without end": problem("[" * 50_000),
    "an error with a number that no frame carries": problem("9" * 40),
    "an error with NaN": problem("NaN"),
    "LOADED twice": frame(Kind.LOADED, 0, b"{}"),
    "READY again": frame(Kind.READY, 0, b"{}"),
    "a nested call of a call that does not run": nested(1, parent=99),
    "a nested call with NaN seconds": nested(1, float("nan")),
    "a nested call with negative seconds": nested(1, -1.0),
    "a nested call's number twice": nested(1, payload=b"1", flags=MORE) * 2,
    "inputs of nested calls that never end": b"".join(
        nested(number, payload=bytes(CHUNK_BYTES), flags=MORE) for number in range(1, 7)
    ),
    "no frames at all": b"\xff" * 1000,
}


async def _calls(pool: Pool, *parts: bytes) -> PendingCall:
    driver = pool.driver
    assert isinstance(driver, FakeDriver)
    [route] = pool.deploy("", spec())
    await pool.up(route)
    call = asyncio.ensure_future(pool.front().call(route))
    [child] = driver.live
    await until(lambda: child.calls)
    for part in parts:
        with suppress(OSError):  # its socket may be closed over the first of them
            await asyncio.to_thread(child.send, part)
    done: PendingCall = await call
    return done


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_the_protocol_ends_the_sandbox_and_says_so(tmp_path: Path, breach: str) -> None:
    async def scene() -> None:
        async with asyncio.timeout(30), Pool(tmp_path, FakeDriver(), payload_bytes_max=PAYLOAD_MAX) as pool:
            driver = pool.driver
            assert isinstance(driver, FakeDriver)
            done = await _calls(pool, BREACHES[breach])
            assert isinstance(done.error, SandboxLost)
            assert "broke the protocol" in done.error.detail
            await until(lambda: not driver.live)
            assert not pool.executor.allocations.report().allocations

    asyncio.run(scene())


def test_a_result_has_a_size_beyond_which_it_is_not_collected(tmp_path: Path) -> None:
    chunk = HEADER.pack(CHUNK_BYTES, Kind.CHUNK, MORE, ONE) + bytes(CHUNK_BYTES)

    async def scene() -> None:
        async with asyncio.timeout(30), Pool(tmp_path, FakeDriver(), payload_bytes_max=PAYLOAD_MAX) as pool:
            done = await _calls(pool, result(bytes(CHUNK_BYTES), flags=MORE), *[chunk] * 4)
            assert isinstance(done.error, SandboxLost)
            assert str(PAYLOAD_MAX) in done.error.detail

    asyncio.run(scene())


@pytest.mark.parametrize("name", ["self", "detail", "slug", "output", "retry_after_s"])
def test_an_errors_members_may_have_any_name(tmp_path: Path, name: str) -> None:
    body = json.dumps({"slug": "timeout", "detail": "late", name: "\ud800"}).encode()

    async def scene() -> None:
        async with asyncio.timeout(30), Pool(tmp_path, FakeDriver()) as pool:
            done = await _calls(pool, result(body, status=Status.PLATFORM_ERROR))
            assert isinstance(done.error, MnError)

    asyncio.run(scene())


def test_what_a_call_prints_around_the_child_is_bounded(tmp_path: Path) -> None:
    flood = frame(Kind.LOG, ONE, b"\x01" + b"\n" * 30_000) * 20

    async def scene() -> None:
        async with asyncio.timeout(30), Pool(tmp_path, FakeDriver(), output_bytes_max=64 * 1024) as pool:
            done = await _calls(pool, flood, result(b"1"))
            assert done.result == b"1"
            pool.executor.logs.flush()
            lines = (pool.settings.logs_dir / "functions" / "square.log").read_text().splitlines()
            assert len(lines) <= SLACK * 64 * 1024 // LINE_COST_BYTES + 30_000
            assert json.loads(lines[-1])["m"] == CUT.decode().strip()

    asyncio.run(scene())


def test_each_call_has_its_own_allowance_of_output() -> None:
    allowance = OutputAllowance(100)
    assert allowance.take(b"x" * 1000) == CUT
    assert allowance.take(b"y") == b""
    allowance.renew()
    assert allowance.take(b"y") == b"y"


def test_acknowledged_items_open_the_window_again(tmp_path: Path) -> None:
    async def scene() -> None:
        async with asyncio.timeout(30), Pool(tmp_path, FakeDriver()) as pool:
            items = [frame(Kind.ITEM, ONE, b"\x001") * WINDOW_CHUNKS for _ in range(4)]
            driver = pool.driver
            assert isinstance(driver, FakeDriver)
            [route] = pool.deploy("", spec(generator=True))
            await pool.up(route)
            front, taken = pool.front(), 0
            ended: asyncio.Future[PendingCall] = asyncio.get_running_loop().create_future()

            def take(call: PendingCall, codec: int, value: bytes) -> None:
                nonlocal taken
                taken += 1
                front.dispatcher.consumed(call)

            front.dispatcher.start(
                route, "inv_a", Codec.JSON, b"", timeout_s=20, on_done=ended.set_result, on_item=take
            )
            [child] = driver.live
            await until(lambda: child.calls)
            for number, part in enumerate(items, 1):
                child.send(part)
                while taken < number * WINDOW_CHUNKS:
                    await asyncio.sleep(0.005)
            child.send(result(b""))
            assert (await ended).error is None

    asyncio.run(scene())
