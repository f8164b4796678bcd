"""A peer's side of the mesh: what a gateway uses to reach the pool. One link to the node of this host, kept up for ever."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mn.formats.errors import MnError, Unavailable, error_from
from mn.formats.settings import Settings
from mn_nodepool.clock import SystemClock
from mn_nodepool.directory import DirectoryView
from mn_nodepool.dispatch.dispatcher import Dispatcher
from mn_nodepool.dispatch.outcomes import Bounds
from mn_nodepool.mesh.stream import StreamLink, dial_unix
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.control import OPS
from mn_nodepool.wire.messages import (
    Answer,
    Ask,
    Demand,
    Directory,
    DirectoryChange,
    DirectoryWanted,
    Hello,
    Message,
    Tail,
    TailStart,
    TailStop,
)

log = structlog.get_logger("pool")
RECONNECT_FIRST_S = 0.02
RECONNECT_MAX_S = 1.0
TAIL_BATCHES_MAX = 1000


def distribution_version() -> str:
    """Version of the installed distribution."""
    return importlib.metadata.version("mirrorneuron")


def mesh_socket(settings: Settings) -> Path:
    return settings.run_dir / "mesh.sock"


class Problem(msgspec.Struct):
    """Body of an `Answer` that tells of an error."""

    detail: str
    extra: dict[str, Any] = {}


class PoolClient:
    """Dispatches calls, asks the leader, follows logs. Reconnects by itself; what is under way when the link breaks fails."""

    def __init__(self, settings: Settings, peer: str) -> None:
        self._path = mesh_socket(settings)
        self._hello = Hello(peer, "gateway", distribution_version())
        self._link: StreamLink | None = None
        self._asks: dict[int, asyncio.Future[Answer]] = {}
        self._tails: dict[int, asyncio.Queue[Tail | None]] = {}
        self._next = 0
        self._task: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._up = asyncio.Event()
        self._monotonic = SystemClock().monotonic
        self.directory = DirectoryView(self._monotonic)
        bounds = Bounds(settings.queue_calls_max, settings.queue_bytes_max, settings.payload_bytes_max)
        self.dispatcher = Dispatcher(bounds, self._demand, self.directory.stale_s)
        self.directory.on_retired.append(self.dispatcher.retired)

    @property
    def connected(self) -> bool:
        return self._link is not None and not self._link.closed

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._task = asyncio.get_running_loop().create_task(self._keep_connected())

    async def wait_connected(self) -> None:
        await self._up.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.dispatcher.close()
        if self._link is not None:
            self._link.close()

    async def _keep_connected(self) -> None:
        delay = RECONNECT_FIRST_S
        while True:
            self._gone.clear()
            try:
                link = await dial_unix(self._path, lambda: StreamLink(self._hello, self, self._ready))
            except OSError:
                await asyncio.sleep(delay)
                delay = min(RECONNECT_MAX_S, delay * 2)
                continue
            since = self._monotonic()
            await self._gone.wait()
            link.close()
            if self._monotonic() - since > RECONNECT_MAX_S:
                delay = RECONNECT_FIRST_S
            else:
                # A node that hangs up at once, on the greeting or what follows, is not dialled without pause.
                await asyncio.sleep(delay)
                delay = min(RECONNECT_MAX_S, delay * 2)

    def _ready(self, link: StreamLink) -> None:
        self._link = link
        self.dispatcher.attach(link)
        self._up.set()

    def _demand(self, demand: Demand) -> None:
        if self._link is not None:
            self._link.send(demand)

    # Receiver.

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if isinstance(message, Answer):
            waiting = self._asks.pop(message.id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, Tail):
            queue = self._tails.get(message.id)
            if queue is not None:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(message)
        elif isinstance(message, Directory | DirectoryChange):
            if not message.epoch:
                self.directory.lost()
            elif not self.directory.apply(message):
                link.send(DirectoryWanted())
        else:
            self.dispatcher.received(link, message, body)

    def lost(self, link: Link) -> None:
        self._link = None
        self._up.clear()
        self.directory.lost()
        self.dispatcher.lost(link)
        for waiting in self._asks.values():
            if not waiting.done():
                waiting.set_exception(
                    Unavailable(
                        "the connection to the node was lost; the request may have been carried out", retry_after_s=1
                    )
                )
        self._asks.clear()
        for queue in self._tails.values():
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
        self._gone.set()

    # Requests.

    async def ask(self, op: str, request: msgspec.Struct, timeout_s: float = 30.0) -> Any:
        """One operation of `wire.control.OPS`, answered by the leader.

        Raises the MnError that the leader answers, or Unavailable when there is no answer.
        """
        link = self._link
        if link is None:
            raise Unavailable("the node does not answer at the moment", retry_after_s=1)
        self._next = number = self._next + 1
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asks[number] = waiting
        link.send(Ask(number, op, msgspec.Raw(msgspec.msgpack.encode(request))))
        try:
            answer = await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            raise Unavailable(
                f"the node did not answer within {timeout_s:g} s; the request may have been carried out",
                retry_after_s=1,
            ) from None
        finally:
            self._asks.pop(number, None)
        if answer.slug:
            raise _error(answer)
        return msgspec.msgpack.decode(answer.body, type=OPS[op][1])

    async def tail(
        self, function: str, invocation: str, follow: bool, limit: int
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Batches of log lines; ends with the history unless following, or when the node goes away."""
        link = self._link
        if link is None:
            raise Unavailable("the node does not answer at the moment", retry_after_s=1)
        self._next = number = self._next + 1
        queue: asyncio.Queue[Tail | None] = asyncio.Queue(TAIL_BATCHES_MAX)
        self._tails[number] = queue
        link.send(TailStart(number, function, invocation, follow, limit))
        try:
            while (batch := await queue.get()) is not None:
                lines = msgspec.json.decode(batch.lines)
                if lines:
                    yield lines
                if batch.end:
                    return
        finally:
            del self._tails[number]
            link.send(TailStop(number))


def _error(answer: Answer) -> MnError:
    problem = msgspec.msgpack.decode(answer.body, type=Problem)
    return error_from(answer.slug, problem.detail, problem.extra)
