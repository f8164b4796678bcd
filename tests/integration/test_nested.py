"""Functions that call functions from inside their sandboxes, where there is no network and no key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import Api, python
from tests.support.runtime import Runtime

MODULE = '''
import os
import socket
import mn


class Refused(ValueError):
    """An exception of the module's own."""


@mn.function
def square(x):
    return x * x

@mn.function
def count(n):
    yield from range(n)

@mn.function(min_replicas=1, max_replicas=1)
def factorial(n):
    return 1 if n < 2 else n * factorial.remote(n - 1)

@mn.function(min_replicas=1, max_replicas=1)
def even(n):
    return True if n == 0 else odd.remote(n - 1)

@mn.function(min_replicas=1, max_replicas=1)
def odd(n):
    return False if n == 0 else even.remote(n - 1)

@mn.function
def total(n):
    return sum(square.map(range(n)))

@mn.function
def halves(n):
    return [str(it) for it in inverse.map(range(n), return_exceptions=True)]

@mn.function
def inverse(x):
    return 2 // x

@mn.function
def counted(n):
    return list(count.remote_gen(n))

@mn.function
def first_of(n):
    values = count.remote_gen(n)
    first = next(values)
    values.close()
    return first

@mn.function
def stamped(n):
    import time
    for _ in range(n):
        yield time.monotonic()

@mn.function
def made_after_a_pause(n):
    import time
    made = stamped.remote_gen(n)
    next(made)
    time.sleep(0.5)
    rested = time.monotonic()
    return sum(1 for at in made if at > rested)

@mn.function
async def gathered(n):
    import asyncio
    return sum(await asyncio.gather(*(square.aio.remote(x) for x in range(n))))

@mn.function
def refuse(x):
    raise Refused(f"not {x}")

@mn.function
def middle(x):
    return refuse.remote(x)

@mn.function
def outer(x):
    return middle.remote(x)

@mn.function
def handles(x):
    try:
        return middle.remote(x)
    except Refused as error:
        return f"handled {error}"

@mn.function
def endless(n):
    return endless.remote(n + 1)

@mn.function
def alone():
    try:
        socket.create_connection(("127.0.0.1", int(os.environ.get("PORT", "1"))), 1)
        reached = True
    except OSError:
        reached = False
    keys = [name for name in os.environ if name.startswith("MN_")]
    return {"reached": reached, "keys": keys, "square": square.remote(5)}

@mn.function
def stranger():
    return mn.lookup("nobody").remote()
'''
NAMES = set(re.findall(r"^(?:async )?def (\w+)", MODULE, re.MULTILINE))


@pytest.fixture(scope="module")
def nest(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("nest")
    (folder / "nest.py").write_text(MODULE)
    runtime.mn("deploy", str(folder / "nest.py"))
    with Api(runtime) as api:
        api.deployed |= NAMES
        yield api


def test_one_replica_is_enough_for_recursion(nest: Api) -> None:
    assert nest.result("factorial", {"n": 12}) == 479001600


def test_one_replica_each_is_enough_for_functions_that_call_each_other(nest: Api) -> None:
    assert nest.result("even", {"n": 10}) is True


def test_a_map_inside_a_sandbox(nest: Api) -> None:
    assert nest.result("total", {"n": 300}) == sum(x * x for x in range(300))
    assert nest.result("halves", {"n": 3}) == ["integer division or modulo by zero", "2", "1"]


def test_a_generator_inside_a_sandbox(nest: Api) -> None:
    assert nest.result("counted", {"n": 50}) == list(range(50))
    assert nest.result("first_of", {"n": 100_000_000}) == 0


def test_a_slow_reader_in_a_sandbox_holds_the_generator_back(nest: Api) -> None:
    assert nest.result("made_after_a_pause", {"n": 200}) > 150


def test_awaited_calls_inside_a_sandbox(nest: Api) -> None:
    assert nest.result("gathered", {"n": 10}) == 285


def test_an_exception_keeps_its_type_through_two_sandboxes(runtime: Runtime, nest: Api, tmp_path: Path) -> None:
    assert nest.result("handles", {"x": 1}) == "handled not 1"
    problem = nest.invoke("outer", {"x": 1}).json()
    assert (problem["type"], problem["exception"]["type"]) == ("/problems/function-error", "Refused")
    (tmp_path / "nest.py").write_text(MODULE)
    program = """
import traceback
import nest
try:
    nest.outer.remote(7)
except nest.Refused as error:
    traceback.print_exception(error)
"""
    done = python(runtime, cwd=tmp_path, code=program)
    assert "Refused: not 7" in done.stderr, done.stderr
    for level in ("outer", "middle", "refuse"):
        assert f"raised in sandbox of {level}" in done.stderr
    assert done.stderr.count("raise Refused") == 1


def test_calls_nest_sixteen_deep_and_no_deeper(nest: Api) -> None:
    problem = nest.invoke("endless", {"n": 0}).json()
    assert "deeper than 16" in problem["detail"]
    assert "call_depth_max" in problem["detail"]


def test_there_is_no_network_and_no_key_inside(nest: Api) -> None:
    assert nest.result("alone") == {"reached": False, "keys": [], "square": 25}


def test_a_name_that_is_not_there_is_told_inside_too(nest: Api) -> None:
    problem = nest.invoke("stranger").json()
    assert problem["exception"]["type"] == "NotFound"
    assert "nobody" in problem["detail"]
