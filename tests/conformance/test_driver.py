"""What every driver does, whatever it isolates: the contract of `mn_runner.sandbox` over real sandboxes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mn.formats.codecs import Codec
from mn_runner.protocol import REASON_CANCELLED, REASON_TIMEOUT, Kind, Status, frame
from tests.support.runtime import until
from tests.support.sandboxes import DRIVERS, Lab

BASICS = """
import os, sys, time

def square(x: int) -> int:
    return x * x

def echo(data: bytes) -> bytes:
    return data

def boom(x):
    raise ValueError(f"not {x}")

def talk(n=1):
    for i in range(n):
        print("line", i)
    print("to stderr", file=sys.stderr)
    sys.stdout.write("no newline")

def count(n):
    for i in range(n):
        yield i

def sleep():
    print("asleep")
    time.sleep(60)

def leave(how):
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), how)

def environment():
    return dict(os.environ)
"""


@pytest.fixture(params=sorted(DRIVERS))
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(request.param, tmp_path)
    yield lab
    lab.close()


def test_check_names_the_layers_that_are_in_force(lab: Lab) -> None:
    layers = lab.run(lab.driver.check())
    if lab.driver.name == "host_local":
        assert layers == ()
    else:
        assert {"pid", "net", "mount", "ipc", "uts", "cgroup", "seccomp", "no capabilities", "no new privileges"} < set(
            layers
        )


def test_a_call_gets_the_result_of_user_code(lab: Lab) -> None:
    sandbox = lab.load(BASICS, "app:square")
    assert sandbox.session.call({"x": 12}).value() == 144
    assert sandbox.session.call(7).value() == 49


def test_an_exception_arrives_with_type_message_and_the_users_frames(lab: Lab) -> None:
    outcome = lab.load(BASICS, "app:boom").session.call("a PDF")
    assert outcome.status == Status.FUNCTION_ERROR
    error = outcome.json()
    assert (error["type"], error["module"], error["message"]) == ("ValueError", "builtins", "not a PDF")
    assert 'app.py", line' in error["traceback"]
    assert "mn_runner" not in error["traceback"]


def test_output_is_tagged_with_its_call(lab: Lab) -> None:
    outcome = lab.load(BASICS, "app:talk").session.call({"n": 2})
    assert outcome.output == "line 0\nline 1\nto stderr\nno newline"


def test_a_generator_sends_its_values_as_they_come(lab: Lab) -> None:
    outcome = lab.load(BASICS, "app:count", generator=True).session.call(3)
    assert [json.loads(item) for item in outcome.items] == [0, 1, 2]
    assert outcome.status == Status.OK


def test_a_mebibyte_and_more_goes_both_ways(lab: Lab) -> None:
    sandbox = lab.load(BASICS, "app:echo", raw=True)
    for size in (65536, 65537, 1 << 20, (3 << 20) + 17):
        data = os.urandom(size)
        assert sandbox.session.call(raw=data, codec=Codec.RAW).value() == data


@pytest.mark.parametrize(("reason", "slug"), [(REASON_TIMEOUT, "timeout"), (REASON_CANCELLED, "cancelled")])
def test_a_running_call_is_interrupted_and_the_next_one_runs(lab: Lab, reason: int, slug: str) -> None:
    session = lab.load(BASICS + "\ndef maybe(long):\n    return sleep() if long else 'fine'\n", "app:maybe").session
    number = session.start(True)
    session.until(lambda: session.outcomes[number].output != "")
    session.cancel(number, reason)
    outcome = session.finish(number)
    assert (outcome.status, outcome.json()["slug"]) == (Status.PLATFORM_ERROR, slug)
    assert session.call(False).value() == "fine"


def test_a_nested_call_is_answered_over_the_same_socket(lab: Lab) -> None:
    source = """
import mn.call
def outer(x):
    status, codec, payload = mn.call.transport().call("inner", 0, str(x).encode(), None)
    return {"status": status, "answer": payload.decode()}
