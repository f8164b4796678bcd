"""A census of Python's standard library: every source file is parsed in a sandbox, the counts are reduced to one table.

    python examples/stdlib_census.py

A sandbox does not see this machine's files, so each file's bytes travel as an argument. `describe` runs once per file, in as
many sandboxes as there is room for; `census` runs in one more and calls `summarise` from there, without network or key.
"""

from __future__ import annotations

import ast
import heapq
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mn

GROUP = 200
"""Files whose facts are summarised by one call."""
SHOWN = 8


@dataclass
class Facts:
    """What is known of one file, or of many together."""

    files: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    unreadable: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)
    """Functions by their lines, the longest first."""
    deepest: tuple[int, str] = (0, "")
    """Most blocks inside each other, and where."""
    imports: Counter[str] = field(default_factory=Counter)
    """Files that import each module."""


@mn.function(memory="256MiB", timeout=60)
def describe(name: str, source: bytes) -> Facts:
    """The facts of one file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the library's own tests hold files that are wrong on purpose
        return Facts(files=1, unreadable=1)
    facts = Facts(files=1, lines=source.count(b"\n"))
    imports: set[str] = set()
    waiting: list[tuple[ast.AST, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, ast.ClassDef):
            facts.classes += 1
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            facts.functions += 1
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            facts.longest.append((length, f"{name}:{node.lineno} {node.name}"))
        elif isinstance(node, ast.Import):
            imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.add(node.module.partition(".")[0])
        if depth > facts.deepest[0] and isinstance(node, ast.stmt):
            facts.deepest = (depth, f"{name}:{node.lineno}")
        waiting.extend(statements(node, depth))
    facts.longest = heapq.nlargest(SHOWN, facts.longest)
    facts.imports = Counter(imports)
    return facts


def statements(node: ast.AST, depth: int) -> Iterator[tuple[ast.AST, int]]:
    """The statements right inside one, and how many blocks each is in. An `elif` is beside its `if`, not inside it."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        inside = getattr(node, block, ())
        if isinstance(inside, list):
            is_elif = (
                block == "orelse" and isinstance(node, ast.If) and len(inside) == 1 and isinstance(inside[0], ast.If)
            )
            level = depth if is_elif or block in ("handlers", "cases") or isinstance(node, ast.Module) else depth + 1
            yield from ((statement, level) for statement in inside)


@mn.function(memory="256MiB", timeout=60)
def summarise(group: list[Facts]) -> Facts:
    """The facts of many files as those of one."""
    total = Facts()
    for facts in group:
        total.files += facts.files
        total.lines += facts.lines
        total.functions += facts.functions
        total.classes += facts.classes
        total.unreadable += facts.unreadable
        total.longest = heapq.nlargest(SHOWN, total.longest + facts.longest)
        total.deepest = max(total.deepest, facts.deepest)
        total.imports += facts.imports
    return total


@mn.function(memory="256MiB", timeout=120)
def census(described: list[Facts]) -> Facts:
    """The facts of all files. Calls functions from inside a function."""
    groups = [described[start : start + GROUP] for start in range(0, len(described), GROUP)]
    return summarise.local(list(summarise.map(groups)))


def source_files(root: Path) -> list[Path]:
    """The library's own files, without what was installed beside them."""
    return sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def show(facts: Facts, timings: list[tuple[str, float]]) -> None:
    rows = [
        ("files", f"{facts.files:,}  ({facts.unreadable} not parsed)"),
        ("lines", f"{facts.lines:,}"),
        ("functions", f"{facts.functions:,}"),
        ("classes", f"{facts.classes:,}"),
        ("deepest nesting", f"{facts.deepest[0]} blocks at {facts.deepest[1]}"),
        ("longest functions", "\n".join(f"{length:,} lines  {where}" for length, where in facts.longest)),
        ("most imported", "\n".join(f"{count:,} files  {name}" for name, count in facts.imports.most_common(SHOWN))),
        *((name, f"{seconds:.2f} s") for name, seconds in timings),
    ]
    title = f"Python {sys.version.split()[0]}'s standard library"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *(f"{name:18} {value}".replace("\n", "\n" + " " * 19) for name, value in rows), sep="\n")
        return
    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def main() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = source_files(root)
    began = time.perf_counter()
    describe.remote("warm-up", b"")
    deployed = time.perf_counter()
    described = list(describe.starmap([(str(path.relative_to(root)), path.read_bytes()) for path in paths]))
    mapped = time.perf_counter()
    facts = census.remote(described)
    reduced = time.perf_counter()
    assert facts.files == len(paths)
    show(
        facts,
        [
            ("deploy, first call", deployed - began),
            (f"map over {len(paths):,} files", mapped - deployed),
            ("reduce, nested calls", reduced - mapped),
        ],
    )


if __name__ == "__main__":
    main()
