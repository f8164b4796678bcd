"""What `invoke` and `map` share: the headers of a call, the route, the codec."""

from __future__ import annotations

import difflib
import itertools
import os
import time
from collections.abc import Mapping

from mn.formats.codecs import MEDIA_JSON, MEDIA_OF_CODEC, MEDIA_PICKLE, MEDIA_RAW, Codec
from mn.formats.errors import InvalidRequest, NotFound, UnsupportedMedia
from mn.formats.ids import InvocationId, encode_ulid
from mn_gateway.pool import DirectoryView
from mn_nodepool.wire.messages import Route

ENTROPY_BYTES = 10
ENTROPIES_AT_A_TIME = 256
TIMEOUT_S_MIN = 0.001
"""Deadlines travel in milliseconds."""
TIMEOUT_S_MAX = 31_536_000.0
NEAR_AMONG_MAX = 2000
JSON, RAW, PICKLE = int(Codec.JSON), int(Codec.RAW), int(Codec.PICKLE)
CODEC_OF_MEDIA: dict[bytes | None, int] = {
    None: JSON,
    b"": JSON,
    MEDIA_JSON.encode(): JSON,
    b"application/x-www-form-urlencoded": JSON,  # what `curl -d` says of a JSON body
    MEDIA_RAW.encode(): RAW,
    MEDIA_PICKLE.encode(): PICKLE,
}
CONTENT_TYPE_OF = {int(codec): (b"content-type", media.encode()) for codec, media in MEDIA_OF_CODEC.items()}


class InvocationIds:
    """Makes invocation ids, with the kernel's randomness fetched for many at a time."""

    def __init__(self) -> None:
        self._entropies: list[bytes] = []

    def __call__(self) -> InvocationId:
        if not self._entropies:
            block = os.urandom(ENTROPY_BYTES * ENTROPIES_AT_A_TIME)
            self._entropies = [block[i : i + ENTROPY_BYTES] for i in range(0, len(block), ENTROPY_BYTES)]
        entropy = int.from_bytes(self._entropies.pop(), "big")
        return InvocationId("inv_" + encode_ulid(time.time_ns() // 1_000_000, entropy))


def route_of(directory: DirectoryView, name: str, namespace: str) -> Route:
    """The route of a function in the caller's namespace. Raises NotFound with `near` names."""
    route = directory.routes.get(name)
    if route is None or route.namespace != namespace:
        raise not_found("function", name, near(name, directory, namespace))
    return route


def near(name: str, directory: DirectoryView, namespace: str) -> list[str]:
    """Names of the namespace's functions that look like `name`."""
    mine = (r.name for r in directory.routes.values() if r.namespace == namespace and "~" not in r.name)
    return difflib.get_close_matches(name[:100], list(itertools.islice(mine, NEAR_AMONG_MAX)), n=3, cutoff=0.6)


def not_found(kind: str, name: str, near_names: list[str]) -> NotFound:
    hint = f"; did you mean {' or '.join(near_names)}?" if near_names else f"; `mn {kind} list` shows those there are"
    return NotFound(f"there is no {kind} {name[:200]!r}{hint}", near=near_names)


def codec_of(content_type: bytes | None, route: Route) -> int:
    """How a call's body is to be read.

    A function with a `bytes` parameter gets any body as it is, unless it is a pickle. Raises UnsupportedMedia.
    """
    codec = CODEC_OF_MEDIA.get(content_type, -1)
    if codec < 0 and content_type is not None:
        media = content_type.partition(b";")[0].strip().lower()
        codec = CODEC_OF_MEDIA.get(media, -1)
        if codec < 0 and media.startswith(b"application/") and media.endswith(b"+json"):
            codec = JSON
    if codec == PICKLE:
        return PICKLE
    if route.spec.raw:
        return RAW
    if codec != JSON:
        raise UnsupportedMedia(
            f"{route.name} takes JSON ({MEDIA_JSON}), not {(content_type or b'').decode('latin-1')[:100]!r}; "
            "a function with one parameter annotated `bytes` takes any body",
            supported=[MEDIA_JSON, MEDIA_PICKLE],
        )
    return JSON


def timeout_of(headers: Mapping[bytes, bytes]) -> float | None:
    """`MN-Timeout` in seconds, None when absent. Raises InvalidRequest."""
    text = headers.get(b"mn-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not TIMEOUT_S_MIN <= seconds <= TIMEOUT_S_MAX:
        raise InvalidRequest(
            f"MN-Timeout: {text.decode('latin-1')[:50]!r} is not a number of seconds "
            f"from {TIMEOUT_S_MIN} to {TIMEOUT_S_MAX:.0f}",
            path="MN-Timeout",
        )
    return seconds
