"""`python -P -m mn_nodepool.supervisor [--background | --repair]`, with the settings in the environment.

Prints one JSON object on stdout when all is ready, or why it is not: `{"ok": true, "already": false, "pid", "api", …}`
or `{"ok": false, "slug", "detail", "exit_code"}`. With `--background` the supervisor then goes on in a session of its
own and this process ends; `--repair` only ends what a killed supervisor left.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from mn.formats.errors import Internal, MnError, outcome_of
from mn.formats.settings import Settings, read_config
from mn_nodepool.supervisor import home, ports
from mn_nodepool.supervisor.children import describe_store, plan
from mn_nodepool.supervisor.loop import Supervisor, say

Report = dict[str, Any]
FILES_WANTED = 65_536
"""Open files of the node and of each gateway."""
EXIT_INTERRUPTED = 130
TOLD_SETTINGS = ("api_port", "store_port", "driver", "gateways")
"""Those that `mn runtime start` has options for: a start with others than the running ones is told of it."""


def main(arguments: list[str]) -> int:
    try:
        # `mn` starts this with Ctrl-C held back, so that one which comes early is met here and not amid the imports.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return _main(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _main(arguments: list[str]) -> int:
    try:
        settings = Settings.load()
        home.prepare(settings)
        if "--repair" in arguments:
            with _lock(settings):
                ended = home.end_leftovers(settings)
                home.leave_run(settings)
                print(json.dumps({"ok": True, "ended": ended}))
            return 0
    except MnError as error:
        return _fail(error, sys.stdout)
    if "--background" in arguments:
        return _in_background(settings)
    return _run(settings, sys.stdout)


def _lock(settings: Settings) -> contextlib.AbstractContextManager[None]:
    return home.locked(settings, home.host_id(), home.is_networked(settings.home))


def _in_background(settings: Settings) -> int:
    """Fork; the child supervises in a new session, this process passes its report on."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _relay(read_end, pid)
    os.close(read_end)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(settings.logs_dir / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir("/")
    with open(write_end, "w", encoding="utf-8") as report:
        return _run(settings, report)


def _relay(read_end: int, pid: int) -> int:
    try:
        with open(read_end, encoding="utf-8") as file:
            text = file.read()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        return EXIT_INTERRUPTED
    if not text:
        return _fail(Internal("the supervisor ended without a word; see logs/supervisor.log in the home"), sys.stdout)
    print(text, end="", flush=True)
    report = json.loads(text)
    return 0 if report["ok"] else int(report["exit_code"])


def _run(settings: Settings, report: TextIO) -> int:
    os.umask(0o077)
    began = time.monotonic()
    try:
        with _lock(settings):
            _supervise(settings, began, lambda said: _tell(report, said))
    except home.AlreadyRunning as error:
        _tell(report, {"ok": True, "already": True, "pid": error.pid, "detail": error.detail})
        return 0
    except MnError as error:
        say(f"error: {error.detail}")
        return _fail(error, report)
    return 0


def _raise_file_limit() -> None:
    """Each connection and each sandbox takes descriptors; what the system grants by default is for programs with a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _supervise(settings: Settings, began: float, tell: Callable[[Report], None]) -> None:
    _raise_file_limit()
    home.end_leftovers(settings)
    settings = ports.settle(settings, os.environ, read_config(settings.home).get("runtime", {}))
    settings = home.with_alias(settings, os.urandom(8))
    phases = plan(settings, os.environ)
    ports.check_free(settings)
    home.give_first_key(settings, os.urandom(home.FIRST_KEY_ENTROPY_BYTES))
    supervisor = Supervisor(
        phases,
        settings.run_dir,
        log_bytes_max=settings.log_file_bytes_max,
        log_files_max=settings.log_files_max,
    )

    def on_ready(pids: dict[str, int]) -> None:
        home.forget_first_key(settings)
        endpoints = {
            "api": f"http://{home.reachable(settings.api_host)}:{settings.api_port}",
            "store": settings.redis_url or f"redis://127.0.0.1:{settings.store_port}/0",
            "store_server": describe_store(settings),
            "mesh": str(settings.run_dir / "mesh.sock"),
            "settings": {name: getattr(settings, name) for name in TOLD_SETTINGS},
            "pids": {"supervisor": os.getpid(), **pids},
        }
        home.write_private(settings.endpoints_file, json.dumps(endpoints))
        seconds = round(time.monotonic() - began, 2)
        say(f"ready in {seconds} s at {endpoints['api']}")
        tell({"ok": True, "already": False, "pid": os.getpid(), "seconds": seconds, **endpoints})
        _notify_manager()

    try:
        supervisor.run(on_ready)
    finally:
        home.leave_run(settings)
    say("stopped")


def _notify_manager() -> None:
    """Tell a service manager that started this with `Type=notify` that all is ready (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _tell(report: TextIO, said: Report) -> None:
    print(json.dumps(said), file=report, flush=True)
    if report is not sys.stdout:
        report.close()


def _fail(error: MnError, report: TextIO) -> int:
    code = outcome_of(error).exit_code
    _tell(report, {"ok": False, "slug": error.slug, "detail": error.detail, "exit_code": code})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
