"""Two gateway processes in front of one executor: neither lets a slot idle while the other has calls, and they share under load."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.api import Api
from tests.support.runtime import Runtime, until

CODE = """
import time

def work(seconds=0):
    print("begins")
    time.sleep(seconds)
    return "done"
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with Runtime(tmp_path_factory.mktemp("two")) as runtime:
        runtime.start("--gateways", "2")
        yield runtime


@pytest.fixture
def api(two: Runtime) -> Iterator[Api]:
    with Api(two) as api:
        yield api


@pytest.fixture
def doors(two: Runtime, api: Api) -> Iterator[tuple[Door, Door]]:
    """A way into each of the two processes."""
    with ExitStack() as stack:
        first = stack.enter_context(Door(api, gateways(two)))
        (other,) = gateways(two) - {first.process}
        yield first, door_to(other, stack, api, gateways(two))


def gateways(runtime: Runtime) -> set[int]:
    return {runtime.children()[name]["pid"] for name in ("gateway-1", "gateway-2")}


def door_to(process: int, stack: ExitStack, api: Api, processes: set[int]) -> Door:
    def knock() -> Door | None:
        door = stack.enter_context(Door(api, processes))
        return door if door.process == process else None

    found: Door = until(knock, "a connection to that gateway")
    return found


class Door:
    """One kept-alive connection; the kernel gives each new one to one of the processes."""

    def __init__(self, api: Api, processes: Iterable[int]) -> None:
        where = urlsplit(api.url)
        assert where.hostname is not None
        assert where.port is not None
        self._connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
        self._headers = {"Authorization": f"Bearer {api.key}"}
        self._connection.request("GET", "/healthz")
        self._connection.getresponse().read()
        mine = self._connection.sock.getsockname()[1]
        self.process = next(
            pid
            for pid in processes
            if any(it.raddr and it.raddr.port == mine for it in psutil.Process(pid).net_connections("tcp"))
        )
        """The gateway process at the other end."""

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def call(self, name: str, seconds: float = 0) -> int:
        body = json.dumps({"seconds": seconds})
        self._connection.request("POST", f"/v1/functions/{name}/invoke", body, self._headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


def test_a_call_runs_at_once_through_either_gateway_when_a_slot_is_idle(api: Api, doors: tuple[Door, Door]) -> None:
    api.deploy(CODE, "work", scaling={"min_replicas": 1, "max_replicas": 1})
    first, second = doors
    for _ in range(20):
        assert first.call("work") == 200
    # The first gateway holds the credits of the one slot; it is idle, so the second gets its turn nevertheless.
    for door in (second, first, second, second, first):
        assert door.call("work") == 200
    assert len(api.sandboxes("work")) == 1


def test_a_slot_that_becomes_idle_serves_who_waits_at_the_other_gateway(api: Api, doors: tuple[Door, Door]) -> None:
    api.deploy(CODE, "work", scaling={"min_replicas": 1, "max_replicas": 1})
    first, second = doors
    order: list[str] = []

    def through(door: Door, name: str, seconds: float) -> None:
        assert door.call("work", seconds) == 200
        order.append(name)

    long = threading.Thread(target=through, args=(first, "long", 1))
    long.start()
    until(lambda: any(it["busy"] for it in api.sandboxes("work")), "a busy replica")
    short = threading.Thread(target=through, args=(second, "short", 0))
    short.start()
    long.join(60)
    short.join(60)
    assert order == ["long", "short"]


def test_neither_gateway_starves_the_other_under_load(two: Runtime, api: Api, doors: tuple[Door, Door]) -> None:
    """Twenty callers at one gateway and one at the other share two slots."""
    api.deploy(CODE, "work", scaling={"min_replicas": 2, "max_replicas": 2})
    until(lambda: len(api.sandboxes("work")) == 2, "two replicas")
    first, second = doors
    stop = threading.Event()
    done = [0] * 20

    def press(index: int, door: Door) -> None:
        while not stop.is_set():
            assert door.call("work", 0.02) == 200
            done[index] += 1

    with ExitStack() as stack:
        crowd = [door_to(first.process, stack, api, gateways(two)) for _ in done]
        threads = [threading.Thread(target=press, args=it) for it in enumerate(crowd)]
        for thread in threads:
            thread.start()
        until(lambda: min(done) >= 2, "a crowd at work")
        before = sum(done)
        for _ in range(10):
            assert second.call("work", 0.02) == 200
        others = sum(done) - before
        stop.set()
        for thread in threads:
            thread.join(60)
    # In one queue with the crowd, each of the ten would have waited for twenty others.
    assert others < 100


def test_metrics_add_up_over_both(api: Api, doors: tuple[Door, Door]) -> None:
    api.deploy(CODE.replace("def work", "def summed"), "summed")
    for door in doors:
        assert door.call("summed") == 200
    assert api.metric("mn_invocations_total", function="summed", outcome="ok") == 2
    assert api.metric("mn_gateway_processes") == 2


def test_calls_through_one_gateway_go_on_when_the_other_is_killed(
    two: Runtime, api: Api, doors: tuple[Door, Door]
) -> None:
    api.deploy(CODE, "work", scaling={"min_replicas": 2})
    until(lambda: len(api.sandboxes("work")) == 2, "two replicas")
    stays, goes = doors
    with ThreadPoolExecutor(2) as pool:
        going, staying = pool.submit(goes.call, "work", 3), pool.submit(stays.call, "work", 3)
        until(lambda: [it["busy"] for it in api.sandboxes("work")] == [1, 1], "two calls that run")
        node = two.children()["node"]["pid"]
        os.kill(goes.process, signal.SIGKILL)
        assert staying.result() == 200
        with pytest.raises((http.client.HTTPException, OSError)):
            going.result()
    until(lambda: two.mn("runtime", "health", check=False).returncode == 0, "a healthy runtime")
    assert two.children()["node"]["pid"] == node
    # Nobody waits for what ran for the killed gateway: it was cancelled, and its sandbox is free again.
    until(lambda: not any(it["busy"] for it in api.sandboxes("work")), "idle replicas")
