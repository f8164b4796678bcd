"""`mn call` and `mn logs`: deployed functions at work."""

from __future__ import annotations

import base64
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mn import failures
from mn.cli.deploying import print_result
from mn.cli.output import Json, print_json
from mn.cli.remote import calling, client
from mn.formats.codecs import MEDIA_NDJSON, MEDIA_RAW
from mn.formats.errors import FunctionFailed, InvalidJson, MnError, Unavailable


def add_to(app: typer.Typer) -> None:
    app.command("call")(call)
    app.command("logs")(logs)


def call(
    name: Annotated[str, typer.Argument(help="A deployed function.")],
    arguments: Annotated[
        str, typer.Argument(metavar="JSON", help="Its arguments; @FILE reads a file, - reads stdin.")
    ] = "{}",
    timeout: Annotated[float | None, typer.Option(help="Seconds.", show_default="the function's own")] = None,
    as_json: Json = False,
) -> None:
    """Call a deployed function with JSON: an object is its keyword arguments, anything else its single argument."""
    text = _read(arguments)
    try:
        json.loads(text)
    except ValueError as error:
        raise InvalidJson(f"the arguments are not JSON: {error}") from None
    with client() as api, calling():
        answer = api.invoke(name, text.encode(), timeout_s=timeout)
    media = answer.headers.get("content-type", "")
    if media.startswith(MEDIA_NDJSON):
        _print_values(name, answer.content, as_json)
    elif media.startswith(MEDIA_RAW):
        print_result(answer.content, True) if as_json else sys.stdout.buffer.write(answer.content)
    else:
        print_result(json.loads(answer.content), as_json)


def _print_values(name: str, lines: bytes, as_json: bool) -> None:
    """What a generator gave: a line each, or one list. Raises the error at which it ended, after what came before."""
    values: list[Any] = []
    problem: dict[str, Any] | None = None
    ended = False
    for line in map(json.loads, lines.splitlines()):
        problem = line.get("error", problem)
        ended = ended or "end" in line
        if "base64" in line:
            values.append(base64.b64decode(line["base64"]))
        elif "value" in line:
            values.append(line["value"])
    if as_json and problem is None and ended:
        print_json(values)
    elif not as_json:
        for value in values:
            print_result(value, as_json=False)
    try:
        with calling():
            if problem is not None:
                raise failures.exception_of(
                    name, failures.slug_of(problem) == FunctionFailed.slug, json.dumps(problem).encode()
                )
            if not ended:
                raise Unavailable("the stream of values was cut off before its end", may_have_run=True)
    except MnError as error:
        error.extra["values"] = values
        raise


def _read(arguments: str) -> str:
    if arguments == "-":
        return sys.stdin.read()
    try:
        return Path(arguments[1:]).read_text("utf-8") if arguments.startswith("@") else arguments
    except UnicodeDecodeError as error:
        raise InvalidJson(f"{arguments[1:]} is not UTF-8: {error}") from None


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME|INVOCATION", help="A function, or one call of it.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many of the latest lines.")] = 1000,
    as_json: Json = False,
) -> None:
    """Show what a function, or one call of it, has printed. With --json each line is a JSON document."""
    with client() as api:
        nothing = True
        for line in api.logs(name, follow=follow, limit=limit):
            nothing = False
            print_line(line, as_json)
    if nothing and not follow:
        print(f"no output is kept of {name}", file=sys.stderr)


def print_line(line: dict[str, Any], as_json: bool) -> None:
    """One line of a function's output: when, in which call, and the text."""
    if as_json:
        print_json(line)
        return
    when = datetime.fromtimestamp(line["t"] / 1000).astimezone().strftime("%H:%M:%S")
    print(f"{when} {line['i']} {line['m'].rstrip()}", flush=True)
