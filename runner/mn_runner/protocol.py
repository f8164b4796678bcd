"""The protocol between a node and the child in a sandbox: bytes ⇄ frames, without I/O. Standard library only.

A frame is a ten-byte header (`u32` body length, `u8` kind, `u8` flags, `u32` call number; little-endian) and a body of at most
`BODY_BYTES_MAX`. A payload that is larger follows in `CHUNK` frames: every frame but the last has the flag `MORE`. The sender keeps at most
`WINDOW_CHUNKS` `CHUNK` and (child → node) `ITEM` frames unacknowledged per call and direction; the receiver answers those that it has passed on
with an `ACK`.
The node numbers its calls upwards and never uses a number twice in one sandbox, so that a cancellation that comes late hits nothing else.

    node → child
      LOAD    JSON: the version to become (see `child.py`)                 → LOADED
      CALL    f64 seconds left (0: no deadline), u8 codec, u8 depth, u16 length of id, id, payload
                                                                           → any LOG, ITEM, NESTED; then one RESULT
      CHUNK   more of a CALL's, REPLY's or ITEM's payload
      ACK     u32 CHUNK and ITEM frames newly taken of a call, or CHUNK frames of a NESTED
      REPLY   u8 status, u8 codec, payload: the answer to a NESTED (its call number)
      ITEM    u8 codec, payload: one value of a NESTED generator; after the last comes a REPLY with an empty payload
      STOP    finish what runs, then exit
    child → node
      READY   JSON {"python": "3.11", "pid": n}: a spare, waiting for LOAD
      LOADED  JSON {} or {"error": {...}}
      RESULT  u8 status, u8 codec, u32 microseconds that user code ran, payload (empty after a generator's last ITEM)
      ITEM    u8 codec, payload: one value of a generator
      CHUNK   more of a RESULT, ITEM or NESTED
      ACK     u32 CHUNK frames newly taken of a CALL, REPLY or ITEM; with the flag TAKEN, u32 ITEM frames
      LOG     u8 stream (1, 2), text: output of the call (0: of no call)
      NESTED  u32 parent call, u8 codec, u8 mode (0 call, 1 generator), f64 seconds left, u16 length of name, name, payload;
              its call number has the top bit set, numbers are the child's own
      CANCEL  empty: the child no longer wants the answer to a NESTED

Cancelling a call goes by a second descriptor, a pipe whose readability raises a signal in the child: eight bytes, `u32` call number
and `u32` reason (`REASON_TIMEOUT`, `REASON_CANCELLED`, or `REASON_WITHDRAWN` for a call that is wanted back unless it has started; then it is
answered with the slug `withdrawn`). Any violation ends the sandbox.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum


class Kind(IntEnum):
    LOAD = 1
    CALL = 2
    CHUNK = 3
    ACK = 4
    REPLY = 5
    STOP = 6
    READY = 17
    LOADED = 18
    RESULT = 19
    ITEM = 20
    LOG = 21
    NESTED = 22
    CANCEL = 23


class Status(IntEnum):
    """How a call ended inside the sandbox."""

    OK = 0
    FUNCTION_ERROR = 1
    """The user's code raised; the payload is JSON: `type`, `message`, `traceback`, and `pickle` (base 64) where the caller sent one."""
    PLATFORM_ERROR = 2
    """The call could not be run or was ended; the payload is JSON: `slug`, `detail` and more members."""


MORE = 1
"""Flag: the payload goes on in CHUNK frames."""
TAKEN = 2
"""Flag of a child's ACK: it is of ITEM frames of a NESTED generator, whose values user code has taken; otherwise of CHUNK frames."""
NESTED_BIT = 0x8000_0000

HEADER = struct.Struct("<IBBI")
CALL_HEAD = struct.Struct("<dBBH")
RESULT_HEAD = struct.Struct("<BBI")
REPLY_HEAD = struct.Struct("<BB")
NESTED_HEAD = struct.Struct("<IBBdH")
U32 = struct.Struct("<I")
CONTROL = struct.Struct("<II")

BODY_BYTES_MAX = 128 * 1024
"""A body of a frame, heads included; over it is a violation."""
CHUNK_BYTES = 64 * 1024
"""Payload bytes in one frame."""
WINDOW_CHUNKS = 16
REASON_TIMEOUT = 1
REASON_CANCELLED = 2
REASON_WITHDRAWN = 3

PROTOCOL_FD = 3
CONTROL_FD = 4
"""Descriptors at which a child finds its socket and its control pipe."""


class Violation(Exception):
    """The other side broke the protocol."""


def frame(kind: int, call: int, body: bytes = b"", flags: int = 0) -> bytes:
    """One frame."""
    return HEADER.pack(len(body), kind, flags, call) + body


def frames_of(kind: int, call: int, head: bytes, payload: bytes | memoryview) -> Iterator[bytes]:
    """A payload as one frame, or as a first frame and its chunks. Beyond `WINDOW_CHUNKS` chunks the sender has to wait for ACKs."""
    size = len(payload)
    if size <= CHUNK_BYTES:
        yield HEADER.pack(len(head) + size, kind, 0, call) + head + payload
        return
    view = memoryview(payload)
    yield HEADER.pack(len(head) + CHUNK_BYTES, kind, MORE, call) + head + view[:CHUNK_BYTES]
    for start in range(CHUNK_BYTES, size, CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]
        yield HEADER.pack(len(part), Kind.CHUNK, MORE if start + CHUNK_BYTES < size else 0, call) + part


class FrameReader:
    """Cuts a byte stream into frames.

    >>> list(FrameReader().feed(frame(Kind.STOP, 0)))
    [(6, 0, 0, b'')]
    """

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """Complete frames in `data` and what came before: (kind, flags, call, body).

        Raises Violation for a body over `BODY_BYTES_MAX`.
        """
        buffer = self._buffer + data if self._buffer else data
        frames: list[tuple[int, int, int, bytes]] = []
        position, size = 0, len(buffer)
        while size - position >= 10:
            length, kind, flags, call = HEADER.unpack_from(buffer, position)
            if length > BODY_BYTES_MAX:
                raise Violation(f"a frame of {length} bytes, over {BODY_BYTES_MAX}")
            end = position + 10 + length
            if end > size:
                break
            frames.append((kind, flags, call, buffer[position + 10 : end]))
            position = end
        self._buffer = buffer[position:] if position < size else b""
        return frames
