"""`mn call` and `mn logs`: deployed functions at work."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mn.cli.deploying import print_result
from mn.cli.output import Json, print_json
from mn.cli.remote import calling, client
from mn.formats.codecs import MEDIA_NDJSON, MEDIA_RAW
from mn.formats.errors import InvalidJson


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
    if answer.headers.get("content-type", "").startswith(MEDIA_RAW) and not as_json:
        sys.stdout.buffer.write(answer.content)
    else:
        print_result(_value(answer.headers.get("content-type", ""), answer.content), as_json)


def _value(media: str, body: bytes) -> Any:
    if media.startswith(MEDIA_RAW):
        return body
    if media.startswith(MEDIA_NDJSON):
        return [json.loads(line) for line in body.splitlines()]
    return json.loads(body)


def _read(arguments: str) -> str:
    if arguments == "-":
        return sys.stdin.read()
    return Path(arguments[1:]).read_text("utf-8") if arguments.startswith("@") else arguments


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME|INVOCATION", help="A function, or one call of it.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", help="At most so many of the latest lines.")] = 1000,
    as_json: Json = False,
) -> None:
    """Show what a function, or one call of it, has printed. With --json each line is a JSON document."""
    with client() as api:
        for line in api.logs(name, follow=follow, limit=limit):
            print_line(line, as_json)


def print_line(line: dict[str, Any], as_json: bool) -> None:
    """One line of a function's output: when, in which call, and the text."""
    if as_json:
        print_json(line)
        return
    when = datetime.fromtimestamp(line["t"] / 1000).astimezone().strftime("%H:%M:%S")
    print(f"{when} {line['i'][-8:]} {line['m'].rstrip()}", flush=True)
