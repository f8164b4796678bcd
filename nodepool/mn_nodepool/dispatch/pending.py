"""A call on its way, as the one who dispatches it sees it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from mn.formats.errors import MnError
from mn_nodepool.dispatch.lane import Credit, Lane
from mn_nodepool.wire.messages import Route


class Stage(IntEnum):
    QUEUED = 0
    SENT = 1
    DONE = 2


class PendingCall:
    """One invocation. `on_done` is called exactly once, from the loop, after the outcome is filled in.

    Outcome: `error` for what the platform could not do; else `status` (`mn_runner.protocol.Status`), `result_codec` and `result`.
    """

    __slots__ = (
        "attempts", "bucket", "cancelled", "codec", "created", "credit", "deadline", "depth", "error", "generation", "invocation", "item_codec",
        "item_parts", "items", "lane", "number", "on_done", "on_item", "payload", "payload_position", "queue_us", "received", "resends", "result",
        "result_codec", "result_parts", "route", "run_us", "sent", "size", "stage", "start_us", "status", "timed_out",
    )  # fmt: skip

    def __init__(
        self,
        route: Route,
        invocation: str,
        codec: int,
        payload: bytes,
        deadline: float,
        depth: int,
        on_done: Callable[[PendingCall], None],
        on_item: Callable[[PendingCall, int, bytes], None] | None,
        created: float,
    ) -> None:
        self.route = route
        self.invocation = invocation
        self.codec = codec
        self.payload = payload
        self.size = len(payload)
        self.deadline = deadline
        """Loop time; 0: none."""
        self.depth = depth
        self.on_done = on_done
        self.on_item = on_item
        self.created = created
        self.stage = Stage.QUEUED
        self.attempts = 0
        self.resends = 0
        self.items = 0
        self.number = 0
        self.bucket = 0
        self.timed_out = False
        self.cancelled = False
        self.payload_position = 0
        self.result_parts: list[bytes] | None = None
        self.item_parts: list[bytes] | None = None
        self.item_codec = 0
        self.received = 0
        """Bytes that came in chunks of the result or of the present item."""
        self.error: MnError | None = None
        self.status = 0
        self.result_codec = 0
        self.result = b""
        self.queue_us = self.start_us = self.run_us = 0
        self.sent = 0.0
        self.generation = 0
        self.lane: Lane
        self.credit: Credit

    @property
    def output(self) -> str:
        """The end of what the call printed, where its failure brought it along."""
        return str(self.error.extra.get("output", "")) if self.error is not None else ""

    @property
    def node(self) -> str:
        """Where it was sent last; empty when it never left the queue."""
        return self.credit.link.peer if self.attempts else ""
