"""The floor of cold calls: bubblewrap with a sandbox's own arguments around a Python that imports what the child imports, from spawn to exit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loadtest.scratch import Failed
from mn.formats.settings import Settings
from mn_runner import guest, seccomp
from mn_runner.drivers import mounts
from mn_runner.drivers.bubblewrap import find_bwrap
from mn_runner.drivers.process import base_environment, python_for
from mn_runner.drivers.uids import Uids
from mn_runner.sandbox import Shape

IMPORTS = f"""
import sys; sys.path.insert(0, "{mounts.GUEST}")
import fcntl, os, resource
import mn_runner.inside.serve
"""
START_S = 60.0


class Start:
    """One command, ready to be started once: all that it needs is open."""

    def __init__(self, command: list[str], fds: Sequence[int]) -> None:
        self._command = command
        self._fds = fds

    def run(self) -> float:
        """Seconds from spawn to exit. Raises Failed when it ends with an error."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self._command,
            env={},
            pass_fds=self._fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        with process.stderr:
            told = process.stderr.read()
            status = process.wait(START_S)
        seconds = time.perf_counter() - began
        if status:
            raise Failed(f"the floor's sandbox ended with {status}: {told.decode('utf-8', 'replace').strip()}")
        return seconds


class Floor:
    """Makes starts. Leaving `made` gives back what they held."""

    def __init__(self, folder: Path) -> None:
        self._guest = guest.build(folder)
        self._code = folder / "code"
        self._code.mkdir(mode=0o755)
        self._shape = Shape("bubblewrap", mounts.this_minor())
        self._as_root = os.geteuid() == 0
        self._setpriv = shutil.which("setpriv") or ""
        self._bwrap = str(find_bwrap())
        self._python = python_for(self._shape, None)
        self._uids = Uids()

    @contextmanager
    def made(self, count: int, words: Sequence[str] = ()) -> Iterator[list[Start]]:
        """Starts of `words`, or else of the Python that imports what the child imports."""
        with ExitStack() as held:
            yield [
                self._make(held, words or [str(self._python), "-I", "-S", "-P", "-c", IMPORTS]) for _ in range(count)
            ]

    def _make(self, held: ExitStack, words: Sequence[str]) -> Start:
        uid = self._uids.take() if self._as_root else 0
        held.callback(self._uids.give_back, uid)
        environment = base_environment(self._shape, mounts.WORK)
        arguments = mounts.arguments(
            self._guest, self._code, self._python, Settings().tmp_bytes_max, uid, self._as_root, environment
        )
        fds = []
        for name, content in mounts.synthetic_files(uid or os.getuid()):
            fds.append(_memory_file(held, name, content))
            arguments += ["--perms", "0444", "--ro-bind-data", str(fds[-1]), name]
        fds.append(_memory_file(held, "seccomp", seccomp.assembled()))
        arguments += [*mounts.closing_arguments(), "--seccomp", str(fds[-1])]
        fds.append(_memory_file(held, "arguments", "\0".join(arguments).encode() + b"\0"))
        return Start([self._bwrap, "--args", str(fds[-1]), "--", *mounts.launcher(self._setpriv, uid), *words], fds)

    def once(self, words: Sequence[str] = ()) -> float:
        """Seconds of one start alone."""
        with self.made(1, words) as (start,):
            return start.run()

    def burst(self, count: int, at_once: int) -> float:
        """Seconds until all of `count` starts have ended, `at_once` side by side."""
        with self.made(count) as starts, ThreadPoolExecutor(at_once) as threads:
            began = time.perf_counter()
            for running in [threads.submit(start.run) for start in starts]:
                running.result()
            return time.perf_counter() - began

    def parts(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of less and less: where the floor's time goes."""
        words = {
            "bubblewrap_and_python_with_imports": [],
            "bubblewrap_and_bare_python": [str(self._python), "-I", "-S", "-P", "-c", "pass"],
            "bubblewrap_alone": ["/usr/bin/true"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in words}
        for _ in range(rounds):
            for name, each in words.items():
                seconds[name].append(self.once(each))
        return seconds


@contextmanager
def floor() -> Iterator[Floor]:
    """A floor with a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mn-loadtest-floor-") as folder:
        # As in a runtime's home, the sandbox's uid has to reach what is mounted from here only through the mount.
        yield Floor(Path(folder))


def _memory_file(held: ExitStack, name: str, content: bytes) -> int:
    fd = os.memfd_create(os.path.basename(name), os.MFD_CLOEXEC)
    held.callback(os.close, fd)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
