"""`mn debug`: a failed call again, here, with the same code and the same input."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import pdb
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from mn.cli.main import carry_out
from mn.cli.output import Json, print_json
from mn.cli.remote import client
from mn.formats.codecs import Codec
from mn.formats.errors import InvalidRequest, MnError

EXIT_CRASH = 70


def add_to(app: typer.Typer) -> None:
    app.command("debug")(debug)


def debug(
    invocation: Annotated[str, typer.Argument(help="Of a call that failed within the last day.")],
    use_pdb: Annotated[bool, typer.Option("--pdb/--no-pdb", help="Stop where it raises, or only raise.")] = True,
    as_json: Json = False,
) -> None:
    """Replay a failed call on this machine, outside any sandbox, and open the debugger where it raises.

    The bundle's code and the call's input run with your rights: debug only what you trust. With --json nothing runs: the record of the
    failure is printed, its input in base 64.
    """
    with client() as api:
        record = api.failure(invocation)
        if as_json:
            print_json(record)
            return
        content = b"".join(api.bundle_content(record["digest"]))
    _check_minor(record)
    with tempfile.TemporaryDirectory(prefix="mn-debug-") as folder:
        payloads = _unpack(content, Path(folder))
        print(f"{_shown(record)}, code in {payloads}", file=sys.stderr)
        code = _in_child(lambda: _run(record, payloads, use_pdb))
    raise typer.Exit(code)


def _in_child(work: Callable[[], int]) -> int:
    """The exit code of some work in a process of its own: the code may end its process, and its folder is removed even so."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        code = EXIT_CRASH
        try:
            code = carry_out(work)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the debugger
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _run(record: dict[str, Any], payloads: Path, use_pdb: bool) -> int:
    sys.path.insert(0, str(payloads))
    function = _load(record["spec"], payloads)
    args, kwargs = _arguments(record, record["spec"])
    return _replay(function, args, kwargs, use_pdb)


def _shown(record: dict[str, Any]) -> str:
    """Which version failed, and when."""
    name, _, number = str(record["version"]).rpartition("#")
    when = datetime.fromtimestamp(record["at_ms"] / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{name.partition('~')[0]} v{number} of {when}"


def _check_minor(record: dict[str, Any]) -> None:
    wanted = record["spec"].get("environment", {}).get("python")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if wanted and wanted != here and record["codec"] == Codec.PICKLE:
        raise InvalidRequest(
            f"the call was pickled with Python {wanted} and this is {here}; run `mn debug` with Python {wanted}"
        )


def _unpack(content: bytes, folder: Path) -> Path:
    from mn.formats.bundle import extract

    extract(io.BytesIO(content), folder)
    return folder / "payloads"


def _load(spec: dict[str, Any], payloads: Path) -> Any:
    module, _, name = spec["entry"].partition(":")
    if module == "pickle":
        from mn.formats.pickles import loads

        function = loads((payloads / name).read_bytes(), spec["name"])
    else:
        _forget_modules_of(payloads)
        function = importlib.import_module(module)
        if spec.get("main"):
            # What the script pickled names its classes after the main module, which is this command's own here.
            sys.modules["__mn_main__"] = function
            for key, value in vars(function).items():
                if not key.startswith("__"):
                    setattr(sys.modules["__main__"], key, value)
        for part in name.split("."):
            function = getattr(function, part)
    return getattr(function, "raw_function", function)


def _forget_modules_of(payloads: Path) -> None:
    """In a sandbox the bundle's `code.py` is alone in its name; here this command may have loaded another `code`."""
    brought = {path.stem for path in payloads.iterdir()} - {"mn"}
    for name in [name for name in sys.modules if name.partition(".")[0] in brought]:
        del sys.modules[name]


def _arguments(record: dict[str, Any], spec: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    payload = base64.b64decode(record["payload"])
    if record["codec"] == Codec.PICKLE:
        from mn.formats.pickles import loads

        both: Any = loads(payload, "the call's input")
        return both[0], both[1]
    if spec.get("raw") or record["codec"] == Codec.RAW:
        return (payload,), {}
    if not payload.strip():
        return (), {}
    value = json.loads(payload)
    return ((), value) if isinstance(value, dict) else ((value,), {})


def _replay(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], use_pdb: bool) -> int:
    """1 when the function raised again, else 0."""
    import asyncio
    import inspect

    try:
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        elif inspect.isgenerator(result):
            result = list(result)
    except (Exception, SystemExit) as error:
        if isinstance(error, MnError):
            raise
        error.__traceback__ = _below_ours(error.__traceback__)
        traceback.print_exception(error)
        if use_pdb:
            pdb.post_mortem(error.__traceback__)
        return 1
    print(f"it returned {result!r} this time")
    return 0


def _below_ours(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame of the function on: how this command came to call it is of no interest."""
    import asyncio

    ours = (__file__, str(Path(asyncio.__file__).parent))
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(ours):
        inner = inner.tb_next
    return inner or trace
