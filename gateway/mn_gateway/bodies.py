"""Request bodies: read whole within a limit, or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from mn.formats.errors import InvalidRequest, QueueFull, TooLarge
from mn.formats.resources import format_size

STALL_S_MAX = 30.0
"""A body that is being collected holds room that others wait for."""


class Gone(Exception):
    """The client went away; there is nobody to answer."""


class Budget:
    """Bytes of all bodies that are being read at a time in this process."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max

    def take(self, size: int) -> None:
        """Raise QueueFull when there is no room for that many more bytes."""
        if size > self._left:
            raise QueueFull("this gateway is reading as many large bodies as it can hold; try again", retry_after_s=1)
        self._left -= size

    def give(self, size: int) -> None:
        self._left += size


def too_large(what: str, limit_bytes: int, setting: str) -> TooLarge:
    return TooLarge(
        f"{what} may have {format_size(limit_bytes)}; the setting is {setting} (MN_{setting.upper()})",
        limit_bytes=limit_bytes,
    )


def check_length(headers: Mapping[bytes, bytes], limit_bytes: int, what: str, setting: str) -> int:
    """The announced length of a body, -1 when it is not announced. Raises TooLarge before a byte of it is read."""
    text = headers.get(b"content-length")
    if text is None:
        return -1
    if not text.isdigit():
        raise InvalidRequest("Content-Length is not a number", path="Content-Length")
    if (length := int(text)) > limit_bytes:
        raise too_large(what, limit_bytes, setting)
    return length


async def chunks(receive: Receive, limit_bytes: int, what: str, setting: str, total: int = 0) -> AsyncIterator[bytes]:
    """The pieces of a body as they come. Raises TooLarge at the first byte too many, Gone when the client leaves,
    InvalidRequest when it stops sending.

    `total` bytes have come before.
    """
    more = True
    while more:
        try:
            async with asyncio.timeout(STALL_S_MAX):
                message = await receive()
        except TimeoutError:
            raise InvalidRequest(f"nothing more of the body came for {STALL_S_MAX:.0f} s", path="") from None
        if message["type"] == "http.disconnect":
            raise Gone
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        total += len(piece)
        if total > limit_bytes:
            raise too_large(what, limit_bytes, setting)
        if piece:
            yield piece


async def rest_of(first: bytes, receive: Receive, limit_bytes: int, budget: Budget) -> bytes:
    """A payload whose first piece has come and that goes on. Raises TooLarge, QueueFull or Gone."""
    body = bytearray(first)
    budget.take(taken := len(body))
    try:
        async for piece in chunks(receive, limit_bytes, "a call's input", "payload_bytes_max", len(first)):
            budget.take(len(piece))
            taken += len(piece)
            body += piece
        return bytes(body)
    finally:
        budget.give(taken)
