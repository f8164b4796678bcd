"""The catalog: bundles, functions and their versions, keys. A copy in memory of what the store has; every change is one fenced commit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from mn.formats.errors import Conflict, Forbidden, InvalidRequest, NotFound
from mn.formats.ids import version_id
from mn.formats.manifest import FunctionSpec, check_spec
from mn_nodepool.control.records import Kind
from mn_nodepool.store.base import Epoch, Op, Store
from mn_nodepool.wire.control import (
    BundlePut,
    BundleRecord,
    Deploy,
    Deployed,
    DeployedFunction,
    FunctionRecord,
    KeyCreate,
    KeyRecord,
    Name,
    Principal,
    Rollback,
    VersionRecord,
)  # fmt: skip
from mn_nodepool.wire.messages import KeyEntry, Route

BUNDLES = Kind("bundle", BundleRecord)
FUNCTIONS = Kind("function", FunctionRecord)
VERSIONS = Kind("version", VersionRecord)
KEYS = Kind("key", KeyRecord)
UNUSED_BUNDLE_KEPT_MS = 86_400_000


class Change(NamedTuple):
    """What a commit did to what gateways know, and which versions are live no longer."""

    routes: tuple[Route, ...] = ()
    routes_gone: tuple[str, ...] = ()
    keys: tuple[KeyEntry, ...] = ()
    keys_gone: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    bundles_gone: tuple[str, ...] = ()


class Catalog:
    """Belongs to one leader, for one epoch. Methods that change things return what to publish."""

    def __init__(self, store: Store, epoch: Epoch, versions_kept: int) -> None:
        self._store = store
        self._epoch = epoch
        self._versions_kept = versions_kept
        self.bundles: dict[str, BundleRecord] = {}
        self.functions: dict[str, FunctionRecord] = {}
        self.versions: dict[str, VersionRecord] = {}
        self.keys: dict[str, KeyRecord] = {}
        self._of_function: dict[str, set[str]] = {}
        self._unused_since: dict[str, int] = {}

    async def load(self) -> None:
        """Read all of it from the store."""
        self.bundles = {r.id: BUNDLES.load(r.value) async for r in self._store.scan(BUNDLES.name)}
        self.functions = {r.id: FUNCTIONS.load(r.value) async for r in self._store.scan(FUNCTIONS.name)}
        self.versions = {r.id: VERSIONS.load(r.value) async for r in self._store.scan(VERSIONS.name)}
        self.keys = {r.id: KEYS.load(r.value) async for r in self._store.scan(KEYS.name)}
        self._of_function = {}
        for version in self.versions.values():
            self._of_function.setdefault(version.function, set()).add(version.id)

    # What gateways get to know.

    def route(self, name: str) -> Route | None:
        record = self.functions.get(name)
        version = self.versions.get(version_id(name, record.version)) if record else None
        if version is None:
            return None
        return Route(
            name, version.id, version.owner, version.namespace, version.spec, version.digest, version.created_ms
        )

    def routes(self) -> tuple[Route, ...]:
        return tuple(route for name in self.functions if (route := self.route(name)) is not None)

    def key_entries(self) -> tuple[KeyEntry, ...]:
        return tuple(_entry(key) for key in self.keys.values())

    def is_live(self, version: str) -> bool:
        record = self.versions.get(version)
        function = self.functions.get(record.function) if record else None
        return record is not None and function is not None and function.version == record.number

    # Bundles.

    async def put_bundle(self, request: BundlePut, now_ms: int, coordinator: str) -> BundleRecord:
        existing = self.bundles.get(request.digest)
        if existing is not None:
            self._unused_since.pop(request.digest, None)
            return existing
        record = BundleRecord(
            request.digest,
            request.functions,
            request.files,
            request.size_bytes,
            request.principal.owner,
            now_ms,
            coordinator,
        )
        await self._commit([Op(BUNDLES.name, record.digest, BUNDLES.dump(record))])
        self.bundles[record.digest] = record
        return record

    def bundle(self, digest: str) -> BundleRecord:
        record = self.bundles.get(digest)
        if record is None:
            near = [known for known in self.bundles if known.startswith(digest)] if digest.startswith("sha256:") else []
            raise NotFound(f"there is no bundle {digest}", near=near)
        return record

    async def delete_bundle(self, request: Name) -> Change:
        record = self.bundle(request.name)
        _own(request.principal, record.owner, f"bundle {record.digest[:19]}")
        users = sorted({v.function for v in self.versions.values() if v.digest == record.digest})
        if users:
            raise Conflict(
                f"bundle {record.digest[:19]}… is used by {', '.join(users[:5])}: delete those functions first",
                functions=users,
            )
        await self._commit([Op(BUNDLES.name, record.digest, None)], request.operation)
        del self.bundles[record.digest]
        return Change(bundles_gone=(record.digest,))

    # Functions.

    def function(self, name: str) -> FunctionRecord:
        record = self.functions.get(name)
        if record is None:
            raise NotFound(
                f"there is no function {name!r}", near=difflib.get_close_matches(name, list(self.functions), 3)
            )
        return record

    def versions_of(self, name: str) -> list[VersionRecord]:
        """Oldest first."""
        return sorted((self.versions[v] for v in self._of_function.get(name, ())), key=lambda v: v.number)

    async def deploy(self, request: Deploy, now_ms: int) -> tuple[Deployed, Change]:
        """A new version of each named function, unless the live one is the same, and its alias moved: all in one commit."""
        bundle = self.bundle(request.digest)
        specs = self._chosen(bundle, request)
        siblings = {spec.name: _pool_name(request.rename or spec.name, request.scope) for spec in specs}
        ops: list[Op] = []
        functions: list[FunctionRecord] = []
        versions: list[VersionRecord] = []
        answers: list[DeployedFunction] = []
        for chosen in specs:
            spec = _override(chosen, request)
            name = _pool_name(spec.name, request.scope)
            existing = self.functions.get(name)
            self._may_replace(name, existing, spec, request)
            live = self.versions.get(version_id(name, existing.version)) if existing else None
            if (
                live is not None
                and existing is not None
                and (live.digest, live.spec, live.siblings) == (bundle.digest, spec, siblings)
            ):
                answers.append(DeployedFunction(name, live.number, live.id, live.digest, False))
                continue
            number = existing.last_version + 1 if existing else 1
            owner, namespace = request.principal.owner, request.principal.namespace
            version = VersionRecord(
                version_id(name, number),
                name,
                number,
                bundle.digest,
                spec,
                owner,
                namespace,
                now_ms,
                siblings,
                request.scope,
            )
            function = FunctionRecord(
                name,
                number,
                number,
                owner,
                namespace,
                spec.source,
                existing.created_ms if existing else now_ms,
                now_ms,
                request.scope,
            )
            ops += [
                Op(VERSIONS.name, version.id, VERSIONS.dump(version)),
                Op(FUNCTIONS.name, name, FUNCTIONS.dump(function)),
            ]
            functions.append(function)
            versions.append(version)
            answers.append(DeployedFunction(name, number, version.id, bundle.digest, True))
        pruned = [old for function in functions for old in self._prunable(function.name)]
        ops += [Op(VERSIONS.name, old, None) for old in pruned]
        if ops and not await self._commit(ops, request.operation):
            return Deployed(
                tuple(self._live(_pool_name(_override(s, request).name, request.scope)) for s in specs)
            ), Change()
        retired = [version_id(f.name, self.functions[f.name].version) for f in functions if f.name in self.functions]
        for version in versions:
            self.versions[version.id] = version
            self._of_function.setdefault(version.function, set()).add(version.id)
        self.functions.update((f.name, f) for f in functions)
        for old in pruned:
            self._of_function[self.versions.pop(old).function].discard(old)
        routes = tuple(route for f in functions if (route := self.route(f.name)) is not None)
        return Deployed(tuple(answers)), Change(routes=routes, retired=tuple(retired))

    def _chosen(self, bundle: BundleRecord, request: Deploy) -> list[FunctionSpec]:
        by_name = {spec.name: spec for spec in bundle.functions}
        unknown = [name for name in request.names if name not in by_name]
        if unknown:
            raise InvalidRequest(
                f"the bundle has no function {unknown[0]!r}; it has {', '.join(by_name)}", path="function"
            )
        specs = [by_name[name] for name in request.names] or list(bundle.functions)
        if (request.rename or request.overrides) and len(specs) != 1:
            raise InvalidRequest(f"the bundle has several functions ({', '.join(by_name)}): say which", path="function")
        return specs

    def _may_replace(self, name: str, existing: FunctionRecord | None, spec: FunctionSpec, request: Deploy) -> None:
        if existing is None or request.replace:
            return
        if existing.owner != request.principal.owner:
            raise Conflict(
                f"{name} belongs to {existing.owner}; choose another name, or ask to replace it",
                owner=existing.owner,
            )
        if existing.source and spec.source and existing.source != spec.source:
            raise Conflict(
                f"{name} was deployed from {existing.source} and this comes from {spec.source}; choose another name, or ask to replace it",
                source=existing.source,
            )

    def _prunable(self, name: str) -> list[str]:
        live = self.functions[name].version if name in self.functions else 0
        old = [v for v in self.versions_of(name) if v.number != live]
        return [v.id for v in old[: max(0, len(old) - self._versions_kept + 1)]]

    async def rollback(self, request: Rollback, now_ms: int) -> tuple[DeployedFunction, Change]:
        """Move the alias to an older version, the one before the live one when none is named."""
        record = self.function(request.name)
        _own(request.principal, record.owner, record.name)
        numbers = [v.number for v in self.versions_of(record.name)]
        older = [n for n in numbers if n < record.version]
        number = request.version or (older[-1] if older else 0)
        if number not in numbers:
            raise NotFound(
                f"{record.name} has no version {number or 'before the live one'}; it has {', '.join(map(str, numbers))}",
                versions=numbers,
            )
        changed = number != record.version
        moved = msgspec.structs.replace(record, version=number, updated_ms=now_ms)
        retired = version_id(record.name, record.version)
        if changed:
            if not await self._commit([Op(FUNCTIONS.name, record.name, FUNCTIONS.dump(moved))], request.operation):
                return self._live(record.name), Change()
            self.functions[record.name] = moved
        version = self.versions[version_id(record.name, number)]
        route = self.route(record.name)
        answer = DeployedFunction(record.name, number, version.id, version.digest, changed)
        return answer, Change(routes=(route,) if route and changed else (), retired=(retired,) if changed else ())

    async def delete_functions(self, names: Iterable[str], principal: Principal | None, operation: str = "") -> Change:
        """Remove functions with all their versions; their bundles stay for a day, for `mn debug`."""
        records = [self.function(name) for name in names]
        for record in records:
            if principal is not None:
                _own(principal, record.owner, record.name)
        gone = [v for record in records for v in self.versions_of(record.name)]
        ops = [Op(FUNCTIONS.name, r.name, None) for r in records] + [Op(VERSIONS.name, v.id, None) for v in gone]
        if not await self._commit(ops, operation):
            return Change()
        for record in records:
            del self.functions[record.name]
            self._of_function.pop(record.name, None)
        for version in gone:
            del self.versions[version.id]
        return Change(routes_gone=tuple(r.name for r in records), retired=tuple(v.id for v in gone))

    def in_scopes(self, scopes: Iterable[str]) -> list[str]:
        wanted = set(scopes)
        return [record.name for record in self.functions.values() if record.scope in wanted]

    async def drop_unused_bundles(self, now_ms: int) -> Change:
        """Bundles that no version has used for a day go; after a takeover the day begins anew."""
        used = {v.digest for v in self.versions.values()}
        self._unused_since = {
            digest: self._unused_since.get(digest, now_ms) for digest in self.bundles if digest not in used
        }
        old = [digest for digest, since in self._unused_since.items() if now_ms - since > UNUSED_BUNDLE_KEPT_MS]
        if old:
            await self._commit([Op(BUNDLES.name, digest, None) for digest in old])
            for digest in old:
                del self.bundles[digest]
        return Change(bundles_gone=tuple(old))

    # Keys.

    async def create_key(self, request: KeyCreate, now_ms: int) -> tuple[KeyRecord, Change]:
        principal = request.principal
        record = KeyRecord(
            request.id, request.sha256, request.name, request.owner or principal.owner, principal.namespace, request.scopes, now_ms,
            request.expires_ms,
        )  # fmt: skip
        await self._commit([Op(KEYS.name, record.id, KEYS.dump(record))])
        self.keys[record.id] = record
        return record, Change(keys=(_entry(record),))

    async def revoke_key(self, request: Name) -> Change:
        """By id, or by name where only one key has it."""
        found = [k for k in self.keys.values() if k.id == request.name] or [
            k for k in self.keys.values() if k.name == request.name
        ]
        if not found:
            raise NotFound(
                f"there is no key {request.name!r}",
                near=difflib.get_close_matches(request.name, [k.name for k in self.keys.values()], 3),
            )
        if len(found) > 1:
            raise Conflict(
                f"{len(found)} keys are named {request.name!r}; say which id: {', '.join(k.id for k in found)}"
            )
        lasting = [k for k in self.keys.values() if "admin" in k.scopes and not k.expires_ms and k.id != found[0].id]
        if "admin" in found[0].scopes and not lasting:
            raise Conflict("this is the last key with the scope admin that does not expire; create another one first")
        await self._commit([Op(KEYS.name, found[0].id, None)], request.operation)
        del self.keys[found[0].id]
        return Change(keys_gone=(found[0].id,))

    def _live(self, name: str) -> DeployedFunction:
        version = self.versions[version_id(name, self.function(name).version)]
        return DeployedFunction(name, version.number, version.id, version.digest, False)

    async def _commit(self, ops: list[Op], operation: str = "") -> bool:
        """Write all or nothing. False when this operation was carried out before, and what is here is read anew: nothing changed now."""
        await self._store.commit(ops, fence=self._epoch, operation=operation)
        if not operation:
            return True
        found = await self._store.get(ops[0].kind, ops[0].id)
        if (found.value if found else None) == ops[0].value:
            return True
        await self.load()
        return False


def _entry(key: KeyRecord) -> KeyEntry:
    return KeyEntry(key.sha256, key.id, key.name, key.owner, key.namespace, key.scopes, key.expires_ms)


def _pool_name(name: str, scope: str) -> str:
    return f"{name}~{scope}" if scope else name


def _own(principal: Principal, owner: str, what: str) -> None:
    if principal.owner != owner and not principal.admin:
        raise Forbidden(f"{what} belongs to {owner}; use a key of that owner's, or one with the scope admin")


def _override(spec: FunctionSpec, request: Deploy) -> FunctionSpec:
    """The manifest's settings with the request's own on top, validated again.

    Raises InvalidRequest with the field's path.
    """
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    for name, value in request.overrides.items():
        nested = fields.get(name)
        fields[name] = {**nested, **value} if isinstance(nested, dict) and isinstance(value, dict) else value
    if request.rename:
        fields["name"] = request.rename
    try:
        changed = msgspec.convert(fields, FunctionSpec)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        raise InvalidRequest(text, path=where.rstrip("`").lstrip(".")) from None
    check_spec(changed)
    return changed
