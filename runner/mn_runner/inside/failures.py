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
WHY_CHARS_MAX = 500
TRACEBACK_CHARS_MAX = 64 * 1024
PICKLE_BYTES_MAX = 1024 * 1024
OUR_FOLDER = __file__.rpartition("/")[0]
PICKLE_HEADER = b"MNP1" + bytes(sys.version_info[:2]) + b"\0\0"
"""As in `mn.formats.codecs`, which is not imported here for its cost."""
LACKING = (
    "which sandboxes of this release do not have: bring pure-Python code with the file, "
    "or import it inside the functions that run here"
)


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
    _note_lacking_module(error)
    members = {
        "type": kind.__qualname__,
        "module": kind.__module__,
        "message": _message(error),
        "traceback": _bounded(user_traceback(error), TRACEBACK_CHARS_MAX),
    }
    if pickled is not None:
        data, why_not = _survivor(error, pickled)
        if data is not None:
            members["pickle"] = data
        else:
            members["pickle_error"] = _bounded(why_not, WHY_CHARS_MAX)
    return json.dumps(members).encode()


def lacking_module(error: BaseException) -> str | None:
    """A sentence when an import failed for a module that is not in the sandbox at all, None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or type(error.name) is not str:
        return None
    top = error.name.partition(".")[0]
    return None if top in sys.modules else f"it needs {top}, {LACKING}"


def _note_lacking_module(error: BaseException) -> None:
    sentence = lacking_module(error)
    # A caller in another sandbox passes the error on, which has the sentence already.
    if sentence and sentence not in getattr(error, "__notes__", ()):
        error.add_note(sentence)


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


class _ByState:
    """An exception that pickles as its class, arguments and attributes, to be rebuilt without its `__init__`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        from mn.failures import remade

        return remade, (type(self.error), self.error.args, vars(self.error))


def _survivor(error: BaseException, pickled: Callable[[Any], bytes]) -> tuple[str | None, str]:
    """Base 64 of the pickled exception; or None, and why it can't be rebuilt from a pickle.

    By default an exception is rebuilt by calling its class with its `args`, which fails, or says something else, where `__init__` takes
    other arguments than those that it hands on.
    """
    import binascii

    why = ""
    for form in (error, _ByState(error)):
        try:
            data = pickled(form)
            again = _pickle.loads(memoryview(data)[8:])
            if type(again) is not type(error) or str(again) != str(error):
                why = f"its pickle becomes another {type(again).__qualname__}"
            elif len(data) > PICKLE_BYTES_MAX:
                why = f"its pickle has more than {PICKLE_BYTES_MAX} bytes"
            else:
                return binascii.b2a_base64(data, newline=False).decode(), ""
        except Exception as failure:  # whatever a user's __reduce__ raises, the text of the error still arrives
            reason = failure.__context__ if isinstance(failure, Refusal) and failure.__context__ else failure
            why = f"{type(reason).__qualname__}: {_message(reason)}"
    return None, why


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
        raise Refusal(
            "invalid-request",
            f"{function.name} returned a generator and is deployed as a plain function: return a list of its values, or "
            'use `yield` (`yield from`) in the function itself; a manifest written by hand says "generator": true',
        )
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
