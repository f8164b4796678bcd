"""An executor with dispatchers around it: over real `host_local` children, or over children that the test plays."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mn.formats.codecs import Codec
from mn.formats.manifest import FunctionSpec
from mn.formats.settings import Settings
from mn_nodepool.clock import SystemClock
from mn_nodepool.dispatch.dispatcher import Dispatcher
from mn_nodepool.dispatch.outcomes import Bounds
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.executor.executor import Executor
from mn_nodepool.executor.fence import Fence
from mn_nodepool.executor.inventory import Facts, Inventory
from mn_nodepool.mesh.memory import MemoryLink, memory_pair
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.messages import Demand, Message, Observed, Route, Start, Stop
from mn_runner.drivers.mounts import this_minor
from mn_runner.protocol import (
    CALL_HEAD,
    CONTROL,
    HEADER,
    REPLY_HEAD,
    RESULT_HEAD,
    FrameReader,
    Kind,
    Status,
    frame,
)
from mn_runner.sandbox import Death, Driver, Handle, Shape

LEADER = "leader"
DIGEST = "sha256:" + "a" * 64


class FakeChild:
    """A child that answers LOAD by itself and CALLs when the test says so."""

    def __init__(self, sandbox: str, sock: socket.socket, control: int, loaded: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.calls: dict[int, str] = {}
        """Number → invocation, of calls not answered yet, in the order in which they came."""
        self.payloads: dict[int, bytes] = {}
        self.replies: list[tuple[int, int, bytes]] = []
        self.cancels: list[tuple[int, int]] = []
        self.exited: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._socket = sock
        self._control = control
        self._loaded = loaded
        self._reader = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)
        self._loop.add_reader(control, self._read_control)

    def ready(self) -> None:
        self.send(frame(Kind.READY, 0, json.dumps({"python": this_minor(), "pid": 1}).encode()))

    def send(self, data: bytes) -> None:
        self._socket.setblocking(True)
        self._socket.sendall(data)
        self._socket.setblocking(False)

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket)
        for kind, _, number, body in self._reader.feed(data):
            if kind == Kind.LOAD:
                self.send(frame(Kind.LOADED, 0, json.dumps(self._loaded).encode()))
            elif kind == Kind.CALL:
                _, _, _, size = CALL_HEAD.unpack_from(body)
                self.calls[number] = body[CALL_HEAD.size : CALL_HEAD.size + size].decode()
                self.payloads[number] = body[CALL_HEAD.size + size :]
            elif kind == Kind.CHUNK:
                self.payloads[number] += body
            elif kind == Kind.REPLY:
                status, _ = REPLY_HEAD.unpack_from(body)
                self.replies.append((number, status, body[REPLY_HEAD.size :]))

    def _read_control(self) -> None:
        data = os.read(self._control, 4096)
        if not data:
            self._loop.remove_reader(self._control)
        self.cancels += [(number, reason) for number, reason in CONTROL.iter_unpack(data)]

    def answer(self, value: object = None, *, number: int = 0, status: int = Status.OK, run_us: int = 10) -> str:
        """End a call, the oldest when none is named; its invocation."""
        number = number or next(iter(self.calls))
        head = RESULT_HEAD.pack(status, Codec.JSON, run_us)
        payload = json.dumps(value).encode()
        self.send(HEADER.pack(len(head) + len(payload), Kind.RESULT, 0, number) + head + payload)
        return self.calls.pop(number)

    def exit(self, death: Death) -> None:
        """The process ends: its socket closes and its exit is noticed."""
        if not self.exited.done():
            self.exited.set_result(death)
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_reader(self._control)
            self._socket.close()
            os.close(self._control)


class FakeDriver:
    """Makes children that the test plays; contract of `mn_runner.sandbox.Driver`."""

    name = "fake"

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.destroyed: list[tuple[str, str]] = []
        self.loaded: dict[str, Any] = {}
        """What LOADED will say."""
        self.stuck = False
        """Whether `destroy` fails."""
        self.ready = True
        """Whether children say READY."""

    async def check(self) -> tuple[str, ...]:
        return ()

    async def start(self, sandbox: str, shape: Shape) -> Handle:
        ours, theirs = socket.socketpair()
        control_read, control_write = os.pipe()
        output_read, output_write = os.pipe()
        os.close(output_write)
        os.set_blocking(control_write, False)
        child = FakeChild(sandbox, theirs, control_read, self.loaded)
        self.children.append(child)
        if self.ready:
            child.ready()
        return Handle(sandbox, ours.detach(), control_write, output_read, 1, child.exited, Path("/nowhere"), "/nowhere")

    async def provide(self, handle: Handle, payload: Path) -> None:
        return None

    async def destroy(self, handle: Handle, reason: str) -> Death:
        child = next(child for child in self.children if child.sandbox == handle.id)
        self.destroyed.append((handle.id, reason))
        if self.stuck:
            raise TimeoutError("it does not end")
        child.exit(Death(None, "SIGKILL"))
        return child.exited.result()

    async def reap(self) -> int:
        return 0

    async def close(self) -> None:
        return None

    @property
    def live(self) -> list[FakeChild]:
        return [child for child in self.children if not child.exited.done()]


class Front:
    """A dispatcher joined to the executor by a memory link."""

    def __init__(self, pool: Pool, name: str) -> None:
        self.demands: list[Demand] = []
        settings = pool.settings
        bounds = Bounds(settings.queue_calls_max, settings.queue_bytes_max, settings.payload_bytes_max)
        self.dispatcher = Dispatcher(bounds, self.demands.append)
        self.link, self.executor_end = memory_pair(
            _DispatcherEnd(self.dispatcher), pool, names=(name, "node"), loop=asyncio.get_running_loop()
        )
        pool.executor.attach(self.executor_end)
        self.dispatcher.attach(self.link)

    async def call(
        self,
        route: Route,
        payload: object = None,
        *,
        timeout_s: float | None = 30.0,
        invocation: str = "inv_a",
        codec: int = Codec.JSON,
    ) -> PendingCall:
        """One call to its end; `payload` is bytes, or a value for JSON."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return await self.dispatcher.call(route, invocation, codec, body, timeout_s=timeout_s)


