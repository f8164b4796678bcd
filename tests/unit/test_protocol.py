"""Frames of the child protocol, without I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mn_runner.protocol import BODY_BYTES_MAX, CHUNK_BYTES, HEADER, MORE, FrameReader, Kind, Violation, frame, frames_of

FRAMES = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, 1), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=20
)


@given(FRAMES, st.lists(st.integers(1, 400), min_size=1))
def test_frames_survive_any_cutting_of_the_stream(frames: list[tuple[Kind, int, int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(kind, number, body, flags) for kind, flags, number, body in frames)
    reader, got, place, turn = FrameReader(), [], 0, 0
    while place < len(data):
        step = cuts[turn % len(cuts)]
        got += reader.feed(data[place : place + step])
        place, turn = place + step, turn + 1
    assert got == frames


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 5 * CHUNK_BYTES + 3])
def test_a_payload_is_cut_into_chunks_and_put_together(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    pieces = list(frames_of(Kind.RESULT, 7, b"head", payload[:size]))
    got = FrameReader().feed(b"".join(pieces))
    assert [kind for kind, _, _, _ in got] == [Kind.RESULT] + [Kind.CHUNK] * (len(got) - 1)
    assert [flags for _, flags, _, _ in got] == [MORE] * (len(got) - 1) + [0]
    assert b"".join(body for _, _, _, body in got) == b"head" + payload[:size]
    assert all(len(piece) <= BODY_BYTES_MAX + HEADER.size for piece in pieces)


def test_a_frame_over_the_limit_is_a_violation() -> None:
    with pytest.raises(Violation, match="over"):
        FrameReader().feed(HEADER.pack(BODY_BYTES_MAX + 1, Kind.CALL, 0, 1))
