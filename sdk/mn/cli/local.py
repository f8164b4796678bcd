"""The runtime of this machine as the CLI sees it: its files, its processes, and the supervisor as a subprocess."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mn.formats import processes
from mn.formats.errors import Internal, Unavailable, error_from
from mn.formats.settings import Settings

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the runtime.", envvar="MN_HOME", show_default="~/.mn")
]
NODE_EXTRA = "mirrorneuron[node]"
STOP_MARGIN_S = 60.0
TELL_EVERY_S = 5.0


def settings_of(home: Path | None) -> Settings:
    return Settings.load({"home": home})


def require_node() -> None:
    """Raise Unavailable with the line that installs what a node needs, when it is missing."""
    missing = [name for name in ("starlette", "uvicorn", "redis", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"this installation is the client alone. To run a node here:\n  pip install '{NODE_EXTRA}'", missing=missing
        )


def supervisor_argv(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "mn_nodepool.supervisor", *arguments]


def run_supervisor(environ: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Run a supervisor command to its report.

    Raises what the report tells. Ctrl-C reaches the subprocess too, which cleans up before it ends.
    """
    # Ctrl-C is held back until the subprocess is ready to meet it: it inherits what is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = subprocess.Popen(supervisor_argv(*arguments), env=dict(environ), stdout=subprocess.PIPE, text=True)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        text, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()
        raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    try:
        report: dict[str, Any] = json.loads(text)
    except ValueError:
        raise Internal(f"the supervisor ended with exit code {process.returncode} and no report") from None
    if not report["ok"]:
        raise error_from(report["slug"], report["detail"], {})
    return report


def supervisor_process(settings: Settings) -> tuple[int, str] | None:
    """Pid and start of the supervisor that runs this home, or None."""
    me = _read(settings.run_dir / "children.json").get("supervisor", {})
    if me and processes.is_alive(me["pid"], me["started"]):
        return me["pid"], me["started"]
    return None


def children(settings: Settings) -> dict[str, dict[str, Any]]:
    """name → `pid`, `started`, `restarts`, `alive`, `ready` of each process of this home."""
    noted = _read(settings.run_dir / "children.json").get("children", {})
    for name, it in noted.items():
        it["alive"] = processes.is_alive(it["pid"], it["started"])
        said = _read(settings.run_dir / f"{name}.json")
        it["ready"] = it["alive"] and (name == "store" or (said.get("pid") == it["pid"] and said.get("ready") is True))
    return dict(noted)


def endpoints(settings: Settings) -> dict[str, Any]:
    """What `run/endpoints.json` says, if the supervisor that wrote it still runs."""
    found = _read(settings.endpoints_file)
    supervisor = supervisor_process(settings)
    return found if found and supervisor and found["pids"]["supervisor"] == supervisor[0] else {}


def await_ready(settings: Settings, timeout_s: float) -> dict[str, Any]:
    """Wait until a runtime that somebody else is starting is ready.

    Raises Unavailable when it ends or takes longer.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := endpoints(settings):
            return found
        time.sleep(0.05)
    raise Unavailable(f"the runtime in {settings.home} is not ready after {timeout_s:.0f} s; see {settings.logs_dir}")


def is_stopping(settings: Settings) -> bool:
    """Whether a supervisor that was told to end still runs."""
    return supervisor_process(settings) is not None and bool(_read(settings.run_dir / "children.json").get("stopping"))


def await_end(settings: Settings, tell: Callable[[str], None], what: str) -> None:
    """Wait until the runtime of this home has ended, telling at once and every few seconds how long that may take.

    A supervisor that takes far longer than its calls may is killed.
    """
    found = supervisor_process(settings)
    began = time.monotonic()
    grace_s = 2 * settings.drain_s + STOP_MARGIN_S
    while found is not None and processes.is_alive(*found):
        waited_s = time.monotonic() - began
        if waited_s > grace_s:
            processes.end(*found, grace_s=0)
            return
        so_far = f", {waited_s:.0f} s so far" if waited_s >= 1 else ""
        tell(f"waiting for running calls, at most {settings.drain_s:.0f} s{so_far}; {what}")
        processes.wait(*found, TELL_EVERY_S)


def stop(settings: Settings, tell: Callable[[str], None]) -> bool:
    """Stop the runtime of this home, and end what a killed supervisor left; whether there was anything.

    A runtime that is stopping is not told again, since that would cut its running calls short.
    """
    found = supervisor_process(settings)
    if found is not None:
        if not is_stopping(settings):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGTERM)
        try:
            await_end(settings, tell, "Ctrl-C leaves it stopping in the background")
        except KeyboardInterrupt:
            tell("it goes on stopping in the background: mn runtime status")
            raise
    if supervisor_process(settings) is None and (settings.run_dir / "children.json").exists():
        report = run_supervisor({**os.environ, **settings.environ()}, "--repair")
        return found is not None or bool(report["ended"])
    return found is not None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
