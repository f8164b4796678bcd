"""The children of a supervisor: what is run, in which environment, and how each says that it is ready."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mn.formats.errors import Unavailable
from mn.formats.settings import Settings
from mn_nodepool.store.embedded import EmbeddedStore

PING_TIMEOUT_S = 1.0
STOP_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep running."""

    name: str
    argv: tuple[str, ...]
    log: Path
    is_ready: Callable[[int], bool]
    """Given its pid: does it serve by now?"""
    env: Mapping[str, str] = field(default_factory=dict)
    stop_s: float = 10.0
    """Seconds between asking it to end and killing it."""
    stop_rank: int = 0
    """Lower ranks end first: gateways, so that no call is admitted any more and running ones can end; then the node;
    the store last."""
    watches_pipe: bool = True
    """It gets `MN_ALIVE_FD`, a pipe that reaches its end when the supervisor dies, and ends itself then."""


def plan(settings: Settings, environ: Mapping[str, str]) -> list[list[Child]]:
    """The children in the order of their start: those of one phase start together, when the phase before is ready.

    Raises Unavailable when there is no store to run or to use.
    """
    env = {k: v for k, v in environ.items() if k not in ("MN_ALIVE_FD", "NOTIFY_SOCKET")} | settings.environ()
    phases: list[list[Child]] = []
    if settings.redis_url:
        check_external(settings.redis_url)
    else:
        phases.append([store_child(settings, environ)])
    node = Child(
        "node",
        (sys.executable, "-P", "-m", "mn_nodepool.node"),
        settings.logs_dir / "node.log",
        lambda pid: says_ready(settings.run_dir / "node.json", pid),
        env,
        settings.drain_s + STOP_MARGIN_S,
        stop_rank=1,
    )
    gateways = [gateway_child(settings, env, index) for index in range(1, settings.gateways + 1)]
    phases.append([node, *gateways])
    return phases


def gateway_child(settings: Settings, env: Mapping[str, str], index: int) -> Child:
    name = f"gateway-{index}"
    return Child(
        name,
        (sys.executable, "-P", "-m", "mn_gateway.serve"),
        settings.logs_dir / f"{name}.log",
        lambda pid: says_ready(settings.run_dir / f"{name}.json", pid),
        {**env, "MN_GATEWAY_INDEX": str(index)},
        settings.drain_s + STOP_MARGIN_S,
    )


def store_child(settings: Settings, environ: Mapping[str, str]) -> Child:
    """The embedded store, after ending one that an earlier run left.

    Raises Unavailable when there is no server binary.
    """
    store = EmbeddedStore(settings)
    argv = store.prepare()
    password = store.password
    return Child(
        "store",
        tuple(argv),
        settings.logs_dir / "store.log",
        lambda _pid: answers_ping(settings.store_port, password),
        {k: v for k, v in environ.items() if not k.startswith("MN_")},
        stop_rank=2,
        watches_pipe=False,
    )


def describe_store(settings: Settings) -> str:
    """One line for people."""
    if settings.redis_url:
        return "external, as MN_REDIS_URL says"
    return f"{EmbeddedStore(settings).binary.label} embedded, append-only"


def says_ready(file: Path, pid: int) -> bool:
    """Whether the child with this pid has written that it is ready."""
    try:
        said = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return said.get("pid") == pid and said.get("ready") is True


def answers_ping(port: int, password: str) -> bool:
    """Whether the embedded store takes its password and answers PING."""
    return _ping("127.0.0.1", port, ("AUTH", password)) == ""


def check_external(url: str) -> None:
    """Raise Unavailable, with what to check, when the store that MN_REDIS_URL names can't be used."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 6379
    name, password = unquote(parts.username or ""), unquote(parts.password or "")
    auth = ("AUTH", *((name,) if name else ()), password) if password else ()
    # A TLS handshake is left to the node: its library would more than double this process.
    why = _connects(host, port) if parts.scheme == "rediss" else _ping(host, port, auth)
    if why:
        raise Unavailable(
            f"the store at {host}:{port} does not work: {why}. Check MN_REDIS_URL, and that it is running."
        )


def _connects(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), PING_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _ping(host: str, port: int, auth: tuple[str, ...]) -> str:
    """Why a Redis-protocol server does not take the credentials and answer PING; empty when it does."""
    wanted = 2 if auth else 1
    answer = b""
    try:
        with socket.create_connection((host, port), PING_TIMEOUT_S) as link:
            link.sendall((_command(auth) if auth else b"") + _command(("PING",)))
            while answer.count(b"\r\n") < wanted and (data := link.recv(512)):
                answer += data
    except OSError as error:
        return error.strerror or str(error)
    refusals = [line[1:].decode("utf-8", "replace") for line in answer.splitlines() if line.startswith(b"-")]
    if refusals:
        return refusals[0]
    return "" if b"+PONG" in answer else "it does not speak the Redis protocol"


def _command(words: tuple[str, ...]) -> bytes:
    encoded = [word.encode() for word in words]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)


def spawn(child: Child, alive_fd: int) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone.

    Where `setpriv` is present the kernel also ends it when the supervisor dies; that works for the thread that spawns,
    of which a supervisor has one.
    """
    prefix = ("setpriv", "--pdeathsig", "TERM", "--") if sys.platform == "linux" and shutil.which("setpriv") else ()
    env = dict(child.env)
    if child.watches_pipe:
        env["MN_ALIVE_FD"] = str(alive_fd)
    log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [*prefix, *child.argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd="/",
            pass_fds=(alive_fd,) if child.watches_pipe else (),
            start_new_session=True,
        )
    finally:
        os.close(log)


def last_lines(log: Path, count: int = 12, bytes_max: int = 8192) -> str:
    """The end of a log, for a message about the process that wrote it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - bytes_max))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-count:])


def rotate(log: Path, bytes_max: int, files_max: int) -> bool:
    """Set a log aside when it has grown too large, and drop the oldest; whether it did.

    The writer keeps its descriptor (which appends), so the content is copied and the file cut; lines written in between
    are lost.
    """
    if not log.exists() or log.stat().st_size < bytes_max:
        return False
    for number in range(files_max - 1, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))
    log.with_name(f"{log.name}.{files_max}").unlink(missing_ok=True)
    with log.open("rb") as source, log.with_name(f"{log.name}.1").open("wb") as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)
    os.truncate(log, 0)
    return True
