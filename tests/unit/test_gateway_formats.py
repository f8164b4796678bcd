"""Keys, item framing and the sums of metrics, without a server."""

from __future__ import annotations

import json
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mn.formats.codecs import RESPONSE_ITEM
from mn.formats.errors import InvalidRequest, TooLarge
from mn.formats.keys import KEY_ENTROPY_BYTES, hash_key, looks_valid, new_key
from mn_gateway.items import FrameCutter, LineCutter
from mn_gateway.lines import frame_item, line_item
from mn_gateway.metrics import FunctionStats, Metrics, Snapshot, add_up, render


def test_a_key_is_recognised_and_a_misspelt_one_is_not() -> None:
    key = new_key(os.urandom(KEY_ENTROPY_BYTES))
    assert looks_valid(key.secret)
    assert key.sha256 == hash_key(key.secret)
    assert key.id.removeprefix("key_") in key.secret
    for position in range(len(key.secret)):
        other = "x" if key.secret[position] != "x" else "y"
        assert not looks_valid(key.secret[:position] + other + key.secret[position + 1 :])
    assert not looks_valid(key.secret[:-1])
    assert not looks_valid("")


def test_a_key_needs_its_entropy() -> None:
    with pytest.raises(ValueError, match="random bytes"):
        new_key(b"short")


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 50))
def test_frames_are_the_same_however_the_body_is_cut(items: list[bytes], piece: int) -> None:
    body = b"".join(struct.pack("<I", len(item)) + item for item in items)
    cutter = FrameCutter(1000)
    got = [item for start in range(0, len(body), piece) for item in cutter.feed(body[start : start + piece])]
    assert got + cutter.end() == items


@given(st.lists(st.integers(), max_size=20), st.integers(1, 50), st.booleans())
def test_lines_are_the_same_however_the_body_is_cut(values: list[int], piece: int, last_newline: bool) -> None:
    body = b"\n\n".join(b"%d" % value for value in values) + (b"\n" if last_newline else b"")
    cutter = LineCutter(1000)
    got = [item for start in range(0, len(body), piece) for item in cutter.feed(body[start : start + piece])]
    assert [json.loads(line) for line in got + cutter.end()] == values


def test_items_have_a_limit_before_they_are_complete() -> None:
    with pytest.raises(TooLarge):
        FrameCutter(10).feed(struct.pack("<I", 11))
    lines = LineCutter(10)
    lines.feed(b"x" * 8)
    with pytest.raises(TooLarge):
        lines.feed(b"x" * 8)


def test_a_body_cut_within_a_frame_is_told() -> None:
    cutter = FrameCutter(10)
    assert cutter.feed(struct.pack("<I", 4) + b"ab") == []
    with pytest.raises(InvalidRequest, match="middle"):
        cutter.end()


def test_lines_stay_lines_whatever_the_json_is_spaced_with() -> None:
    line = line_item(3, 0, 0, b'{\n"a": 1\r\n}')
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"index": 3, "value": {"a": 1}}
    assert json.loads(line_item(4, 0, 1, b"\x00\xff")) == {"index": 4, "base64": "AP8="}
    assert json.loads(line_item(9, 255, 0, b"")) == {"end": 9}


def test_a_frame_says_index_status_codec_and_length() -> None:
    head, payload = frame_item(7, 1, 2, b"abc")[:12], b"abc"
    assert RESPONSE_ITEM.unpack(head) == (7, 1, 2, 0, len(payload))


def test_numbers_of_several_processes_add_up() -> None:
    one, two = Metrics(), Metrics()
    one.of("f").observe(0.002)
    two.of("f").observe(4.0)
    two.of("f~scope").failed("function-error")
    two.of("g").failed("timeout")
    one.responses[200] += 1
    two.responses[200] += 2
    total = add_up([one.snapshot({"queued_calls": 1}), two.snapshot({"queued_calls": 2})])
    assert (total.functions["f"].ok, total.responses, total.gauges, total.processes) == (
        2,
        {200: 3},
        {"queued_calls": 3},
        2,
    )
    text = render(total).decode()
    assert 'mn_invocations_total{function="f",outcome="ok"} 2.0' in text
    assert 'mn_function_errors_total{function="f"} 1.0' in text
    assert 'mn_platform_errors_total{function="g",problem="timeout"} 1.0' in text
    assert 'mn_invocation_seconds_bucket{function="f",le="0.0025"} 1.0' in text
    assert 'mn_invocation_seconds_bucket{function="f",le="+Inf"} 2.0' in text


def test_functions_beyond_the_limit_count_together() -> None:
    metrics = Metrics()
    for number in range(1200):
        metrics.of(f"f{number}").observe(0.1)
    assert len(metrics.functions) == 1001
    assert sum(stats.ok for stats in metrics.functions.values()) == 1200


def test_an_empty_snapshot_renders() -> None:
    assert b"mn_gateway_processes 1.0" in render(Snapshot(functions={"f": FunctionStats()}))
