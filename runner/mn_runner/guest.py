"""The one folder of ours that a sandbox sees: the child, the SDK and cloudpickle, read-only, named by its content."""

from __future__ import annotations

import hashlib
import os
import py_compile
import secrets
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

LEFT_OUT = {"cli", "rpc", "__pycache__"}
"""Folders of the `mn` package that only clients use."""
PREFIX = "guest-"


def build(run_dir: Path) -> Path:
    """The guest folder in `run_dir`, made where it is not there yet; folders of other contents are removed.

    Raises OSError where `run_dir` can't be written, and RuntimeError where a part is not installed.
    """
    sources = sorted(_sources())
    digest = hashlib.sha256()
    for name, path in sources:
        data = path.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    digest.update(bytes(sys.version_info[:2]))
    target = run_dir / f"{PREFIX}{digest.hexdigest()[:16]}"
    if not target.is_dir():
        _make(target, sources)
    for old in run_dir.glob(PREFIX + "*"):
        if old != target:
            _remove(old)
    return target


def _sources() -> Iterator[tuple[str, Path]]:
    """(name in the guest, file)."""
    runner = Path(__file__).parent
    yield "child.py", runner / "child.py"
    yield "mn_runner/__init__.py", runner / "__init__.py"
    yield "mn_runner/protocol.py", runner / "protocol.py"
    yield from _package(runner / "inside", "mn_runner/inside")
    for name in ("mn", "cloudpickle"):
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"the package {name} is not installed here; install mirrorneuron[node] again")
        yield from _package(Path(next(iter(spec.submodule_search_locations))), name)


def _package(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in LEFT_OUT:
            yield from _package(entry, f"{name}/{entry.name}")
        elif entry.suffix == ".py":
            yield f"{name}/{entry.name}", entry


def _make(target: Path, sources: list[tuple[str, Path]]) -> None:
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    for name, path in sources:
        copy = aside / name
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        shutil.copyfile(path, copy)
        # Unchecked: nothing in there ever changes, and a check would cost a stat for each import.
        compiled = py_compile.compile(
            str(copy),
            dfile=f"/mn/guest/{name}",
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        os.chmod(copy, 0o444)
        os.chmod(str(compiled), 0o444)
    for folder, _, _ in os.walk(aside):
        os.chmod(folder, 0o755)  # noqa: S103
    try:
        aside.rename(target)
    except OSError:
        # Another process of this home made it first; theirs has the same content.
        _remove(aside)
        if not target.is_dir():
            raise


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
