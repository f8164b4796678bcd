"""A fresh Debian, made with debootstrap and entered as if it were a machine of its own; and a shell in it that follows a text.

The root is kept per machine in a cache folder, under a name that says what was installed into it; every test works on a copy.
How the host reaches its package sources (pip's settings, certificates, name servers) is handed in by environment and mounts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

SUITE = "bookworm"
BUILD_S = 900
HANDED_IN = ("PIP_", "SSL_", "CURL_", "REQUESTS_CA", "HTTP_", "HTTPS_", "NO_PROXY", "ALL_PROXY")
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf")
MARK = "-- mark of the session --"


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    folder = Path(base) / "mirrorneuron-tests"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def require_debootstrap() -> None:
    """Skip where a fresh root can't be made."""
    if os.geteuid() != 0:
        pytest.skip("a fresh root is made and entered by root alone; this is an ordinary user")
    for tool, package in (("debootstrap", "debootstrap"), ("unshare", "util-linux"), ("git", "git")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install {package}")


def prepared_root(packages: Sequence[str]) -> Path:
    """The cached root with these packages; made when it is not there yet."""
    key = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]
    root = cache_folder() / f"{SUITE}-{key}"
    with open(cache_folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            making = Path(tempfile.mkdtemp(prefix="making-", dir=cache_folder()))
            try:
                _make(making, packages)
                making.rename(root)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return root


def _make(root: Path, packages: Sequence[str]) -> None:
    root.chmod(0o755)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    for argv in (
        ["debootstrap", "--variant=minbase", SUITE, str(root)],
        ["chroot", str(root), "apt-get", "install", "-y", "-q", *packages],
        ["chroot", str(root), "apt-get", "clean"],
    ):
        done = subprocess.run(argv, env=quiet, capture_output=True, text=True, timeout=BUILD_S, check=False)
        assert done.returncode == 0, f"{shlex.join(argv)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def handed_in() -> tuple[dict[str, str], list[Path]]:
    """(variables, files and folders) through which the host reaches its package sources."""
    variables = {name: value for name, value in os.environ.items() if name.upper().startswith(HANDED_IN)}
    config = Path.home() / ".config" / "pip" / "pip.conf"
    texts = [*variables.values(), *(path.read_text() for path in (config, Path("/etc/pip.conf")) if path.exists())]
    words = [word.removeprefix("file://") for text in texts for word in text.replace("=", " ").split()]
    named = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    # Of an index's folder, what lies beside it belongs to it as well.
    named = {path.parent if path.name == "simple" else path for path in named}
    if config.exists():
        variables.setdefault("PIP_CONFIG_FILE", str(config))
        named.add(config)
    return variables, sorted(named | {Path(name) for name in HOST_FILES if Path(name).exists()})


class Shell:
    """One bash session in a root: each command's output and exit code."""

    def __init__(self, process: subprocess.Popen[str], script: Path) -> None:
        self._process = process
        self._script = open(script, "w")  # noqa: SIM115 - it lives as long as the session

    def __call__(self, command: str) -> tuple[str, int]:
        self._script.write(f"{command}\nprintf '\\n{MARK} %s\\n' $?\n")
        self._script.flush()
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                return "".join(lines).rstrip("\n"), int(line.removeprefix(MARK))
            lines.append(line)
        raise AssertionError(f"the session ended at {command!r}:\n{''.join(lines)}")

    def close(self) -> None:
        self._script.close()


@contextmanager
def shell_in(root: Path, cwd: str, variables: dict[str, str]) -> Iterator[Shell]:
    """A session in a root with its own mounts and processes, all of which end with it."""
    given, paths = handed_in()
    pip_cache = cache_folder() / "pip"
    pip_cache.mkdir(exist_ok=True)
    mounts = [
        "set -e",
        "mount --make-rprivate /",
        # bubblewrap wants a root that is a mount, and pivot_root too.
        f"mount --bind {root} {root}",
        f"cd {root}",
        "mount -t proc proc proc",
        "mount --rbind /sys sys",
        "mount --rbind /dev dev",
        "mount -t tmpfs -o mode=1777 tmpfs tmp",
        "mkdir -p var/pip-cache .host",
        f"mount --bind {pip_cache} var/pip-cache",
        "mkfifo -m 600 session",
    ]
    for path in paths:
        inside = f".{path}"
        make = f"mkdir -p {inside}" if path.is_dir() else f"mkdir -p {Path(inside).parent} && touch {inside}"
        mounts += [make, f"mount --bind {path} {inside}"]
    mounts += ["pivot_root . .host", "umount -l /.host", f"cd {cwd}", "echo ready", "exec bash /session"]
    environ = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PIP_CACHE_DIR": "/var/pip-cache",
        **given,
        **variables,
    }
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "bash", "-c", "\n".join(mounts)]
    with session(argv, root / "session", environ, ready=True) as shell:
        yield shell


@contextmanager
def session(
    argv: Sequence[str], script: Path, environ: dict[str, str], cwd: Path | None = None, *, ready: bool = False
) -> Iterator[Shell]:
    """A shell that reads its commands from a pipe at `script`; `ready`: it says so first, when the pipe is there."""
    process = subprocess.Popen(
        argv,
        env=environ,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        if ready:
            first = process.stdout.readline()
            assert first == "ready\n", first + process.stdout.read()
        shell = Shell(process, script)
        try:
            yield shell
        finally:
            shell.close()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
