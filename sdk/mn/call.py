"""One call, wherever it starts: the transport seam, and what becomes of arguments and answers.

A transport carries encoded calls. In a sandbox the child sets one that uses its own socket; everywhere else it is HTTP
to the gateway. Names are those that the code knows: the sandbox's executor maps them to the functions that were
deployed together.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Protocol

    from mn.functions import Function

    class Transport(Protocol):
        """Carries calls. `status` is an `ItemStatus`; for failures the payload is a problem document in JSON."""

        def call(self, name: str, codec: int, payload: bytes, timeout_s: float | None) -> tuple[int, int, bytes]:
            """(status, codec, payload) of one call."""

        def stream(
            self, name: str, codec: int, payload: bytes, timeout_s: float | None
        ) -> Iterator[tuple[int, int, bytes]]:
            """The values of a generator; one that is not OK is the last."""

        def map(
            self, name: str, codec: int, payloads: Iterable[bytes], timeout_s: float | None, window: int
        ) -> Iterator[tuple[int, int, int, bytes]]:
            """(index, status, codec, payload) of each call as it ends, with at most `window` unanswered ones."""


_OK = 0
_FUNCTION_ERROR = 1
_JSON, _RAW, PICKLE = 0, 1, 2

_in_sandbox: Transport | None = None


def set_transport(transport: Transport | None) -> None:
    """What the child calls in a sandbox, before it loads user code. None: HTTP again."""
    global _in_sandbox
    _in_sandbox = transport


def inside_sandbox() -> bool:
    return _in_sandbox is not None


def transport() -> Transport:
    """The transport of this process.

    Outside a sandbox, raises Unavailable when no runtime is known.
    """
    if _in_sandbox is not None:
        return _in_sandbox
    from mn.transport import default_transport

    return default_transport()


def encode(function: Function[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The payload of one call."""
    from mn.formats import pickles
    from mn.formats.errors import InvalidRequest

    try:
        return pickles.dumps((args, kwargs), main_is_shared=function.shares_main)
    except InvalidRequest as error:
        raise InvalidRequest(f"an argument of {function.name}: {error.detail}") from error.__cause__


def decode(function: Function[Any, Any], status: int, codec: int, payload: bytes) -> Any:
    """The value that an answer stands for.

    Raises what the function raised, or the platform's error.
    """
    if status != _OK:
        from mn.failures import exception_of

        raise exception_of(function.name, status == _FUNCTION_ERROR, payload)
    if codec == PICKLE:
        from mn.formats.pickles import loads

        return loads(payload, f"the result of {function.name}")
    if codec == _JSON:
        import json

        return json.loads(payload)
    return payload
