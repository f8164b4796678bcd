"""How many sandboxes a function has: from zero, to zero, within its bounds, with spares at hand and room made when there is none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.api import Api
from tests.support.runtime import Runtime, until

CODE = """
import time, uuid
ME = uuid.uuid4().hex

def who(seconds=0):
    print("begins")
    time.sleep(seconds)
    return ME

def other(seconds=0):
    return who(seconds)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime with room for two replicas, and one spare."""
    with Runtime(tmp_path_factory.mktemp("small"), MN_SLOTS="2", MN_SPARES="1") as runtime:
        runtime.start()
        yield runtime


@pytest.fixture
def tight(small: Runtime) -> Iterator[Api]:
    with Api(small) as api:
        yield api


def test_from_zero_and_to_zero_after_idle_s(api: Api) -> None:
    api.deploy(CODE, "who", scaling={"idle_s": 0.5})
    assert api.sandboxes("who") == []
    first = api.result("who")
    until(lambda: api.sandboxes("who") == [], "no sandbox after idle_s")
    assert api.result("who") != first
    assert api.metric("mn_platform_errors_total", function="who") == 0


def test_min_replicas_run_before_anybody_calls_and_stay(api: Api) -> None:
    api.deploy(CODE, "who", scaling={"min_replicas": 2, "idle_s": 2})
    until(lambda: len(api.sandboxes("who")) == 2, "two replicas")
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(lambda _: api.result("who", {"seconds": 0.5}), range(6)))) >= 2
    until(lambda: len(api.sandboxes("who")) == 2, "two replicas again")
    kept = {it["sandbox"] for it in api.sandboxes("who")}
    api.deploy(CODE, "other", scaling={"idle_s": 0.2})
    api.result("other")
    until(lambda: api.sandboxes("other") == [], "the end of an idle replica without a minimum")
    assert {it["sandbox"] for it in api.sandboxes("who")} == kept


def test_a_burst_grows_to_max_replicas_and_no_further(api: Api) -> None:
    api.deploy(CODE, "who", scaling={"max_replicas": 3})
    with ThreadPoolExecutor(12) as pool:
        who = list(pool.map(lambda _: api.result("who", {"seconds": 0.5}), range(12)))
    assert len(set(who)) == 3
    assert len(api.sandboxes("who")) == 3


def test_a_long_call_does_not_hold_up_those_behind_it(api: Api) -> None:
    api.deploy(CODE, "who")
    for _ in range(20):
        api.result("who")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(api.invoke, "who", {"seconds": 600}, 30)
        until(lambda: any(it["busy"] for it in api.sandboxes("who")), "a busy replica")
        assert api.result("who")
        assert not long.done()
        for sandbox in api.sandboxes("who"):
            os.kill(sandbox["pid"], signal.SIGKILL)
        assert long.result().status_code == 502


def test_a_killed_replica_of_the_minimum_is_replaced(api: Api) -> None:
    api.deploy(CODE + "\ndef die():\n    import os\n    os._exit(3)\n", "die", scaling={"min_replicas": 1})
    until(lambda: api.sandboxes("die"), "its replica")
    [before] = api.sandboxes("die")
    answer = api.invoke("die")
    assert answer.status_code == 502
    until(lambda: [it["sandbox"] for it in api.sandboxes("die") if it != before], "a new replica")


def test_a_claimed_spare_is_replaced(tight: Api) -> None:
    until(lambda: tight.spares() == 1, "a spare")
    tight.deploy(CODE, "who")
    tight.result("who")
    until(lambda: tight.spares() == 1, "another spare")


def test_an_idle_replica_makes_room_for_another_function(tight: Api) -> None:
    tight.deploy(CODE, "who", "other", scaling={"idle_s": 600})
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda _: tight.result("who", {"seconds": 1}), range(2)))) == 2
    assert len(tight.sandboxes("who")) == 2
    tight.result("other")
    assert len(tight.sandboxes("other")) == 1
    assert len(tight.sandboxes("who")) == 1


def test_a_busy_replica_is_not_ended_for_another_function(tight: Api) -> None:
    tight.deploy(CODE, "who", "other", scaling={"idle_s": 600})
    ended: list[str] = []

    def call(name: str, seconds: float) -> None:
        tight.result(name, {"seconds": seconds})
        ended.append(name)

    busy = [threading.Thread(target=call, args=("who", 3)) for _ in range(2)]
    for thread in busy:
        thread.start()
    until(lambda: [it["busy"] for it in tight.sandboxes("who")] == [1, 1], "two busy replicas")
    call("other", 0)
    for thread in busy:
        thread.join(60)
    assert sorted(ended) == ["other", "who", "who"]
    assert ended[0] == "who"


def test_what_no_node_can_run_is_refused_with_the_reason(api: Api) -> None:
    api.deploy(CODE, "who", resources={"gpu": 2, "memory_mb": 1 << 23})
    answer = api.invoke("who")
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/unschedulable")
    assert "memory" in answer.text or "GPU" in answer.text
    assert answer.headers["retry-after"]


def test_a_new_version_takes_over_while_the_old_one_finishes(api: Api) -> None:
    [old] = api.deploy(CODE, "who")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(api.result, "who", {"seconds": 2})
        until(lambda: any(it["busy"] for it in api.sandboxes("who")), "a busy replica")
        [new] = api.deploy(CODE.replace("return ME", "return 'new'"), "who")
        assert new["version"] == old["version"] + 1
        assert api.result("who") == "new"
        assert len(running.result()) == 32
    until(lambda: {it["version"] for it in api.sandboxes("who")} == {f"who#{new['version']}"}, "the new version alone")
