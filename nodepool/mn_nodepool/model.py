"""The pool as the leader sees it: values, without I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mn.formats.ids import AllocationId, NodeId, VersionId
from mn.formats.manifest import FunctionSpec


class NodeState(msgspec.Struct, frozen=True):
    """One node, from its last report."""

    id: NodeId
    cpu: float
    """Cores that may be promised, overcommitment included."""
    memory_mb: int
    gpus: int
    driver: str
    python: tuple[str, ...]
    slots_max: int = 0
    """Replicas that may run at once; 0: as the other resources allow."""
    eligible: bool = True


class AllocationState(msgspec.Struct, frozen=True):
    """One committed replica."""

    id: AllocationId
    version: VersionId
    node: NodeId
    spec: FunctionSpec
    ready: bool = False
    stopping: bool = False
    idle_ms: int = 0
    """0: it is busy, or was when last heard of."""
    lent: bool = False
    """All its calls wait for calls of their own."""


class Snapshot(msgspec.Struct, frozen=True):
    """All that a decision needs."""

    nodes: Mapping[NodeId, NodeState]
    allocations: Mapping[AllocationId, AllocationState]


class Want(msgspec.Struct, frozen=True):
    """How many replicas of a version there should be in all."""

    version: VersionId
    spec: FunctionSpec
    replicas: int


class Place(msgspec.Struct, frozen=True):
    version: VersionId
    node: NodeId


class End(msgspec.Struct, frozen=True):
    allocation: AllocationId
    reason: str


class Unmet(msgspec.Struct, frozen=True):
    """Replicas that found no node, and why, node by node."""

    version: VersionId
    missing: int
    reasons: Mapping[NodeId, str]
    permanent: bool
    """No node could run it even if it were empty."""


class Plan(msgspec.Struct, frozen=True):
    places: tuple[Place, ...] = ()
    ends: tuple[End, ...] = ()
    unmet: tuple[Unmet, ...] = ()
