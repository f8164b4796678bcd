"""The floor of warm calls: a bare JSON echo, and nothing that a gateway does besides.

As a program (`python -P floor.py`) it listens on a free port and prints the port.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

BACKLOG = 2048


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(await request.json())


def serve() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(
        Starlette(routes=[Route("/echo", echo, methods=["POST"])]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        lifespan="off",
    )
    uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def running() -> Iterator[str]:
    """The floor in a process of its own: its URL."""
    import subprocess

    from loadtest.scratch import Failed, child, plain_environ

    with child([sys.executable, "-P", __file__], plain_environ(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise Failed(f"the floor's server ended with exit code {process.wait()}")
        yield f"http://127.0.0.1:{port}/echo"


if __name__ == "__main__":
    serve()
