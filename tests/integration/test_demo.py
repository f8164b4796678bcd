"""`make demo` in a clone: it installs, runs, shows its table, and leaves nothing but `.venv`."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(HERE), str(folder)], check=True)
    return folder


def make_demo(clone: Path, scratch: Path) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MN_", "MAKE"))}
    environ = {**plain, "TMPDIR": str(scratch), "NO_COLOR": "1"}
    done = subprocess.run(["make", "demo"], cwd=clone, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def untracked(clone: Path) -> list[str]:
    argv = ["git", "status", "--porcelain", "--ignored", "--untracked-files=normal"]
    status = subprocess.run(argv, cwd=clone, capture_output=True, text=True, check=True).stdout
    return [line.split()[1] for line in status.splitlines()]


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.timeout(900)
def test_make_demo_shows_its_table_and_leaves_nothing_twice_over(clone: Path) -> None:
    # A folder of its own with a short name: what the demo leaves in it can be seen, and sockets fit into it.
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as scratch:
        for _ in range(2):
            said = make_demo(clone, Path(scratch))
            for row in ("files", "functions", "classes", "deepest nesting", "longest functions", "most imported"):
                assert row in said
            assert "map over" in said
            assert "no process and no file is left" in said
            assert set(untracked(clone)) <= {".venv/"}
            assert processes_of(Path(scratch)) == []
            assert [name for name in os.listdir(scratch) if name.startswith("mn-")] == []
