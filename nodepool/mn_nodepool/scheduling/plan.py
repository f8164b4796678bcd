"""Which replicas start where, and which idle ones make room."""

from __future__ import annotations

from collections.abc import Sequence

from mn.formats.ids import AllocationId, NodeId, VersionId
from mn.formats.manifest import FunctionSpec
from mn_nodepool.model import AllocationState, End, NodeState, Place, Plan, Snapshot, Unmet, Want
from mn_nodepool.scheduling.feasible import Used, used_by, why_not


def plan(snapshot: Snapshot, wants: Sequence[Want]) -> Plan:
    """Places for the replicas that are missing, least loaded node first; idle replicas above other functions' minimum end when they
    are in the way, longest idle first. Places never exceed a node's capacity once the ends have happened."""
    used: dict[NodeId, Used] = {
        node: used_by(a for a in snapshot.allocations.values() if a.node == node) for node in snapshot.nodes
    }
    present: dict[VersionId, int] = {}
    for allocation in snapshot.allocations.values():
        if not allocation.stopping:
            present[allocation.version] = present.get(allocation.version, 0) + 1
    needed = {want.version: want.replicas for want in wants}
    ending: set[AllocationId] = set()
    places: list[Place] = []
    ends: list[End] = []
    unmet: list[Unmet] = []
    for want in wants:
        missing = want.replicas - present.get(want.version, 0)
        while missing > 0:
            node = _best(snapshot, used, want.spec)
            if node is None:
                victims = _make_room(snapshot, used, want, ending, present, needed)
                if victims is None:
                    reasons = {n.id: why_not(want.spec, n, used[n.id]) or "" for n in snapshot.nodes.values()}
                    nodes = snapshot.nodes.values()
                    permanent = bool(nodes) and all(why_not(want.spec, n, Used()) is not None for n in nodes)
                    unmet.append(Unmet(want.version, missing, reasons, permanent))
                    break
                for victim in victims:
                    ending.add(victim.id)
                    present[victim.version] -= 1
                    used[victim.node] = used[victim.node].minus(victim.spec, lent=victim.lent)
                    ends.append(End(victim.id, f"idle, and {want.spec.name} needs its place"))
                continue
            used[node] = used[node].plus(want.spec)
            places.append(Place(want.version, node))
            missing -= 1
    return Plan(tuple(places), tuple(ends), tuple(unmet))


def _best(snapshot: Snapshot, used: dict[NodeId, Used], spec: FunctionSpec) -> NodeId | None:
    fitting = [n for n in snapshot.nodes.values() if why_not(spec, n, used[n.id]) is None]
    return min(fitting, key=lambda n: (_load(n, used[n.id]), n.id)).id if fitting else None


def _load(node: NodeState, used: Used) -> float:
    return max(used.cpu / node.cpu, used.memory_mb / max(1, node.memory_mb))


def _make_room(
    snapshot: Snapshot,
    used: dict[NodeId, Used],
    want: Want,
    ending: set[AllocationId],
    present: dict[VersionId, int],
    needed: dict[VersionId, int],
) -> list[AllocationState] | None:
    """The fewest, longest idle replicas on one node whose end makes the replica fit; None where none would."""
    best: list[AllocationState] | None = None
    for node in snapshot.nodes.values():
        victims: list[AllocationState] = []
        left = used[node.id]
        spare = dict(present)
        idle = [
            a for a in snapshot.allocations.values()
            if a.node == node.id and a.idle_ms and a.ready and not a.stopping and a.id not in ending and a.version != want.version
        ]  # fmt: skip
        for allocation in sorted(idle, key=lambda a: -a.idle_ms):
            if why_not(want.spec, node, left) is None:
                break
            least = max(allocation.spec.scaling.min_replicas, needed.get(allocation.version, 0))
            if spare.get(allocation.version, 0) > least:
                spare[allocation.version] -= 1
                victims.append(allocation)
                left = left.minus(allocation.spec, lent=allocation.lent)
        if victims and why_not(want.spec, node, left) is None:
            victims = _without_bystanders(want.spec, node, left, victims)
            if best is None or len(victims) < len(best):
                best = victims
    return best


def _without_bystanders(
    spec: FunctionSpec, node: NodeState, left: Used, victims: list[AllocationState]
) -> list[AllocationState]:
    """Those without whose end it does not fit; who was used last is spared first."""
    ending = []
    for victim in reversed(victims):
        with_it = left.plus(victim.spec, lent=victim.lent)
        if why_not(spec, node, with_it) is None:
            left = with_it
        else:
            ending.append(victim)
    return ending[::-1]
