"""JSON that a sandbox wrote: made into values that every later reader, encoder and frame can take, or refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

DEPTH_MAX = 32
"""Levels of nesting; each reader's own stack has to be deep enough for them."""
INT_MAX = 2**63 - 1


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises ValueError for anything else, and for what cannot be passed on: numbers beyond 64 bits, NaN, nesting beyond `DEPTH_MAX`.
    Halves of surrogate pairs become question marks.
    """
    try:
        value = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("JSON that nests too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("JSON that is not an object")  # noqa: TRY004 - one kind of error for all that cannot be read
    cleaned: dict[str, Any] = _cleaned(value, DEPTH_MAX)
    return cleaned


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _cleaned(value: Any, left: int) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -INT_MAX <= value <= INT_MAX:
        raise ValueError("a number beyond 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number beyond what a float holds")
    if isinstance(value, dict | list) and not left:
        raise ValueError(f"JSON that nests deeper than {DEPTH_MAX}")
    if isinstance(value, dict):
        return {_cleaned(name, left): _cleaned(member, left - 1) for name, member in value.items()}
    if isinstance(value, list):
        return [_cleaned(member, left - 1) for member in value]
    return value
