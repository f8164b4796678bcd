"""What commands print: one JSON document with `--json`, aligned columns or sentences otherwise."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from mn.formats.errors import Conflict, MnError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def columns(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of left-aligned columns without lines, so that it can be read, cut and grepped."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def tick(what: str, text: str) -> str:
    """A line that says that something is in place."""
    return f"{paint('✓', '32')} {what:<8} {text}"


def describe(error: MnError) -> str:
    """An error for people: the field that it is about, what happened, and what to do next."""
    detail = error.detail or error.slug
    path = str(error.extra.get("path") or "")
    if path and path not in detail:
        detail = f"{path}: {detail}"
    notes = list(getattr(error, "__notes__", ()))
    if isinstance(error, Conflict) and {"owner", "source"} & error.extra.keys():
        notes.append("  to replace it: --replace")
    return "\n".join([detail, *notes])


def note(text: str) -> None:
    """A line about what goes on, beside the output that scripts read."""
    print(text, file=sys.stderr, flush=True)


def paint(text: str, colour: str) -> str:
    """Colour for terminals only."""
    import os

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def ago(timestamp_ms: float, now_ms: float | None = None) -> str:
    """How long ago a moment was."""
    from mn.formats.resources import format_duration

    now_ms = time.time() * 1000 if now_ms is None else now_ms
    return format_duration(max(0.0, (now_ms - timestamp_ms) / 1000)) + " ago"


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone.

    Raises InvalidRequest where nobody can be asked, and typer.Abort on a no.
    """
    from mn.formats.errors import InvalidRequest

    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} There is no terminal to ask on; --yes says yes.")
    typer.confirm(question, abort=True)
