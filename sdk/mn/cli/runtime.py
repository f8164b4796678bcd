"""`mn runtime`: start, stop and look after the runtime of this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from mn.cli import local, units
from mn.cli.local import Home, settings_of
from mn.cli.output import Json, columns, confirm, note, print_json, tick
from mn.formats.errors import Conflict, InvalidRequest, Unavailable
from mn.formats.resources import format_size
from mn.formats.settings import Settings

app = typer.Typer(help="Start, stop and look after the runtime of this machine.", no_args_is_help=True)

PORTS = ("api_port", "store_port", "dist_port", "mapper_port", "grpc_port", "sentinel_port")
START_S = 75.0
REMOVED_BY_RESET = ("store", "bundles", "envs", "failures", "logs", "run")


@app.command()
def start(
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached, for service managers.")] = False,
    worker_node: Annotated[
        bool, typer.Option("--worker-node", help="Wait to be joined by another node; comes with clusters.")
    ] = False,
    home: Home = None,
    ports: Annotated[str | None, typer.Option(help="`auto`: pick free ports and keep them.", metavar="auto")] = None,
    api_port: Annotated[int | None, typer.Option(help="Port of the HTTP API.", show_default="54001")] = None,
    store_port: Annotated[int | None, typer.Option(help="Port of the store.", show_default="6379")] = None,
    driver: Annotated[
        str | None, typer.Option(help="bubblewrap, or host_local, which isolates nothing.", show_default="bubblewrap")
    ] = None,
    gateways: Annotated[int | None, typer.Option(help="Gateway processes.", show_default="1")] = None,
    as_json: Json = False,
) -> None:
    """Start the runtime of this machine, unless it runs already; return when all is ready."""
    local.require_node()
    if worker_node:
        raise InvalidRequest(
            "--worker-node comes with clusters, which this release does not have yet: it runs one machine. "
            "Without the option this machine becomes a node of its own: mn runtime start"
        )
    if ports not in (None, "auto"):
        raise InvalidRequest(f"--ports: {ports!r} is not `auto`; single ports are --api-port and --store-port")
    given = {"api_port": api_port, "store_port": store_port, "driver": driver, "gateways": gateways}
    environ = _environ(home, ports == "auto", given)
    settings = Settings.load(environ=environ)
    _check(settings)
    _await_stopped(settings)
    if foreground:
        argv = local.supervisor_argv()
        os.execve(argv[0], argv, environ)  # noqa: S606 - the service manager watches this very process
    report = local.run_supervisor(environ, "--background")
    if report["already"] and local.is_stopping(settings):
        _await_stopped(settings)
        report = local.run_supervisor(environ, "--background")
    if report["already"]:
        found = local.await_ready(settings, START_S)
        _check_same(found["settings"], given)
        report = {**report, **found}
    if as_json:
        print_json(report)
    else:
        _print_started(settings, report)


def _await_stopped(settings: Settings) -> None:
    """Where the runtime is stopping, wait for its end."""
    if local.is_stopping(settings):
        local.await_end(settings, note, "it is stopping, and starts again then")


def _check_same(running: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise Conflict where an option asks for another setting than the runtime has that runs already."""
    other = [
        f"{name} {running[name]}, not {value}"
        for name, value in given.items()
        if value not in (None, 0, running.get(name))
    ]
    if other:
        raise Conflict(f"it runs already with other settings ({', '.join(other)}): mn runtime stop first")


def _environ(home: Path | None, automatic_ports: bool, given: dict[str, Any]) -> dict[str, str]:
    environ = dict(os.environ)
    if home is not None:
        environ["MN_HOME"] = str(home.expanduser().absolute())
    if automatic_ports:
        environ |= {"MN_" + name.upper(): "0" for name in PORTS if not os.environ.get("MN_" + name.upper())}
    return environ | {"MN_" + name.upper(): str(value) for name, value in given.items() if value is not None}


def _check(settings: Settings) -> None:
    if settings.driver not in ("bubblewrap", "host_local"):
        raise InvalidRequest(f"driver: {settings.driver!r} is not one of bubblewrap, host_local", path="driver")
    if not 1 <= settings.gateways <= 64:
        raise InvalidRequest(f"gateways: {settings.gateways} is not between 1 and 64", path="gateways")
    for name in PORTS:
        if not 0 <= getattr(settings, name) <= 65535:
            raise InvalidRequest(f"{name}: {getattr(settings, name)} is no port number", path=name)


def _print_started(settings: Settings, report: dict[str, Any]) -> None:
    from mn.cli.nodes import describe_node
    from mn.cli.remote import local_client

    with local_client(settings, report["api"]) as client:
        node = client.nodes()["nodes"][0]
    print(tick("store", f"{report.get('store_server', 'external')}   {_short(settings.store_dir)}"))
    print(tick("node", describe_node(node)))
    print(tick("gateway", f"{report['api']}   (key in {_short(settings.config_file)})"))
    ready = "It runs already." if report["already"] else f"Ready in {report['seconds']:.1f} s."
    if node["layers"]:
        print(f"Sandboxes: {node['driver']} ({', '.join(node['layers'])}).  {ready}")
    else:
        print(f"Sandboxes: {node['driver']}, which isolates NOTHING: run only code that you trust.  {ready}")


