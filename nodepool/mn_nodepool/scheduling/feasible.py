"""Whether a node can run a replica: one function, for planner and executor alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mn.formats.manifest import FunctionSpec
from mn_nodepool.model import AllocationState, NodeState


class Used(NamedTuple):
    cpu: float = 0.0
    memory_mb: int = 0
    gpus: int = 0
    slots: int = 0

    def plus(self, spec: FunctionSpec, *, lent: bool = False) -> Used:
        resources = spec.resources
        cpu, slots = (0.0, 0) if lent else (resources.cpu, 1)
        return Used(self.cpu + cpu, self.memory_mb + resources.memory_mb, self.gpus + resources.gpu, self.slots + slots)

    def minus(self, spec: FunctionSpec, *, lent: bool = False) -> Used:
        resources = spec.resources
        cpu, slots = (0.0, 0) if lent else (resources.cpu, 1)
        return Used(self.cpu - cpu, self.memory_mb - resources.memory_mb, self.gpus - resources.gpu, self.slots - slots)


def used_by(allocations: Iterable[AllocationState]) -> Used:
    used = Used()
    for allocation in allocations:
        used = used.plus(allocation.spec, lent=allocation.lent)
    return used


def why_not(spec: FunctionSpec, node: NodeState, used: Used) -> str | None:
    """None when a replica fits beside what is used; else what is in the way, to follow the node's name."""
    need = spec.resources
    if not node.eligible:
        return "takes no new work"
    if spec.environment.python is not None and spec.environment.python not in node.python:
        return f"has Python {', '.join(node.python)}, not {spec.environment.python}"
    if need.gpu > node.gpus:
        return f"has {node.gpus or 'no'} GPU{'s' if node.gpus > 1 else ''}"
    if need.memory_mb > node.memory_mb:
        return f"has {node.memory_mb} MiB memory"
    if need.cpu > node.cpu:
        return f"has {node.cpu:g} cores to promise"
    if need.gpu + used.gpus > node.gpus:
        return f"has all {node.gpus} GPUs in use"
    if need.memory_mb + used.memory_mb > node.memory_mb:
        return f"has {max(0, node.memory_mb - used.memory_mb)} of {node.memory_mb} MiB memory free"
    if need.cpu + used.cpu > node.cpu + 1e-9:
        return f"has {max(0.0, node.cpu - used.cpu):g} of {node.cpu:g} cores free"
    if node.slots_max and used.slots + 1 > node.slots_max:
        return f"has all {node.slots_max} slots in use"
    return None
