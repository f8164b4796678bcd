"""What a sandbox sees, as bubblewrap's arguments. Pure but for looking at which system folders this machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

GUEST = "/mn/guest"
CODE = "/mn/code"
WORK = "/mn/work"
ROOT_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "timezone", "ssl/certs", "ssl/openssl.cnf",
       "ca-certificates", "pki/tls/certs", "pki/ca-trust", "fonts", "mime.types", "services", "protocols")  # fmt: skip
WRITABLE = ("/tmp", "/dev/shm", WORK)  # noqa: S108
SHARED_MEMORY_PART = 4
"""Shared memory gets this part of what the folder for temporary files may hold."""


def this_minor() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def launcher(setpriv: str, uid: int) -> list[str]:
    """The command before the interpreter: as root, what drops to the sandbox's uid and gives up every capability for good."""
    if not uid:
        return []
    return [
        setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
        "--no-new-privs", "--",
    ]  # fmt: skip


def arguments(
    guest: Path,
    code: Path | None,
    python: Path,
    tmp_bytes_max: int,
    uid: int,
    as_root: bool,
    environment: Mapping[str, str],
) -> list[str]:
    """Options for one sandbox, without those that name descriptors."""
    words = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"]
    words += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
    if as_root:
        for capability in ROOT_CAPABILITIES:
            words += ["--cap-add", capability]
    else:
        words += ["--unshare-user", "--disable-userns"]
    for name, value in environment.items():
        words += ["--setenv", name, value]
    words += _system()
    words += _interpreter(python)
    words += ["--perms", "0755", "--dir", "/mn", "--ro-bind", str(guest), GUEST]
    if code is not None:
        words += ["--ro-bind", str(code), CODE]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for folder, size in zip(WRITABLE, (tmp_bytes_max, tmp_bytes_max // SHARED_MEMORY_PART, tmp_bytes_max), strict=True):
        words += ["--perms", "1777", "--size", str(size), "--tmpfs", folder]
    return words


def closing_arguments() -> list[str]:
    """Options after all others: the root, bubblewrap's own small memory folder, is not to be written any more."""
    return ["--remount-ro", "/", "--chdir", WORK]


def _system() -> list[str]:
    words = ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM_FOLDERS:
        path = Path("/") / name
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    words += ["--perms", "0755", "--dir", "/etc"]
    for name in ETC:
        path = Path("/etc") / name
        if path.exists():
            words += [*_parents(path, Path("/etc")), "--ro-bind", str(path.resolve()), str(path)]
    return words


def _interpreter(python: Path) -> list[str]:
    """The installation that the interpreter belongs to, where it is not the system's."""
    prefix = python.resolve().parent.parent
    if prefix == Path("/usr") or Path("/usr") in prefix.parents or prefix == Path("/"):
        return []
    return [*_parents(prefix, Path("/")), "--ro-bind", str(prefix), str(prefix)]


def _parents(path: Path, above: Path) -> Iterator[str]:
    """Options that make the folders between `above` and `path` readable to the sandbox's uid; bubblewrap makes missing ones private."""
    for parent in reversed(path.parents):
        if parent != above and above in parent.parents:
            yield from ("--perms", "0755", "--dir", str(parent))


def synthetic_files(uid: int) -> list[tuple[str, bytes]]:
    """Files of /etc that tell nothing about this machine."""
    return [
        (
            "/etc/passwd",
            f"root:x:0:0:root:/:/usr/sbin/nologin\nsandbox:x:{uid}:{uid}:sandbox:{WORK}:/bin/sh\n".encode(),
        ),
        ("/etc/group", f"root:x:0:\nsandbox:x:{uid}:\n".encode()),
        ("/etc/hosts", b"127.0.0.1 localhost sandbox\n::1 localhost\n"),
        ("/etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n"),
        ("/etc/resolv.conf", b"# no network\n"),
    ]
