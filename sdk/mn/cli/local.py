"""The runtime of this machine as the CLI sees it: its files, its processes, and the supervisor as a subprocess."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
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
    process = subprocess.Popen(supervisor_argv(*arguments), env=dict(environ), stdout=subprocess.PIPE, text=True)
    try:
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


def stop(settings: Settings) -> bool:
    """Stop the runtime of this home, and end what a killed supervisor left; whether there was anything."""
    found = supervisor_process(settings)
    if found is not None:
        processes.end(*found, grace_s=2 * settings.drain_s + STOP_MARGIN_S)
    if (settings.run_dir / "children.json").exists():
        report = run_supervisor({**os.environ, **settings.environ()}, "--repair")
        return found is not None or bool(report["ended"])
    return found is not None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
