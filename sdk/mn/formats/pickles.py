"""Pickled payloads: making them, and telling why one can't be read here before any of it is unpickled.

Standard library only, but for cloudpickle where plain pickle is not enough.
Only a sandbox and the caller's own process call `loads`.
"""

from __future__ import annotations

import pickle
import sys

from mn.formats.codecs import PICKLE_HEADER, pickle_minor
from mn.formats.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROTOCOL = 5
SANDBOX_MAIN = "__mn_main__"
"""What a script's module is called in a sandbox; the process that shipped it knows it by that name too."""
SCAN_BYTES_MAX = 1 << 20
"""Above it a payload is not scanned for modules, since the scan takes a microsecond per value; unpickling finds them.
"""
_STACK_GLOBAL = b"\x93"
_HEADER_BYTES = len(PICKLE_HEADER)


def dumps(value: object, *, main_is_shared: bool = False) -> bytes:
    """A payload for a value.

    Plain pickle refers to classes and functions by name. What that can't express is pickled by value, and so is what
    belongs to `__main__`, unless the reader has the same `__main__` (`main_is_shared`).
    Raises InvalidRequest when the value can't be pickled at all.
    """
    try:
        data = pickle.dumps(value, PROTOCOL)
    except Exception:  # of any type: `__reduce__` is user code, and cloudpickle tells what is really wrong
        data = b""
    if data and (main_is_shared or b"__main__" not in data):
        return PICKLE_HEADER + data
    import cloudpickle

    try:
        return PICKLE_HEADER + bytes(cloudpickle.dumps(value, PROTOCOL))
    except Exception as error:
        raise InvalidRequest(f"it can't be pickled: {type(error).__name__}: {error}") from error


def loads(payload: bytes, what: str) -> object:
    """The value of a payload. `what` names it in errors, for example "the result of parse".

    Raises InvalidRequest when it was pickled by another Python minor or needs a module that is not here; nothing was
    unpickled then.
    """
    data = checked(payload, what)
    try:
        return pickle.loads(data)  # noqa: S301
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(
            f"{what} can't be unpickled here: {error}; define it in a module that this process imports too"
        ) from error


def checked(payload: bytes, what: str) -> bytes:
    """The pickle in a payload, after all the checks that `loads` makes before it unpickles."""
    minor = pickle_minor(payload)
    if minor is None:
        raise InvalidRequest(f"{what} is not a pickle of MirrorNeuron's: its first bytes are {payload[:8]!r}")
    if payload[:_HEADER_BYTES] != PICKLE_HEADER:
        theirs, ours = ".".join(map(str, minor)), ".".join(map(str, sys.version_info[:2]))
        raise InvalidRequest(
            f"{what} was pickled by Python {theirs} and this is Python {ours}: use Python {theirs} here, "
            f"or deploy the function again from Python {ours} (mn deploy --replace)"
        )
    data = payload[_HEADER_BYTES:]
    if _STACK_GLOBAL in data and len(data) <= SCAN_BYTES_MAX and (missing := missing_modules(modules_of(data))):
        names = ", ".join(missing)
        raise InvalidRequest(
            f"{what} needs the module{'s' * (len(missing) > 1)} {names}, which can't be imported here: install it"
        )
    return data


def missing_modules(modules: set[str]) -> list[str]:
    """Top-level names of those modules that neither are imported nor could be."""
    from importlib.util import find_spec

    tops = {module.partition(".")[0] for module in modules if module not in sys.modules}
    return sorted(top for top in tops if top not in sys.modules and find_spec(top) is None)


def modules_of(data: bytes) -> set[str]:
    """Modules that unpickling these bytes would import: the ones that they name as the home of a class or function, or
    ship by name.
    """
    import pickletools

    modules: set[str] = set()
    memo: dict[int, str | None] = {}
    last: str | None = None
    before: str | None = None
    importing = False
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = last
            continue
        if name in ("GLOBAL", "INST"):
            modules.add(argument.partition(" ")[0])
        elif name == "STACK_GLOBAL" and before is not None:
            modules.add(before)
            importing = (before, last) == ("cloudpickle.cloudpickle", "subimport")
            before, last = last, None
            continue
        pushed = argument if name.endswith("UNICODE") or name == "BINUNICODE8" else None
        if name in ("BINGET", "LONG_BINGET", "GET"):
            pushed = memo.get(int(argument))
        if importing and pushed is not None:
            modules.add(pushed)
            importing = False
        before, last = last, pushed
    return modules
