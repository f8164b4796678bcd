"""`mn login`: which cluster this machine's CLI and SDK talk to."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

import typer

from mn.cli.output import Json, print_json
from mn.formats.errors import Forbidden, InvalidRequest


def add_to(app: typer.Typer) -> None:
    app.command("login")(login)


def login(
    url: Annotated[str, typer.Argument(help="The cluster's API, such as https://192.168.4.25:54001.")],
    key: Annotated[str, typer.Option("--key", help="An API key.", envvar="MN_KEY", prompt="API key", hide_input=True)],
    name: Annotated[str | None, typer.Option(help="Of the context.", show_default="from the address")] = None,
    ca: Annotated[str | None, typer.Option(help="File with the authority to trust.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Check a cluster's address and key, and use them from now on. MN_CONTEXT=NAME chooses among several."""
    from mn import config
    from mn.client import Client
    from mn.formats.keys import looks_valid

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{url!r} is no address of an API; write for example https://192.168.4.25:54001")
    if not looks_valid(key):
        raise InvalidRequest("the key is cut or misspelt: it starts with mnk_ and its checksum does not fit")
    chosen = name or re.sub(r"[^A-Za-z0-9_-]", "-", parts.hostname)
    context = config.Context(url.rstrip("/"), key, ca, chosen)
    with Client.of(context) as api:
        try:
            api.functions()
        except Forbidden as error:
            if "scope" not in error.extra:
                raise  # it is not the key that is refused, but the address
    config.save_context(config.home(), context)
    if as_json:
        print_json({"context": chosen, "url": context.url})
    else:
        print(f"logged in to {context.url} as context {chosen}")