def _short(path: Path) -> str:
    home = str(Path.home())
    return "~" + str(path)[len(home) :] if str(path).startswith(home + "/") else str(path)


@app.command()
def stop(home: Home = None, as_json: Json = False) -> None:
    """Let running calls end, then end every process of the runtime."""
    local.require_node()
    settings = settings_of(home)
    stopped = local.stop(settings, note)
    if as_json:
        print_json({"home": str(settings.home), "stopped": stopped})
    else:
        print("stopped" if stopped else f"no runtime runs in {_short(settings.home)}")


@app.command()
def status(home: Home = None, as_json: Json = False) -> None:
    """Show the runtime's processes and where it listens. Exit code 9 when it does not run."""
    settings = settings_of(home)
    found, children = local.endpoints(settings), local.children(settings)
    running, stopping = local.supervisor_process(settings) is not None, local.is_stopping(settings)
    if as_json:
        state = {"home": str(settings.home), "running": running, "stopping": stopping}
        print_json({**state, "endpoints": found, "processes": children})
    elif running:
        print(f"{'api':<8} {found.get('api', 'starting')}\n{'store':<8} {found.get('store', 'starting')}")
        print(f"{'home':<8} {_short(settings.home)}")
        print(f"{'state':<8} {'stopping' if stopping else 'running' if found else 'starting'}\n")
        rows = [(name, it["pid"], _state(it), it["restarts"]) for name, it in children.items()]
        print(columns(("PROCESS", "PID", "STATE", "RESTARTS"), rows))
    if not running:
        if not as_json:
            print(f"no runtime runs in {_short(settings.home)}; start it: mn runtime start")
        raise typer.Exit(9)


def _state(child: dict[str, Any]) -> str:
    if not child["alive"]:
        return "ended"
    return "ready" if child["ready"] else "starting"


@app.command()
def health(home: Home = None, as_json: Json = False) -> None:
    """Exit with 0 when every process runs and the API answers, with 9 otherwise."""
    settings = settings_of(home)
    problems = _problems(settings)
    if as_json:
        print_json({"healthy": not problems, "problems": problems})
        if problems:
            raise typer.Exit(9)
    elif problems:
        raise Unavailable("; ".join(problems))
    else:
        print("healthy")


def _problems(settings: Settings) -> list[str]:
    found = local.endpoints(settings)
    if not found:
        return [f"no runtime is ready in {_short(settings.home)} (start it: mn runtime start)"]
    children = local.children(settings)
    problems = [f"{name} is {_state(it)}" for name, it in children.items() if not it["ready"]]
    problems += [f"{name} is not running" for name in found["pids"] if name != "supervisor" and name not in children]
    if not problems:
        import httpx

        try:
            answer = httpx.get(found["api"] + "/readyz", timeout=10, trust_env=False)
        except httpx.HTTPError as error:
            problems.append(f"the API at {found['api']} does not answer: {error}")
        else:
            if answer.status_code != 200:
                problems.append(f"the API is not ready (status {answer.status_code})")
    return problems


@app.command()
def reset(
    home: Home = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the runtime and remove its functions, keys, bundles and logs. Its name, ports and settings stay."""
    settings = settings_of(home)
    folders = [settings.home / name for name in REMOVED_BY_RESET if (settings.home / name).exists()]
    if settings.run_dir not in folders and settings.run_dir.exists():
        folders.append(settings.run_dir)
    if not as_json and folders:
        print("This removes:")
        for folder in folders:
            print(f"  {_short(folder):<40} {format_size(_size_of(folder))}")
    if folders:
        running = local.supervisor_process(settings) is not None
        confirm("Stop the runtime and remove all of it?" if running else "Remove all of it?", yes)
        local.stop(settings, note)
        for folder in folders:
            if folder.exists():  # a folder for sockets outside the home goes at the stop
                _remove(folder)
    if as_json:
        print_json({"removed": [str(folder) for folder in folders]})
    else:
        print("removed" if folders else f"there is nothing to remove in {_short(settings.home)}")


def _remove(folder: Path) -> None:
    """Bundles are kept read-only, folders included, which only matters to who is not root."""
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o700)
    shutil.rmtree(folder)


def _size_of(folder: Path) -> int:
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)


@app.command()
def enable(home: Home = None, as_json: Json = False) -> None:
    """Start the runtime with this machine: installs a systemd unit (the system's for root, the user's otherwise)."""
    local.require_node()
    unit = units.enable(settings_of(home), os.environ)
    if as_json:
        print_json({"enabled": True, "unit": str(unit)})
    else:
        print(f"enabled {unit.name}: it starts with this machine, and runs now.   mn runtime disable")


@app.command()
def disable(home: Home = None, as_json: Json = False) -> None:
    """Undo `enable`: stops the runtime and removes the unit."""
    unit = units.disable(settings_of(home))
    if as_json:
        print_json({"enabled": False, "unit": str(unit)})
    else:
        print(f"disabled and removed {unit.name}")
