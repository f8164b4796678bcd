"""A runtime in a throw-away home, driven by the `mn` command; when the context ends, so has every process and file of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from loadtest.report import say
from mn.client import Client
from mn.formats.settings import Settings, read_config

MN = (sys.executable, "-P", "-c", "from mn.cli.main import main; main()")
COMMAND_S = 180.0
WAIT_S = 120.0
POLL_S = 0.05
KILLED_S = 10.0
T = TypeVar("T")


class Failed(Exception):
    """What a measurement needs did not come about; the message tells what, and what to do."""


def until(condition: Callable[[], T], what: str, wait_s: float = WAIT_S) -> T:
    """Wait for a condition and return its value.

    Raises Failed when it does not hold within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"{what} did not come about within {wait_s:.0f} s")
        time.sleep(POLL_S)
    return value


def plain_environ() -> dict[str, str]:
    """This process's environment without settings of any runtime."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MN_")}


class Runtime:
    """A running runtime."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        self.home = home
        self.environ = {**plain_environ(), "MN_HOME": str(home), "NO_COLOR": "1", **settings}
        self._run_dir = Settings.load(environ=self.environ).run_dir

    def mn(self, *arguments: str) -> str:
        """Run `mn …` against this home: what it printed.

        Raises Failed with what it said when it fails.
        """
        # In a session of its own: Ctrl-C is for this process, which then stops the runtime in order.
        done = subprocess.run(
            [*MN, *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
            start_new_session=True,
        )
        if done.returncode:
            raise Failed(f"mn {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    @property
    def endpoints(self) -> dict[str, Any]:
        return dict(json.loads((self._run_dir / "endpoints.json").read_text()))

    @property
    def key(self) -> str:
        return str(read_config(self.home)["client"]["key"])

    def client(self) -> Client:
        return Client(self.endpoints["api"], self.key)

    def node(self) -> dict[str, Any]:
        """The one row of `mn node list`."""
        with self.client() as client:
            return dict(client.nodes()["nodes"][0])

    def deploy(self, file: Path) -> None:
        self.mn("deploy", str(file))

    def await_spares(self) -> int:
        """Wait until as many sandboxes stand ready as this runtime keeps."""
        wanted = int(self.environ.get("MN_SPARES", "2"))
        until(lambda: self.node()["spares"] >= wanted, f"{wanted} spares")
        return wanted

    def await_sandboxes(self, count: int) -> None:
        """Wait until exactly so many sandboxes have a function."""
        until(lambda: len(self.node()["sandboxes"]) == count, f"{count} sandboxes with a function")

    def store_password(self) -> str:
        return (self._run_dir / "store.password").read_text("ascii")

    def processes(self) -> list[psutil.Process]:
        """The supervisor and all below it."""
        supervisor = psutil.Process(self.endpoints["pids"]["supervisor"])
        return [supervisor, *supervisor.children(recursive=True)]

    def stop(self) -> None:
        """End every process of this home, in order where that works."""
        try:
            self.mn("runtime", "stop")
        except (Failed, subprocess.TimeoutExpired) as error:
            say(f"the runtime did not stop by itself, so its processes are killed: {error}")
        left = [process for process in psutil.process_iter() if _belongs(process, self.home)]
        for process in left:
            _kill(process)
        psutil.wait_procs(left, timeout=KILLED_S)

    def remove(self) -> None:
        """After `stop`: the home, and the folder of sockets that a long home has elsewhere."""
        for folder in (self.home, self._run_dir):
            if folder.exists():
                shutil.rmtree(folder)


def _belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return bool(process.environ().get("MN_HOME") == str(home))
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@contextmanager
def runtime(**settings: str) -> Iterator[Runtime]:
    """A runtime on free ports, with `MN_*` settings given by their full names. Stopped and removed however the block ends."""
    home = Path(tempfile.mkdtemp(prefix="mn-loadtest-"))
    it = Runtime(home, settings)
    try:
        it.mn("runtime", "start", "--ports", "auto")
        yield it
    finally:
        with undisturbed():
            it.stop()
            it.remove()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Cleaning up is not interrupted by a second Ctrl-C."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def child(command: list[str], environ: dict[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    process = subprocess.Popen(command, env=environ, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        with undisturbed():
            process.terminate()
            try:
                process.wait(KILLED_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
