"""Calling functions on the pool, seen from the caller: values, exceptions, generators, maps, asyncio."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import mn
from mn import app, failures, transport
from mn.client import Client
from mn.formats.codecs import PICKLE_HEADER
from tests.support.stub_gateway import StubGateway, running


@mn.function(timeout=30)
def square(x: int) -> int:
    return x * x


@mn.function
def count(n: int) -> Iterator[int]:
    yield from range(n)


def refuse_odd(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


@pytest.fixture
def stub() -> Iterator[StubGateway]:
    with running() as stub, Client(stub.url, "mnk_test") as client:
        stub.functions |= {"square": lambda x: x * x, "count": lambda n: iter(range(n)), "refuse_odd": refuse_odd}
        transport.use(client)
        yield stub
        app.remove_all()
        transport.use(None)


def test_a_call_deploys_once_and_returns_the_value(stub: StubGateway) -> None:
    assert [square.remote(4), square.remote(x=5)] == [16, 25]
    assert square(3) == square.local(3) == 9
    assert len(stub.bundles) == 1 and len(stub.scopes) == 1
    invoked = [path for _, path, _ in stub.requests if path.endswith("/invoke")]
    assert set(invoked) == {f"/v1/functions/square~{next(iter(stub.scopes))}/invoke"}
    app.remove_all()
    assert ("DELETE", f"/v1/scopes/{next(iter(stub.scopes))}") in [request[:2] for request in stub.requests]


def test_a_looked_up_function_is_called_without_a_deploy(stub: StubGateway) -> None:
    found = mn.lookup("square")
    assert found.remote(7) == 49
    assert stub.bundles == []
    with pytest.raises(mn.errors.InvalidRequest, match="not here"):
        found.local(7)


def test_options_give_one_handle_another_deadline(stub: StubGateway) -> None:
    assert square.options(timeout=2.5).remote(2) == 4
    assert stub.requests[-1][2]["MN-Timeout"] == "2.5"
    square.remote(2)
    assert "MN-Timeout" not in stub.requests[-1][2]
    with pytest.raises(ValueError, match="above 0"):
        square.options(timeout=0)


def test_a_remote_exception_keeps_its_type_and_shows_where_it_was_raised(stub: StubGateway) -> None:
    with pytest.raises(ValueError, match="3 is odd") as raised:
        mn.lookup("refuse_odd").remote(3)
    shown = "".join(traceback.format_exception(raised.value))
    assert (
        "ValueError: 3 is odd\n  raised in sandbox of refuse_odd v3 on mirror_neuron@mn-1, call inv_01STUB\n" in shown
    )
    assert 'raise ValueError(f"{x} is odd")' in shown.partition("raised in sandbox")[2]
    assert shown.rstrip().endswith("debug it here: mn debug inv_01STUB")


def test_an_exception_that_cannot_be_rebuilt_is_told_in_words(stub: StubGateway) -> None:
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("no way")

    stub.functions["fail"] = fail
    with pytest.raises(mn.errors.FunctionFailed, match="Local: no way") as raised:
        mn.lookup("fail").remote()
    assert raised.value.instance == "inv_01STUB"


def test_an_exception_through_several_sandboxes_is_told_once_a_level(stub: StubGateway) -> None:
    refuse = mn.lookup("refuse_odd")

    def through_another(depth: int) -> int:
        return refuse.remote(1) if depth == 0 else mn.lookup("through").remote(depth - 1)

    stub.functions["through"] = through_another
    with pytest.raises(ValueError, match="1 is odd") as raised:
        mn.lookup("through").remote(3)
    note = "\n".join(raised.value.__notes__)
    assert note.count("raised in sandbox of through") == 4
    assert note.count("raised in sandbox of refuse_odd") == 1


def test_names_and_frames_that_are_the_platforms_own_are_not_shown() -> None:
    frames = """Traceback (most recent call last):
  File "/mn/code/a.py", line 1, in f
    g.remote()
  File "/mn/guest/mn/functions.py", line 96, in remote
    return call.decode()
           ^^^^^^^^^^^
  File "/mn/code/a.py", line 2, in g
    1 / 0
