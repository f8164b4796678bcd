"""Bodies of `Ask` and `Answer`, by op: requests to the leader (and, where it says so, to the node at hand).

Mutations that are not harmless to repeat carry an operation id made by the asker: asking twice with the same one changes things once.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mn.formats.manifest import FunctionSpec


class Principal(msgspec.Struct, frozen=True, array_like=True):
    """On whose behalf."""

    key: str
    owner: str
    namespace: str = "default"
    admin: bool = False
    """Its key has the scope `admin`: it may change what belongs to others."""


class Empty(msgspec.Struct, frozen=True):
    pass


class BundlePut(msgspec.Struct, frozen=True):
    """`bundles.put` → BundleRecord. The bytes are already on the coordinator (this node)."""

    digest: str
    functions: tuple[FunctionSpec, ...]
    files: int
    size_bytes: int
    principal: Principal


class BundleRecord(msgspec.Struct, frozen=True):
    digest: str
    functions: tuple[FunctionSpec, ...]
    files: int
    size_bytes: int
    owner: str
    created_ms: int
    coordinator: str


class Name(msgspec.Struct, frozen=True):
    """`bundles.get`, `bundles.delete`, `functions.get`, `functions.delete`, `functions.versions`, `keys.revoke`, `failures.get` …"""

    name: str
    principal: Principal
    operation: str = ""


class Deploy(msgspec.Struct, frozen=True):
    """`functions.deploy` → Deployed: make a version of each function of a bundle and move its alias."""

    digest: str
    principal: Principal
    operation: str
    names: tuple[str, ...] = ()
    """Only these of the manifest's functions; empty: all."""
    rename: str = ""
    """Deploy the one function of the bundle (or of `names`) under this name."""
    replace: bool = False
    scope: str = ""
    """An ephemeral scope: names become `name~scope`, and go `ephemeral_s` after the last contact."""
    overrides: dict[str, Any] = {}
    """Fields of FunctionSpec that replace the manifest's."""


class DeployedFunction(msgspec.Struct, frozen=True):
    name: str
    version: int
    version_id: str
    digest: str
    changed: bool


class Deployed(msgspec.Struct, frozen=True):
    functions: tuple[DeployedFunction, ...]


class VersionRecord(msgspec.Struct, frozen=True):
    """One immutable version."""

    id: str
    function: str
    number: int
    digest: str
    spec: FunctionSpec
    owner: str
    namespace: str
    created_ms: int
    siblings: dict[str, str] = {}
    """Names of the functions deployed with it, as the code knows them → as the pool knows them."""
    scope: str = ""


class FunctionRecord(msgspec.Struct, frozen=True):
    """A name and the version that it stands for."""

    name: str
    version: int
    last_version: int
    owner: str
    namespace: str
    source: str
    created_ms: int
    updated_ms: int
    scope: str = ""


class FunctionView(msgspec.Struct, frozen=True):
    """`functions.get` → this; `functions.list` → a tuple of them."""

    name: str
    version: int
    owner: str
    namespace: str
    digest: str
    spec: FunctionSpec
    created_ms: int
    updated_ms: int
    replicas: int
    versions: tuple[int, ...] = ()
    ephemeral: bool = False


class FunctionList(msgspec.Struct, frozen=True):
    functions: tuple[FunctionView, ...]


class VersionList(msgspec.Struct, frozen=True):
    live: int
    versions: tuple[VersionRecord, ...]


class BundleList(msgspec.Struct, frozen=True):
    bundles: tuple[BundleRecord, ...]


class Rollback(msgspec.Struct, frozen=True):
    """`functions.rollback` → DeployedFunction. `version` 0: the one before the live one."""

    name: str
    principal: Principal
    operation: str
    version: int = 0


class Contact(msgspec.Struct, frozen=True):
    """`scopes.contact`: these ephemeral scopes are in use; `scopes.delete`: remove what they hold."""

    scopes: tuple[str, ...]
    principal: Principal


class KeyCreate(msgspec.Struct, frozen=True):
    """`keys.create` → KeyRecord. The asker made the secret and sends its hash alone."""

    id: str
    sha256: str
    name: str
    scopes: tuple[str, ...]
    expires_ms: int
    principal: Principal
    owner: str = ""


class KeyRecord(msgspec.Struct, frozen=True):
    id: str
    sha256: str
    name: str
    owner: str
    namespace: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int = 0


class KeyList(msgspec.Struct, frozen=True):
    keys: tuple[KeyRecord, ...]


class SandboxView(msgspec.Struct, frozen=True):
    sandbox: str
    allocation: str
    version: str
    state: str
    slots: int
    busy: int
    pid: int = 0


class NodeView(msgspec.Struct, frozen=True):
    name: str
    status: str
    eligible: bool
    role: str
    """`leader`, `control` or `worker`."""
    version: str
    address: str
    cpu: float
    """Cores."""
    cpu_used: float
    """Cores promised to replicas; may exceed those that there are by the overcommitment."""
    memory_mb: int
    memory_used_mb: int
    gpus: int
    gpus_used: int
    slots: int
    slots_busy: int
    driver: str
    python: tuple[str, ...]
    pool: str = "default"
    spares: int = 0
    started_ms: int = 0
    layers: tuple[str, ...] = ()
    """Isolation layers in force in its sandboxes."""
    sandboxes: tuple[SandboxView, ...] = ()


class PoolView(msgspec.Struct, frozen=True):
    pool: str
    nodes: int
    slots: int
    slots_busy: int
    cpu: float
    cpu_used: float
    memory_mb: int
    memory_used_mb: int
    gpus: int
    gpus_used: int


class NodeList(msgspec.Struct, frozen=True):
    """`nodes.list` → this."""

    nodes: tuple[NodeView, ...]
    executor_pools: tuple[PoolView, ...]


class FailureRecord(msgspec.Struct, frozen=True):
    """`failures.get` → this: a failed call, kept for a day on its node. The input is as it was sent, never decoded here."""

    invocation: str
    function: str
    version: str
    digest: str
    node: str
    at_ms: int
    codec: int
    payload: bytes
    problem: dict[str, Any]
    output: str
    spec: FunctionSpec


class Health(msgspec.Struct, frozen=True):
    """`node.health` → this (answered by the node at hand, leader or not)."""

    node: str
    leader: str
    epoch: int
    store_ok: bool
    accepting: bool
    layers: tuple[str, ...] = ()


OPS: dict[str, tuple[Any, Any]] = {
    "bundles.put": (BundlePut, BundleRecord),
    "bundles.get": (Name, BundleRecord),
    "bundles.list": (Empty, BundleList),
    "bundles.delete": (Name, Empty),
    "functions.deploy": (Deploy, Deployed),
    "functions.get": (Name, FunctionView),
    "functions.list": (Empty, FunctionList),
    "functions.versions": (Name, VersionList),
    "functions.delete": (Name, Empty),
    "functions.rollback": (Rollback, DeployedFunction),
    "scopes.contact": (Contact, Empty),
    "scopes.delete": (Contact, Empty),
    "keys.create": (KeyCreate, KeyRecord),
    "keys.list": (Empty, KeyList),
    "keys.revoke": (Name, Empty),
    "nodes.list": (Empty, NodeList),
    "failures.get": (Name, FailureRecord),
    "node.health": (Empty, Health),
}
"""Op → (type of its request, type of its answer)."""
