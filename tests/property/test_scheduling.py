"""The scheduler over ten thousand random pools; a failure names the seed that replays it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mn.formats.ids import AllocationId, NodeId, VersionId
from mn.formats.manifest import Environment, FunctionSpec, Resources, Scaling
from mn_nodepool.model import AllocationState, NodeState, Plan, Snapshot, Want
from mn_nodepool.scheduling.feasible import Used, used_by, why_not
from mn_nodepool.scheduling.plan import plan
from mn_nodepool.scheduling.scale import wanted_replicas

VERSIONS = tuple(f"f{number}#1" for number in range(4))
CASES = 10_000


def random_spec(chance: Random, version: str) -> FunctionSpec:
    return FunctionSpec(
        version[:2],
        "app:f",
        resources=Resources(
            chance.choice([0.25, 0.5, 1.0, 2.0]), chance.choice([64, 512, 1024]), chance.choice([0, 0, 1])
        ),
        scaling=Scaling(min_replicas=chance.choice([0, 0, 0, 1])),
        environment=Environment(chance.choice([None, None, "3.11", "3.12"])),
    )


def random_pool(seed: int) -> tuple[Snapshot, list[Want]]:
    """A pool that keeps within its capacity, and what is wanted of it."""
    chance = Random(seed)
    by_version = {version: random_spec(chance, version) for version in VERSIONS}
    nodes = {}
    for number in range(chance.randint(0, 3)):
        id_ = NodeId(f"n{number}")
        nodes[id_] = NodeState(
            id_, chance.choice([1.0, 2.0, 4.0]), chance.choice([512, 2048]), chance.randint(0, 1), "fake",
            chance.choice([("3.11",), ("3.11", "3.12")]), chance.choice([0, 0, 2]), chance.random() < 0.8,
        )  # fmt: skip
    allocations: dict[AllocationId, AllocationState] = {}
    for number in range(chance.randint(0, 8) if nodes else 0):
        node = nodes[chance.choice(sorted(nodes))]
        version = chance.choice(VERSIONS)
        used = used_by(a for a in allocations.values() if a.node == node.id)
        if why_not(by_version[version], node, used) is None:
            id_ = AllocationId(f"a{number}")
            allocations[id_] = AllocationState(
                id_, VersionId(version), node.id, by_version[version], chance.random() < 0.7, chance.random() < 0.2,
                chance.choice([0, 0, 500, 9000]),
            )  # fmt: skip
    wanted = chance.sample(VERSIONS, chance.randint(0, 4))
    return Snapshot(nodes, allocations), [Want(VersionId(v), by_version[v], chance.randint(1, 5)) for v in wanted]


def present(snapshot: Snapshot, version: str) -> int:
    return sum(1 for a in snapshot.allocations.values() if a.version == version and not a.stopping)


def applied(snapshot: Snapshot, made: Plan, wants: Sequence[Want]) -> Snapshot:
    """The pool after every end happened and every place was started."""
    spec_of = {want.version: want.spec for want in wants}
    ended = {end.allocation for end in made.ends}
    allocations = {id_: a for id_, a in snapshot.allocations.items() if id_ not in ended}
    for number, place in enumerate(made.places):
        id_ = AllocationId(f"new{len(allocations)}-{number}")
        allocations[id_] = AllocationState(id_, place.version, place.node, spec_of[place.version])
    return Snapshot(snapshot.nodes, allocations)


def check_capacity(snapshot: Snapshot, wants: list[Want], made: Plan) -> None:
    after = applied(snapshot, made, wants)
    for node in {place.node for place in made.places}:
        there = [a for a in after.allocations.values() if a.node == node]
        for each in there:
            others = used_by(a for a in there if a is not each)
            fits = why_not(each.spec, snapshot.nodes[node], others)
            assert fits is None or each.id in snapshot.allocations, f"{each} does not fit: {fits}"


def check_numbers(snapshot: Snapshot, wants: list[Want], made: Plan) -> None:
    for want in wants:
        placed = sum(1 for place in made.places if place.version == want.version)
        short = [unmet.missing for unmet in made.unmet if unmet.version == want.version]
        missing = max(0, want.replicas - present(snapshot, want.version))
        assert placed + sum(short) == missing
    assert made.places or not made.ends


def check_ends(snapshot: Snapshot, wants: list[Want], made: Plan) -> None:
    after = applied(snapshot, made, wants)
    assert len({end.allocation for end in made.ends}) == len(made.ends)
    for end in made.ends:
        ended = snapshot.allocations[end.allocation]
        assert (ended.ready, bool(ended.idle_ms), ended.stopping) == (True, True, False)
        assert present(after, ended.version) >= ended.spec.scaling.min_replicas, "the minimum was given away"


def check_reasons(snapshot: Snapshot, wants: list[Want], made: Plan) -> None:
    for unmet in made.unmet:
        assert set(unmet.reasons) == set(snapshot.nodes)
        assert all(unmet.reasons.values())
        spec = next(want.spec for want in wants if want.version == unmet.version)
        possible = any(why_not(spec, node, Used()) is None for node in snapshot.nodes.values())
        assert unmet.permanent == (bool(snapshot.nodes) and not possible)


def check_convergence(snapshot: Snapshot, wants: list[Want], made: Plan) -> None:
    again = plan(applied(snapshot, made, wants), wants)
    assert (again.places, again.ends) == ((), ()), "a plan that was carried out leaves something to do"


@pytest.mark.parametrize("check", [check_capacity, check_numbers, check_ends, check_reasons, check_convergence])
def test_a_plan_holds_in_every_pool(check: Callable[[Snapshot, list[Want], Plan], None]) -> None:
    for seed in range(CASES):
        snapshot, wants = random_pool(seed)
        try:
            check(snapshot, wants, plan(snapshot, wants))
        except AssertionError as error:
            raise AssertionError(f"random_pool({seed}): {error}") from error


@given(
    st.builds(
        lambda least, more, slots: Scaling(least, least + more, slots), st.integers(0, 3), st.integers(1, 20), st.integers(1, 8)
    ),
    st.integers(0, 25), st.integers(0, 5000), st.integers(0, 100), st.sampled_from([0, 50, 10_000, 3_000_000]),
)  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_the_number_of_replicas_follows_the_queue_within_its_bounds(
    scaling: Scaling, there: int, queued: int, running: int, run_us: int
) -> None:
    wanted = wanted_replicas(scaling, there, queued, running, run_us)
    assert wanted >= scaling.min_replicas
    assert wanted <= max(there, scaling.max_replicas)
    if queued:
        assert wanted >= 1
        needed = -(-(queued + running) // scaling.concurrency)
        assert wanted <= max(there, needed, scaling.min_replicas), "more than there are calls for"
    else:
        assert wanted == max(there, scaling.min_replicas)
    again = wanted_replicas(scaling, wanted, queued, running, run_us)
    assert again == wanted or there > scaling.max_replicas


def test_the_least_loaded_node_is_taken_and_bystanders_are_spared() -> None:
    node = NodeState(NodeId("n"), 4.0, 4096, 1, "fake", ("3.11",))
    small = FunctionSpec("small", "app:f", resources=Resources(1.0, 64))
    gpu = FunctionSpec("gpu", "app:f", resources=Resources(1.0, 64, 1))
    held = [
        AllocationState(AllocationId("a"), VersionId("small#1"), node.id, small, True, False, 9000),
        AllocationState(AllocationId("b"), VersionId("gpu#1"), node.id, gpu, True, False, 10),
    ]
    wants = [Want(VersionId("other#1"), msgspec.structs.replace(gpu, name="other"), 1)]
    made = plan(Snapshot({node.id: node}, {a.id: a for a in held}), wants)
    assert [end.allocation for end in made.ends] == ["b"], "ending the longest idle one would have brought no GPU"
