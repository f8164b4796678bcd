"""The node process: mesh server, executor, leader candidate.

python -P -m mn_nodepool.node
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

import msgspec
import structlog
import uvloop

from mn.formats.errors import Internal, InvalidRequest, MnError, NoLeader, outcome_of
from mn.formats.ids import NodeId
from mn.formats.settings import Settings
from mn_nodepool.client import Problem, distribution_version, mesh_socket
from mn_nodepool.clock import Clock, SystemClock
from mn_nodepool.control.leader import Leader
from mn_nodepool.control.leadership import Leadership
from mn_nodepool.directory import DirectoryView
from mn_nodepool.dispatch.dispatcher import Dispatcher
from mn_nodepool.dispatch.outcomes import Bounds
from mn_nodepool.executor.executor import Executor
from mn_nodepool.executor.fence import Fence
from mn_nodepool.executor.inventory import Facts, take_inventory
from mn_nodepool.logging import configure_logging
from mn_nodepool.mesh.memory import memory_pair
from mn_nodepool.mesh.stream import StreamLink, serve_unix
from mn_nodepool.mesh.transport import Link
from mn_nodepool.store.base import Epoch, Store, StoreUnavailable
from mn_nodepool.store.embedded import endpoint
from mn_nodepool.store.redis import RedisStore
from mn_nodepool.wire.control import OPS, Health, KeyCreate, Name, Principal
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
)  # fmt: skip
from mn_runner.drivers import make_driver
from mn_runner.sandbox import Driver

log = structlog.get_logger("node")
EXPIRE_EVERY_S = 600.0


class LocalDispatch:
    """Owns the dispatcher's end of the in-process link that nested calls take; the directory comes by it too."""

    def __init__(self, dispatcher: Dispatcher, directory: DirectoryView) -> None:
        self._dispatcher = dispatcher
        self._directory = directory
        directory.on_retired.append(dispatcher.retired)

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if not isinstance(message, Directory | DirectoryChange):
            self._dispatcher.received(link, message, body)
        elif not self._directory.apply(message):
            link.send(DirectoryWanted())

    def lost(self, link: Link) -> None:
        self._dispatcher.lost(link)


class LeaderEnd:
    """Owns the leader's end of the in-process link to the executor."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if self._node.leader is not None:
            self._node.leader.received(link, message)

    def lost(self, link: Link) -> None:
        return None


class ExecutorEnd:
    """Owns the executor's end of that link."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def received(self, link: Link, message: Message, body: bytes) -> None:
        self._executor.allocations.command(message)

    def lost(self, link: Link) -> None:
        return None


