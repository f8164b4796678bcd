"""What the drivers on this machine share: descriptors, spawning, watching, ending, and the record of what runs.

Processes are started from one long-lived thread: `--die-with-parent` and `--pdeathsig` react to the death of the thread that started them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mn.formats.errors import SandboxUnavailable
from mn_runner.sandbox import Death, Refused, Shape

RECORD = "sandbox.json"
SOCKET_BUFFER_BYTES = 256 * 1024


@dataclass(slots=True)
class Ends:
    """Descriptors of one sandbox: the node's, and the child's until it is spawned."""

    protocol: int
    control: int
    output: int
    child: tuple[int, int, int]
    """Socket, read end of the control pipe, write end of the output pipe."""

    @classmethod
    def make(cls) -> Ends:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        control_read, control_write = os.pipe()
        output_read, output_write = os.pipe()
        return cls(ours.detach(), control_write, output_read, (theirs.detach(), control_read, output_write))

    def close_child(self) -> None:
        for fd in self.child:
            os.close(fd)

    def close_ours(self) -> None:
        for fd in (self.protocol, self.control, self.output):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that can't be mistaken for a later one with its number."""

    pid: int
    started: int
    """Clock ticks after boot (field 22 of `/proc/<pid>/stat`); 0 where there is no `/proc`."""

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The process with this number now, or None."""
        if sys.platform != "linux":
            return cls(pid, 0)
        try:
            text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = text.rpartition(")")[2].split()
        return None if fields[0] == "Z" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return Identity.of(self.pid) == self


class Spawner:
    """Starts processes with exact descriptors, and resolves a future when each ends."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "mn-spawn")
        self._waiters: set[asyncio.Task[None]] = set()

    async def spawn(
        self,
        command: Sequence[str],
        fds: Sequence[int],
        output: int,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, asyncio.Future[Death]]:
        """Start `command` in a session of its own with `fds`, `output` as stdout and stderr, and no other descriptor: its pid and its end.

        Raises SandboxUnavailable when the program can't be started.
        """
        loop = asyncio.get_running_loop()
        try:
            process = await loop.run_in_executor(self._thread, _popen, command, fds, output, cwd, env)
        except OSError as error:
            raise SandboxUnavailable(f"{command[0]} could not be started: {error}") from None
        exited: asyncio.Future[Death] = loop.create_future()
        self._watch(process, exited, loop)
        return process.pid, exited

    def _watch(
        self, process: subprocess.Popen[bytes], exited: asyncio.Future[Death], loop: asyncio.AbstractEventLoop
    ) -> None:
        if not hasattr(os, "pidfd_open"):
            task = loop.create_task(_wait_in_thread(process, exited))
            self._waiters.add(task)
            task.add_done_callback(self._waiters.discard)
            return
        pidfd = os.pidfd_open(process.pid)

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            code = process.wait()
            if not exited.done():
                exited.set_result(death_of(code))

        loop.add_reader(pidfd, ended)

    def close(self) -> None:
        """Ends the thread, and with it what was started to die with it."""
        self._thread.shutdown(wait=False)


async def _wait_in_thread(process: subprocess.Popen[bytes], exited: asyncio.Future[Death]) -> None:
    code = await asyncio.to_thread(process.wait)
    if not exited.done():
        exited.set_result(death_of(code))


def _popen(
    command: Sequence[str], fds: Sequence[int], output: int, cwd: Path | None, env: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=cwd,
        env=dict(env or {}),
        pass_fds=fds,
        start_new_session=True,
    )


def death_of(code: int) -> Death:
    """A wait status as Popen gives it; bubblewrap reports a signal of its child as 128 + number."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number in signal.valid_signals():
        return Death(None, signal.Signals(number).name)
    return Death(code, None)


def write_record(folder: Path, processes: Sequence[Identity], uid: int = 0) -> None:
    """What `reap` needs when this process is gone."""
    record = {"processes": [[p.pid, p.started] for p in processes], "uid": uid}
    aside = folder / (RECORD + ".new")
    aside.write_text(json.dumps(record))
    aside.rename(folder / RECORD)


def read_record(folder: Path) -> tuple[list[Identity], int]:
    """Processes and uid of a recorded sandbox; nothing where a crash left no whole record."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return [Identity(pid, started) for pid, started in record["processes"]], record["uid"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return [], 0


def python_for(shape: Shape, python: Path | None) -> Path:
    """The interpreter to run: `python`, or the one beneath this process's virtual environment.

    Raises Refused when it is not the version that the shape asks for.
    """
    if python is not None:
        return python
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if shape.python != mine:
        raise Refused(
            f"this node runs Python {mine} and the function wants {shape.python}; deploy it with python={mine!r}",
            fix=f"start the node with Python {shape.python}",
        )
    return Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


def base_environment(shape: Shape, home: str) -> dict[str, str]:
    """The clean environment that every child starts with; LOAD adds the function's own."""
    threads = str(max(1, round(shape.cpu)))
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
