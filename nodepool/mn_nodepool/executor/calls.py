"""A call as its executor sees it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mn_nodepool.mesh.transport import Link
from mn_runner.protocol import WINDOW_CHUNKS, Violation

if TYPE_CHECKING:
    from mn_nodepool.executor.lane import VersionLane
    from mn_nodepool.executor.replica import Replica

OUTPUT_TAIL_BYTES = 4096
PAYLOAD_KEPT_BYTES_MAX = 8 << 20
"""Inputs up to this size are kept for `mn debug` when the call fails."""


class RunningCall:
    """One attempt of an invocation at this executor: queued here, or in a replica."""

    __slots__ = (
        "cancel_reason", "chunks", "codec", "deadline_ms", "depth", "input_complete", "invocation", "kept", "kill_timer", "lane", "link",
        "nested", "number", "output", "passing", "payload", "received", "replica", "result_open", "slot",
        "unacknowledged", "withdrawn",
    )  # fmt: skip

    def __init__(
        self,
        link: Link,
        number: int,
        lane: VersionLane,
        invocation: str,
        codec: int,
        payload: bytes,
        timeout_ms: int,
        depth: int,
        received: float,
    ) -> None:
        self.link = link
        self.number = number
        self.lane = lane
        self.invocation = invocation
        self.codec = codec
        self.payload = payload
        self.deadline_ms = timeout_ms
        self.depth = depth
        self.received = received
        self.input_complete = True
        self.chunks: list[bytes] | None = None
        """Further chunks that came while the call was queued, or that are kept for the failure ring."""
        self.kept = 0
        self.replica: Replica | None = None
        self.slot = 0
        """Its number in the replica's session."""
        self.nested = 0
        """Calls of its own that it waits for."""
        self.output: bytearray | None = None
        self.result_open = False
        """Its result is longer than a frame, and not all of it has passed."""
        self.passing = 0
        """Bytes that have passed of the result or item that is on its way out."""
        self.unacknowledged = 0
        """CHUNK and ITEM frames from the child that nobody has taken yet."""
        self.cancel_reason = 0
        """Why it was interrupted."""
        self.withdrawn = False
        """It is wanted back from behind a slow one, unless it has started."""
        self.kill_timer: asyncio.TimerHandle | None = None

    def pass_part(self, size: int, bytes_max: int, *, first: bool) -> None:
        """An ITEM or CHUNK of this call passes. Raises Violation beyond the window, or beyond what a payload may have."""
        self.unacknowledged += 1
        self.passing = size if first else self.passing + size
        if self.unacknowledged > WINDOW_CHUNKS:
            raise Violation(f"more than {WINDOW_CHUNKS} frames of one call ahead of who takes them")
        if self.passing > bytes_max:
            raise Violation(f"a payload over {bytes_max} bytes (setting payload_bytes_max)")

    def add_output(self, text: bytes) -> None:
        tail = self.output
        if tail is None:
            tail = self.output = bytearray()
        tail += text
        if len(tail) > 2 * OUTPUT_TAIL_BYTES:
            del tail[:-OUTPUT_TAIL_BYTES]

    def output_tail(self) -> str:
        return bytes(self.output[-OUTPUT_TAIL_BYTES:]).decode("utf-8", "replace") if self.output else ""

    def whole_payload(self) -> bytes | None:
        """The input, or None where it was too long to be kept."""
        if self.kept < 0:
            return None
        return b"".join([self.payload, *self.chunks]) if self.chunks else self.payload
