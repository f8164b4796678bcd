"""Deadlines and cancellation, observed in the sandboxes that they end: what a call printed, and what became of its sandbox."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.api import Api, python
from tests.support.runtime import MN, Runtime, until

SLEEPER = """
import time

def sleeper(seconds, name="it"):
    print(name, "begins")
    try:
        time.sleep(seconds)
    except BaseException as why:
        print(name, "is interrupted by", type(why).__name__)
        raise
    print(name, "is through")
    return name

def stubborn(seconds):
    print("stubborn begins")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(end - time.monotonic())
        except BaseException:
            print("swallowed")
    return "through"
"""
NESTED_MODULE = """
import time
import mn

@mn.function
def inner(seconds):
    print("inner begins")
    try:
        time.sleep(seconds)
    except BaseException:
        print("inner is interrupted")
        raise

@mn.function
def outer(seconds):
    try:
        return inner.remote(seconds)
    except BaseException:
        print("outer is interrupted")
        raise

@mn.function
def patient(seconds):
    try:
        return inner.options(timeout=0.5).remote(seconds)
    except mn.errors.CallTimeout:
        return "gave up"
"""


@pytest.fixture
def sleeper(api: Api) -> Api:
    api.deploy(SLEEPER, "sleeper")
    return api


def test_mn_timeout_interrupts_the_function(sleeper: Api) -> None:
    answer = sleeper.invoke("sleeper", {"seconds": 600}, timeout_s=0.5)
    assert answer.status_code == 504
    assert answer.json()["type"] == "/problems/timeout"
    sleeper.printed("it is interrupted by", "sleeper")
    # Interrupted and not killed: the same sandbox answers the next call.
    [before] = sleeper.sandboxes("sleeper")
    assert sleeper.result("sleeper", {"seconds": 0}) == "it"
    assert [it["sandbox"] for it in sleeper.sandboxes("sleeper")] == [before["sandbox"]]


def test_a_functions_own_timeout_holds_where_the_caller_gives_none(api: Api) -> None:
    api.deploy(SLEEPER, "sleeper", timeout_s=0.5)
    assert api.invoke("sleeper", {"seconds": 600}).status_code == 504
    assert api.invoke("sleeper", {"seconds": 1}, timeout_s=30).status_code == 200


def test_a_function_that_swallows_the_interrupt_is_killed_and_its_neighbour_goes_on(sleeper: Api) -> None:
    sleeper.deploy(SLEEPER, "stubborn")
    answers: list[object] = []
    neighbour = threading.Thread(target=lambda: answers.append(sleeper.result("sleeper", {"seconds": 6})))
    neighbour.start()
    sleeper.printed("it begins", "sleeper")
    answer = sleeper.invoke("stubborn", {"seconds": 600}, timeout_s=0.5)
    assert answer.status_code == 504
    sleeper.printed("swallowed", "stubborn")
    until(lambda: sleeper.sandboxes("stubborn") == [], "the end of the stubborn sandbox")
    neighbour.join(60)
    assert answers == ["it"]
    assert sleeper.result("stubborn", {"seconds": 0}) == "through"


def test_a_client_that_disconnects_cancels_what_runs(sleeper: Api) -> None:
    url = urlsplit(sleeper.url)
    body = b'{"seconds": 600, "name": "left"}'
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(
            f"POST /v1/functions/sleeper/invoke HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Authorization: Bearer {sleeper.key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        sleeper.printed("left begins", "sleeper")
    sleeper.printed("left is interrupted by", "sleeper")


@pytest.fixture
def nested(runtime: Runtime, api: Api, tmp_path: Path) -> Api:
    (tmp_path / "calls.py").write_text(NESTED_MODULE)
    api.deployed |= {"inner", "outer", "patient"}
    runtime.mn("deploy", str(tmp_path / "calls.py"))
    return api


def test_a_deadline_reaches_through_nested_calls(nested: Api) -> None:
    answer = nested.invoke("outer", {"seconds": 600}, timeout_s=1.0)
    assert answer.status_code == 504
    nested.printed("inner is interrupted", "inner")
    nested.printed("outer is interrupted", "outer")


def test_a_nested_calls_own_deadline_is_an_error_that_its_caller_can_handle(nested: Api) -> None:
    assert nested.result("patient", {"seconds": 600}) == "gave up"
    nested.printed("inner is interrupted", "inner")


def test_a_caller_that_is_gone_takes_its_nested_call_with_it(runtime: Runtime, nested: Api) -> None:
    argv = [*MN, "call", "outer", '{"seconds": 600}']
    with subprocess.Popen(argv, env=runtime.environ, stderr=subprocess.DEVNULL) as caller:
        nested.printed("inner begins", "inner")
        caller.kill()
    nested.printed("inner is interrupted", "inner")
    nested.printed("outer is interrupted", "outer")


def test_a_cancelled_task_cancels_its_call(runtime: Runtime, api: Api, tmp_path: Path) -> None:
    api.deploy(SLEEPER, "sleeper")
    program = """
import asyncio, mn

async def main():
    call = asyncio.create_task(mn.lookup("sleeper").aio.remote(600, "task"))
    await asyncio.sleep(1)
    call.cancel()
    try:
        await call
    except asyncio.CancelledError:
        print("cancelled here")

asyncio.run(main())
"""
    done = python(runtime, cwd=tmp_path, code=program)
    assert done.stdout == "cancelled here\n", done.stderr
    api.printed("task is interrupted by", "sleeper")


def test_options_give_one_call_another_deadline(runtime: Runtime, api: Api, tmp_path: Path) -> None:
    api.deploy(SLEEPER, "sleeper")
    program = """
import mn
try:
    mn.lookup("sleeper").options(timeout=0.5).remote(600)
except mn.errors.CallTimeout as error:
    print("late:", error.detail)
"""
    done = python(runtime, cwd=tmp_path, code=program)
    assert done.stdout.startswith("late: "), done.stderr
