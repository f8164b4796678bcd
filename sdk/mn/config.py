"""Which runtime to talk to, with which key: contexts.

In this order: `MN_URL` and `MN_KEY`; the context that `MN_CONTEXT` or `[client] context` names, a table
`[contexts.NAME]` in `config.toml`; the `[client]` table itself; the runtime that this home last started. Each table
has `url`, `key` and, for a cluster with its own authority, `ca` (a file). `config.toml` lies in `MN_HOME` (`~/.mn`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mn.formats.errors import InvalidRequest, NotFound, Unavailable
from mn.formats.settings import read_config

CONTEXT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_TABLE = re.compile(r"^\s*\[(?P<name>[^\[\]]+)\]\s*(#.*)?$")
_TABLE_ARRAY = re.compile(r"^\s*\[\[")


@dataclass(frozen=True, slots=True)
class Context:
    """A runtime and the right to use it."""

    url: str
    """Without a slash at its end."""
    key: str
    """Empty: none."""
    ca: str | None = None
    """File with the certificate authority to trust; None: the system's."""
    name: str = ""
    """Of the table that it comes from; empty when it comes from elsewhere."""

    def __repr__(self) -> str:
        return f"Context(url={self.url!r}, name={self.name!r})"


def home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of this user's configuration and runtime."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("MN_HOME") or "~/.mn").expanduser().absolute()


def current_context(environ: Mapping[str, str] | None = None) -> Context:
    """The context in force.

    Raises Unavailable when there is none, NotFound for a context that is named and not there, InvalidRequest for a
    configuration that can't be read.
    """
    environ = os.environ if environ is None else environ
    folder = home(environ)
    config = read_config(folder)
    client = _table(config, "client", folder)
    chosen = environ.get("MN_CONTEXT") or client.get("context") or ""
    if chosen:
        named = _table(_table(config, "contexts", folder), str(chosen), folder)
        if not named.get("url"):
            known = ", ".join(sorted(config.get("contexts", {}))) or "none"
            raise NotFound(f"there is no context {chosen!r} (known: {known}): make it with mn login URL --key KEY")
        client = named
    url = environ.get("MN_URL") or client.get("url") or _running(folder)
    if not url:
        raise Unavailable(
            f"no runtime is known (looked at MN_URL and {folder / 'config.toml'}): start one with mn runtime start, "
            "or log in to one with mn login URL --key KEY"
        )
    if not str(url).startswith(("http://", "https://")):
        raise InvalidRequest(f"{url!r} is no URL of a runtime: write http://HOST:PORT or https://HOST:PORT", path="url")
    ca = environ.get("MN_CA") or client.get("ca")
    return Context(
        str(url).rstrip("/"),
        str(environ.get("MN_KEY") or client.get("key") or ""),
        str(ca) if ca else None,
        str(chosen),
    )


def _table(config: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    table = config.get(name, {})
    if not isinstance(table, dict):
        raise InvalidRequest(f"{folder / 'config.toml'}: {name} must be a table", path=name)
    return table


def _running(folder: Path) -> str:
    """The API of the runtime that this home started last, if any."""
    try:
        endpoints = json.loads((folder / "run" / "endpoints.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return ""
    return str(endpoints.get("api") or "") if isinstance(endpoints, dict) else ""


def contexts(environ: Mapping[str, str] | None = None) -> dict[str, Context]:
    """All named contexts."""
    folder = home(environ)
    tables = _table(read_config(folder), "contexts", folder)
    return {
        name: Context(str(table["url"]).rstrip("/"), str(table.get("key", "")), table.get("ca"), name)
        for name, table in tables.items()
        if isinstance(table, dict) and table.get("url")
    }


def save_context(folder: Path, context: Context, *, use: bool = True) -> None:
    """Keep a named context in the home's `config.toml`, and make it the current one when `use`.

    Raises InvalidRequest when the context has no proper name.
    """
    if not CONTEXT_NAME.match(context.name):
        raise InvalidRequest(f"{context.name!r} is no context name: letters, digits, _ and -, at most 64", path="name")
    write_table(folder, f"contexts.{context.name}", {"url": context.url, "key": context.key, "ca": context.ca})
    if use:
        use_context(folder, context.name)


def use_context(folder: Path, name: str) -> None:
    """Make a named context the current one; an empty name goes back to the `[client]` table's own url and key."""
    client = dict(_table(read_config(folder), "client", folder))
    write_table(folder, "client", {**client, "context": name or None})


def write_table(folder: Path, table: str, values: Mapping[str, str | int | float | bool | None]) -> None:
    """Set one table of the home's `config.toml` to these values (None: left out), and leave every other line as it is.

    The file is replaced in one step and readable by its owner alone, since it holds keys.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "config.toml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        text = ""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    _replace(path, with_table(text, table, lines))


def with_table(text: str, table: str, lines: list[str]) -> str:
    """A TOML text in which one table has these lines. Pure.

    >>> print(with_table("[a]\\nx = 1\\n\\n[b]\\ny = 2", "a", ["x = 3"]), end="")
    [a]
    x = 3
    <BLANKLINE>
    [b]
    y = 2
    """
    before: list[str] = []
    after: list[str] = []
    found = inside = False
    for line in text.splitlines():
        match = _TABLE.match(line)
        if match or _TABLE_ARRAY.match(line):
            inside = bool(match) and match is not None and match["name"].strip() == table
            found = found or inside
        if not inside:
            (after if found else before).append(line)
    while before and not before[-1].strip():
        before.pop()
    parts = ["\n".join(before)] if before else []
    parts.append("\n".join([f"[{table}]", *lines]))
    if after:
        parts.append("\n".join(after))
    return "\n\n".join(parts) + "\n"


def _toml(value: str | float) -> str:
    # A TOML basic string and a JSON string agree on everything but escaped surrogates, which this leaves unescaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _replace(path: Path, text: str) -> None:
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".config-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