class Node:
    """Wires the parts of one node together and hands messages to whom they are for."""

    def __init__(self, settings: Settings, driver: Driver, store: Store, clock: Clock, layers: tuple[str, ...]) -> None:
        loop = asyncio.get_running_loop()
        self.settings = settings
        self.id = NodeId(settings.node_name)
        self.leader: Leader | None = None
        self._clock = clock
        self._store = store
        self._layers = layers
        self.directory = DirectoryView(clock.monotonic)
        facts = Facts(self.id, take_inventory(), layers, distribution_version(), clock.now_ms())
        self.executor = Executor(
            settings,
            facts,
            driver,
            clock,
            Fence(settings.run_dir / "epoch.json"),
            lambda name: self.directory.routes.get(name),
        )
        bounds = Bounds(settings.queue_calls_max, settings.queue_bytes_max, settings.payload_bytes_max)
        self._dispatcher = Dispatcher(bounds, self._local_demand, self.directory.stale_s)
        name = str(self.id)
        mine, theirs = memory_pair(
            LocalDispatch(self._dispatcher, self.directory), self, names=(f"{name}/nested", name), loop=loop
        )
        self._local = theirs
        self.executor.attach_nested(self._dispatcher, mine, theirs)
        self._to_executor, to_leader = memory_pair(
            LeaderEnd(self), ExecutorEnd(self.executor), names=(name, name), loop=loop
        )
        self._to_leader = to_leader
        self._links: set[Link] = set()
        self._tails: dict[tuple[Link, int], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._led = asyncio.Event()
        self.leadership = Leadership(store, self.id, settings.lease_ttl_s, clock, self._establish, self._revoke)

    # Leadership.

    async def _establish(self, epoch: Epoch) -> None:
        leader = Leader(self.settings, self.id, self._store, epoch, self._clock, self.leadership.give_up)
        await leader.establish()
        self.leader = leader
        await self._bootstrap_key(leader)
        for link in (*self._links, self._local):
            leader.subscribe(link)
        self.directory.apply(
            Directory(epoch.counter, 0, self.id, leader.catalog.routes(), leader.catalog.key_entries())
        )
        self.executor.allocations.attach_leader(self._to_leader.send)
        self._led.set()

    async def _revoke(self) -> None:
        leader, self.leader = self.leader, None
        self.executor.allocations.detach_leader()
        self.directory.lost()
        for link in self._links:
            link.send(Directory(0, 0, "", (), ()))
        if leader is not None:
            await leader.revoke()

    async def _bootstrap_key(self, leader: Leader) -> None:
        """The first API key, made by whoever started the runtime, whose hash waits in a file."""
        file = self.settings.run_dir / "bootstrap_key.json"
        if not file.exists():
            return
        key = json.loads(file.read_text())
        known = leader.catalog.keys
        if key["id"] not in known and (key["made"] or not any("admin" in each.scopes for each in known.values())):
            request = KeyCreate(
                key["id"], key["sha256"], key["name"], tuple(key["scopes"]), 0, Principal(key["id"], "admin"), "admin"
            )
            await leader.catalog.create_key(request, self._clock.now_ms())

    # Receiver, for gateways and for the in-process dispatcher.

    def hello(self) -> Hello:
        return Hello(self.id, "node", distribution_version())

    def ready(self, link: StreamLink) -> None:
        self._links.add(link)
        self.executor.attach(link)
        if self.leader is not None:
            self.leader.subscribe(link)

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if self.executor.received(link, message, body):
            return
        if isinstance(message, Demand):
            if self.leader is not None and self.leadership.acting():
                self.leader.received(link, message)
        elif isinstance(message, DirectoryWanted):
            if self.leader is not None:
                self.leader.subscribe(link)
        elif isinstance(message, Ask):
            self._spawn(self._answer(link, message))
        elif isinstance(message, TailStart):
            task = self._spawn(self._tail(link, message))
            self._tails[link, message.id] = task
        elif isinstance(message, TailStop):
            tail = self._tails.pop((link, message.id), None)
            if tail is not None:
                tail.cancel()

    def lost(self, link: Link) -> None:
        self._links.discard(link)
        self.executor.lost(link)
        if self.leader is not None:
            self.leader.unsubscribe(link)
        for key in [key for key in self._tails if key[0] is link]:
            self._tails.pop(key).cancel()

    def _local_demand(self, demand: Demand) -> None:
        if self.leader is not None and self.leadership.acting():
            self.leader.received(self._local, demand)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, link: Link, ask: Ask) -> None:
        try:
            result = await self._perform(ask)
            answer = Answer(ask.id, "", msgspec.Raw(msgspec.msgpack.encode(result)))
        except MnError as error:
            answer = _failure(ask.id, error)
        except Exception as error:
            log.exception("a request failed", action="ask_failed", op=ask.op)
            answer = _failure(ask.id, Internal(f"{ask.op} failed: {type(error).__name__}"))
        link.send(answer)

    async def _perform(self, ask: Ask) -> Any:
        types = OPS.get(ask.op)
        if types is None:
            raise InvalidRequest(f"there is no operation {ask.op!r}", path="op")
        try:
            request = msgspec.msgpack.decode(ask.body, type=types[0])
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"{ask.op}: {error}", path="") from None
        if ask.op == "node.health":
            return self.health()
        if ask.op == "failures.get":
            assert isinstance(request, Name)
            return self.executor.failures.get(request.name)
        if self.leader is None or not self.leadership.acting():
            why = "" if self.leadership.store_ok else " (the store does not answer)"
            raise NoLeader(f"there is no leader at the moment{why}; try again in a few seconds", retry_after_s=2)
        return await self.leader.ask(ask.op, request)

    def health(self) -> Health:
        epoch = self.leadership.epoch
        acting = self.leadership.acting()
        return Health(
            self.id,
            self.id if acting else "",
            epoch.counter if epoch else 0,
            self.leadership.store_ok,
            acting,
            self._layers,
        )

    async def _tail(self, link: Link, request: TailStart) -> None:
        lines = self.executor.logs.tail(
            request.function, request.invocation, follow=request.follow, limit=min(request.limit, 10_000)
        )
        async with contextlib.aclosing(lines):
            async for batch in lines:
                for start in range(0, len(batch), 200):
                    link.send(Tail(request.id, msgspec.json.encode(batch[start : start + 200])))
        link.send(Tail(request.id, b"[]", True))

    # Life.

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`: then answer what runs, give up the lease, and end every sandbox."""
        await self.executor.begin()
        socket_path = mesh_socket(self.settings)
        server = await serve_unix(socket_path, lambda: StreamLink(self.hello(), self, self.ready))
        leading = asyncio.get_running_loop().create_task(self.leadership.run())
        self._spawn(self._expire_files())
        try:
            stopping = self._spawn(stop.wait())
            await asyncio.wait([self._spawn(self._led.wait()), stopping], return_when=asyncio.FIRST_COMPLETED)
            _say_ready(self.settings, self.id, self._layers)
            await stop.wait()
        finally:
            server.close()
            self._dispatcher.close()
            leading.cancel()
            await asyncio.wait([leading])
            await self.executor.close()
            for link in list(self._links):
                link.close()
            for task in list(self._tasks):
                task.cancel()
            socket_path.unlink(missing_ok=True)
            with contextlib.suppress(StoreUnavailable):
                await self._store.close()

    async def _expire_files(self) -> None:
        """Logs and failures that are too old go."""
        while True:
            self.executor.logs.expire(self.settings.logs_s)
            self.executor.failures.expire(self._clock.now_ms() / 1000)
            await asyncio.sleep(EXPIRE_EVERY_S)


def _failure(number: int, error: MnError) -> Answer:
    return Answer(number, error.slug, msgspec.Raw(msgspec.msgpack.encode(Problem(error.detail, error.extra))))


def _say_ready(settings: Settings, node: str, layers: tuple[str, ...]) -> None:
    file = settings.run_dir / "node.json"
    temporary = file.with_suffix(".new")
    temporary.write_text(
        json.dumps({"pid": os.getpid(), "ready": True, "node": node, "driver": settings.driver, "layers": list(layers)})
    )
    os.replace(temporary, file)


def _watch_supervisor(stop: asyncio.Event) -> None:
    """End when the supervisor is gone: the pipe that it holds reaches its end."""
    descriptor = os.environ.get("MN_ALIVE_FD")
    if descriptor is not None:
        asyncio.get_running_loop().add_reader(int(descriptor), stop.set)


async def serve(settings: Settings) -> None:
    """Run a node until SIGTERM, SIGINT, or the end of its supervisor.

    Raises MnError when it cannot start, for example because an isolation layer is missing.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _watch_supervisor(stop)
    driver = make_driver(settings)
    layers = await driver.check()
    url, password = endpoint(settings)
    store = RedisStore(url, password=password)
    await Node(settings, driver, store, SystemClock(), layers).run(stop)


def main() -> int:
    settings = Settings.load()
    configure_logging(settings.log_level)
    try:
        uvloop.run(serve(settings))
    except MnError as error:
        print(f"error: {error.detail}", file=sys.stderr)
        if "fix" in error.extra:
            print(f"  {error.extra['fix']}", file=sys.stderr)
        return outcome_of(error).exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
