"""Sandboxes for tests: a driver on a loop of its own, and blocking functions over it."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from mn_runner.drivers.bubblewrap import Bubblewrap
from mn_runner.drivers.host_local import HostLocal
from mn_runner.drivers.mounts import this_minor
from mn_runner.sandbox import Death, Driver, Handle, Shape
from tests.support.session import Nested, Session

WAIT_S = 60.0
DRIVERS: dict[str, Callable[[Path], Driver]] = {
    "bubblewrap": lambda run: Bubblewrap(run, tmp_bytes_max=16 << 20),
    "host_local": HostLocal,
}


class Sandbox:
    """A started sandbox and the session with its child."""

    def __init__(self, lab: Lab, handle: Handle, answer: Callable[[Nested], Any] | None) -> None:
        self._lab = lab
        self.handle = handle
        self.session = Session(handle.protocol, handle.control, answer)
        self._closed = False

    def provide(self, files: dict[str, str], folder: Path) -> None:
        """Make `files` (name → source) its code."""
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        self._lab.run(self._lab.driver.provide(self.handle, folder))

    def raw_output(self) -> bytes:
        """What the child wrote to its raw stdout and stderr so far."""
        os.set_blocking(self.handle.output, False)
        try:
            return os.read(self.handle.output, 1 << 16)
        except BlockingIOError:
            return b""

    def death(self) -> Death:
        """Wait for the main process to end by itself."""

        async def wait() -> Death:
            return await asyncio.wait_for(asyncio.shield(self.handle.exited), WAIT_S)

        return self._lab.run(wait())

    def session_closed(self) -> None:
        """Say that the test closed the session itself."""
        self._closed = True
        os.close(self.handle.output)

    def destroy(self) -> Death:
        death = self._lab.run(self._lab.driver.destroy(self.handle, "the test is over"))
        if not self._closed:
            self._closed = True
            self.session.close()
            os.close(self.handle.output)
        return death


class Lab:
    """One driver in one `run/` folder, driven from a blocking test."""

    def __init__(self, driver: str, run_dir: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab")
        self._thread.start()
        self._numbers = itertools.count(1)
        self._folders = itertools.count(1)
        self.run_dir = run_dir
        self.driver = DRIVERS[driver](run_dir)
        self.shape = Shape(driver, this_minor())
        self.live: list[Sandbox] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def start(self, answer: Callable[[Nested], Any] | None = None) -> Sandbox:
        """A spare: started, READY received."""
        handle = self.run(self.driver.start(f"sbx_{next(self._numbers)}", self.shape))
        sandbox = Sandbox(self, handle, answer)
        self.live.append(sandbox)
        sandbox.session.wait_ready()
        return sandbox

    def load(
        self, source: str | dict[str, str], entry: str, answer: Callable[[Nested], Any] | None = None, **members: Any
    ) -> Sandbox:
        """A sandbox that has become `entry` of `source` (the text of `app.py`, or many files)."""
        sandbox = self.start(answer)
        folder = self.run_dir / f"payload-{next(self._folders)}"
        sandbox.provide({"app.py": source} if isinstance(source, str) else source, folder)
        loaded = sandbox.session.load(entry, sandbox.handle.code_root, **members)
        assert loaded == {}, loaded
        return sandbox

    def close(self) -> None:
        for sandbox in self.live:
            sandbox.destroy()
        self.run(self.driver.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
