"""The contract between an executor and the drivers that make sandboxes, and a sandbox's lifecycle.

After `destroy` returns, no process of the sandbox is left and its folder is gone; calling it again does nothing. A protocol violation,
whoever notices it, ends in `destroy`. A driver never runs user code before every layer and limit that `layers()` names is in force; what it
can't give, it refuses with `Refused` and the command that fixes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from mn.formats.errors import SandboxUnavailable


class State(StrEnum):
    STARTING = "starting"
    SPARE = "spare"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.SPARE, State.STOPPING, State.DEAD}),
    State.SPARE: frozenset({State.LOADING, State.STOPPING, State.DEAD}),
    State.LOADING: frozenset({State.READY, State.STOPPING, State.DEAD}),
    State.READY: frozenset({State.STOPPING, State.DEAD}),
    State.STOPPING: frozenset({State.DEAD}),
    State.DEAD: frozenset(),
}


class Refused(SandboxUnavailable):
    """The driver can't isolate here; `fix` is the command that changes it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that is fixed when a sandbox starts. Spares are kept per shape."""

    driver: str
    python: str
    memory_mb: int = 512
    cpu: float = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """How a sandbox's main process ended."""

    exit_code: int | None
    signal: str | None
    out_of_memory: bool = False

    def sentence(self) -> str:
        if self.out_of_memory:
            return "it ran out of memory"
        if self.signal:
            return f"it was killed by {self.signal}"
        return f"it exited with code {self.exit_code}"


@dataclass(frozen=True, slots=True)
class Handle:
    """A started sandbox as the executor sees it: descriptors to talk to its child. Whoever gets the handle owns them."""

    id: str
    protocol: int
    """Socket of the child protocol."""
    control: int
    """Write end of the control pipe."""
    output: int
    """Read end of what the sandbox writes to its raw stdout and stderr."""
    pid: int
    """Of the outermost process, in this namespace."""
    exited: asyncio.Future[Death]
    """Resolves once when the main process has ended, however it ended."""
    bundle_mount: Path
    """Host folder that the sandbox sees, read-only, as its code folder: the executor puts the payload here before LOAD (see `Driver.provide`)."""
    code_root: str
    """The same folder as the child sees it."""
    extra: dict[str, object] = field(default_factory=dict)


class Driver(Protocol):
    """Makes sandboxes. One instance per node process."""

    name: str

    async def check(self) -> tuple[str, ...]:
        """The isolation layers that it will put in force here. Raises Refused when one that it promises is missing."""

    async def start(self, sandbox: str, shape: Shape) -> Handle:
        """Start a sandbox whose child will send READY. Raises Refused or SandboxUnavailable."""

    async def provide(self, handle: Handle, payload: Path) -> None:
        """Make a bundle's `payloads/` folder readable inside, at `handle.code_root`. Done once, before LOAD."""

    async def destroy(self, handle: Handle, reason: str) -> Death:
        """End it and remove all it left. Idempotent."""

    async def reap(self) -> int:
        """At node start: end and remove what an earlier process of this node left behind; how many there were."""

    async def close(self) -> None: ...
