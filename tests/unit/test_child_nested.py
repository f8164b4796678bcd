"""Calls from inside calls, and many calls at a time: threads, tasks, lent slots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mn_runner.protocol import REASON_TIMEOUT, Status
from tests.support.sandboxes import Lab, Sandbox
from tests.support.session import Nested, Session


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab("host_local", tmp_path)
    yield lab
    lab.close()


class Loopback:
    """A pool of one replica: what a sandbox calls comes back to it as calls of its own function."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.session: Session = sandbox.session
        self.session.answer = self._take
        self.out: dict[int, Nested] = {}
        self.most = 0

    def _take(self, nested: Nested) -> None:
        number = self.session.start(raw=nested.payload, depth=1)
        self.out[number] = nested
        self.most = max(self.most, len(self.out))

    def finish(self, number: int) -> object:
        while number not in self.session.finished:
            self.session.until(lambda: bool(self.session.finished & {number, *self.out}))
            for inner in list(self.session.finished & set(self.out)):
                outcome = self.session.outcomes[inner]
                self.session.reply(self.out.pop(inner), outcome.payload, outcome.status, outcome.codec)
        return self.session.outcomes[number].value()


FIB = """
import json
import mn.call
def call(n):
    status, codec, payload = mn.call.transport().call("fib", 0, json.dumps(n).encode(), None)
    assert status == 0, payload
    return json.loads(payload)
"""


def test_one_replica_can_call_itself(lab: Lab) -> None:
    source = FIB + "def fib(n):\n    return n if n < 2 else call(n - 1) + call(n - 2)\n"
    pool = Loopback(lab.load(source, "app:fib"))
    assert pool.finish(pool.session.start(8)) == 21


def test_one_replica_can_call_itself_from_threads(lab: Lab) -> None:
    source = (
        FIB
        + """
from concurrent.futures import ThreadPoolExecutor
def fib(n):
    if n < 2:
        return n
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(call, [n - 1, n - 2]))
"""
    )
    pool = Loopback(lab.load(source, "app:fib"))
    assert pool.finish(pool.session.start(6)) == 8


def test_one_replica_of_an_async_function_can_call_itself(lab: Lab) -> None:
    source = (
        FIB
        + """
import asyncio
async def fib(n):
    if n < 2:
        return n
    return sum(await asyncio.gather(asyncio.to_thread(call, n - 1), asyncio.to_thread(call, n - 2)))
"""
    )
    pool = Loopback(lab.load(source, "app:fib"))
    assert pool.finish(pool.session.start(6)) == 8


def test_an_async_function_that_blocks_its_loop_in_a_call_does_not_deadlock(lab: Lab) -> None:
    source = FIB + "async def fib(n):\n    return n if n < 2 else call(n - 1) + call(n - 2)\n"
    pool = Loopback(lab.load(source, "app:fib"))
    assert pool.finish(pool.session.start(5)) == 5


def test_recursion_in_threads(lab: Lab) -> None:
    source = FIB + "def fib(n):\n    return n if n < 2 else call(n - 1) + call(n - 2)\n"
    pool = Loopback(lab.load(source, "app:fib", concurrency=3))
    numbers = [pool.session.start(n) for n in (4, 5, 6)]
    assert [pool.finish(number) for number in numbers] == [3, 5, 8]


MAP = """
import mn.call
def f(n):
    answers = mn.call.transport().map("g", 0, (str(i).encode() for i in range(n)), None, 8)
    return sorted((index, status, payload.decode()) for index, status, codec, payload in answers)
def first(n):
    for index, status, codec, payload in mn.call.transport().map("g", 0, (b"%d" % i for i in range(n)), None):
        return index
"""


def test_a_map_keeps_its_window_and_names_each_item(lab: Lab) -> None:
    session = lab.load(MAP, "app:f").session
    waiting: list[Nested] = []
    most = 0

    def answer(nested: Nested) -> None:
        nonlocal most
        waiting.append(nested)
        most = max(most, len(waiting))
        if len(waiting) == 8 or int(nested.payload) >= 95:
            # In another order than they came.
            for item in reversed(waiting):
                failed = item.payload == b"13"
                session.reply(
                    item,
                    b"{}" if failed else b"<" + item.payload + b">",
                    Status.FUNCTION_ERROR if failed else Status.OK,
                )
            waiting.clear()

    session.answer = answer
    answers = session.call(100).value()
    assert answers == [[i, 1, "{}"] if i == 13 else [i, 0, f"<{i}>"] for i in range(100)]
    assert most == 8


