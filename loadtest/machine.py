"""Facts about the machine that a reader of the figures wants to know."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("mirrorneuron", "uvicorn", "uvloop", "starlette")


def facts() -> dict[str, Any]:
    """The processor, the system, and how busy it is by others at this moment."""
    return {
        "cpu": _processor(),
        "cores": cores(),
        "memory_mb": psutil.virtual_memory().total >> 20,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
        "as_root": os.geteuid() == 0,
        "packages": {name: version(name) for name in PACKAGES},
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