"""
    sandbox = lab.load(source, "app:outer")
    sandbox.session.answer = lambda nested: sandbox.session.reply(nested, nested.name.encode() + b" " + nested.payload)
    assert sandbox.session.call(5).value() == {"status": 0, "answer": "inner 5"}


@pytest.mark.parametrize(("how", "exit_code", "name"), [("exit", 3, None), (9, None, "SIGKILL"), (11, None, "SIGSEGV")])
def test_the_end_of_the_child_is_told_as_it_was(lab: Lab, how: object, exit_code: int | None, name: str | None) -> None:
    sandbox = lab.load(BASICS, "app:leave")
    sandbox.session.start(how)
    death = sandbox.death()
    assert (death.exit_code, death.signal) == (exit_code, name)
    with pytest.raises((EOFError, ConnectionError)):
        sandbox.session.until(lambda: False)


def test_stop_lets_what_runs_finish_and_ends_the_child(lab: Lab) -> None:
    session = (sandbox := lab.load(BASICS, "app:square")).session
    number = session.start(3)
    session.stop()
    assert session.finish(number).value() == 9
    assert sandbox.death().exit_code == 0


def test_a_violation_ends_the_sandbox(lab: Lab) -> None:
    sandbox = lab.start()
    sandbox.session.send(frame(Kind.CALL, 1, b"too early"))
    assert sandbox.death().exit_code == 76
    assert b"protocol violation" in sandbox.raw_output()


def test_destroy_leaves_nothing_and_can_be_repeated(lab: Lab) -> None:
    sandbox = lab.load(BASICS, "app:square")
    folder = sandbox.handle.bundle_mount.parent
    assert folder.exists()
    death = sandbox.destroy()
    assert death.signal == "SIGKILL"
    assert sandbox.destroy() == death
    assert not folder.exists()
    assert not Path(f"/proc/{sandbox.handle.pid}").exists()


def test_children_of_user_code_end_with_the_sandbox(lab: Lab) -> None:
    source = """
import subprocess
def start():
    subprocess.Popen(["/bin/sleep", "987654321"], start_new_session=False)
    return "started"
"""
    sandbox = lab.load(source, "app:start")
    assert sandbox.session.call().value() == "started"
    until(lambda: processes_with("987654321"), "its command line, which the kernel shows a moment after the start")
    sandbox.destroy()
    assert not processes_with("987654321")


def test_reap_ends_what_a_dead_node_left(lab: Lab, tmp_path: Path) -> None:
    sandbox = lab.load(BASICS, "app:square")
    again = Lab(lab.driver.name, tmp_path)
    try:
        assert again.run(again.driver.reap()) == 1
        assert list((tmp_path / "sandboxes").iterdir()) == []
        assert again.run(again.driver.reap()) == 0
    finally:
        again.close()
    assert sandbox.death().signal == "SIGKILL"


def test_reap_spares_a_process_that_got_the_recorded_number(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "sandboxes" / "sbx_old"
    folder.mkdir()
    (folder / "sandbox.json").write_text(json.dumps({"processes": [[os.getpid(), 1]], "uid": 0}))
    assert lab.run(lab.driver.reap()) == 1
    assert not folder.exists()


def test_what_a_sandbox_plants_is_not_followed(lab: Lab, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "kept.txt").write_text("kept")
    sandbox = lab.start()
    planted = sandbox.handle.bundle_mount / "link"
    planted.symlink_to(treasure)
    sandbox.destroy()
    assert (treasure / "kept.txt").read_text() == "kept"


def test_payload_links_are_left_out(lab: Lab, tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "app.py").write_text("import os\ndef f():\n    return sorted(os.listdir(os.path.dirname(__file__)))\n")
    (payload / "shadow").symlink_to("/etc/shadow")
    sandbox = lab.start()
    lab.run(lab.driver.provide(sandbox.handle, payload))
    assert sandbox.session.load("app:f", sandbox.handle.code_root) == {}
    assert "shadow" not in sandbox.session.call().value()


def test_the_environment_is_clean(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MN_CANARY", "secret")
    environment = lab.load(BASICS, "app:environment", env={"WANTED": "yes"}).session.call().value()
    assert environment["WANTED"] == "yes"
    assert "MN_CANARY" not in environment
    assert set(environment) <= {"WANTED", "PATH", "HOME", "LANG", "LC_CTYPE", "PWD", "TMPDIR", "OMP_NUM_THREADS",
                                "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}  # fmt: skip


def test_twenty_sandboxes_leave_no_process_mount_or_folder(lab: Lab, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    fds = len(os.listdir("/proc/self/fd"))
    sandboxes = [lab.start() for _ in range(20)]
    pids = [sandbox.handle.pid for sandbox in sandboxes]
    threads = [threading.Thread(target=sandbox.destroy) for sandbox in sandboxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list((tmp_path / "sandboxes").iterdir()) == []
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert processes_with(str(tmp_path)) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(os.listdir("/proc/self/fd")) == fds


def processes_with(word: str) -> list[int]:
    """Live processes whose command line contains `word`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if word.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_a_signal_is_named_as_people_know_it() -> None:
    from mn_runner.drivers.process import death_of

    assert death_of(-signal.SIGKILL).sentence() == "it was killed by SIGKILL"
    assert death_of(128 + signal.SIGSEGV).sentence() == "it was killed by SIGSEGV"
    assert death_of(3).sentence() == "it exited with code 3"