def test_what_is_no_longer_wanted_is_cancelled(lab: Lab) -> None:
    session = lab.load(MAP, "app:first").session
    number = session.start(20)
    session.until(lambda: len(session.nested) == 20)
    session.reply(session.nested[4], b"1")
    assert session.finish(number).value() == 4
    assert len(session.cancelled_nested) == 19


def test_a_stream_gives_items_then_ends_or_fails(lab: Lab) -> None:
    source = """
import mn.call
def f():
    return [[status, payload.decode()] for status, codec, payload in mn.call.transport().stream("g", 0, b"", None)]
"""
    session = lab.load(source, "app:f").session
    for status, last in ((Status.OK, b""), (Status.FUNCTION_ERROR, b"{}")):
        number = session.start()
        session.until(lambda: len(session.nested) == 1)
        nested = session.nested.popleft()
        assert nested.mode == 1
        session.item(nested, b"1")
        session.item(nested, b"2" * 200_000)
        session.reply(nested, last, status)
        expected = [[0, "1"], [0, "2" * 200_000]] + ([] if status == Status.OK else [[1, "{}"]])
        assert session.finish(number).value() == expected


def test_large_nested_payloads_go_both_ways(lab: Lab) -> None:
    source = "import mn.call\ndef f(n):\n    return mn.call.transport().call('g', 1, b'x' * n, None)[2]\n"
    session = lab.load(source, "app:f").session
    session.answer = lambda nested: session.reply(nested, nested.payload[::-1] + b"!")
    assert session.call(3 << 20).value() == b"x" * (3 << 20) + b"!"


def test_a_nested_call_inherits_its_parent_and_what_it_has_left(lab: Lab) -> None:
    source = "import mn.call\ndef f(own):\n    return mn.call.transport().call('g', 0, b'', own)[2].decode()\n"
    session = lab.load(source, "app:f").session
    seen: list[Nested] = []

    def answer(nested: Nested) -> None:
        seen.append(nested)
        session.reply(nested, b"ok")

    session.answer = answer
    numbers = [
        session.start(None, seconds=9.0, raw=b"null"),
        session.start(2.0, seconds=9.0),
        session.start(None, raw=b"null"),
    ]
    for number in numbers:
        session.finish(number)
    assert [nested.parent for nested in seen] == numbers
    assert 2.0 < seen[0].seconds <= 9.0
    assert seen[1].seconds == 2.0
    assert seen[2].seconds == 0.0


def test_calls_that_nest_too_deeply_are_refused_in_a_sentence(lab: Lab) -> None:
    source = "import mn.call\ndef f():\n    return mn.call.transport().call('g', 0, b'', None)[2].decode()\n"
    session = lab.load(source, "app:f", depth_max=2).session
    refused = json.loads(session.call(depth=2).value())
    assert refused["slug"] == "invalid-request"
    assert "deeper than 2" in refused["detail"]


def test_a_call_that_waits_for_another_is_interrupted_and_lets_it_go(lab: Lab) -> None:
    source = "import mn.call\ndef f():\n    return mn.call.transport().call('g', 0, b'', None)[2].decode()\n"
    session = lab.load(source, "app:f").session
    for _ in range(20):
        session.nested.clear()
        session.cancelled_nested.clear()
        number = session.start()
        session.until(lambda: len(session.nested) == 1)
        session.cancel(number, REASON_TIMEOUT)
        assert session.finish(number).json()["slug"] == "timeout"
        assert session.cancelled_nested == [session.nested[0].number]


CONCURRENT = {
    "threads": """
import threading
gate = threading.Barrier(3)
def f(i):
    print("call", i)
    gate.wait(20)
    return i
def spin(i):
    while True:
        pass
""",
    "tasks": """
import asyncio
arrived, event = [], asyncio.Event()
async def f(i):
    print("call", i)
    arrived.append(i)
    if len(arrived) == 3:
        event.set()
    await event.wait()
    return i
async def spin(i):
    await asyncio.sleep(60)
""",
}


