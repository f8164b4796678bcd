"""Payloads longer than one frame: sent within a window, put together as they come."""

from __future__ import annotations

from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.wire.messages import Chunk
from mn_runner.protocol import CHUNK_BYTES


def first_part(call: PendingCall) -> tuple[bytes | memoryview, bool]:
    """What of the input rides with the `Call`, and whether chunks follow."""
    if call.size <= CHUNK_BYTES:
        return call.payload, False
    call.payload_position = CHUNK_BYTES
    return memoryview(call.payload)[:CHUNK_BYTES], True


def send_chunks(call: PendingCall, count: int) -> None:
    """The next `count` chunks of the input, as far as there are any."""
    view = memoryview(call.payload)
    while count and call.payload_position < call.size:
        start = call.payload_position
        end = call.payload_position = min(start + CHUNK_BYTES, call.size)
        call.credit.link.send(Chunk(call.number, end < call.size), view[start:end])
        count -= 1


def add_chunk(call: PendingCall, body: bytes, more: bool) -> bytes | None:
    """Put a chunk to the item or result that is coming in: all of it once it is whole, else None."""
    parts = call.item_parts if call.item_parts is not None else call.result_parts
    if parts is None:
        return None
    parts.append(body)
    return None if more else b"".join(parts)


def forget_parts(call: PendingCall) -> None:
    """Begin anew: the call is sent again."""
    call.result_parts = call.item_parts = None
    call.received = 0
    call.payload_position = 0
