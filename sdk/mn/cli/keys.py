"""`mn key`: API keys."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from mn.cli.output import Json, ago, columns, print_json
from mn.cli.remote import client
from mn.formats.errors import InvalidRequest
from mn.formats.resources import format_duration, parse_duration

app = typer.Typer(help="API keys.", no_args_is_help=True)

SCOPES = ("invoke", "deploy", "read", "admin")


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="What it is for.")],
    scope: Annotated[list[str], typer.Option("--scope", help="invoke, deploy, read or admin (all); repeatable.")],
    expires: Annotated[str | None, typer.Option(help="After this long, such as 90d.", show_default="never")] = None,
    owner: Annotated[
        str | None,
        typer.Option(help="To whom what it deploys belongs; several keys can share one.", show_default="NAME"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown once."""
    for one in scope:
        if one not in SCOPES:
            raise InvalidRequest(f"--scope: {one!r} is not one of {', '.join(SCOPES)}")
    try:
        expires_s = parse_duration(expires) if expires is not None else None
    except ValueError as error:
        raise InvalidRequest(f"--expires: {error}") from None
    if expires_s is not None and expires_s <= 0:
        raise InvalidRequest(f"--expires: {expires} is no time from now; without the option the key does not expire")
    with client() as api:
        made = api.create_key(name, scope, expires_s, owner)
    if as_json:
        print_json(made)
    else:
        print(made["key"])


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """Show the keys, without their secrets."""
    with client() as api:
        found = api.keys()
    if as_json:
        print_json({"keys": found})
        return
    now_ms = time.time() * 1000
    rows = []
    for key in found:
        expires_ms = key.get("expires_ms") or 0
        expires = "in " + format_duration((expires_ms - now_ms) / 1000) if expires_ms > now_ms else "expired"
        rows.append(
            (
                key["id"],
                key["name"],
                key["owner"],
                ",".join(key["scopes"]),
                ago(key["created_ms"]),
                expires if expires_ms else "never",
            )
        )
    print(columns(("ID", "NAME", "OWNER", "SCOPES", "CREATED", "EXPIRES"), rows))


@app.command()
def revoke(id: Annotated[str, typer.Argument(help="As `mn key list` shows it.")], as_json: Json = False) -> None:
    """Revoke a key. Gateways refuse it within two seconds."""
    with client() as api:
        api.revoke_key(id)
    print_json({"revoked": id}) if as_json else print(f"revoked {id}")
