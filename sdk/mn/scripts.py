"""What a file defines, read from its source: whether importing a script brings a function back, and what is lost."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Importable:
    """What an import of a file defines."""

    names: frozenset[str]
    """Functions and classes at its top."""
    guarded: tuple[range, ...]
    """Lines that an import leaves out."""


def is_defined_by_import(raw_function: Any, file: str) -> bool:
    """Whether a function of the script `file`, which is running, is there as well when the file is imported."""
    found = _of_file(file)
    if found is None:
        return True
    if raw_function.__qualname__.partition(".")[0] not in found.names:
        return False
    code = getattr(inspect.unwrap(raw_function), "__code__", None)
    if code is None or code.co_filename != file:
        return True
    return not any(code.co_firstlineno in lines for lines in found.guarded)


@lru_cache(maxsize=16)
def _of_file(file: str) -> Importable | None:
    """Of a file as it was at first; None for what can't be read as Python."""
    try:
        return importable_parts(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def importable_parts(source: bytes) -> Importable:
    """What an import of this source defines. Pure.

    Raises SyntaxError or ValueError for what is not Python.
    """
    names: set[str] = set()
    guarded: list[range] = []

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
                continue
            if isinstance(node, ast.If) and _asks_for_main(node.test):
                guarded.append(range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1))
                visit(node.orelse)
                continue
            for part in ("body", "orelse", "finalbody"):
                visit(getattr(node, part, []))
            for handler in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                visit(handler.body)

    visit(ast.parse(source).body)
    return Importable(frozenset(names), tuple(guarded))


def redefined(source: bytes) -> tuple[str, int, int] | None:
    """Name and lines of a function of MirrorNeuron's that the file's top defines twice, so that the first is lost. Pure.

    None for source that is not Python.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    lines: dict[str, int] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and any(map(_is_ours, node.decorator_list)):
            line = node.decorator_list[0].lineno
            if (first := lines.setdefault(node.name, line)) != line:
                return node.name, first, line
    return None


def _is_ours(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("mn.function", "function")


def _asks_for_main(test: ast.expr) -> bool:
    """Whether a condition has `__name__ == "__main__"` in it."""
    return any(
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Eq)
        and {part.id for part in _sides(node) if isinstance(part, ast.Name)} == {"__name__"}
        and {part.value for part in _sides(node) if isinstance(part, ast.Constant)} == {"__main__"}
        for node in ast.walk(test)
    )


def _sides(node: ast.Compare) -> tuple[ast.expr, ...]:
    return (node.left, *node.comparators)
