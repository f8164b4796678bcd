"""What is told of a pickled payload before any of it is unpickled."""

from __future__ import annotations

import collections
import datetime
import decimal
import pickle
import pickletools
import sys
from pathlib import PurePosixPath
from types import ModuleType

import cloudpickle
import pytest

from mn.formats.codecs import PICKLE_HEADER
from mn.formats.errors import InvalidRequest
from mn.formats.pickles import dumps, loads, modules_of


@pytest.mark.parametrize("protocol", range(6))
def test_modules_are_found_in_every_protocol(protocol: int) -> None:
    value = [decimal.Decimal(1), collections.Counter("ab"), datetime.date(2020, 1, 1), decimal.Decimal(2)]
    found = modules_of(pickle.dumps(value, protocol))
    assert {"decimal", "collections", "datetime"} <= found


def test_modules_behind_memoised_names_are_found() -> None:
    value = [PurePosixPath("a"), "pathlib", "decimal", decimal.Decimal(1), decimal.getcontext, datetime.time(1)]
    data = pickle.dumps(value, 5)
    assert {"pathlib", "decimal", "datetime"} <= modules_of(data)
    assert modules_of(pickletools.optimize(data)) == modules_of(data)


def test_a_module_that_a_function_by_value_imports_is_found() -> None:
    assert "decimal" in modules_of(cloudpickle.dumps(lambda: decimal.Decimal(1)))


def test_plain_values_name_no_module() -> None:
    assert modules_of(pickle.dumps([1, "two", {"three": 4.0}, b"\x93c", None])) == set()


FIRED: list[str] = []


class Canary:
    def __reduce__(self) -> object:
        return FIRED.append, ("fired",)


def canary_and_absent_class(monkeypatch: pytest.MonkeyPatch) -> bytes:
    absent = ModuleType("absent")
    absent.Thing = type("Thing", (), {"__module__": "absent"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "absent", absent)
        return pickle.dumps([Canary(), absent.Thing], 5)


def test_nothing_is_unpickled_before_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = canary_and_absent_class(monkeypatch)
    other_minor = bytes([3, sys.version_info[1] + 1])
    with pytest.raises(InvalidRequest, match="the result of f needs the module absent"):
        loads(PICKLE_HEADER + data, "the result of f")
    with pytest.raises(InvalidRequest, match=f"pickled by Python 3.{other_minor[1]} and this is"):
        loads(b"MNP1" + other_minor + b"\0\0" + data, "it")
    with pytest.raises(InvalidRequest, match="not a pickle of MirrorNeuron"):
        loads(data, "it")
    assert FIRED == []


def test_large_payloads_are_explained_as_well() -> None:
    large = (
        b"\x80\x05\x8c\x06absent\x94\x8c\x01x\x94\x93\x94B"
        + (2 << 20).to_bytes(4, "little")
        + bytes(2 << 20)
        + b"\x86."
    )
    with pytest.raises(InvalidRequest, match="absent"):
        loads(PICKLE_HEADER + large, "the result of f")


def test_values_survive_the_way() -> None:
    for value in (None, {"a": [1, 2]}, collections.Counter("abc"), b"\x93" * 10):
        assert loads(dumps(value), "it") == value
    assert loads(dumps(lambda x: x + 1), "it")(1) == 2  # type: ignore[operator]
