"""`mn deploy`, `mn run` and `mn serve`: from a file to the pool."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mn.cli.functions import short
from mn.cli.output import Json, describe, note, paint, print_json
from mn.cli.remote import calling, client
from mn.formats.errors import InvalidRequest, MnError, NotFound, Unavailable

FILES_SHOWN = 5
Target = Annotated[str, typer.Argument(metavar="FILE[::FUNCTION]", help="A file or module, and one of its functions.")]
RUN_HELP = """Run a function of a file once, in a sandbox on the pool, and print what it returns.

Its parameters are options: mn run hello.py::square --x 12. With --help after the target they are listed."""


def add_to(app: typer.Typer) -> None:
    app.command("deploy")(deploy)
    app.command(
        "run",
        help=RUN_HELP,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )(run)
    app.command("serve")(serve)


def deploy(
    target: Target,
    replace: Annotated[bool, typer.Option("--replace", help="Replace functions from elsewhere.")] = False,
    as_json: Json = False,
) -> None:
    """Deploy the functions of a file under their names."""
    from mn import app

    began = time.monotonic()
    with importing(target):
        done = app.deploy(target, replace=replace)
    if as_json:
        print_json(done)
        return
    took = f"deployed in {time.monotonic() - began:.1f} s"
    for function in done["functions"]:
        state = took if function["changed"] else "unchanged"
        digest = short(done["digest"])
        print(f"{function['name']}  v{function['version']}  {digest}  {function['url']}     {state}")


def run(
    context: typer.Context,
    target: Target,
    timeout: Annotated[float | None, typer.Option(help="Seconds.", show_default="the function's own")] = None,
    as_json: Json = False,
) -> None:
    from mn import app
    from mn.cli.arguments import parse

    with importing(target):
        function = _one_function(app.load_target(target), target)
    args, kwargs, json_too = parse(function.raw_function, function.name, f"mn run {target}", context.args)
    handle = function if timeout is None else function.options(timeout=timeout)
    with calling():
        if function.is_generator:
            values = handle.remote_gen(*args, **kwargs)
            if as_json or json_too:
                print_json(list(values))
            else:
                for item in values:
                    print_result(item, as_json=False)
            return
        result = handle.remote(*args, **kwargs)
    print_result(result, as_json or json_too)


@contextlib.contextmanager
def importing(target: str) -> Iterator[None]:
    """Around what runs a user's file: what the file raises becomes InvalidRequest with the file's own frames."""
    _refuse_folder(target.partition("::")[0])
    try:
        yield
    except MnError:
        raise
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
        told = "".join(traceback.format_exception_only(error)).strip()
        refused = InvalidRequest(f"{target} can't be imported: {told}")
        for line in traceback.format_list(frames):
            refused.add_note(line.rstrip())
        raise refused from error


def _refuse_folder(place: str) -> None:
    folder = Path(place)
    if not folder.is_dir() or (folder.name == place and (folder / "__init__.py").is_file()):
        return
    if (folder / "manifest.json").is_file():
        raise InvalidRequest(f"{place} is a bundle's folder: mn bundle push {place} --deploy")
    files = ", ".join(sorted(path.name for path in folder.glob("*.py"))[:FILES_SHOWN]) or "no .py file"
    raise InvalidRequest(f"{place} is a folder: give one of its files (it has {files}), or a module's name")


def _is_ours(filename: str) -> bool:
    return filename.startswith(("<frozen", str(Path(__file__).parents[1]))) or "/importlib/" in filename


def _one_function(found: Any, target: str) -> Any:
    functions = list(found)
    if len(functions) == 1:
        return functions[0]
    names = ", ".join(function.name for function in functions)
    raise InvalidRequest(f"{target} has several functions; say which: {target}::NAME with NAME one of {names}")


def print_result(value: Any, as_json: bool) -> None:
    """A call's result: JSON where it can be written so, Python's own form otherwise."""
    if as_json:
        print_json(value)
        return
    try:
        print(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        print(repr(value))


def serve(target: Target, as_json: Json = False) -> None:
    """Deploy a file, again at every save, and stream its logs; remove its functions on Ctrl-C."""
    watch = _watcher()
    path = Path(target.partition("::")[0]).resolve()
    served: set[str] = set()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # a closed terminal and a service manager mean Ctrl-C too
    try:
        _serve_once(target, served, as_json, stopped, first=True)
        for _ in watch(path.parent, stop_event=stopped, watch_filter=lambda _change, changed: changed.endswith(".py")):
            _serve_once(target, served, as_json, stopped)
    except KeyboardInterrupt:
        print()
    finally:
        stopped.set()
        with client() as api:
            for name in served:
                with contextlib.suppress(NotFound):  # somebody else removed it
                    api.delete_function(name)
        if served and not as_json:
            print(f"removed {', '.join(sorted(served))}")


def _watcher() -> Any:
    try:
        from watchfiles import watch
    except ImportError:
        raise Unavailable(
            "`mn serve` watches files with a library of the node:\n  pip install 'mirrorneuron[node]'"
        ) from None
    return watch


def _serve_once(target: str, served: set[str], as_json: bool, stopped: threading.Event, *, first: bool = False) -> None:
    """Deploy what the file holds now. A file that can't be loaded is told, and the version before goes on serving.

    What a save does not mend, such as a missing file or runtime, ends the command when it is met at the start.
    """
    from mn import app

    try:
        with importing(target):
            done = app.deploy(target, replace=True)
    except MnError as error:
        if first and not isinstance(error, InvalidRequest):
            raise
        note(f"not deployed: {describe(error)}\nwaiting for a save")
        return
    if as_json:
        print_json(done)
    for function in done["functions"]:
        if not as_json:
            print(f"{function['name']}  v{function['version']}  {function['url']}")
        if function["name"] not in served:
            served.add(function["name"])
            threading.Thread(target=_follow, args=(function["name"], as_json, stopped), daemon=True).start()


def _follow(name: str, as_json: bool, stopped: threading.Event) -> None:
    """Print a function's lines as they come; those from before this moment are left out."""
    from mn.cli.calls import print_line

    began_ms = time.time() * 1000
    try:
        with client() as api:
            for line in api.logs(name, follow=True, limit=1):
                if stopped.is_set():
                    return
                if line["t"] >= began_ms:
                    print_line(line, as_json)
    except MnError as error:
        if not stopped.is_set():
            print(paint(f"no more logs of {name}: {error.detail}", "31"), flush=True)
