"""Arguments and results: bytes ⇄ Python values, as `docs/architecture.md` maps them."""

from __future__ import annotations

import _pickle
import json
import sys

from mn_runner.inside.failures import PICKLE_HEADER, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

JSON, RAW, PICKLE = 0, 1, 2
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
STACK_GLOBAL = b"\x93"
"""The opcode by which a pickle names a class or function."""
NO_KEYWORDS: dict[str, Any] = {}

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_decode_json = json.JSONDecoder().decode


def arguments(codec: int, payload: bytes, raw: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call.

    Raises Refusal when the bytes are not what the codec says.
    """
    if codec == PICKLE:
        args, kwargs = unpickled(payload, "the arguments")
        return args, kwargs
    if raw or codec == RAW:
        return (payload,), NO_KEYWORDS
    if codec != JSON:
        raise Refusal(
            "unsupported-media-type", f"codec {codec} is unknown to this sandbox; send JSON, bytes or a pickle"
        )
    if not payload:
        return (), NO_KEYWORDS
    try:
        value = _decode_json(payload.decode("utf-8"))
    except RecursionError:
        raise Refusal("invalid-json", "the body is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise Refusal("invalid-json", f"the body is not JSON: {error}") from None
    return ((), value) if type(value) is dict else ((value,), NO_KEYWORDS)


def unpickled(payload: bytes, what: str) -> Any:
    """The value of a pickled payload.

    Raises Refusal for another interpreter's pickle and for one that needs a module that is not here, both before it is opened.
    """
    if payload[:8] != PICKLE_HEADER:
        raise _wrong_pickle(payload, what)
    if STACK_GLOBAL in payload and (missing := _missing_modules(payload)):
        raise Refusal(
            "invalid-request",
            f"{what} need the module {', '.join(missing)}, which the function's sandbox does not have: "
            "bring pure-Python code with the file, or send plain values",
            missing_modules=missing,
        )
    try:
        return _pickle.loads(memoryview(payload)[8:])
    except Exception as error:
        raise Refusal(
            "invalid-request", f"{what} could not be unpickled in the sandbox: {type(error).__name__}: {error}"
        ) from error


def _missing_modules(payload: bytes) -> list[str]:
    """Modules that the pickle names and that are not here, found before any of it is unpickled. A huge one is not scanned."""
    from mn.formats.pickles import SCAN_BYTES_MAX, missing_modules, modules_of

    return missing_modules(modules_of(payload[8:])) if len(payload) <= SCAN_BYTES_MAX else []


def _wrong_pickle(payload: bytes, what: str) -> Refusal:
    if payload[:4] != b"MNP1" or len(payload) < 8:
        return Refusal("invalid-request", f"{what} are not a pickle as mn writes it: the header is missing")
    theirs = f"{payload[4]}.{payload[5]}"
    return Refusal(
        "invalid-request",
        f"{what} were pickled with Python {theirs} and the function runs on {MINOR}; "
        f"deploy it with python={theirs!r}, or call it from Python {MINOR}",
        python=MINOR,
    )


def encoded(value: Any, codec: int, bytes_max: int) -> tuple[int, bytes]:
    """A result for a caller that sent `codec`: its codec and bytes.

    Raises Refusal where the value can't be sent that way, or is longer than `bytes_max`.
    """
    codec, payload = _encoded(value, codec)
    if len(payload) > bytes_max:
        raise Refusal(
            "too-large",
            f"the result has {len(payload)} bytes and may have {bytes_max} (setting payload_bytes_max); "
            "return it in parts, as a generator does",
            limit_bytes=bytes_max,
        )
    return codec, payload


def _encoded(value: Any, codec: int) -> tuple[int, bytes]:
    if codec == PICKLE:
        return PICKLE, pickled(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return RAW, bytes(value)
    try:
        return JSON, _encode_json(value).encode()
    except RecursionError:
        raise Refusal(
            "function-error", "the result is nested too deeply, or contains itself; return a plain value"
        ) from None
    except (TypeError, ValueError) as error:
        kind = type(value).__qualname__
        raise Refusal(
            "function-error",
            f"the function returned a {kind} that JSON can't express ({error}); "
            "return dicts, lists, strings and numbers, or bytes; Python callers get any value that pickles",
        ) from None


def pickled(value: Any) -> bytes:
    """Header and pickle: plain where that works, by value with cloudpickle where it does not (functions, classes made on the fly).

    Raises Refusal when neither works.
    """
    try:
        return PICKLE_HEADER + _pickle.dumps(value, 5)
    except Exception:  # pickling runs user code, and its errors are of every type
        return PICKLE_HEADER + _by_value(value)


def _by_value(value: Any) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value, 5))
    except Exception as error:
        raise Refusal(
            "function-error",
            f"a {type(value).__qualname__} can't be sent to the caller: {type(error).__name__}: {error}; "
            "return plain data instead of something that lives in the sandbox",
        ) from None