ZeroDivisionError: division by zero
"""
    problem = {"type": "/problems/timeout", "detail": "slow~0a1b2c3d4e5f did not end within 1 s"}
    assert failures.error_of(problem).detail == "slow did not end within 1 s"
    note = failures.remote_note("f~0a1b2c3d4e5f", {}, frames, "")
    assert note == (
        "  raised in sandbox of f\n"
        '    File "/mn/code/a.py", line 1, in f\n      g.remote()\n'
        '    File "/mn/code/a.py", line 2, in g\n      1 / 0'
    )


def test_an_exit_in_a_sandbox_does_not_end_the_caller() -> None:
    import base64

    from mn.failures import rebuilt

    pickled = base64.b64encode(PICKLE_HEADER + pickle.dumps(SystemExit(3), 5)).decode()
    told = {"type": "SystemExit", "module": "builtins", "message": "3", "traceback": "", "pickle": pickled}
    assert isinstance(rebuilt("f", told), mn.errors.FunctionFailed)


def test_a_platform_problem_becomes_its_error(stub: StubGateway) -> None:
    stub.problems["square"] = ("queue-full", {"detail": "10000 calls wait", "retry_after_s": 2, "instance": "inv_9"})
    with pytest.raises(mn.errors.QueueFull, match="10000 calls wait") as full:
        square.remote(1)
    assert full.value.retry_after_s == 2
    assert "call inv_9" in "".join(traceback.format_exception(full.value))


def test_a_result_of_another_python_is_not_unpickled(stub: StubGateway) -> None:
    stub.raw_answers["square"] = b"MNP1\x03\x63\0\0" + pickle.dumps(1, 5)
    with pytest.raises(mn.errors.InvalidRequest, match=r"pickled by Python 3\.99 .*mn deploy"):
        square.remote(1)


def test_a_result_that_needs_a_missing_module_says_which(stub: StubGateway) -> None:
    stub.raw_answers["square"] = PICKLE_HEADER + b"\x80\x05\x8c\x0bmissing_mod\x94\x8c\x05Thing\x94\x93\x94."
    with pytest.raises(mn.errors.InvalidRequest, match="result of square needs the module missing_mod"):
        square.remote(1)


def test_arguments_that_plain_pickle_refuses_travel_by_value(stub: StubGateway) -> None:
    stub.functions["apply"] = lambda f, x: f(x)
    assert mn.lookup("apply").remote(lambda x: x + 1, 2) == 3
    with pytest.raises(mn.errors.InvalidRequest, match=r"argument of apply: it can't be pickled.*lock"):
        mn.lookup("apply").remote(threading.Lock(), 2)


def test_generators_stream_their_values(stub: StubGateway) -> None:
    assert list(count.remote_gen(4)) == [0, 1, 2, 3]
    with pytest.raises(mn.errors.InvalidRequest, match="remote_gen"):
        count.remote(4)
    with pytest.raises(mn.errors.InvalidRequest, match="remote_gen"):
        mn.lookup("count").remote(4)
    with pytest.raises(mn.errors.InvalidRequest, match="no generator"):
        list(mn.lookup("square").remote_gen(4))


def test_map_keeps_order_and_takes_several_iterables(stub: StubGateway) -> None:
    assert list(square.map(range(3000))) == [x * x for x in range(3000)]
    stub.functions["square"] = lambda x, y=0: x + y
    assert list(square.map([1, 2, 3], (10, 20, 30, 40))) == [11, 22, 33]
    assert list(square.starmap([(1, 2), (3, 4)])) == [3, 7]
    assert list(square.map(iter([]))) == []
    assert Counter(square.map(range(500), order_outputs=False)) == Counter(range(500))


def test_map_raises_the_first_exception_or_returns_them(stub: StubGateway) -> None:
    handle = mn.lookup("refuse_odd")
    with pytest.raises(ValueError, match="1 is odd"):
        list(handle.map([0, 1, 2, 3]))
    values = list(handle.map([0, 1, 2], return_exceptions=True))
    assert values[::2] == [0, 2] and isinstance(values[1], ValueError)


def test_map_streams_results_while_its_inputs_still_come(stub: StubGateway) -> None:
    first_is_there = threading.Event()

    def inputs() -> Iterator[int]:
        yield 3
        assert first_is_there.wait(20), "the first result did not come while the second input was awaited"
        yield 4

    results = square.map(inputs())
    assert next(results) == 9
    first_is_there.set()
    assert list(results) == [16]


def test_map_takes_endless_inputs_and_closing_it_cancels(stub: StubGateway) -> None:
    results = square.map(itertools.count())
    assert list(itertools.islice(results, 10)) == [x * x for x in range(10)]
    results.close()  # type: ignore[attr-defined]
    assert stub.disconnected.wait(20)
    assert stub.map_items < 100_000


def test_an_error_of_the_inputs_comes_after_the_results_before_it(stub: StubGateway) -> None:
    def inputs() -> Iterator[int]:
        yield 2
        raise LookupError("no more input")

    results = square.map(inputs())
    assert next(results) == 4
    with pytest.raises(LookupError, match="no more input"):
        next(results)


def test_map_tells_when_it_was_cut_off_or_refused(stub: StubGateway) -> None:
    stub.map_cut_after = 5
    with pytest.raises(mn.errors.Unavailable, match=r"cut off|lost"):
        list(square.map(range(50)))
    stub.problems["square"] = ("not-found", {"detail": "there is no function square"})
    with pytest.raises(mn.errors.NotFound, match="no function square"):
        list(square.map(range(50)))


def test_a_slow_first_item_bounds_how_far_inputs_are_taken(stub: StubGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mn.maps.HELD_MAX", 50)
    stub.map_first_last = True
    taken = itertools.count(1)

    def inputs() -> Iterator[int]:
        for x in range(20_000):
            next(taken)
            yield x

    results = square.map(inputs())
    assert next(results) == 0
    assert next(taken) < 15_000
    assert list(results) == [x * x for x in range(1, 20_000)]


def test_large_items_go_both_ways(stub: StubGateway) -> None:
    stub.functions["echo"] = lambda data: data
    items = [bytes([n]) * 3_000_000 for n in range(4)]
    assert list(mn.lookup("echo").map(items)) == items
    assert mn.lookup("echo").remote(items[1]) == items[1]


def test_the_same_calls_can_be_awaited(stub: StubGateway) -> None:
    async def main() -> list[Any]:
        several = await asyncio.gather(*(square.aio.remote(n) for n in range(30)))
        mapped = [value async for value in square.aio.map(range(5))]
        pairs = [value async for value in square.aio.starmap([(3,), (4,)])]
        generated = [value async for value in count.aio.remote_gen(3)]
        plain = square.remote(9)  # in a running loop, as in a notebook
        with pytest.raises(ValueError, match="odd"):
            await mn.lookup("refuse_odd").aio.remote(1)
        return [several, mapped, pairs, generated, plain, list(square.map([1]))]

    expected = [[n * n for n in range(30)], [0, 1, 4, 9, 16], [9, 16], [0, 1, 2], 81, [1]]
    assert asyncio.run(main()) == expected


def test_leaving_an_async_map_cancels_it(stub: StubGateway) -> None:
    async def main() -> None:
        values = square.aio.map(itertools.count())
        async for value in values:
            if value > 100:
                break
        await values.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    assert stub.disconnected.wait(20)


def test_a_forked_child_makes_its_own_deployment(stub: StubGateway) -> None:
    square.remote(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(square.remote(11)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        assert answer.read() == "121"
    os.waitpid(child, 0)
    assert square.remote(2) == 4
    assert len(stub.scopes) == 2


def test_many_threads_make_one_deployment(stub: StubGateway) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(square.remote(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [n * n for n in range(8)]
    assert len(stub.bundles) == 1


def test_a_runtime_that_is_not_there_is_told_with_what_to_do() -> None:
    with running() as gone:
        url = gone.url
    with (
        Client(url, "mnk_test") as client,
        pytest.raises(mn.errors.Unavailable, match=f"cannot reach {url}.*mn runtime start"),
    ):
        client.functions()
    transport.use(Client(url, "mnk_test"))
    try:
        with pytest.raises(mn.errors.Unavailable, match="mn runtime start"):
            list(mn.lookup("square").map([1]))
        with pytest.raises(mn.errors.Unavailable, match="mn runtime start") as told:
            square.remote(1)
        assert any("square.local" in note for note in told.value.__notes__)
    finally:
        transport.use(None)


def test_a_failed_deploy_is_told_as_the_gateway_says(stub: StubGateway) -> None:
    stub.problems["deploy"] = ("invalid-request", {"detail": "the pool has Python 3.12 and not 3.11", "path": "python"})
    with pytest.raises(mn.errors.InvalidRequest, match=r"the pool has Python 3\.12"):
        square.remote(1)
    del stub.problems["deploy"]
    assert square.remote(2) == 4


def test_inside_a_sandbox_calls_take_the_childs_transport() -> None:
    from mn import call

    class Inside:
        def call(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> tuple[int, int, bytes]:
            args, _ = pickle.loads(payload[8:])
            return 0, 2, PICKLE_HEADER + pickle.dumps((name, codec, args, timeout_s))

        def stream(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> Any:
            return iter([(0, 0, b"1"), (0, 1, b"raw")])

        def map(self, name: str, codec: int, payloads: Any, timeout_s: float | None, window: int) -> Any:
            answers = [(n, 0, 2, PICKLE_HEADER + payload[8:]) for n, payload in enumerate(payloads)]
            return iter(reversed(answers))

    call.set_transport(Inside())
    try:
        assert square.remote(3) == ("square", 2, (3,), None)
        assert list(count.remote_gen(1)) == [1, b"raw"]
        assert list(square.map([1, 2])) == [((1,), {}), ((2,), {})]
        assert asyncio.run(square.aio.remote(4))[2] == (4,)
    finally:
        call.set_transport(None)
