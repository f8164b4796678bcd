"""The ports of a runtime: those it was told, those it picked once and keeps, and who holds one that is taken."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from mn.formats.errors import Conflict
from mn.formats.settings import Settings
from mn_nodepool.supervisor.home import read_json, write_private

PORTS = ("api_port", "store_port", "dist_port", "mapper_port", "grpc_port", "sentinel_port")
FLAGS = {"api_port": "--api-port", "store_port": "--store-port"}


def resolve(
    wanted: Mapping[str, int],
    explicit: frozenset[str],
    kept: Mapping[str, int],
    is_free: Callable[[int], bool],
    pick: Callable[[], int],
) -> dict[str, int]:
    """Which port each name gets.

    A wanted port of 0 takes the one kept from an earlier start, if that is free, else a picked one. A port that nobody
    asked for explicitly stays the kept one, so that a runtime does not move when it is started again without its flags.
    """
    result: dict[str, int] = {}
    for name, port in wanted.items():
        if port == 0:
            before = kept.get(name, 0)
            port = before if before and is_free(before) else pick()
        elif name not in explicit:
            port = kept.get(name, port)
        result[name] = port
    return result


def settle(settings: Settings, environ: Mapping[str, str], runtime_table: Mapping[str, object]) -> Settings:
    """The settings with every port known; picked ones are kept in the home's `ports.json`."""
    file = settings.home / "ports.json"
    kept: dict[str, int] = read_json(file)
    explicit = frozenset(name for name in PORTS if environ.get("MN_" + name.upper()) or runtime_table.get(name))
    wanted = {name: int(getattr(settings, name)) for name in PORTS}
    taken: set[int] = set()

    def pick() -> int:
        while (port := free_port()) in taken:
            continue
        taken.add(port)
        return port

    ports = resolve(wanted, explicit, kept, lambda port: is_free("127.0.0.1", port), pick)
    keep = kept | {name: port for name, port in ports.items() if wanted[name] == 0}
    if keep != kept:
        write_private(file, json.dumps(keep))
    return settings.with_(**ports)


def check_free(settings: Settings) -> None:
    """Raise Conflict, naming who holds it and what to do, when a port that this runtime is about to open is taken."""
    wanted = [("api_port", settings.api_host)]
    if not settings.redis_url:
        wanted.insert(0, ("store_port", "127.0.0.1"))
    for name, host in wanted:
        port = getattr(settings, name)
        if not is_free(host, port):
            raise Conflict(taken_message(name, port, holder_of(port)), port=port)


def taken_message(name: str, port: int, holder: tuple[str, int] | None) -> str:
    """What a user reads when `port` is taken: by whom, and the commands that solve it."""
    who = f"{holder[0]} (pid {holder[1]})" if holder else "another process"
    lines = [f"port {port} is taken by {who}."]
    move = f"mn runtime start {FLAGS[name]} {port + 1}      (--ports auto for all)"
    if name == "store_port" and holder and ("redis" in holder[0] or "valkey" in holder[0]):
        lines.append(f"  Use it:       MN_REDIS_URL=redis://127.0.0.1:{port}/0 mn runtime start")
        lines.append(f"  Or move ours: {move}")
    else:
        lines.append(f"  Move ours: {move}")
    return "\n".join(lines)


def is_free(host: str, port: int) -> bool:
    """Whether a listener could be opened there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def holder_of(port: int) -> tuple[str, int] | None:
    """Name and pid of the process that listens on a TCP port, where this user may see it."""
    inodes = {inode for table in ("/proc/net/tcp", "/proc/net/tcp6") for inode in _listening(Path(table), port)}
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(fd) in wanted for fd in (process / "fd").iterdir()):
                return (process / "comm").read_text().strip(), int(process.name)
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
    return None


def _listening(table: Path, port: int) -> list[str]:
    if not table.exists():
        return []
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]
