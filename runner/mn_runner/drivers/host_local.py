"""A driver that isolates nothing: the child is a plain process of this user. For machines without namespaces, and only when asked for."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

from mn_runner import guest
from mn_runner.drivers import folders
from mn_runner.drivers.process import Ends, Identity, Spawner, base_environment, python_for, read_record, write_record
from mn_runner.sandbox import Death, Handle, Shape

END_WAIT_S = 10.0


class HostLocal:
    """Sandboxes in name only; see `mn_runner.sandbox.Driver` for the contract."""

    name = "host_local"

    def __init__(self, run_dir: Path, python: Path | None = None) -> None:
        """`run_dir` is the runtime's `run/`; `python` another interpreter than this process's."""
        self._guest = guest.build(run_dir)
        self._sandboxes = run_dir / "sandboxes"
        self._sandboxes.mkdir(mode=0o700, exist_ok=True)
        self._python = python
        self._spawner = Spawner()
        self._setpriv = shutil.which("setpriv")

    async def check(self) -> tuple[str, ...]:
        return ()

    async def start(self, sandbox: str, shape: Shape) -> Handle:
        python = python_for(shape, self._python)
        folder = self._sandboxes / sandbox
        for path in (folder, folder / "code", folder / "work"):
            path.mkdir(mode=0o700)
        ends = Ends.make()
        words = [str(python), "-I", "-S", "-P", str(self._guest / "child.py"), f"fds={ends.child[0]},{ends.child[1]}"]
        if self._setpriv and sys.platform == "linux":
            words = [self._setpriv, "--pdeathsig", "KILL", "--", *words]
        environment = base_environment(shape, str(folder / "work"))
        try:
            pid, exited = await self._spawner.spawn(words, ends.child[:2], ends.child[2], folder / "work", environment)
        except BaseException:
            ends.close_ours()
            folders.remove(self._sandboxes, sandbox)
            raise
        finally:
            ends.close_child()
        identity = Identity.of(pid)
        write_record(folder, [identity] if identity else [])
        return Handle(
            sandbox,
            ends.protocol,
            ends.control,
            ends.output,
            pid,
            exited,
            folder / "code",
            str((folder / "code").resolve()),
        )

    async def provide(self, handle: Handle, payload: Path) -> None:
        await asyncio.to_thread(folders.fill, payload, handle.bundle_mount)

    async def destroy(self, handle: Handle, reason: str) -> Death:
        if not handle.exited.done():
            end_session(handle.pid)
        death = await asyncio.wait_for(asyncio.shield(handle.exited), END_WAIT_S)
        end_session(handle.pid)
        await asyncio.to_thread(folders.remove, self._sandboxes, handle.id)
        return death

    async def reap(self) -> int:
        found = 0
        for folder in sorted(self._sandboxes.iterdir()):
            for process in read_record(folder)[0]:
                if process.alive():
                    end_session(process.pid)
            await asyncio.to_thread(folders.remove, self._sandboxes, folder.name)
            found += 1
        return found

    async def close(self) -> None:
        self._spawner.close()


def end_session(leader: int) -> None:
    """Kill the processes of a sandbox's session: its process group, and on Linux also those that made groups of their own."""
    for pid in _session_members(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _session_members(leader: int) -> list[int]:
    if sys.platform != "linux":
        return []
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader:
                members.append(int(entry))
    return members
