"""How calls fail: the JSON that goes back in a RESULT, for people and for callers that rebuild the exception."""

from __future__ import annotations

import _pickle
import json
import sys

from mn_runner.inside.calls import TIMEOUT, WITHDRAWN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from mn_runner.inside.loading import Function

FUNCTION_ERROR = 1
PLATFORM_ERROR = 2
MESSAGE_CHARS_MAX = 8 * 1024
TRACEBACK_CHARS_MAX = 64 * 1024
PICKLE_BYTES_MAX = 1024 * 1024
OUR_FOLDER = __file__.rpartition("/")[0]
PICKLE_HEADER = b"MNP1" + bytes(sys.version_info[:2]) + b"\0\0"
"""As in `mn.formats.codecs`, which is not imported here for its cost."""


class Refusal(Exception):
    """The call can't be run, or its result can't be sent; `slug` is a problem's."""

    def __init__(self, slug: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.slug, self.detail, self.extra = slug, detail, extra

    def payload(self) -> bytes:
        return problem(self.slug, self.detail, **self.extra)


def problem(slug: str, detail: str, **extra: Any) -> bytes:
    """A PLATFORM_ERROR's payload."""
    return json.dumps({"slug": slug, "detail": detail, **extra}).encode()


def function_error(error: BaseException, pickled: Callable[[Any], bytes] | None = None) -> bytes:
    """A FUNCTION_ERROR's payload; with `pickled`, the exception itself goes along where it survives the journey."""
    kind = type(error)
    members = {
        "type": kind.__qualname__,
        "module": kind.__module__,
        "message": _message(error),
        "traceback": _bounded(user_traceback(error), TRACEBACK_CHARS_MAX),
    }
    if pickled is not None:
        data = _survivor(error, pickled)
        if data is not None:
            members["pickle"] = data
    return json.dumps(members).encode()


def user_traceback(error: BaseException) -> str:
    """The traceback from the first frame of user code on."""
    import traceback

    try:
        return "".join(traceback.format_exception(kind := type(error), error, _below_ours(error.__traceback__)))
    except Exception as failure:  # an exception's own __str__ or __cause__ may raise
        return f"{kind.__qualname__} (its traceback can't be shown: {type(failure).__name__})\n"


def _below_ours(tb: TracebackType | None) -> TracebackType | None:
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(OUR_FOLDER):
        tb = tb.tb_next
    return tb


def _message(error: BaseException) -> str:
    try:
        return _bounded(str(error), MESSAGE_CHARS_MAX)
    except Exception as failure:  # a user's __str__ may raise anything
        return f"(no message: its __str__ raised {type(failure).__name__})"


def _bounded(text: str, chars_max: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= chars_max:
        return text
    return text[: chars_max // 2] + "\n… (shortened) …\n" + text[-chars_max // 2 :]


def _survivor(error: BaseException, pickled: Callable[[Any], bytes]) -> str | None:
    """Base 64 of the pickled exception, or None where it could not be pickled or rebuilt: many need arguments that they don't keep."""
    import binascii

    try:
        data = pickled(error)
        if len(data) > PICKLE_BYTES_MAX or type(_pickle.loads(memoryview(data)[8:])) is not type(error):
            return None
    except Exception:  # whatever a user's __reduce__ raises, the text of the error still arrives
        return None
    return binascii.b2a_base64(data, newline=False).decode()


def interruption_payload(reason: int, started: bool = True) -> bytes:
    """The PLATFORM_ERROR of a call that was ended from outside."""
    where = "while it ran" if started else "before it started"
    if reason == TIMEOUT:
        return problem("timeout", f"the call's deadline passed {where}; give it more time with timeout=, or MN-Timeout")
    if reason == WITHDRAWN:
        return problem("withdrawn", f"the node took the call back {where}")
    return problem("cancelled", f"the caller went away {where}")


def refuse_unless_generator(function: Function, value: Any) -> None:
    """A version's `generator` and what its function returns have to agree: callers were promised one or the other.

    Raises Refusal where they don't.
    """
    kind = type(value)
    yields = hasattr(kind, "__next__") or hasattr(kind, "__anext__")
    if yields and not function.generator:
        raise Refusal("invalid-request", f'{function.name} yields values; say "generator": true in its manifest')
    if not yields:
        raise Refusal(
            "invalid-request",
            f"{function.name} is deployed as a generator and returned a {kind.__name__}; yield its values",
        )


def wrong_arguments(function: Function | None, error: TypeError) -> str | None:
    """A sentence when the arguments don't fit the signature, None when the TypeError means something else.

    Looks only at errors raised at the call itself, so that a TypeError from within the function stays the function's.
    """
    import inspect

    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename.startswith(OUR_FOLDER):
        tb = tb.tb_next
    if function is None or tb is None or not tb.tb_frame.f_code.co_filename.startswith(OUR_FOLDER):
        return None
    try:
        signature = str(inspect.signature(function.call))
    except (TypeError, ValueError):
        signature = "(…)"
    message = str(error).removeprefix(f"{getattr(function.call, '__qualname__', '')}() ")
    return f"{function.name}{signature}: {message}"
