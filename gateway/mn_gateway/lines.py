"""Results of many: as frames, or as NDJSON for callers without a client library.

NDJSON lines are `{"index": i, "value": …}`, `{"index": i, "base64": "…"}` for bytes, `{"index": i, "error":
{problem}}`, and at the end `{"end": n}`; a stream without that last line was cut off.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

from mn.formats.codecs import MEDIA_FRAMES, MEDIA_NDJSON, RESPONSE_ITEM, Codec, ItemStatus
from mn_gateway import problems

ItemEncoder = Callable[[int, int, int, bytes], bytes]
"""(index, item status, codec, payload) → bytes to send."""


def frame_item(index: int, status: int, codec: int, payload: bytes) -> bytes:
    return RESPONSE_ITEM.pack(index, status, codec, 0, len(payload)) + payload


def line_item(index: int, status: int, codec: int, payload: bytes) -> bytes:
    if status == ItemStatus.END:
        return b'{"end":%d}\n' % index
    if status != ItemStatus.OK:
        return b'{"index":%d,"error":%b}\n' % (index, payload)
    if codec != Codec.JSON:
        return b'{"index":%d,"base64":"%b"}\n' % (index, b64encode(payload))
    # Between JSON's tokens a newline is a space; inside a string there can be none.
    return b'{"index":%d,"value":%b}\n' % (index, payload.replace(b"\n", b" ").replace(b"\r", b" "))


def encoder_of(framed: bool) -> tuple[ItemEncoder, bytes]:
    """How to write items, and the media type of that."""
    return (frame_item, MEDIA_FRAMES.encode()) if framed else (line_item, MEDIA_NDJSON.encode())


def ended_item(encode: ItemEncoder, index: int, call: Any) -> tuple[bytes, str]:
    """What to send of a call that ended, and the slug of its problem (empty when it has a result)."""
    slug = problems.slug_of(call)
    if not slug:
        return encode(index, ItemStatus.OK, call.result_codec, call.result), ""
    status = ItemStatus.PLATFORM_ERROR if call.error is not None else ItemStatus.FUNCTION_ERROR
    return encode(index, status, Codec.JSON, problems.encode(problems.of_call(call))), slug
