"""Mesh frames: every message survives the trip, and no bytes do worse than end the link."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mn.formats.errors import ProtocolError
from mn.formats.manifest import Environment, FunctionSpec, Resources, Scaling
from mn_nodepool.wire.codec import (
    FRAME_BYTES_MAX,
    HEADER,
    LAST_PIECE,
    MESSAGE_BYTES_IN_FRAME_MAX,
    PIECE,
    MessageReader,
    encode,
)
from mn_nodepool.wire.messages import AllocationReport, AnyMessage, Directory, Failed, KeyEntry, Message, Result, Route

TYPES: tuple[type[Message], ...] = get_args(AnyMessage)
text = st.text(max_size=20)
numbers = st.integers(0, 2**53)
spec = st.builds(
    FunctionSpec, text, text, main=st.booleans(), environment=st.builds(Environment, st.none() | text), resources=st.builds(Resources),
    scaling=st.builds(Scaling, st.integers(0, 9)), timeout_s=st.floats(0.1, 1e6), env=st.dictionaries(text, text, max_size=2),
)  # fmt: skip
by_type: dict[Any, st.SearchStrategy[Any]] = {
    str: text, int: numbers, bool: st.booleans(), float: st.floats(0, 1e9),
    msgspec.Raw: st.builds(lambda value: msgspec.Raw(msgspec.msgpack.encode(value)), st.dictionaries(text, numbers, max_size=3)),
    bytes: st.binary(max_size=50), dict[str, str]: st.dictionaries(text, text, max_size=3),
    dict[str, Any]: st.dictionaries(text, st.none() | text | numbers | st.lists(text, max_size=2), max_size=3),
    tuple[str, ...]: st.lists(text, max_size=3).map(tuple), FunctionSpec: spec,
}  # fmt: skip


def built(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return st.builds(kind, **{name: by_type[hint] for name, hint in hints.items()})


for struct in (Route, KeyEntry, AllocationReport):
    by_type[tuple[struct, ...]] = st.lists(built(struct), max_size=2).map(tuple)


def plain(message: Message) -> Any:
    """For comparing: `Raw` has no equality of its own."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_message_arrives_as_it_was_sent(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(built(kind))
    body = data.draw(st.binary(max_size=100))
    [(arrived, carried)] = MessageReader().feed(encode(message, body))
    assert type(arrived) is kind
    assert (plain(arrived), carried) == (plain(message), body)


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(0, 1 << 30))
@settings(max_examples=100, deadline=None)
def test_messages_come_whole_and_in_order_however_the_bytes_are_cut(bodies: list[bytes], seed: int) -> None:
    stream = b"".join(encode(Result(number, 0, 0, 1, 2), body) for number, body in enumerate(bodies))
    chance, reader, arrived = random.Random(seed), MessageReader(), []
    while stream:
        cut = chance.randint(1, 400)
        arrived += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert [(message.call, body) for message, body in arrived] == list(enumerate(bodies))


def test_a_long_message_goes_in_pieces_and_others_between_them() -> None:
    routes = tuple(Route(f"f{n}", f"f{n}#1", "ann", "default", FunctionSpec(f"f{n}", "app:f")) for n in range(5000))
    message = Directory(1, 2, "n", routes, ())
    whole = encode(message)
    assert len(whole) > FRAME_BYTES_MAX
    reader, arrived, position = MessageReader(), [], 0
    while position < len(whole):
        length = HEADER.size + HEADER.unpack_from(whole, position)[0]
        arrived += reader.feed(whole[position : position + length])
        arrived += reader.feed(encode(Result(position, 0, 0, 1, 2)))
        position += length
    assert [m for m, _ in arrived if isinstance(m, Directory)] == [message]
    assert len([m for m, _ in arrived if isinstance(m, Result)]) > 2


def test_a_body_never_goes_missing() -> None:
    long = Failed(1, "sandbox-lost", "x" * (MESSAGE_BYTES_IN_FRAME_MAX + 1), {}, True)
    with pytest.raises(ProtocolError, match="body"):
        encode(long, b"body")


@given(st.binary(max_size=500))
@settings(max_examples=1000, deadline=None)
def test_random_bytes_are_refused_or_waited_on(data: bytes) -> None:
    feed(data)


@given(st.sampled_from(TYPES), st.data(), st.integers(0, 1 << 30))
@settings(max_examples=1000, deadline=None)
def test_damaged_frames_are_refused_or_read(kind: type[Message], data: st.DataObject, seed: int) -> None:
    chance = random.Random(seed)
    frame = bytearray(encode(data.draw(built(kind)), b"body"))
    for _ in range(chance.randint(1, 5)):
        frame[chance.randrange(len(frame))] = chance.randrange(256)
    feed(bytes(frame))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_message_of_a_frame_is_refused_or_read(message: bytes) -> None:
    feed(HEADER.pack(len(message), len(message), 0, 0) + message)


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(FRAME_BYTES_MAX + 1, 0, 0, 0),
        HEADER.pack(0xFFFFFFFF, 0, 0, 0),
        HEADER.pack(4, 5, 0, 0) + b"abcd",
        HEADER.pack(0, 0, 0, 0),
        HEADER.pack(0, 0, PIECE | LAST_PIECE, 0),
        HEADER.pack(2, 0, 0x80, 0) + b"ab",
    ],
)
def test_frames_out_of_bounds_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        MessageReader().feed(frame)


def test_values_nested_without_end_are_refused() -> None:
    head = msgspec.msgpack.encode([13, 1, "internal", "x"])
    deep = b"\x96" + head[1:] + b"\x81\xa1k" + b"\x91" * 20_000 + b"\xc0" + b"\xc3"
    with pytest.raises(ProtocolError):
        MessageReader().feed(HEADER.pack(len(deep), len(deep), 0, 0) + deep)


def feed(data: bytes) -> None:
    try:
        MessageReader().feed(data)
    except ProtocolError:
        return
