"""What the gateway needs of the pool. `mn_nodepool.client.PoolClient` is the one that runs; tests bring their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

import msgspec

from mn.formats.errors import MnError
from mn_nodepool.wire.messages import KeyEntry, Route


class Call(Protocol):
    """One call. What follows `depth` is set once it has ended."""

    route: Route
    invocation: str
    codec: int
    payload: bytes
    depth: int
    error: MnError | None
    status: int
    result_codec: int
    result: bytes
    queue_us: int
    start_us: int
    run_us: int
    attempts: int
    output: str
    node: str


class Dispatcher(Protocol):
    @property
    def queued_calls(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def running_calls(self) -> int: ...

    def start(
        self,
        route: Route,
        invocation: str,
        codec: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        depth: int = 0,
        on_done: Callable[[Any], None],
        on_item: Callable[[Any, int, bytes], None] | None = None,
    ) -> Any:
        """Queue a call; `on_done` is called once, from the loop. Raises QueueFull."""

    def cancel(self, call: Any) -> None: ...

    def consumed(self, call: Any) -> None:
        """One item of a generator has been passed on."""


class DirectoryView(Protocol):
    """The last copy of what the leader publishes."""

    @property
    def routes(self) -> Mapping[str, Route]: ...
    @property
    def keys(self) -> Mapping[str, KeyEntry]:
        """By SHA-256 in hex."""

    @property
    def leader(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def synced(self) -> bool: ...
    def stale_s(self) -> float:
        """Seconds since the leader was last heard."""


class Pool(Protocol):
    @property
    def connected(self) -> bool: ...
    @property
    def directory(self) -> DirectoryView: ...
    @property
    def dispatcher(self) -> Dispatcher: ...

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def ask(self, op: str, request: msgspec.Struct, timeout_s: float = 30) -> Any:
        """The answer to an op of `mn_nodepool.wire.control.OPS`. Raises MnError."""

    def tail(
        self, function: str, invocation: str, follow: bool, limit: int
    ) -> AsyncGenerator[list[dict[str, Any]], None]: ...
