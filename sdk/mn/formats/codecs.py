"""How payloads are encoded, and the framing of a stream of them.

A payload is opaque bytes plus one of three codecs. Only a sandbox and the caller's own process decode `PICKLE`.

A pickled payload starts with eight bytes: `MNP1`, the major and minor version of the interpreter that pickled it, and two zero
bytes. Both ends compare the minor before they unpickle, since pickled code objects of another minor can crash an interpreter.
The pickle that follows is of `(args, kwargs)` for a call and of the value for a result.

A framed stream (`application/vnd.mn.frames`) is used by `…/map` in both directions. Integers are little-endian.

    request item    u32 length, payload
    response item   u32 index, u8 status, u8 codec, u16 zero, u32 length, payload      (status as in `ItemStatus`)

Each response item's invocation id is the id in the response's `MN-Invocation-Id` header, a dot, and the index.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum

MEDIA_JSON = "application/json"
MEDIA_RAW = "application/octet-stream"
MEDIA_PICKLE = "application/vnd.mn.cloudpickle"
MEDIA_FRAMES = "application/vnd.mn.frames"
MEDIA_NDJSON = "application/x-ndjson"
MEDIA_PROBLEM = "application/problem+json"


class Codec(IntEnum):
    JSON = 0
    RAW = 1
    PICKLE = 2


MEDIA_OF_CODEC = {Codec.JSON: MEDIA_JSON, Codec.RAW: MEDIA_RAW, Codec.PICKLE: MEDIA_PICKLE}


class ItemStatus(IntEnum):
    """How one item of a map ended. For the two failures the payload is a problem document in JSON."""

    OK = 0
    FUNCTION_ERROR = 1
    PLATFORM_ERROR = 2
    END = 255
    """After the last item; the index is the number of items. A stream without it was cut off."""


PICKLE_HEADER = b"MNP1" + bytes(sys.version_info[:2]) + b"\0\0"
"""What this interpreter puts before a pickle."""

REQUEST_ITEM = struct.Struct("<I")
RESPONSE_ITEM = struct.Struct("<IBBHI")


def pickle_minor(payload: bytes | memoryview) -> tuple[int, int] | None:
    """The interpreter version that a pickled payload names, or None when it has no such header."""
    if len(payload) < 8 or bytes(payload[:4]) != b"MNP1":
        return None
    return payload[4], payload[5]
