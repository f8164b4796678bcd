"""Bytes ⇄ mesh frames, without I/O.

A frame is `u32` bytes that follow the header, `u16` bytes of the message, `u8` flags, `u8` zero; then the message (MessagePack) and the body, whose
bytes are never looked at. A message too long for one frame (a directory of thousands of functions) is cut into pieces with the flags
`PIECE` and, on the last, `LAST_PIECE`; other frames may come between pieces.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from mn.formats.errors import ProtocolError
from mn_nodepool.wire.messages import AnyMessage, Message

HEADER = struct.Struct("<IHBB")
HEADER_BYTES = HEADER.size
FRAME_BYTES_MAX = 128 * 1024
MESSAGE_BYTES_IN_FRAME_MAX = 32 * 1024
MESSAGE_BYTES_MAX = 64 << 20
"""Of a message in pieces."""
PIECE = 1
LAST_PIECE = 2

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message, body: bytes | memoryview = b"") -> bytes:
    """One message with its body as bytes to send; the body is at most one chunk (64 KiB)."""
    head = _encode(message)
    size = len(head)
    if size > MESSAGE_BYTES_IN_FRAME_MAX:
        if body:
            raise ProtocolError(
                f"a message of {size} bytes with a body: only one within {MESSAGE_BYTES_IN_FRAME_MAX} may carry one"
            )
        return _encode_pieces(head)
    return HEADER.pack(size + len(body), size, 0, 0) + head + body


def _encode_pieces(head: bytes) -> bytes:
    if len(head) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a message of {len(head)} bytes is over the limit of {MESSAGE_BYTES_MAX}")
    parts = []
    step = FRAME_BYTES_MAX // 2
    for start in range(0, len(head), step):
        part = head[start : start + step]
        flags = PIECE | (LAST_PIECE if start + step >= len(head) else 0)
        parts.append(HEADER.pack(len(part), 0, flags, 0) + part)
    return b"".join(parts)


class MessageReader:
    """Cuts a byte stream into messages. One per link and direction."""

    __slots__ = ("_buffer", "_pieces")

    def __init__(self) -> None:
        self._buffer = b""
        self._pieces = bytearray()

    def feed(self, data: bytes) -> list[tuple[Any, bytes]]:
        """Complete (message, body) pairs in `data` and what came before.

        Raises ProtocolError for anything that is not a frame within its limits or not a known message.
        """
        buffer = self._buffer + data if self._buffer else data
        messages: list[tuple[Any, bytes]] = []
        position, size = 0, len(buffer)
        try:
            while size - position >= HEADER_BYTES:
                length, head, flags, _ = HEADER.unpack_from(buffer, position)
                if length > FRAME_BYTES_MAX or head > length:
                    raise ProtocolError(f"a frame of {length} bytes, over the limit of {FRAME_BYTES_MAX}")
                start = position + HEADER_BYTES
                end = start + length
                if end > size:
                    break
                position = end
                if flags:
                    self._take_piece(buffer[start:end], flags, messages)
                else:
                    middle = start + head
                    messages.append((_decoder.decode(buffer[start:middle]), buffer[middle:end]))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ProtocolError(f"not a message: {error}") from None
        self._buffer = buffer[position:] if position < size else b""
        return messages

    def _take_piece(self, part: bytes, flags: int, messages: list[tuple[Any, bytes]]) -> None:
        if flags not in (PIECE, PIECE | LAST_PIECE):
            raise ProtocolError(f"a frame with the flags {flags:#x}")
        if len(self._pieces) + len(part) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message in pieces is over the limit of {MESSAGE_BYTES_MAX} bytes")
        self._pieces += part
        if flags & LAST_PIECE:
            whole, self._pieces = bytes(self._pieces), bytearray()
            messages.append((_decoder.decode(whole), b""))
