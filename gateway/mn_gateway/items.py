"""Cuts the body of a map into items. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mn.formats.codecs import REQUEST_ITEM, Codec
from mn.formats.errors import InvalidRequest, TooLarge
from mn_gateway.bodies import too_large

CODEC_OF_NAME = {b"json": int(Codec.JSON), b"raw": int(Codec.RAW), b"pickle": int(Codec.PICKLE)}


class Cutter(Protocol):
    def feed(self, data: bytes) -> list[bytes]:
        """The items that are complete. Raises InvalidRequest or TooLarge."""

    def end(self) -> list[bytes]:
        """What is left when the body ends. Raises InvalidRequest when it was cut off."""


class FrameCutter:
    """`u32` length and payload, again and again."""

    def __init__(self, item_bytes_max: int) -> None:
        self._item_bytes_max = item_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        buffer = self._buffer
        buffer += data
        items: list[bytes] = []
        position, size = 0, len(buffer)
        unpack, head = REQUEST_ITEM.unpack_from, REQUEST_ITEM.size
        while size - position >= head:
            (length,) = unpack(buffer, position)
            if length > self._item_bytes_max:
                raise too_large("an item", self._item_bytes_max, "payload_bytes_max")
            end = position + head + length
            if end > size:
                break
            items.append(bytes(buffer[position + head : end]))
            position = end
        del buffer[:position]
        return items

    def end(self) -> list[bytes]:
        if self._buffer:
            raise InvalidRequest("the body ends in the middle of an item", path="")
        return []


class LineCutter:
    """One JSON value per line; empty lines are skipped, the last newline may be missing."""

    def __init__(self, item_bytes_max: int) -> None:
        self._item_bytes_max = item_bytes_max
        self._rest: list[bytes] = []
        self._rest_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join(self._rest) + lines[0]
            self._rest, self._rest_bytes = [], 0
        if rest:
            self._rest.append(rest)
            self._rest_bytes += len(rest)
        if self._rest_bytes > self._item_bytes_max or any(len(line) > self._item_bytes_max for line in lines):
            raise self._over()
        return [line for line in lines if line.strip()]

    def end(self) -> list[bytes]:
        line = b"".join(self._rest)
        return [line] if line.strip() else []

    def _over(self) -> TooLarge:
        return too_large("an item", self._item_bytes_max, "payload_bytes_max")


CUTTERS: dict[bool, Callable[[int], Cutter]] = {True: FrameCutter, False: LineCutter}
"""By whether the body is framed."""