@pytest.mark.parametrize("kind", sorted(CONCURRENT))
def test_as_many_calls_as_allowed_run_at_once_with_their_own_output(lab: Lab, kind: str) -> None:
    session = lab.load(CONCURRENT[kind], "app:f", concurrency=3).session
    numbers = [session.start(i) for i in range(3)]
    assert [session.finish(number).value() for number in numbers] == [0, 1, 2]
    assert [session.outcomes[number].output for number in numbers] == [f"call {i}\n" for i in range(3)]


@pytest.mark.parametrize("kind", sorted(CONCURRENT))
def test_one_of_many_is_interrupted_alone(lab: Lab, kind: str) -> None:
    source = CONCURRENT[kind] + (
        "\nasync def g(i):\n    print('in')\n    return await spin(i) if i else 'ran'\n"
        if kind == "tasks"
        else "\ndef g(i):\n    print('in')\n    return spin(i) if i else 'ran'\n"
    )
    session = lab.load(source, "app:g", concurrency=2).session
    for _ in range(5):
        number = session.start(1)
        session.until(lambda number=number: session.outcomes[number].output != "")
        assert session.call(0).value() == "ran"
        session.cancel(number, REASON_TIMEOUT)
        assert session.finish(number).json()["slug"] == "timeout"
    assert session.call(0).value() == "ran"


def test_calls_beyond_the_concurrency_wait_their_turn(lab: Lab) -> None:
    source = """
import asyncio
running = most = 0
async def f(i):
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    running -= 1
    return most
"""
    session = lab.load(source, "app:f", concurrency=2).session
    numbers = [session.start(i) for i in range(20)]
    assert max(session.finish(number).value() for number in numbers) == 2


def test_async_generators_send_items(lab: Lab) -> None:
    source = "import asyncio\nasync def f(n):\n    for i in range(n):\n        await asyncio.sleep(0)\n        yield bytes([i]) * 100_000\n"
    outcome = lab.load(source, "app:f", generator=True).session.call(3)
    assert outcome.items == [bytes([i]) * 100_000 for i in range(3)]
    assert outcome.status == Status.OK


def test_a_plain_function_that_returns_a_coroutine_is_awaited(lab: Lab) -> None:
    source = "import asyncio\nasync def inner(x):\n    await asyncio.sleep(0)\n    return x + 1\ndef f(x):\n    return inner(x)\n"
    assert lab.load(source, "app:f").session.call(1).value() == 2


@pytest.mark.parametrize("line", ["sq.remote(3)", "list(sq.map([3]))", "asyncio.run(sq.aio.remote(3))"])
def test_a_call_while_the_module_is_imported_is_refused_with_its_line(lab: Lab, line: str) -> None:
    sandbox = lab.start()
    source = f"import asyncio, mn\n@mn.function\ndef sq(x):\n    return x * x\n{line}\n"
    sandbox.provide({"app.py": source}, lab.run_dir / "payload-early")
    told = sandbox.session.load("app:sq", sandbox.handle.code_root, main=True)["error"]
    verb = "map" if "map" in line else "remote"
    advice = 'put that under `if __name__ == "__main__":`'
    assert told["slug"] == "invalid-request"
    assert told["detail"] == f"app.py calls sq.{verb} while it is imported (line 5): {advice}"


def test_a_thread_of_no_call_is_told_so_and_the_sandbox_lives(lab: Lab) -> None:
    source = """
import threading, mn
go, done, told = threading.Event(), threading.Event(), []
def early():
    go.wait()
    try:
        f.remote(1)
    except RuntimeError as error:
        told.append(str(error))
    done.set()
threading.Thread(target=early, daemon=True).start()
late = threading.Barrier(2)
@mn.function(concurrency=2)
def f(x):
    late.wait()
    go.set()
    done.wait(20)
    return told[0]
"""
    session = lab.load(source, "app:f", concurrency=2).session
    calls = [session.start(n) for n in range(2)]
    session.until(lambda: session.finished >= set(calls))
    assert "belongs to no running call" in session.outcomes[calls[0]].value()
