"""A pool in memory, as the gateway sees it: a directory, a dispatcher that runs callables, a leader of dictionaries."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop

from mn.formats.codecs import Codec
from mn.formats.errors import CallTimeout, Cancelled, Conflict, MnError, NotFound, QueueFull
from mn.formats.keys import KEY_ENTROPY_BYTES, Key, new_key
from mn.formats.manifest import FunctionSpec
from mn.formats.settings import Settings
from mn_gateway.server import run
from mn_nodepool.wire import control
from mn_nodepool.wire.messages import KeyEntry, Route

NODE = "mirror_neuron@fake"


class UserError(Exception):
    """Raised by a behaviour: the user's code failed."""


@dataclass(slots=True)
class FakeCall:
    route: Route
    invocation: str
    codec: int
    payload: bytes
    depth: int = 0
    error: MnError | None = None
    status: int = 0
    result_codec: int = 0
    result: bytes = b""
    queue_us: int = 10
    start_us: int = 0
    run_us: int = 20
    attempts: int = 1
    output: str = ""
    node: str = NODE
    ended: bool = False
    consumed: int = 0
    timer: asyncio.TimerHandle | None = None
    on_done: Callable[[Any], None] = lambda call: None
    timeout_s: float | None = None


Behaviour = Callable[["FakeDispatcher", FakeCall], None]


def echo(dispatcher: FakeDispatcher, call: FakeCall) -> None:
    """The input is the result, as bytes for bytes."""
    call.result, call.result_codec = call.payload or b"null", call.codec
    dispatcher.finish(call)


def never(_: FakeDispatcher, call: FakeCall) -> None:
    """Runs until it is cancelled or its time is over."""


def raising(dispatcher: FakeDispatcher, call: FakeCall) -> None:
    call.status = 1
    call.output = "x" * 5000 + "last words\n"
    call.result = msgspec.json.encode(
        {"type": "ValueError", "module": "builtins", "message": "not a PDF", "traceback": "Traceback …"}
    )
    dispatcher.finish(call)


def failing(error: Callable[[], MnError]) -> Behaviour:
    """Ends with a problem of the platform's."""

    def behave(dispatcher: FakeDispatcher, call: FakeCall) -> None:
        call.error = error()
        dispatcher.finish(call)

    return behave


