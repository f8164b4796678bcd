"""The functions that are measured, as source files that users could have written."""

from __future__ import annotations

from pathlib import Path

ECHO = """
import mn

@mn.function(min_replicas={replicas}, max_replicas={replicas}, timeout=30)
def echo(text: str) -> str:
    return text
"""
SMALL = """
@mn.function(cpu=0.05, memory="64MiB", max_replicas=1, timeout=60)
def {name}(text: str) -> str:
    return text
"""


def echo(folder: Path, replicas: int) -> Path:
    """A file with the function `echo`, which always has so many replicas."""
    return _write(folder / "echo.py", ECHO.format(replicas=replicas))


def many(folder: Path, names: list[str]) -> Path:
    """A file with a function of each name, small enough for all to have a sandbox at the same time."""
    return _write(folder / f"{names[0]}.py", "import mn\n" + "".join(SMALL.format(name=name) for name in names))


def _write(path: Path, source: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    return path
