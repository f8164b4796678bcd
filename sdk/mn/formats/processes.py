"""Which process a pid names: pids are reused, so a process is its pid together with the moment at which it started."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

_STAT_STATE = 0
_STAT_STARTED = 19


def started(pid: int) -> str:
    """When a process started, as text that no other process on this machine shares; empty when it has ended.

    A zombie has ended. On Linux it is the boot's id and the clock ticks since boot, elsewhere what `ps` tells.
    """
    if pid <= 0:
        return ""
    if not Path("/proc/self/stat").exists():
        return _started_by_ps(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[_STAT_STATE] in "ZX":
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{fields[_STAT_STARTED]}"


def _started_by_ps(pid: int) -> str:
    ps = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, when = ps.stdout.strip().partition(" ")
    return "" if not when or state.startswith("Z") else when.strip()


def is_alive(pid: int, since: str) -> bool:
    """Whether the process that had this pid and start (from `started`) still runs."""
    return bool(since) and started(pid) == since


def end(pid: int, since: str, *, grace_s: float) -> bool:
    """Ask a process to end, and kill it when it has not after `grace_s` seconds; False when it had ended before."""
    if not is_alive(pid, since):
        return False
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        if wait(pid, since, patience_s):
            return True
    return True


def wait(pid: int, since: str, timeout_s: float) -> bool:
    """Wait until a process, a child or not, has ended; False when it still runs after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    try:
        watch = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    except ProcessLookupError:
        return True
    try:
        while is_alive(pid, since):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if watch >= 0:
                select.select([watch], [], [], left_s)
            else:
                time.sleep(min(left_s, 0.05))
        return True
    finally:
        if watch >= 0:
            os.close(watch)
