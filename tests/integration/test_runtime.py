"""The runtime: started, stopped, killed and repaired with real processes, as an operator meets it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from mn.formats.settings import read_config
from tests.support.runtime import MN, Runtime, until

HELLO = """
import mn

@mn.function()
def square(x: int) -> int:
    return x * x
"""


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Runtime]:
    """A home that nothing has been started in."""
    with Runtime(tmp_path / "home") as runtime:
        yield runtime


def deploy_square(runtime: Runtime, folder: Path) -> None:
    (folder / "hello.py").write_text(HELLO)
    runtime.mn("deploy", str(folder / "hello.py"))


def answers(runtime: Runtime) -> bool:
    done = runtime.mn("call", "square", '{"x": 12}', check=False)
    return done.returncode == 0 and done.stdout.strip() == "144"


def test_start_returns_when_all_is_ready_and_is_idempotent(fresh: Runtime) -> None:
    first = fresh.start()
    assert httpx.get(first["api"] + "/readyz", trust_env=False).status_code == 200
    again = fresh.start()
    assert again["already"] is True
    assert again["pids"] == first["pids"]
    assert fresh.mn("runtime", "health").stdout.strip() == "healthy"
    other = fresh.mn("runtime", "start", "--gateways", "2", check=False)
    assert other.returncode == 5
    assert "runs already with other settings (gateways 1, not 2): mn runtime stop first" in other.stderr


def test_start_shows_what_runs_and_where(fresh: Runtime) -> None:
    said = fresh.mn("runtime", "start", "--ports", "auto").stdout
    assert "✓ store" in said
    assert "embedded, append-only" in said
    assert "✓ node     mirror_neuron@mn-" in said
    assert f"✓ gateway  {fresh.endpoints['api']}" in said
    assert "Sandboxes: " in said


def test_starts_at_the_same_time_make_one_runtime(fresh: Runtime) -> None:
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: fresh.start(), range(3)))
    assert len({report["pids"]["supervisor"] for report in reports}) == 1
    assert sorted(report["already"] for report in reports) == [False, True, True]


def test_stop_leaves_no_process_and_no_socket(fresh: Runtime) -> None:
    fresh.start()
    assert fresh.processes()
    fresh.mn("runtime", "stop")
    assert fresh.processes() == []
    left = [path for path in (fresh.home / "run").rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
    assert left == []
    assert not (fresh.home / "run" / "endpoints.json").exists()
    assert fresh.mn("runtime", "health", check=False).returncode == 9


def test_a_stop_tells_what_it_waits_for_and_goes_on_after_ctrl_c(fresh: Runtime, tmp_path: Path) -> None:
    fresh.start()
    (tmp_path / "nap.py").write_text(
        "import mn, time\n\n@mn.function()\ndef nap() -> int:\n    print('asleep', flush=True)\n    time.sleep(6)\n    return 6\n"
    )
    fresh.mn("deploy", str(tmp_path / "nap.py"))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(fresh.mn, "call", "nap")
        until(lambda: "asleep" in fresh.mn("logs", "nap").stdout, "a running call")
        with subprocess.Popen([*MN, "runtime", "stop"], env=fresh.environ, stderr=subprocess.PIPE, text=True) as stop:
            assert stop.stderr is not None
            assert stop.stderr.readline().startswith("waiting for running calls, at most 30 s; Ctrl-C")
            until(lambda: fresh.json("runtime", "status")["stopping"], "a runtime that stops")
            assert "state    stopping" in fresh.mn("runtime", "status").stdout
            stop.send_signal(signal.SIGINT)
            assert "goes on stopping" in stop.communicate(timeout=60)[1]
            assert stop.returncode == 130
        again = fresh.mn("runtime", "start")
        assert "starts again then" in again.stderr
        assert "Ready in" in again.stdout
        assert call.result().stdout.strip() == "6"


def test_two_runtimes_live_side_by_side(fresh: Runtime, tmp_path: Path) -> None:
    with Runtime(tmp_path / "second") as second:
        one, two = fresh.start(), second.start()
        assert one["api"] != two["api"]
        deploy_square(fresh, tmp_path)
        assert answers(fresh)
        assert second.mn("call", "square", "{}", check=False).returncode == 4
        second.mn("runtime", "stop")
        assert answers(fresh)


def test_automatic_ports_are_kept(fresh: Runtime) -> None:
    first = fresh.start()
    fresh.mn("runtime", "stop")
    assert json.loads(fresh.mn("runtime", "start", "--json").stdout)["api"] == first["api"]


def test_a_taken_port_names_who_holds_it(fresh: Runtime) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = fresh.mn("runtime", "start", "--ports", "auto", "--store-port", port, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: port {port} is taken by")
    assert f"(pid {os.getpid()})" in done.stderr
    assert "--ports auto" in done.stderr
    assert fresh.processes() == []
    assert int(port) not in json.loads((fresh.home / "ports.json").read_text()).values()


def test_an_external_store_that_does_not_answer_is_told_at_once(tmp_path: Path) -> None:
    with Runtime(tmp_path / "home", MN_REDIS_URL="redis://127.0.0.1:1/0") as runtime:
        done = runtime.mn("runtime", "start", "--ports", "auto", check=False)
        assert done.returncode == 9
        assert done.stderr.startswith("error: the store at 127.0.0.1:1 does not work: Connection refused")
        assert "MN_REDIS_URL" in done.stderr
        assert runtime.processes() == []


def test_an_external_store_that_wants_a_password_is_told(fresh: Runtime, tmp_path: Path) -> None:
    url = fresh.start()["store"]
    with Runtime(tmp_path / "second", MN_REDIS_URL=url) as second:
        refused = second.mn("runtime", "start", "--ports", "auto", check=False)
        assert refused.returncode == 9
        assert "NOAUTH" in refused.stderr


@pytest.mark.soak
@pytest.mark.parametrize("name", ["store", "node", "gateway-1"])
def test_a_killed_child_comes_back_and_calls_work_again(fresh: Runtime, tmp_path: Path, name: str, rounds: int) -> None:
    fresh.start()
    deploy_square(fresh, tmp_path)
    assert answers(fresh)
    for _ in range(rounds):
        pid = fresh.children()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: fresh.children().get(name, {}).get("pid", pid) != pid, f"a new {name}")
        until(lambda: fresh.mn("runtime", "health", check=False).returncode == 0, "a healthy runtime")
        until(lambda: answers(fresh), "an answered call")


@pytest.mark.soak
def test_a_killed_supervisor_takes_all_with_it_and_the_next_start_brings_functions_and_keys_back(
    fresh: Runtime, tmp_path: Path, rounds: int
) -> None:
    fresh.start()
    deploy_square(fresh, tmp_path)
    key = read_config(fresh.home)["client"]["key"]
    assert answers(fresh)
    for _ in range(rounds):
        os.kill(fresh.endpoints["pids"]["supervisor"], signal.SIGKILL)
        until(lambda: fresh.processes() == [], "the end of every process")
        assert fresh.start()["already"] is False
        assert read_config(fresh.home)["client"]["key"] == key
        assert answers(fresh)


@pytest.mark.soak
def test_everything_killed_at_once_comes_back_with_one_start(fresh: Runtime, tmp_path: Path, rounds: int) -> None:
    fresh.start()
    deploy_square(fresh, tmp_path)
    for _ in range(rounds):
        for process in fresh.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        until(lambda: fresh.processes() == [], "the end of every process")
        fresh.start()
        assert answers(fresh)


def test_stop_after_the_supervisor_was_killed_ends_what_is_left(fresh: Runtime) -> None:
    os.kill(fresh.start()["pids"]["supervisor"], signal.SIGKILL)
    fresh.mn("runtime", "stop")
    until(lambda: fresh.processes() == [], "the end of every process")


def test_foreground_stays_until_it_is_told_to_end(fresh: Runtime) -> None:
    argv = [*MN, "runtime", "start", "--foreground", "--ports", "auto"]
    with subprocess.Popen(argv, env=fresh.environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.readline())
        assert report["pids"]["supervisor"] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert fresh.processes() == []


def test_the_first_key_is_in_a_private_file_and_works_at_once(fresh: Runtime) -> None:
    api = fresh.start()["api"]
    assert (fresh.home / "config.toml").stat().st_mode & 0o777 == 0o600
    key = read_config(fresh.home)["client"]["key"]
    ask = {"trust_env": False, "timeout": 30}
    allowed = httpx.get(api + "/v1/keys", headers={"Authorization": f"Bearer {key}"}, **ask)  # type: ignore[arg-type]
    assert [it["name"] for it in allowed.json()["keys"]] == ["first"]
    assert httpx.get(api + "/v1/keys", **ask).status_code == 401  # type: ignore[arg-type]
    assert not (fresh.home / "run" / "bootstrap_key.json").exists()


def test_a_home_with_a_long_path_works_like_any_other(tmp_path: Path) -> None:
    with Runtime(tmp_path / ("long" * 30)) as runtime:
        runtime.start()
        deploy_square(runtime, tmp_path)
        assert answers(runtime)
        sockets = Path(runtime.json("runtime", "status")["endpoints"]["mesh"]).parent
        assert sockets.exists()
        runtime.mn("runtime", "stop")
        assert not sockets.exists()
        runtime.mn("runtime", "start")
        assert answers(runtime)


def test_reset_removes_what_it_shows_and_asks_before(fresh: Runtime, tmp_path: Path) -> None:
    fresh.start()
    deploy_square(fresh, tmp_path)
    refused = fresh.mn("runtime", "reset", check=False)
    assert refused.returncode == 2
    assert f"{fresh.home}/store" in refused.stdout
    assert answers(fresh)
    fresh.mn("runtime", "reset", "--yes")
    assert fresh.processes() == []
    assert not (fresh.home / "store").exists()
    fresh.start()
    assert fresh.mn("call", "square", "{}", check=False).returncode == 4


def test_status_shows_every_process(fresh: Runtime) -> None:
    fresh.start("--gateways", "2")
    told = fresh.json("runtime", "status")
    assert set(told["processes"]) == {"store", "node", "gateway-1", "gateway-2"}
    assert all(it["ready"] for it in told["processes"].values())
    assert "gateway-2" in fresh.mn("runtime", "status").stdout


def test_doctor_tells_what_this_machine_can_do(fresh: Runtime) -> None:
    done = fresh.mn("doctor", "--json", check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "store", "isolation", "cgroups", "docker", "gpus", "open files"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["state"] == "missing")
    assert done.returncode == (1 if any(check["state"] == "missing" for check in checks.values()) else 0)


def test_a_lost_key_is_replaced_at_the_next_start(fresh: Runtime) -> None:
    config = fresh.home / "config.toml"
    fresh.mn("runtime", "start", "--ports", "auto")
    config.write_text("\n".join(line for line in config.read_text().splitlines() if not line.startswith("key")))
    fresh.mn("runtime", "stop")
    fresh.mn("runtime", "start")
    assert len(fresh.json("key", "list")["keys"]) == 2
    fresh.mn("runtime", "stop")


def test_a_runtime_whose_run_folder_is_lost_is_not_started_twice(fresh: Runtime) -> None:
    fresh.mn("runtime", "start", "--ports", "auto")
    supervisor = fresh.endpoints["pids"]["supervisor"]
    (fresh.home / "run").rename(fresh.home / "mislaid")
    try:
        second = fresh.mn("runtime", "start", "--ports", "auto", check=False)
        assert second.returncode != 0
        assert str(supervisor) in second.stderr
    finally:
        if (fresh.home / "run").exists():
            (fresh.home / "run").rename(fresh.home / "emptied")
        (fresh.home / "mislaid").rename(fresh.home / "run")
    fresh.mn("runtime", "stop")
