"""`mn function`: what is deployed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mn.cli.output import Json, ago, columns, confirm, print_json
from mn.cli.remote import client

app = typer.Typer(help="Deployed functions.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The function's name.")]


@app.command("list")
def list_functions(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Ephemeral ones too.")] = False,
    as_json: Json = False,
) -> None:
    """Show the deployed functions."""
    with client() as api:
        found = [it for it in api.functions() if everything or not it.get("ephemeral")]
    if as_json:
        print_json({"functions": found})
        return
    rows = [
        (it["name"], f"v{it['version']}", short(it["digest"]), it["replicas"], ago(it["updated_ms"]), it["owner"])
        for it in sorted(found, key=lambda it: str(it["name"]))
    ]
    print(columns(("FUNCTION", "VERSION", "BUNDLE", "REPLICAS", "UPDATED", "OWNER"), rows))


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show one function and its versions."""
    with client() as api:
        found, versions = api.function(name), api.versions(name)
    if as_json:
        print_json({**found, "history": versions})
        return
    print(f"{found['name']}  v{found['version']}  {short(found['digest'])}  replicas {found['replicas']}\n")
    print(
        columns(
            ("VERSION", "BUNDLE", "CREATED", "LIVE"),
            [_version_row(it, versions["live"]) for it in versions["versions"]],
        )
    )


def _version_row(version: dict[str, Any], live: int) -> tuple[str, ...]:
    mark = "live" if version["number"] == live else ""
    return (f"v{version['number']}", short(version["digest"]), ago(version["created_ms"]), mark)


@app.command()
def rollback(
    name: Name,
    version: Annotated[
        int | None, typer.Option("--version", "-v", help="Which one.", show_default="the one before")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let the name stand for an earlier version again."""
    with client() as api:
        done = api.rollback(name, version)
    print_json(done) if as_json else print(f"{name} is v{done['version']} again")


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a function and its versions."""
    confirm(f"Remove the function {name} and all its versions?", yes)
    with client() as api:
        api.delete_function(name)
    print_json({"deleted": name}) if as_json else print(f"removed {name}")


def short(digest: str) -> str:
    """The first digits of a digest, enough to tell it from others."""
    return digest.removeprefix("sha256:")[:6] + "…"
