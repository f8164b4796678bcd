"""Modules that decide purely use no clock, no randomness and no I/O, whatever they are changed to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mn_nodepool
import mn_runner

POOL, RUNNER = Path(str(mn_nodepool.__file__)).parent, Path(str(mn_runner.__file__)).parent
PURE = [
    POOL / "model.py",
    RUNNER / "protocol.py",
    *sorted((POOL / "scheduling").glob("*.py")),
    *sorted((POOL / "wire").glob("*.py")),
]
MODULES_ALLOWED = {
    "__future__", "base64", "collections", "dataclasses", "enum", "functools", "itertools", "json", "math", "mn", "mn_nodepool",
    "mn_runner", "msgspec", "operator", "re", "struct", "typing",
}  # fmt: skip
NAMES_REFUSED = {"open", "input", "print", "eval", "exec", "compile", "__import__", "breakpoint"}
ID_MAKERS = {"new_ulid", "new_invocation_id", "new_allocation_id", "new_sandbox_id", "new_key_id"}
IMPURE_BELOW = {"mn_nodepool": {"model", "scheduling", "wire"}, "mn_runner": {"protocol"}, "mn": {"formats"}}


def impurities(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in MODULES_ALLOWED]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if parts[0] not in MODULES_ALLOWED or (
                parts[0] in IMPURE_BELOW and not {*parts[1:2]} & IMPURE_BELOW[parts[0]]
            ):
                found.append(str(node.module))
            found += [alias.name for alias in node.names if alias.name in ID_MAKERS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES_REFUSED:
            found.append(f"{node.func.id}()")
        elif isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Global):
            found.append(type(node).__name__)
    return found


@pytest.mark.parametrize("path", PURE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_decides_purely_stays_pure(path: Path) -> None:
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from random import random",
        "import os.path",
        "import asyncio",
        "def f():\n    import socket",
        "open('x')",
        "async def f(): ...",
        "from mn_nodepool.clock import SystemClock",
        "from mn.formats.ids import new_ulid",
    ],
)
def test_the_scan_finds_what_it_is_for(source: str) -> None:
    assert impurities(source)
