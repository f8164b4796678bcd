"""Gateway processes: start, two on one port, drain, and the end of whoever started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mn.formats.settings import Settings
from tests.support.fake_pool import FakePool, eventually, ready_port

ROOT = Path(__file__).parents[2]
KEY = FakePool().add_key("admin").secret
"""The same in every process: the fake pool counts instead of drawing."""


class Processes:
    def __init__(self, home: Path, gateways: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = Settings(home=home, gateways=gateways, api_port=port, drain_s=5.0)
        self.settings.run_dir.mkdir(parents=True)
        self.running: list[subprocess.Popen[bytes]] = []
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {KEY}"}, timeout=30
        )

    def command(self, index: int) -> list[str]:
        return [sys.executable, "-m", "tests.support.fake_pool", str(index)]

    @property
    def environ(self) -> dict[str, str]:
        return os.environ | self.settings.environ()

    def state(self, index: int) -> Path:
        return self.settings.run_dir / f"gateway-{index}.json"

    def start(self, index: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self.command(index), cwd=ROOT, env=self.environ)
        self.running.append(process)
        ready_port(self.state(index))
        return process

    def close(self) -> None:
        self.client.close()
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "home", 2)
    yield processes
    processes.close()


def test_two_processes_share_the_port_and_add_up_their_numbers(two: Processes) -> None:
    two.start(1)
    two.start(2)
    calls = 40
    for _ in range(calls):
        # A connection each, so that the kernel spreads them.
        response = httpx.post(
            two.client.base_url.join("/v1/functions/square/invoke"), json=1, headers=dict(two.client.headers)
        )
        assert response.json() == 1
    for _ in range(4):
        metrics = httpx.get(two.client.base_url.join("/metrics")).text
        assert f'mn_invocations_total{{function="square",outcome="ok"}} {calls}.0' in metrics
        assert "mn_gateway_processes 2.0" in metrics


def test_the_other_process_serves_on_when_one_is_killed(two: Processes) -> None:
    first = two.start(1)
    two.start(2)
    first.kill()
    first.wait()
    for _ in range(10):
        answer = httpx.post(
            two.client.base_url.join("/v1/functions/square/invoke"), json=1, headers=dict(two.client.headers)
        )
        assert answer.status_code == 200
    assert "mn_gateway_processes 1.0" in two.client.get("/metrics").text


def test_stopping_answers_what_runs_and_takes_nothing_new(two: Processes) -> None:
    process = two.start(1)
    answers: list[httpx.Response] = []
    slow = threading.Thread(target=lambda: answers.append(two.client.post("/v1/functions/slow/invoke", json=7)))
    slow.start()
    metrics = httpx.Client(base_url=two.client.base_url)
    eventually(lambda: "mn_gateway_running_calls 1.0" in metrics.get("/metrics").text)
    process.send_signal(signal.SIGTERM)
    slow.join(20)
    assert [answer.json() for answer in answers] == [7]
    assert process.wait(20) == 0
    assert not two.state(1).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(two.client.base_url.join("/healthz"))
    metrics.close()


def test_a_gateway_ends_when_its_starter_is_killed(two: Processes) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({two.command(1)!r})"], cwd=ROOT, env=two.environ
    )
    two.running.append(starter)
    ready_port(two.state(1))
    starter.kill()
    starter.wait()
    eventually(lambda: not two.state(1).exists())
