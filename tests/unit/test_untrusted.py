"""What a sandbox writes as an error is read without harm to who reads it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from mn.formats.errors import OUTCOMES, error_from
from mn_gateway import problems
from mn_nodepool.wire.untrusted import DEPTH_MAX, read_object


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 40 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[]",
        b"\xff",
        b"",
    ],
)
def test_what_cannot_be_passed_on_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_object(data)


def test_half_a_surrogate_pair_becomes_text_that_can_be_sent() -> None:
    value = read_object(b'{"\\ud800": ["\\ud800", "\\ud83d\\ude00", "\xc3\xa9"]}')
    assert value == {"?": ["?", "😀", "é"]}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value)) == value


@pytest.mark.parametrize("name", ["self", "detail", "cls", "slug", "extra", "args"])
def test_a_problems_members_may_have_any_name(name: str) -> None:
    error = error_from("timeout", "late", {name: 1})
    assert (error.slug, error.detail) == ("timeout", "late")
    assert problems.answer(problems.document(error))[0] == OUTCOMES["timeout"].status


@pytest.mark.parametrize("value", ["abc\r\nX: 1", [], {}, -5, 1e300, True, float("nan")])
def test_a_strange_retry_after_is_a_second(value: Any) -> None:
    _, headers, body = problems.answer(problems.document(error_from("no-leader", "x", {"retry_after_s": value})))
    assert dict(headers)[b"retry-after"] == b"1"
    assert json.loads(body)["status"] == 503
