"""One gateway process: a listening socket, the server, the link to the pool; from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from mn.formats.settings import Settings
from mn_gateway import bundles
from mn_gateway.app import App
from mn_gateway.context import Context
from mn_gateway.http import Http
from mn_gateway.pool import Pool
from mn_gateway.watch import SWEEP_S

log = structlog.get_logger("gateway")
BACKLOG = 2048
KEEP_ALIVE_S = 75
HEAD_S = 20.0
"""A request's head may take that long at least, and twice that at most."""
CANCEL_S = 2.0
"""How long cancelled requests get to tell the pool."""
PARENT_LOOK_S = 1.0
GC_THRESHOLD = 20_000


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The process handles them: a gateway drains first, and exits with 0.
        yield


def listen(settings: Settings) -> socket.socket:
    """The listening socket, shared when there are several processes. Raises OSError when the address is taken."""
    family = socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.gateways > 1:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((settings.api_host, settings.api_port))
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def run(settings: Settings, index: int, pool: Pool, stop: asyncio.Event) -> None:
    """Serve until `stop` is set or the parent process ends.

    The end: not ready → stop accepting → drain → cancel → close the link.
    """
    context = Context.of(settings, pool, index)
    listener = listen(settings)
    server = _Server(_config(settings, App(context)))
    # What is there now stays; calls leave no cycles, so that looking for them can be rare.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 50)
    bundles.sweep(settings)
    await pool.start()
    await context.siblings.start()
    state = settings.run_dir / f"gateway-{index}.json"
    port: int = listener.getsockname()[1]
    tasks = [
        asyncio.create_task(_stopping(context, server, stop)),
        asyncio.create_task(_housekeeping(context, server, state, port)),
        asyncio.create_task(_parent_watch(stop)),
        asyncio.create_task(_close_slow(server)),
    ]
    try:
        await server.serve(sockets=[listener])
        await _settle(server)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        state.unlink(missing_ok=True)
        await context.watch.close()
        await context.siblings.close()
        await pool.close()


def _config(settings: Settings, app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


async def _settle(server: uvicorn.Server) -> None:
    """Let requests that the drain's end cancelled say so to the pool."""
    if tasks := list(server.server_state.tasks):
        await asyncio.wait(tasks, timeout=CANCEL_S)


async def _stopping(context: Context, server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    context.draining = True
    server.should_exit = True


async def _housekeeping(context: Context, server: uvicorn.Server, state: Path, port: int) -> None:
    ready = False
    while True:
        await asyncio.sleep(SWEEP_S)
        context.watch.sweep()
        now_ready = server.started and context.pool.connected and not context.draining
        if now_ready != ready:
            ready = now_ready
            _write_state(state, {"pid": os.getpid(), "ready": ready, "port": port})


async def _close_slow(server: uvicorn.Server) -> None:
    while True:
        await asyncio.sleep(HEAD_S)
        for connection in list(server.server_state.connections):
            if isinstance(connection, Http):
                connection.close_if_slow()


async def _parent_watch(stop: asyncio.Event) -> None:
    """A process whose parent dies is given another one: then nobody restarts or stops this one any more."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(PARENT_LOOK_S)
    log.warning("the supervisor is gone; this gateway ends", action="gateway.orphaned")
    stop.set()


def _write_state(path: Path, state: dict[str, object]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(state))
    aside.chmod(0o600)
    aside.replace(path)
