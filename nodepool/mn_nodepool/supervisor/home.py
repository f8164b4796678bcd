"""The home of a runtime: its folders, its lock, this node's alias, and the first key."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mn.formats import processes
from mn.formats.errors import Conflict, Forbidden, InvalidRequest
from mn.formats.settings import Settings, read_config

NETWORK_FILESYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "9p",
        "ceph",
        "glusterfs",
        "lustre",
        "afs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "beegfs",
    }
)
SHOWS_ITSELF_S = 5.0
FIRST_KEY_ENTROPY_BYTES = 32


class AlreadyRunning(Conflict):
    """A runtime holds this home's lock; `pid` is its supervisor."""


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner alone."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    aside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty when there is no file, or a crash left no whole one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def prepare(settings: Settings) -> None:
    """Make the folders that every process expects.

    Raises Forbidden when the folder for sockets exists and is somebody else's, InvalidRequest when a folder can't be
    made.
    """
    try:
        _make_folders(settings)
    except OSError as error:
        raise InvalidRequest(
            f"{settings.home} can't be a home: {error.filename}: {error.strerror}. Choose another folder: MN_HOME=…",
            path="home",
        ) from None


def _make_folders(settings: Settings) -> None:
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (settings.run_dir, settings.lock_file.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Forbidden(f"{folder} belongs to somebody else; remove it, or choose another home: MN_HOME=…")
        folder.chmod(0o700)
    for folder in (settings.bundles_dir, settings.logs_dir, settings.home / "failures"):
        folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def locked(settings: Settings, host: str, networked: bool) -> Iterator[None]:
    """Hold the home's lock.

    Raises AlreadyRunning for a second runtime on this host, and Conflict for a network home that another host uses:
    there the kernel's lock need not reach across hosts, so the host's id in the file counts.
    """
    fd = os.open(settings.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd)
            if holder.get("host", host) != host:
                raise _elsewhere(settings, holder) from None
            pid = holder.get("pid", 0)
            if not _shows_itself(settings):
                raise Conflict(
                    f"{settings.home} is run by pid {pid}, but its folder {settings.run_dir} is lost, so nothing can reach it. "
                    f"End it with: kill {pid}   then start again.",
                    pid=pid,
                ) from None
            raise AlreadyRunning(
                f"{settings.home} is run by pid {pid} already. For a second runtime here choose another home "
                "and other ports: mn runtime start --home DIR --ports auto",
                pid=pid,
            ) from None
        holder = _holder(fd)
        if networked and holder and holder.get("host") != host:
            raise _elsewhere(settings, holder)
        me = {"host": host, "hostname": socket.gethostname(), "pid": os.getpid()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(me).encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _shows_itself(settings: Settings) -> bool:
    """Whether the runtime that holds the lock is to be found; one that has just begun gets a while."""
    deadline = time.monotonic() + SHOWS_ITSELF_S
    while not (settings.run_dir / "children.json").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _holder(fd: int) -> dict[str, Any]:
    text = os.pread(fd, 4096, 0)
    try:
        return dict(json.loads(text)) if text else {}
    except ValueError:
        return {}


def _elsewhere(settings: Settings, holder: dict[str, Any]) -> Conflict:
    return Conflict(
        f"{settings.home} is used by the host {holder.get('hostname', 'unknown')} (pid {holder.get('pid')}). "
        "Give each host a home of its own: MN_HOME=/var/lib/mn mn runtime start. "
        f"If that host is gone for good, remove {settings.lock_file} and start again."
    )


def host_id() -> str:
    """What tells this host from others that may see the same home."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            if text := Path(place).read_text().strip():
                return text
    return platform.node()


def is_networked(path: Path) -> bool:
    """Whether a path lies on a file system that other hosts can mount too."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return False
    place, best, kind = str(path.resolve()), "", ""
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind in NETWORK_FILESYSTEMS


def with_alias(settings: Settings, entropy: bytes) -> Settings:
    """The settings with this node's short name, which is made once and kept in `node.json`; a given one is kept too."""
    file = settings.home / "node.json"
    known = read_json(file)
    alias = settings.node_alias or known.get("alias") or f"mn-{entropy[:4].hex()}"
    if not alias.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(alias) > 63:
        raise InvalidRequest(f"MN_NODE_ALIAS: {alias!r} is no name: letters, digits, - _ . and at most 63 of them")
    if known.get("alias") != alias:
        write_private(file, json.dumps(known | {"alias": alias}))
    return settings.with_(node_alias=alias)


def give_first_key(settings: Settings, entropy: bytes) -> None:
    """See to it that the CLI and the SDK on this machine have a key that the runtime knows.

    The secret goes to `config.toml`; its hash waits in `run/bootstrap_key.json` until the node has put it into the
    store; one that was not made just now gets in only while the store has no admin's key. A client that is logged in
    to another cluster keeps its configuration.
    """
    known = read_json(settings.home / "node.json")
    client = read_config(settings.home).get("client", {})
    url = f"http://{reachable(settings.api_host)}:{settings.api_port}"
    local = not client.get("url") or client["url"] in (url, known.get("url"))
    if not local:
        return
    secret = client.get("key", "")
    if not secret or _store_is_new(settings):
        from mn.formats.keys import new_key  # brings a cryptography library, which later starts do not need

        key = new_key(entropy[:FIRST_KEY_ENTROPY_BYTES])
        record = {"id": key.id, "sha256": key.sha256, "name": "first", "scopes": ["admin"], "made": True}
        write_private(settings.run_dir / "bootstrap_key.json", json.dumps(record))
        secret = key.secret
    elif settings.redis_url:
        from mn.formats.keys import hash_key  # another store may be behind the address than last time

        name = "key_" + secret.split("_")[1] if secret.count("_") == 3 else "key_first"
        record = {"id": name, "sha256": hash_key(secret), "name": "first", "scopes": ["admin"], "made": False}
        write_private(settings.run_dir / "bootstrap_key.json", json.dumps(record))
    if client.get("url") != url or client.get("key") != secret:
        from mn.config import write_table  # likewise: an ordinary start has nothing to write

        write_table(settings.home, "client", {**client, "url": url, "key": secret})
    if known.get("url") != url:
        write_private(settings.home / "node.json", json.dumps(known | {"url": url}))


def forget_first_key(settings: Settings) -> None:
    """Once the store has the key its hash need not wait; a key that is revoked later must not come back."""
    (settings.run_dir / "bootstrap_key.json").unlink(missing_ok=True)


def _store_is_new(settings: Settings) -> bool:
    folder = settings.store_dir
    return not settings.redis_url and (not folder.exists() or not any(folder.iterdir()))


def reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104


def end_leftovers(settings: Settings) -> list[str]:
    """End what a supervisor that was killed left running; the names of those children.

    A pid counts only together with the start time that was noted for it, so a stranger that got the pid since is left
    alone.
    """
    noted = read_json(settings.run_dir / "children.json").get("children", {})
    ended = [name for name, it in noted.items() if processes.is_alive(it["pid"], it["started"])]
    for name in ended:
        processes.end(noted[name]["pid"], noted[name]["started"], grace_s=10.0)
        print(f"ended {name} (pid {noted[name]['pid']}), left by a supervisor that was killed", file=sys.stderr)
    clear_run(settings)
    return ended


def leave_run(settings: Settings) -> None:
    """`clear_run` when nothing runs any more. A folder for sockets outside the home goes too, unless a first key that
    the store does not have yet waits in it.
    """
    clear_run(settings)
    outside = settings.run_dir != settings.home / "run"
    if outside and not (settings.run_dir / "bootstrap_key.json").exists():
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def clear_run(settings: Settings) -> None:
    """Remove what tells others of running processes."""
    for file in settings.run_dir.glob("*"):
        if (
            file.name in {"endpoints.json", "children.json", "node.json"}
            or file.suffix == ".sock"
            or (file.name.startswith("gateway-") and file.suffix == ".json")
        ):
            file.unlink(missing_ok=True)
