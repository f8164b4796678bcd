"""`mn bundle`: code on its way to the pool."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mn.cli.functions import short
from mn.cli.output import Json, ago, columns, print_json
from mn.cli.remote import client
from mn.formats.errors import InvalidRequest, NotFound
from mn.formats.resources import format_size

app = typer.Typer(help="Bundles: a manifest and the code that it names.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A folder with manifest.json and payloads/, or an archive of one.")]


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A folder with manifest.json and payloads/.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The archive.", show_default="NAME.tgz")] = None,
    as_json: Json = False,
) -> None:
    """Validate a bundle and pack it: the same files always give the same bytes."""
    from mn.formats.bundle import write_archive

    files, manifest = _read(folder)
    target = output or Path(f"{folder.resolve().name}.tgz")
    found = examine(folder)
    with target.open("wb") as out:
        write_archive(out, files, manifest)
    said = {"archive": str(target), "packed_bytes": target.stat().st_size, **found}
    print_json(said) if as_json else print(f"{target}  {format_size(said['packed_bytes'])}  {said['digest']}")


@app.command()
def validate(bundle: Folder, as_json: Json = False) -> None:
    """Check a bundle as the gateway would. Exit code 2 when something is wrong with it."""
    found = examine(bundle)
    if as_json:
        print_json(found)
    else:
        print(f"{found['digest']}  {found['files']} files, {format_size(found['size_bytes'])}")
        print(f"functions: {', '.join(found['functions'])}")


def examine(bundle: Path) -> dict[str, Any]:
    """Digest, number of files, size and function names of a bundle.

    Raises InvalidRequest or TooLarge, naming what is wrong with it.
    """
    from mn.formats.bundle import extract
    from mn.formats.manifest import parse_manifest

    with tempfile.TemporaryDirectory(prefix="mn-bundle-") as scratch:
        archive = Path(scratch, "archive")
        into = Path(scratch, "into")
        into.mkdir()
        _write_archive(bundle, archive)
        with archive.open("rb") as file:
            found = extract(file, into)
        functions = parse_manifest(found.manifest).functions
        for spec in functions:
            _check_entry(into / "payloads", spec.entry)
    names = [spec.name for spec in functions]
    return {"digest": found.digest, "files": found.files, "size_bytes": found.size_bytes, "functions": names}


def _check_entry(payloads: Path, entry: str) -> None:
    module, _, name = entry.partition(":")
    if module == "pickle":
        places = [payloads / name]
    else:
        base = payloads.joinpath(*module.split("."))
        places = [base.with_name(base.name + ".py"), base / "__init__.py"]
    if not any(place.is_file() for place in places):
        looked = " or ".join(place.relative_to(payloads.parent).as_posix() for place in places)
        raise InvalidRequest(f"entry {entry!r}: the bundle has no {looked}", path="entry")


def _write_archive(bundle: Path, target: Path) -> None:
    from mn.formats.bundle import write_archive

    if not bundle.is_dir():
        try:
            target.write_bytes(bundle.read_bytes())
        except FileNotFoundError:
            raise NotFound(f"there is no {bundle}") from None
        return
    files, manifest = _read(bundle)
    with target.open("wb") as out:
        write_archive(out, files, manifest)


def _read(folder: Path) -> tuple[dict[str, bytes | Path], bytes]:
    from mn.formats.bundle import read_folder

    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    return read_folder(folder)


@app.command()
def push(
    bundle: Folder,
    deploy: Annotated[bool, typer.Option("--deploy", help="Deploy its functions too.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace functions from elsewhere.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a bundle."""
    examine(bundle)
    with tempfile.TemporaryDirectory(prefix="mn-bundle-") as scratch, client() as api:
        archive = Path(scratch, "archive")
        _write_archive(bundle, archive)
        with archive.open("rb") as file:
            done = api.push_bundle(file, deploy=deploy, replace=replace)
    if as_json:
        print_json(done)
        return
    print(done["digest"])
    for function in done.get("functions", ()):
        print(f"{function['name']}  v{function['version']}  {function['url']}")


@app.command("list")
def list_bundles(as_json: Json = False) -> None:
    """Show the bundles that the pool holds."""
    with client() as api:
        found = api.bundles()
    if as_json:
        print_json({"bundles": found})
        return
    rows = [
        (short(it["digest"]), ", ".join(spec["name"] for spec in it["functions"]), it["files"],
         format_size(it["size_bytes"]), ago(it["created_ms"]), it["owner"])
        for it in found
    ]  # fmt: skip
    print(columns(("BUNDLE", "FUNCTIONS", "FILES", "SIZE", "CREATED", "OWNER"), rows))