class FakeDispatcher:
    def __init__(self) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self.generators: dict[str, Callable[[FakeCall], Iterator[Any]]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.running: dict[str, FakeCall] = {}
        self.cancelled: list[str] = []
        self.started: list[FakeCall] = []
        self.keep_started = True
        self.capacity: int | None = None
        self.queued_calls = 0
        self.queued_bytes = 0

    @property
    def running_calls(self) -> int:
        return len(self.running)

    def start(
        self,
        route: Route,
        invocation: str,
        codec: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        depth: int = 0,
        on_done: Callable[[Any], None],
        on_item: Callable[[Any, int, bytes], None] | None = None,
    ) -> FakeCall:
        if self.capacity is not None and len(self.running) >= self.capacity:
            raise QueueFull(f"{route.name} has {self.capacity} calls waiting", retry_after_s=2)
        call = FakeCall(route, invocation, codec, payload, depth, on_done=on_done, timeout_s=timeout_s)
        loop = asyncio.get_running_loop()
        self.running[invocation] = call
        if self.keep_started:
            self.started.append(call)
        if timeout_s is not None:
            call.timer = loop.call_later(timeout_s, self._time_out, call)
        if route.spec.generator and on_item is not None:
            task = loop.create_task(self._generate(call, self.generators[route.name](call), on_item))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            loop.call_soon(self.behaviours.get(route.name, echo), self, call)
        return call

    async def _generate(self, call: FakeCall, values: Iterator[Any], on_item: Callable[..., None]) -> None:
        sent = 0
        try:
            for value in values:
                on_item(call, Codec.JSON, msgspec.json.encode(value))
                sent += 1
                while sent - call.consumed >= 4 and not call.ended:
                    await asyncio.sleep(0)
                if call.ended:
                    return
        except UserError as error:
            call.status = 1
            call.result = msgspec.json.encode(
                {"type": "UserError", "module": "m", "message": str(error), "traceback": ""}
            )
        self.finish(call)

    def _time_out(self, call: FakeCall) -> None:
        call.error = CallTimeout(f"its {call.timeout_s} s are over")
        self.finish(call)

    def finish(self, call: FakeCall) -> None:
        if call.ended:
            return
        call.ended = True
        if call.timer is not None:
            call.timer.cancel()
        self.running.pop(call.invocation, None)
        call.on_done(call)

    def cancel(self, call: FakeCall) -> None:
        if call.ended:
            return
        self.cancelled.append(call.invocation)
        call.error = Cancelled("its caller went away")
        self.finish(call)

    def consumed(self, call: FakeCall) -> None:
        call.consumed += 1


@dataclass
class FakeDirectory:
    routes: dict[str, Route] = field(default_factory=dict)
    keys: dict[str, KeyEntry] = field(default_factory=dict)
    leader: str = NODE
    epoch: int = 1
    synced: bool = True
    silent_s: float = 0.0

    def stale_s(self) -> float:
        return self.silent_s


class FakePool:
    """Deploys what it is told, calls what behaves as told."""

    def __init__(self) -> None:
        self.connected = True
        self.directory = FakeDirectory()
        self.dispatcher = FakeDispatcher()
        self.bundles: dict[str, control.BundleRecord] = {}
        self.failures: dict[str, control.FailureRecord] = {}
        self.log_lines: list[dict[str, Any]] = []
        self.more_lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.asked: list[tuple[str, Any]] = []
        self.follow_ends = False
        self._entropy = 0

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    def add_function(self, name: str, behaviour: Behaviour = echo, namespace: str = "default", **spec: Any) -> Route:
        made = FunctionSpec(name=name, entry="m:" + name.replace("-", "_"), **spec)
        route = Route(name, f"{name}#1", "own", namespace, made, "sha256:" + "0" * 64, 1)
        self.directory.routes[name] = route
        self.dispatcher.behaviours[name] = behaviour
        return route

    def add_generator(self, name: str, values: Callable[[FakeCall], Iterator[Any]]) -> None:
        self.add_function(name, generator=True)
        self.dispatcher.generators[name] = values

    def add_key(self, *scopes: str, namespace: str = "default", expires_ms: int = 0) -> Key:
        self._entropy += 1
        key = new_key(self._entropy.to_bytes(KEY_ENTROPY_BYTES, "big"))
        entry = KeyEntry(key.sha256, key.id, f"key{self._entropy}", "own", namespace, scopes, expires_ms)
        self.directory.keys[key.sha256] = entry
        return key

    async def ask(self, op: str, request: Any, timeout_s: float = 30) -> Any:
        self.asked.append((op, request))
        handler = getattr(self, "_" + op.replace(".", "_"))
        # Over the wire and back, as the real one does.
        wanted, answered = control.OPS[op]
        answer = handler(msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=wanted))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=answered)

    async def tail(
        self, function: str, invocation: str, follow: bool, limit: int
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        found = [line for line in self.log_lines if line["f"] == function or line["i"] == invocation]
        if found:
            yield found[-limit:]
        while follow and not self.follow_ends:
            yield [await self.more_lines.get()]

    def _bundles_put(self, request: control.BundlePut) -> control.BundleRecord:
        record = control.BundleRecord(
            request.digest, request.functions, request.files, request.size_bytes, request.principal.owner, 1, NODE
        )
        return self.bundles.setdefault(request.digest, record)

    def _bundles_get(self, request: control.Name) -> control.BundleRecord:
        if request.name not in self.bundles:
            raise NotFound(f"there is no bundle {request.name}", near=[])
        return self.bundles[request.name]

    def _bundles_list(self, _: control.Empty) -> control.BundleList:
        return control.BundleList(tuple(self.bundles.values()))

    def _bundles_delete(self, request: control.Name) -> control.Empty:
        self._bundles_get(request)
        if any(route.digest == request.name for route in self.directory.routes.values()):
            raise Conflict("a live version uses it")
        del self.bundles[request.name]
        return control.Empty()

    def _functions_deploy(self, request: control.Deploy) -> control.Deployed:
        bundle = self._bundles_get(control.Name(request.digest, request.principal))
        deployed = []
        for spec in bundle.functions:
            if request.names and spec.name not in request.names:
                continue
            name = (request.rename or spec.name) + (f"~{request.scope}" if request.scope else "")
            old = self.directory.routes.get(name)
            number = int(old.version.rpartition("#")[2]) + 1 if old else 1
            spec = msgspec.convert(msgspec.to_builtins(spec) | request.overrides, FunctionSpec)
            self.directory.routes[name] = Route(name, f"{name}#{number}", "own", "default", spec, request.digest, 1)
            deployed.append(control.DeployedFunction(name, number, f"{name}#{number}", request.digest, True))
        return control.Deployed(tuple(deployed))

    def _route(self, name: str) -> Route:
        if name not in self.directory.routes:
            raise NotFound(f"there is no function {name!r}")
        return self.directory.routes[name]

    def _view(self, route: Route) -> control.FunctionView:
        number = int(route.version.rpartition("#")[2])
        return control.FunctionView(
            route.name,
            number,
            route.owner,
            route.namespace,
            route.digest,
            route.spec,
            1,
            1,
            1,
            tuple(range(1, number + 1)),
        )

    def _functions_get(self, request: control.Name) -> control.FunctionView:
        return self._view(self._route(request.name))

    def _functions_list(self, _: control.Empty) -> control.FunctionList:
        return control.FunctionList(tuple(self._view(route) for route in self.directory.routes.values()))

    def _functions_versions(self, request: control.Name) -> control.VersionList:
        route = self._route(request.name)
        number = int(route.version.rpartition("#")[2])
        record = control.VersionRecord(route.version, route.name, number, route.digest, route.spec, "own", "default", 1)
        return control.VersionList(number, (record,))

    def _functions_delete(self, request: control.Name) -> control.Empty:
        self._route(request.name)
        del self.directory.routes[request.name]
        return control.Empty()

    def _functions_rollback(self, request: control.Rollback) -> control.DeployedFunction:
        route = self._route(request.name)
        number = request.version or int(route.version.rpartition("#")[2]) - 1
        if number < 1:
            raise Conflict("there is no earlier version")
        version = f"{route.name}#{number}"
        self.directory.routes[route.name] = msgspec.structs.replace(route, version=version)
        return control.DeployedFunction(route.name, number, version, route.digest, True)

    def _scopes_contact(self, _: control.Contact) -> control.Empty:
        return control.Empty()

    def _scopes_delete(self, request: control.Contact) -> control.Empty:
        for name in [n for n in self.directory.routes if n.partition("~")[2] in request.scopes]:
            del self.directory.routes[name]
        return control.Empty()

    def _keys_create(self, request: control.KeyCreate) -> control.KeyRecord:
        entry = KeyEntry(
            request.sha256,
            request.id,
            request.name,
            request.principal.owner,
            "default",
            request.scopes,
            request.expires_ms,
        )
        self.directory.keys[request.sha256] = entry
        return self._key_record(entry)

    def _key_record(self, entry: KeyEntry) -> control.KeyRecord:
        return control.KeyRecord(
            entry.id, entry.sha256, entry.name, entry.owner, entry.namespace, entry.scopes, 1, entry.expires_ms
        )

    def _keys_list(self, _: control.Empty) -> control.KeyList:
        return control.KeyList(tuple(self._key_record(entry) for entry in self.directory.keys.values()))

    def _keys_revoke(self, request: control.Name) -> control.Empty:
        for digest, entry in list(self.directory.keys.items()):
            if entry.id == request.name:
                del self.directory.keys[digest]
                return control.Empty()
        raise NotFound(f"there is no key {request.name!r}", near=[])

    def _nodes_list(self, _: control.Empty) -> control.NodeList:
        node = control.NodeView(
            NODE, "healthy", True, "leader", "0.1.0", "127.0.0.1", 8, 1, 32000, 512, 0, 0, 8, 1, "bubblewrap", ("3.11",)
        )
        return control.NodeList((node,), (control.PoolView("default", 1, 8, 1, 8, 1, 32000, 512, 0, 0),))

    def _failures_get(self, request: control.Name) -> control.FailureRecord:
        if request.name not in self.failures:
            raise NotFound(f"no failed call {request.name!r} is kept", near=[])
        return self.failures[request.name]


def later_ms(seconds: float) -> int:
    return int((time.time() + seconds) * 1000)


class GatewayThread:
    """A gateway on a free port, with a pool of its own, in a thread."""

    def __init__(self, home: Path, pool: FakePool | None = None, **settings: Any) -> None:
        self.settings = Settings(home=home, **{"api_port": 0, "drain_s": 2.0, **settings})
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        self.pool = pool or FakePool()
        self.admin = self.pool.add_key("admin").secret
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._loop.run_until_complete(run(self.settings, 1, self.pool, self._stop))
        self._loop.close()

    def __enter__(self) -> GatewayThread:
        self._thread.start()
        self.port = ready_port(self.settings.run_dir / "gateway-1.json")
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.admin if key is None else key}"} if key != "" else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **options)


def ready_port(state: Path, within_s: float = 20) -> int:
    """The port of a gateway, once its state file says that it is ready."""

    def look() -> int:
        try:
            shown = json.loads(state.read_text())
        except FileNotFoundError:
            return 0
        return int(shown["port"]) if shown["ready"] else 0

    return eventually(look, within_s)


def eventually(condition: Callable[[], Any], within_s: float = 20) -> Any:
    """Wait until the condition holds; its value."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
    return value


async def _process(settings: Settings, index: int) -> None:
    pool, stop = FakePool(), asyncio.Event()
    pool.add_function("square")
    pool.add_function("slow", lambda d, call: asyncio.get_running_loop().call_later(0.5, echo, d, call) and None)
    pool.add_function("never", never)
    pool.add_key("admin")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await run(settings, index, pool, stop)


if __name__ == "__main__":
    uvloop.run(_process(Settings.load(), int(sys.argv[1])))