class _DispatcherEnd:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def received(self, link: Link, message: Message, body: bytes) -> None:
        self._dispatcher.received(link, message, body)

    def lost(self, link: Link) -> None:
        self._dispatcher.lost(link)


class Pool:
    """One executor whose leader is the test. `async with` ends all that it started."""

    def __init__(self, home: Path, driver: Driver | Callable[[Path], Driver], **settings: Any) -> None:
        self.settings = Settings(home=home, **{"spares": 0, "interrupt_grace_s": 0.5, **settings})
        self.settings.run_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.driver: Driver = driver(self.settings.run_dir) if callable(driver) else driver
        self.routes: dict[str, Route] = {}
        self.told: list[Message] = []
        self._allocations = 0
        inventory = Inventory(2.0, 4096, 0, (this_minor(),))
        clock = SystemClock()
        self.executor = Executor(
            self.settings,
            Facts("node", inventory, (), "0", clock.now_ms()),
            self.driver,
            clock,
            Fence(self.settings.run_dir / "epoch.json"),
            self.routes.get,
        )
        loop = asyncio.get_running_loop()
        bounds = Bounds(1000, 1 << 28, 1 << 28)
        self._nested = Dispatcher(bounds, lambda _: None)
        mine, theirs = memory_pair(_DispatcherEnd(self._nested), self, names=("node/nested", "node"), loop=loop)
        self.executor.attach_nested(self._nested, mine, theirs)
        self.executor.allocations.attach_leader(self.told.append)

    async def __aenter__(self) -> Pool:
        await self.executor.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.executor.close()

    # Receiver, for the executor's ends of links.

    def received(self, link: Link, message: Message, body: bytes) -> None:
        assert self.executor.received(link, message, body), message

    def lost(self, link: Link) -> None:
        self.executor.lost(link)

    def front(self, name: str = "gateway-1") -> Front:
        return Front(self, name)

    def deploy(self, source: str, *specs: FunctionSpec) -> list[Route]:
        """Put `source` where the executor finds it as the bundle of `specs`."""
        folder = self.settings.bundles_dir / DIGEST.replace(":", "-") / "payloads"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "app.py").write_text(source)
        for spec in specs:
            self.routes[spec.name] = Route(spec.name, f"{spec.name}#1", "ann", "default", spec, DIGEST)
        return [self.routes[spec.name] for spec in specs]

    def start(self, route: Route, *, epoch: int = 1, leader: str = LEADER) -> str:
        """Command one more replica; its allocation."""
        self._allocations += 1
        allocation = f"alc_{self._allocations}"
        self.executor.allocations.command(
            Start(epoch, leader, allocation, route.version, DIGEST, route.spec, {}, route.owner, route.namespace)
        )
        return allocation

    def stop(self, allocation: str, *, drain: bool = True, epoch: int = 1, leader: str = LEADER) -> None:
        self.executor.allocations.command(Stop(epoch, leader, allocation, "the test stops it", drain))

    async def up(self, route: Route, replicas: int = 1) -> list[str]:
        """Replicas that are ready."""
        allocations = [self.start(route) for _ in range(replicas)]
        for allocation in allocations:
            assert (await self.observed(allocation)).state == "ready"
        return allocations

    async def observed(self, allocation: str, state: str = "") -> Observed:
        """Wait until the leader is told of it."""
        while True:
            for message in self.told:
                if isinstance(message, Observed) and message.allocation == allocation and state in ("", message.state):
                    self.told.remove(message)
                    return message
            await asyncio.sleep(0.005)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; the test's own time limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.005)


def link_between(first: Any, second: Any) -> tuple[MemoryLink, MemoryLink]:
    return memory_pair(first, second, names=("a", "b"), loop=asyncio.get_running_loop())
