"""A benchmark leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

WAIT_S = 60.0


def of_folder(folder: Path) -> list[psutil.Process]:
    """Processes that name the folder in their environment or command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().get("MN_HOME", "") or str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", "footprint"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + WAIT_S
        while not any(tmp_path.glob("mn-loadtest-*/config.toml")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no runtime was started"
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []
    assert of_folder(tmp_path) == []


def test_a_command_that_is_not_there_is_told_before_anything_is_started(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", "lukewarm"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "warm" in done.stderr
    assert list(tmp_path.iterdir()) == []
