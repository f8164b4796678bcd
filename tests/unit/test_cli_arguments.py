"""A function's parameters as options of `mn run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mn.cli.arguments import parse
from mn.formats.errors import InvalidRequest


def resize(path: str, *, width: int, ratio: float = 1.5, crop: bool = False, tags: list[str] | None = None) -> None:
    """Resize a picture."""


def blob(data: bytes, note="") -> None:  # type: ignore[no-untyped-def]
    """Two kinds that need care."""


def test_values_have_the_types_of_the_signature() -> None:
    tokens = ["--path", "a.png", "--width", "12", "--crop", "--tags", '["x", "y"]']
    args, kwargs, as_json = parse(resize, "resize", "mn run f.py", tokens)
    assert (args, as_json) == ([], False)
    assert kwargs == {"path": "a.png", "width": 12, "crop": True, "tags": ["x", "y"]}


def test_help_lists_the_parameters_with_their_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(resize, "resize", "mn run f.py", ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Resize a picture." in said
    assert "--width WIDTH" in said
    assert "float (default 1.5)" in said


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["--width", "3"], "required: --path"),
        (["--path", "a", "--width", "wide"], "invalid int value: 'wide'"),
        (["--path", "a", "--width", "3", "--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_what_does_not_fit_is_told_with_the_usage(tokens: list[str], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(resize, "resize", "mn run f.py", tokens)
    assert told in refused.value.detail
    assert "usage: mn run f.py" in refused.value.detail


def test_bytes_come_from_a_file_and_untyped_values_are_json_or_text(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"\x00\xff")
    assert parse(blob, "blob", "p", ["--data", f"@{tmp_path}/in.bin", "--note", "3"])[1] == {
        "data": b"\x00\xff",
        "note": 3,
    }
    assert parse(blob, "blob", "p", ["--data", "abc", "--note", "so so"])[1] == {"data": b"abc", "note": "so so"}


def test_variable_arguments() -> None:
    def f(*numbers: int, **names: str) -> None:
        """Takes many."""

    args, kwargs, as_json = parse(f, "f", "p", ["--numbers", "1", "2", "--names", "a=b", "c=d=e", "--json"])
    assert (args, kwargs, as_json) == ([1, 2], {"a": "b", "c": "d=e"}, True)
