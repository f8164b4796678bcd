"""Whatever bytes come as an archive: they are unpacked within the folder, or refused in words and nothing is left."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mn.formats.bundle import Limits, extract, pack
from mn.formats.errors import InvalidRequest, TooLarge
from tests.support.archives import tar_of, zip_of

NAMES = st.text(alphabet="aAb.é/\\ \n", min_size=1, max_size=12)
CONTENTS = st.dictionaries(
    st.from_regex(r"payloads/(pkg/)?[a-m]{1,5}[.]py", fullmatch=True), st.binary(max_size=2000), max_size=8
)
LIMITS = Limits(bytes_max=100_000, files_max=50)


def check(archive: bytes) -> str | None:
    """Unpack; the digest, or None when it was refused. Nothing may be outside, and nothing left after a refusal."""
    with tempfile.TemporaryDirectory() as parent:
        inner = Path(parent, "in")
        inner.mkdir()
        try:
            digest = extract(io.BytesIO(archive), inner, LIMITS).digest
        except (InvalidRequest, TooLarge):
            digest = None
            assert list(inner.iterdir()) == []
        assert list(Path(parent).iterdir()) == [inner]
        return digest


@given(CONTENTS)
@settings(max_examples=60, deadline=None)
def test_every_way_of_packing_gives_one_digest(files: dict[str, bytes]) -> None:
    manifest = b'{"name": "hello"}'
    digests = {check(pack(files, manifest)), check(tar_of(*files.items(), mode="w")), check(zip_of(*files.items()))}
    assert len(digests) == 1 and None not in digests


@given(st.lists(st.tuples(NAMES.map(lambda name: "payloads/" + name), st.binary(max_size=50)), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_names_stay_inside(members: list[tuple[str, bytes]]) -> None:
    check(tar_of(*members, mode="w"))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_archives_are_refused_or_harmless(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(_SOUND))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged))


_FILES = {"payloads/a.py": b"x" * 700, "payloads/pkg/b.py": b"y" * 30}
_SOUND = [pack(_FILES, b"{}"), tar_of(*_FILES.items(), mode="w")[: 12 * 512], zip_of(*_FILES.items())]
