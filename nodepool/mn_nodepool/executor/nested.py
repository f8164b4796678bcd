"""Calls that a sandbox makes: from its socket to the node's dispatcher, and the answers back.

A caller that waits lends its slot to the calls it made, so that recursion with a single replica does not deadlock.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

from mn.formats.errors import InvalidRequest, MnError
from mn_nodepool.dispatch.pending import PendingCall, Stage
from mn_runner.protocol import (
    CHUNK_BYTES,
    HEADER,
    MORE,
    NESTED_BIT,
    NESTED_HEAD,
    REPLY_HEAD,
    TAKEN,
    U32,
    WINDOW_CHUNKS,
    Kind,
    Status,
    Violation,
)

if TYPE_CHECKING:
    from mn_nodepool.executor.calls import RunningCall
    from mn_nodepool.executor.replica import Replica

OPEN_MAX = 4096
"""Unanswered calls that one sandbox may have made."""
_CHUNK, _ITEM, _REPLY = int(Kind.CHUNK), int(Kind.ITEM), int(Kind.REPLY)


class Gate(Protocol):
    """Where nested calls go."""

    def start_nested(
        self,
        parent: RunningCall,
        name: str,
        invocation: str,
        codec: int,
        payload: bytes,
        timeout_s: float,
        nested: NestedCall,
    ) -> PendingCall:
        """Raises MnError when the call cannot even be queued."""

    def cancel_nested(self, call: PendingCall) -> None: ...

    def item_taken(self, call: PendingCall) -> None: ...


class NestedCall:
    """One call that a sandbox made."""

    __slots__ = (
        "_blocks",
        "_sent",
        "calls",
        "codec",
        "mode",
        "name",
        "number",
        "parent",
        "parts",
        "pending",
        "size",
        "timeout_s",
    )

    def __init__(
        self, calls: NestedCalls, number: int, parent: RunningCall, name: str, codec: int, mode: int, timeout_s: float
    ) -> None:
        self.calls = calls
        self.number = number
        self.parent = parent
        self.name = name
        self.codec = codec
        self.mode = mode
        self.timeout_s = timeout_s
        self.parts: list[bytes] = []
        self.size = 0
        self.pending: PendingCall | None = None
        self._blocks: list[bytes] = []
        """CHUNK frames that wait for the window to open."""
        self._sent = 0

    def on_done(self, call: PendingCall) -> None:
        if not self.calls.is_open(self.number):
            return
        if call.error is not None:
            self.fail(call.error)
        else:
            self._reply(call.status, call.result_codec, call.result)

    def on_item(self, call: PendingCall, codec: int, value: bytes) -> None:
        self._send(_ITEM, bytes([codec]), value)

    def fail(self, error: MnError) -> None:
        problem = {"slug": error.slug, "detail": error.detail, **error.extra}
        self._reply(Status.PLATFORM_ERROR, 0, json.dumps(problem).encode())

    def _reply(self, status: int, codec: int, payload: bytes) -> None:
        self.parent.nested -= 1
        self._send(_REPLY, REPLY_HEAD.pack(status, codec), payload)
        if not self._blocks:
            self.calls.close_call(self.number)
        self.pending = None

    def _send(self, kind: int, head: bytes, payload: bytes) -> None:
        size = len(payload)
        view = memoryview(payload)
        first = view[:CHUNK_BYTES]
        more = size > CHUNK_BYTES
        frames = [HEADER.pack(len(head) + len(first), kind, MORE if more else 0, self.number) + head + first]
        for start in range(CHUNK_BYTES, size, CHUNK_BYTES):
            part = view[start : start + CHUNK_BYTES]
            frames.append(HEADER.pack(len(part), _CHUNK, MORE if start + CHUNK_BYTES < size else 0, self.number) + part)
        self._blocks += frames
        self._flow()

    def _flow(self) -> None:
        blocks, done = self._blocks, 0
        for block in blocks:
            windowed = block[4] == _CHUNK
            if windowed and self._sent >= WINDOW_CHUNKS:
                break
            self._sent += windowed
            self.calls.replica.send_frame(block)
            done += 1
        del blocks[:done]

    def acked(self, chunks: int) -> None:
        self._sent = max(0, self._sent - chunks)
        self._flow()
        if self.pending is None and not self._blocks:
            self.calls.close_call(self.number)


class NestedCalls:
    """All calls that one sandbox has made and that are not answered."""

    def __init__(self, replica: Replica, gate: Gate, payload_bytes_max: int, depth_max: int) -> None:
        self.replica = replica
        self.gate = gate
        self.payload_bytes_max = payload_bytes_max
        self._gathered_bytes = 0
        """Of inputs that have not come whole."""
        self._depth_max = depth_max
        self._open: dict[int, NestedCall] = {}

    def frame(self, kind: int, flags: int, number: int, body: bytes) -> None:
        """Raises Violation for what is out of order."""
        if kind == Kind.NESTED:
            self._begin(flags, number, body)
            return
        call = self._open.get(number)
        if call is None:
            return
        if kind == Kind.CHUNK:
            call.parts.append(body)
            self._gather(call, len(body))
            self.replica.send_frame(HEADER.pack(4, Kind.ACK, 0, number) + U32.pack(1))
            if not flags & MORE:
                self._go(call)
        elif kind == Kind.ACK and flags & TAKEN:
            if call.pending is not None:
                self.gate.item_taken(call.pending)
        elif kind == Kind.ACK:
            call.acked(U32.unpack(body)[0])
        elif kind == Kind.CANCEL:
            if call.pending is not None:
                self.gate.cancel_nested(call.pending)
        else:
            raise Violation(f"a frame of kind {kind} for a nested call")

    def _begin(self, flags: int, number: int, body: bytes) -> None:
        if number in self._open or len(self._open) >= OPEN_MAX or len(body) < NESTED_HEAD.size:
            raise Violation("a nested call with a number in use, too short, or one too many")
        parent_number, codec, mode, timeout_s, length = NESTED_HEAD.unpack_from(body)
        parent = self.replica.running.get(parent_number)
        if parent is None:
            raise Violation(f"a nested call of call {parent_number}, which does not run")
        if not timeout_s >= 0.0:
            raise Violation(f"a nested call with {timeout_s} seconds left")
        end = NESTED_HEAD.size + length
        name = body[NESTED_HEAD.size : end].decode("utf-8", "replace")
        call = NestedCall(self, number, parent, name, codec, mode, timeout_s)
        call.parts.append(body[end:])
        self._open[number] = call
        parent.nested += 1
        if flags & MORE:
            self._gather(call, len(body) - end)
        else:
            self._go(call)

    def _gather(self, call: NestedCall, size: int) -> None:
        call.size += size
        self._gathered_bytes += size
        if self._gathered_bytes > self.payload_bytes_max:
            raise Violation(f"inputs of nested calls over {self.payload_bytes_max} bytes (setting payload_bytes_max)")

    def _go(self, call: NestedCall) -> None:
        payload = b"".join(call.parts) if len(call.parts) > 1 else call.parts[0]
        call.parts = []
        self._gathered_bytes -= call.size
        call.size = 0
        parent = call.parent
        try:
            if parent.depth + 1 > self._depth_max:
                raise InvalidRequest(f"calls nest deeper than {self._depth_max} (setting call_depth_max)")
            invocation = f"{parent.invocation}.{call.number & ~NESTED_BIT}"
            call.pending = self.gate.start_nested(
                parent, call.name, invocation, call.codec, payload, call.timeout_s, call
            )
        except MnError as error:
            call.fail(error)

    def is_open(self, number: int) -> bool:
        return number in self._open

    def close_call(self, number: int) -> None:
        self._open.pop(number, None)

    def parent_ended(self, parent: RunningCall) -> None:
        """What a call that ended has left running is cancelled."""
        for call in list(self._open.values()):
            if call.parent is parent:
                del self._open[call.number]
                self._gathered_bytes -= call.size
                if call.pending is not None and call.pending.stage is not Stage.DONE:
                    self.gate.cancel_nested(call.pending)

    def close(self) -> None:
        for call in list(self._open.values()):
            if call.pending is not None and call.pending.stage is not Stage.DONE:
                self.gate.cancel_nested(call.pending)
        self._open.clear()
