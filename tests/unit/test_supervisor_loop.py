"""The supervisor with stand-ins for children: order, restarts, what remains after each kind of end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mn.formats import processes

CHILD = """
import json, os, signal, sys, threading
name, run = sys.argv[1], sys.argv[2]
def end(*_):
    open(run + "/order.txt", "a").write(name + " ")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
alive = int(os.environ.get("MN_ALIVE_FD", "-1"))
path = run + "/" + name + ".json"
open(path + ".new", "w").write(json.dumps({"pid": os.getpid(), "ready": True}))
os.replace(path + ".new", path)
if alive >= 0:
    os.read(alive, 1)
    end()
threading.Event().wait()
"""

PARENT = """
import json, sys
from pathlib import Path
from mn_nodepool.supervisor.children import Child, says_ready
from mn_nodepool.supervisor.loop import Supervisor
run = Path(sys.argv[1])
def child(name, rank, code=None):
    argv = (sys.executable, "-c", code) if code else (sys.executable, str(run / "child.py"), name, str(run))
    return Child(name, argv, run / (name + ".log"), lambda pid: says_ready(run / (name + ".json"), pid), stop_rank=rank)
broken = "import sys; sys.exit('no such interpreter')" if "broken" in sys.argv else None
try:
    Supervisor([[child("store", 2)], [child("node", 1), child("gateway-1", 0, broken)]], run).run(
        lambda pids: (run / "ready").write_text(json.dumps(pids)))
except Exception as error:
    sys.exit(str(error))
"""


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for a condition to hold and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.01)
    return value


class Parent:
    def __init__(self, run: Path, *arguments: str) -> None:
        self.run = run
        (run / "child.py").write_text(textwrap.dedent(CHILD))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PARENT, str(run), *arguments], stderr=subprocess.PIPE, text=True
        )

    def children(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads((self.run / "children.json").read_text())["children"])

    def ready(self) -> dict[str, dict[str, Any]]:
        until((self.run / "ready").exists)
        return self.children()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    parents: list[Parent] = []

    def make(*arguments: str) -> Parent:
        parents.append(Parent(tmp_path, *arguments))
        return parents[-1]

    yield make
    for parent in parents:
        if parent.process.poll() is None:
            parent.process.kill()
        parent.process.communicate()


def test_stop_ends_gateways_then_the_node_then_the_store(start: Callable[..., Parent]) -> None:
    parent = start()
    children = parent.ready()
    parent.process.terminate()
    assert parent.process.wait(30) == 0
    assert (parent.run / "order.txt").read_text().split() == ["gateway-1", "node", "store"]
    assert not any(processes.is_alive(it["pid"], it["started"]) for it in children.values())


@pytest.mark.parametrize("name", ["store", "node", "gateway-1"])
def test_a_killed_child_is_restarted_and_the_others_are_left_alone(start: Callable[..., Parent], name: str) -> None:
    parent = start()
    before = parent.ready()
    os.kill(before[name]["pid"], signal.SIGKILL)
    after = until(lambda: (now := parent.children()).get(name, {}).get("restarts") == 1 and now)
    assert after[name]["pid"] != before[name]["pid"]
    assert {k: v for k, v in after.items() if k != name} == {k: v for k, v in before.items() if k != name}


def test_children_end_by_themselves_when_the_supervisor_is_killed(start: Callable[..., Parent]) -> None:
    parent = start()
    children = parent.ready()
    parent.process.kill()
    for it in children.values():
        assert processes.wait(it["pid"], it["started"], 30)


def test_a_child_that_does_not_come_up_is_told_with_its_last_words_and_the_others_end(
    start: Callable[..., Parent],
) -> None:
    parent = start("broken")
    _, said = parent.process.communicate(timeout=60)
    assert "gateway-1 ended at its start (exit code 1)" in said
    assert "no such interpreter" in said
    assert not (parent.run / "ready").exists()
    assert not any(processes.is_alive(it["pid"], it["started"]) for it in parent.children().values())


def test_a_pid_that_a_stranger_got_since_is_not_taken_for_the_child() -> None:
    me = os.getpid()
    assert processes.is_alive(me, processes.started(me))
    assert not processes.is_alive(me, "another boot:1")
    assert not processes.end(me, "another boot:1", grace_s=1)
