"""What this machine has."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import psutil


class Inventory(NamedTuple):
    cpu: float
    """Cores that this process may use."""
    memory_mb: int
    gpus: int
    python: tuple[str, ...]
    """Interpreter minors that sandboxes can have."""


class Facts(NamedTuple):
    """What a node says of itself."""

    node: str
    inventory: Inventory
    layers: tuple[str, ...]
    version: str
    started_ms: int


def take_inventory() -> Inventory:
    """Ask the system once; GPUs are found when a driver is there to use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Inventory(float(cores), psutil.virtual_memory().total >> 20, 0, (minor,))
