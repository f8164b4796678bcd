"""What people get to see of the leader's state."""

from __future__ import annotations

from mn.formats.ids import version_id
from mn_nodepool.control.catalog import Catalog
from mn_nodepool.control.placer import Placer
from mn_nodepool.wire.control import FunctionRecord, FunctionView, NodeList, NodeView, PoolView, SandboxView
from mn_nodepool.wire.messages import AllocationReport, Report


def function_view(catalog: Catalog, placer: Placer, record: FunctionRecord) -> FunctionView:
    live = catalog.versions[version_id(record.name, record.version)]
    replicas = sum(1 for a in placer.allocations.values() if a.version == live.id and a.ready and not a.stopping)
    return FunctionView(
        record.name, record.version, record.owner, record.namespace, live.digest, live.spec, record.created_ms, record.updated_ms, replicas,
        tuple(v.number for v in catalog.versions_of(record.name)), bool(record.scope),
    )  # fmt: skip


def node_list(placer: Placer, leader: str) -> NodeList:
    """Every node from its last report, and the sums by pool."""
    nodes = tuple(_node(placer, at.report, leader) for at in placer.executors.values())
    pools = []
    for name in sorted({node.pool for node in nodes}):
        members = [node for node in nodes if node.pool == name]
        pools.append(
            PoolView(
                name,
                len(members),
                sum(n.slots for n in members),
                sum(n.slots_busy for n in members),
                sum(n.cpu for n in members),
                sum(n.cpu_used for n in members),
                sum(n.memory_mb for n in members),
                sum(n.memory_used_mb for n in members),
                sum(n.gpus for n in members),
                sum(n.gpus_used for n in members),
            )
        )
    return NodeList(nodes, tuple(pools))


def _node(placer: Placer, report: Report, leader: str) -> NodeView:
    allocations = [a for a in placer.allocations.values() if a.node == report.node]
    cpu_used = sum(a.spec.resources.cpu for a in allocations)
    memory_used = sum(a.spec.resources.memory_mb for a in allocations)
    sandboxes = tuple(_sandbox(a) for a in report.allocations)
    return NodeView(
        report.node, "healthy", True, "leader" if report.node == leader else "worker", report.version, report.address, report.cpu,
        cpu_used, report.memory_mb, memory_used, report.gpus, sum(a.spec.resources.gpu for a in allocations), sum(s.slots for s in sandboxes),
        sum(s.busy for s in sandboxes), report.driver, report.python, report.pool, report.spares, report.started_ms, report.layers, sandboxes,
    )  # fmt: skip


def _sandbox(item: AllocationReport) -> SandboxView:
    return SandboxView(item.sandbox, item.allocation, item.version, item.state, item.slots, item.busy, item.pid)
