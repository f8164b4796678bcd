"""The leader: answers requests that change things, publishes the directory, and owns the placer. Lives from `establish` to `revoke`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from mn.formats.errors import InvalidRequest, MnError, NoLeader, NotFound
from mn.formats.ids import NodeId
from mn.formats.settings import Settings
from mn_nodepool.clock import Clock
from mn_nodepool.control.catalog import Catalog, Change
from mn_nodepool.control.placer import Placer
from mn_nodepool.control.views import function_view, node_list
from mn_nodepool.mesh.transport import Link
from mn_nodepool.store.base import Epoch, StaleEpoch, Store, StoreUnavailable
from mn_nodepool.wire.control import (
    BundleList,
    BundlePut,
    BundleRecord,
    Contact,
    Deploy,
    Deployed,
    DeployedFunction,
    Empty,
    FunctionList,
    FunctionView,
    KeyCreate,
    KeyList,
    KeyRecord,
    Name,
    NodeList,
    Principal,
    Rollback,
    VersionList,
)  # fmt: skip
from mn_nodepool.wire.messages import Demand, Directory, DirectoryChange, Idle, Message, Observed, Report

log = structlog.get_logger("leader")
SWEEP_EVERY_S = 15.0


class Leader:
    """One period of leadership."""

    def __init__(
        self, settings: Settings, node: NodeId, store: Store, epoch: Epoch, clock: Clock, stale: Callable[[int], None]
    ) -> None:
        self._settings = settings
        self._node = node
        self._store = store
        self._clock = clock
        self._stale = stale
        self.epoch = epoch
        self.catalog = Catalog(store, epoch, settings.versions_kept)
        self.placer = Placer(
            store,
            epoch,
            self.catalog,
            clock,
            cpu_overcommit=settings.cpu_overcommit,
            slots_max=settings.slots,
            stale=lambda: stale(0),
        )
        self._subscribers: set[Link] = set()
        self._seq = 0
        self._contacts: dict[str, float] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ops: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "bundles.put": self._put_bundle, "bundles.get": self._get_bundle, "bundles.list": self._list_bundles,
            "bundles.delete": self._delete_bundle, "functions.deploy": self._deploy, "functions.get": self._get_function,
            "functions.list": self._list_functions, "functions.versions": self._versions, "functions.delete": self._delete_function,
            "functions.rollback": self._rollback, "scopes.contact": self._contact, "scopes.delete": self._delete_scopes,
            "keys.create": self._create_key, "keys.list": self._list_keys, "keys.revoke": self._revoke_key, "nodes.list": self._nodes,
        }  # fmt: skip

    async def establish(self) -> None:
        """Load what the store has; every ephemeral scope gets its whole time again."""
        await self.catalog.load()
        await self.placer.load()
        now = self._clock.monotonic()
        self._contacts = {f.scope: now for f in self.catalog.functions.values() if f.scope}
        self._spawn(self.placer.run())
        self._spawn(self._sweep())

    async def revoke(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, StaleEpoch):
            self._stale(0)
        elif isinstance(error, StoreUnavailable):
            log.warning("the store did not answer", action="store_down", reason=error.detail)
            self.placer.look_again()
        elif error is not None:
            log.error("a control task failed; giving up the lease", action="leader_failed", exc_info=error)
            self._stale(0)

    # Links.

    def subscribe(self, link: Link) -> None:
        """A gateway or node that wants the directory."""
        self._subscribers.add(link)
        link.send(
            Directory(self.epoch.counter, self._seq, self._node, self.catalog.routes(), self.catalog.key_entries())
        )

    def unsubscribe(self, link: Link) -> None:
        self._subscribers.discard(link)
        self.placer.forget_link(link)

    def received(self, link: Link, message: Message) -> bool:
        """A message for the leader that is no `Ask`; False when it is none of its."""
        if isinstance(message, Demand):
            self.placer.demand(link, message)
        elif isinstance(message, Observed):
            self._spawn(self.placer.observed(message))
        elif isinstance(message, Idle):
            self._spawn(self.placer.idle(message))
        elif isinstance(message, Report) and message.epoch > self.epoch.counter:
            self._stale(message.epoch)
        elif isinstance(message, Report):
            self._spawn(self.placer.report(link, message))
        else:
            return False
        return True

    async def ask(self, op: str, request: Any) -> Any:
        """One operation of `wire.control.OPS`.

        Raises MnError.
        """
        handler = self._ops.get(op)
        if handler is None:
            raise InvalidRequest(f"there is no operation {op!r}", path="op")
        try:
            return await handler(request)
        except StaleEpoch as error:
            self._stale(0)
            raise NoLeader("leadership moved during the request; try again", retry_after_s=1) from error

    async def _publish(self, change: Change) -> None:
        if change.routes or change.routes_gone or change.keys or change.keys_gone:
            self._seq += 1
            message = DirectoryChange(
                self.epoch.counter, self._seq, change.routes, change.routes_gone, change.keys, change.keys_gone
            )
            for link in self._subscribers:
                link.send(message)
        if change.retired:
            await self.placer.retire(change.retired)
        if change.routes:
            self.placer.look_again()
        for digest in change.bundles_gone:
            await asyncio.to_thread(_remove, self._settings.bundles_dir / digest.replace(":", "-"))

    # Operations.

    async def _put_bundle(self, request: BundlePut) -> BundleRecord:
        async with self._changing:
            return await self.catalog.put_bundle(request, self._clock.now_ms(), self._node)

    async def _get_bundle(self, request: Name) -> BundleRecord:
        return self.catalog.bundle(request.name)

    async def _list_bundles(self, _: Empty) -> BundleList:
        return BundleList(tuple(self.catalog.bundles.values()))

    async def _delete_bundle(self, request: Name) -> Empty:
        async with self._changing:
            await self._publish(await self.catalog.delete_bundle(request))
        return Empty()

    async def _deploy(self, request: Deploy) -> Deployed:
        async with self._changing:
            self._check_python(request)
            answer, change = await self.catalog.deploy(request, self._clock.now_ms())
            if request.scope:
                self._contacts[request.scope] = self._clock.monotonic()
            await self._publish(change)
        return answer

    def _check_python(self, request: Deploy) -> None:
        offered = sorted({python for at in self.placer.executors.values() for python in at.report.python})
        for spec in self.catalog.bundle(request.digest).functions:
            wanted = spec.environment.python
            if offered and wanted is not None and wanted not in offered:
                raise InvalidRequest(
                    f"{spec.name} was made with Python {wanted} and the pool has {', '.join(offered)}: deploy it with Python {offered[-1]}, "
                    f"or add a node that has {wanted}",
                    path="environment.python",
                    offered=offered,
                )

    async def _get_function(self, request: Name) -> FunctionView:
        return function_view(self.catalog, self.placer, self.catalog.function(request.name))

    async def _list_functions(self, _: Empty) -> FunctionList:
        return FunctionList(tuple(function_view(self.catalog, self.placer, f) for f in self.catalog.functions.values()))

    async def _versions(self, request: Name) -> VersionList:
        record = self.catalog.function(request.name)
        return VersionList(record.version, tuple(self.catalog.versions_of(record.name)))

    async def _delete_function(self, request: Name) -> Empty:
        async with self._changing:
            await self._publish(
                await self.catalog.delete_functions([request.name], request.principal, request.operation)
            )
        return Empty()

    async def _rollback(self, request: Rollback) -> DeployedFunction:
        async with self._changing:
            answer, change = await self.catalog.rollback(request, self._clock.now_ms())
            await self._publish(change)
        return answer

    async def _contact(self, request: Contact) -> Empty:
        now = self._clock.monotonic()
        for scope in request.scopes:
            if scope not in self._contacts:
                raise NotFound(
                    f"the scope {scope} was given up: nothing was heard of it for {self._settings.ephemeral_s:g} s"
                )
            self._contacts[scope] = now
        return Empty()

    async def _delete_scopes(self, request: Contact) -> Empty:
        await self._drop_scopes(request.scopes, request.principal)
        return Empty()

    async def _drop_scopes(self, scopes: tuple[str, ...], principal: Principal | None = None) -> None:
        async with self._changing:
            names = self.catalog.in_scopes(scopes)
            if names:
                await self._publish(await self.catalog.delete_functions(names, principal))
            for scope in scopes:
                self._contacts.pop(scope, None)

    async def _create_key(self, request: KeyCreate) -> KeyRecord:
        async with self._changing:
            record, change = await self.catalog.create_key(request, self._clock.now_ms())
            await self._publish(change)
        return record

    async def _list_keys(self, _: Empty) -> KeyList:
        return KeyList(tuple(self.catalog.keys.values()))

    async def _revoke_key(self, request: Name) -> Empty:
        async with self._changing:
            await self._publish(await self.catalog.revoke_key(request))
        return Empty()

    async def _nodes(self, _: Empty) -> NodeList:
        await self.placer.fresh_reports()
        return node_list(self.placer, self._node)

    async def _sweep(self) -> None:
        """Ephemeral scopes out of contact, and bundles that nothing uses, go."""
        while True:
            await asyncio.sleep(min(SWEEP_EVERY_S, self._settings.ephemeral_s))
            over = self._clock.monotonic() - self._settings.ephemeral_s
            lapsed = tuple(scope for scope, at in self._contacts.items() if at <= over)
            try:
                if lapsed:
                    await self._drop_scopes(lapsed)
                async with self._changing:
                    await self._publish(await self.catalog.drop_unused_bundles(self._clock.now_ms()))
            except StoreUnavailable as error:
                log.warning("the store did not answer", action="store_down", reason=error.detail)
            except StaleEpoch:
                raise
            except MnError as error:
                log.warning("a sweep was refused", action="sweep_refused", reason=error.detail)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
