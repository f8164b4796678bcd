"""The catalog over the memory store: versions, aliases, owners, keys; and that the store holds what the leader believes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mn.formats.errors import Conflict, Forbidden, Internal, InvalidRequest, NotFound
from mn.formats.manifest import FunctionSpec, Scaling
from mn_nodepool.control.catalog import KEYS, UNUSED_BUNDLE_KEPT_MS, Catalog
from mn_nodepool.store.base import Epoch, Op, StaleEpoch
from mn_nodepool.wire.control import BundlePut, Deploy, KeyCreate, Name, Principal, Rollback
from tests.support.links import spec
from tests.support.memory_store import MemoryStore

ANN, BOB, ADMIN = Principal("key_a", "ann"), Principal("key_b", "bob"), Principal("key_c", "carol", admin=True)
Scene = Callable[["Desk"], Awaitable[None]]


class Desk:
    """A leader's catalog; operations get a new id each."""

    def __init__(self, versions_kept: int = 10) -> None:
        self.now_s = 0.0
        self.store = MemoryStore(lambda: self.now_s)
        self.catalog: Catalog
        self.epoch: Epoch
        self.versions_kept = versions_kept
        self.operations = 0

    async def lead(self, holder: str = "n1") -> Catalog:
        epoch = await self.store.acquire_lease(holder, 1e9)
        assert epoch is not None
        self.epoch = epoch
        self.catalog = Catalog(self.store, epoch, self.versions_kept)
        await self.catalog.load()
        return self.catalog

    async def put(self, digest: str, *specs: FunctionSpec, by: Principal = ANN) -> None:
        await self.catalog.put_bundle(BundlePut(digest, specs or (spec(),), 1, 100, by), 1000, "n1")

    def operation(self) -> str:
        self.operations += 1
        return f"op_{self.operations}"

    async def deploy(
        self, digest: str = "sha256:1", *, by: Principal = ANN, operation: str = "", **members: Any
    ) -> list[tuple[str, int, bool]]:
        """(name, version, changed) of each function."""
        request = Deploy(digest, by, operation or self.operation(), **members)
        answer, self.change = await self.catalog.deploy(request, 2000)
        return [(f.name, f.version, f.changed) for f in answer.functions]

    async def rollback(self, version: int = 0, *, by: Principal = ANN, operation: str = "") -> int:
        answer, self.change = await self.catalog.rollback(
            Rollback("square", by, operation or self.operation(), version), 3000
        )
        return answer.version

    async def same_after_takeover(self) -> None:
        """Who leads next finds what this leader believes."""
        mine = self.catalog
        after = Catalog(self.store, self.epoch, self.versions_kept)
        await after.load()
        assert (after.functions, after.versions) == (mine.functions, mine.versions)
        assert (after.bundles, after.keys) == (mine.bundles, mine.keys)
        assert {r.name: r for r in after.routes()} == {r.name: r for r in mine.routes()}


def play(scene: Scene, versions_kept: int = 10) -> None:
    async def run() -> None:
        desk = Desk(versions_kept)
        await desk.lead()
        await scene(desk)
        await desk.same_after_takeover()

    asyncio.run(run())


def test_deploying_the_same_again_makes_no_version() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        assert await desk.deploy() == [("square", 1, True)]
        assert [route.version for route in desk.change.routes] == ["square#1"]
        assert await desk.deploy() == [("square", 1, False)]
        assert not desk.change.routes
        assert await desk.deploy(overrides={"timeout_s": 5.0}) == [("square", 2, True)]
        assert desk.change.retired == ("square#1",)
        route = desk.catalog.route("square")
        assert route is not None
        assert (route.version, route.spec.timeout_s) == ("square#2", 5.0)

    play(scene)


def test_a_repeated_operation_changes_things_once() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        await desk.put("sha256:2")
        await desk.deploy("sha256:1", operation="first")
        await desk.deploy("sha256:2")
        assert await desk.deploy("sha256:1", operation="first") == [("square", 2, False)]
        await desk.deploy("sha256:1")
        assert await desk.rollback(operation="back") == 2
        assert await desk.rollback(operation="back") == 2, "a repeated rollback went back twice"
        await desk.lead()
        assert await desk.rollback(operation="back") == 2

    play(scene)


def test_several_functions_change_together_and_know_each_other() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1", spec("a"), spec("b"))
        assert await desk.deploy(scope="s1") == [("a~s1", 1, True), ("b~s1", 1, True)]
        assert desk.catalog.versions["a~s1#1"].siblings == {"a": "a~s1", "b": "b~s1"}
        assert await desk.deploy(names=("b",), rename="c") == [("c", 1, True)]
        with pytest.raises(InvalidRequest, match="several functions"):
            await desk.deploy(rename="d")
        with pytest.raises(InvalidRequest, match="has no function 'x'"):
            await desk.deploy(names=("x",))
        assert sorted(desk.catalog.functions) == ["a~s1", "b~s1", "c"]

    play(scene)


def test_a_name_belongs_to_its_owner_and_its_source() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1", spec(source="/home/ann/a.py"))
        await desk.put("sha256:2", spec(source="/home/ann/b.py"))
        await desk.deploy("sha256:1")
        with pytest.raises(Conflict, match="belongs to ann"):
            await desk.deploy("sha256:1", by=BOB)
        with pytest.raises(Conflict, match=r"deployed from /home/ann/a\.py"):
            await desk.deploy("sha256:2")
        assert await desk.deploy("sha256:2", replace=True) == [("square", 2, True)]
        assert await desk.deploy("sha256:1", by=BOB, replace=True) == [("square", 3, True)]
        with pytest.raises(Forbidden):
            await desk.rollback(1, by=ANN)

    play(scene)


def test_settings_that_make_no_sense_are_refused_with_their_path() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        for overrides, path in (
            ({"scaling": {"max_replicas": 0}}, "scaling.max_replicas"),
            ({"timeout_s": "soon"}, "timeout_s"),
            ({"scaling": {"min_replica": 1}}, "scaling"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                await desk.deploy(overrides=overrides)
            assert refused.value.path == path
        assert not desk.catalog.functions

    play(scene)


def test_rolling_back_moves_the_alias_and_back_again() -> None:
    async def scene(desk: Desk) -> None:
        for number in "123":
            await desk.put(f"sha256:{number}")
            await desk.deploy(f"sha256:{number}")
        assert await desk.rollback() == 2
        assert (desk.change.retired, desk.change.routes[0].digest) == (("square#3",), "sha256:2")
        assert await desk.rollback() == 1
        with pytest.raises(NotFound, match="it has 1, 2, 3"):
            await desk.rollback()
        with pytest.raises(NotFound, match="no version 9"):
            await desk.rollback(9)
        assert await desk.rollback(3) == 3
        assert await desk.rollback(3) == 3
        assert not desk.change.routes
        await desk.rollback(1)
        await desk.put("sha256:4")
        assert await desk.deploy("sha256:4") == [("square", 4, True)], "numbers are never used again"

    play(scene)


def test_old_versions_go_and_the_live_one_stays() -> None:
    async def scene(desk: Desk) -> None:
        for number in range(1, 4):
            await desk.put(f"sha256:{number}")
            await desk.deploy(f"sha256:{number}")
        await desk.rollback(1)
        for number in range(4, 9):
            await desk.put(f"sha256:{number}")
            await desk.deploy(f"sha256:{number}")
            kept = [version.number for version in desk.catalog.versions_of("square")]
            assert len(kept) <= 3
            assert number in kept
        assert kept == [6, 7, 8]

    play(scene, versions_kept=2)


def test_deleting_a_function_frees_its_bundle_after_a_day() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        await desk.deploy(scope="s1")
        with pytest.raises(Conflict, match="is used by square~s1"):
            await desk.catalog.delete_bundle(Name("sha256:1", ANN))
        assert desk.catalog.in_scopes(["s1", "s2"]) == ["square~s1"]
        with pytest.raises(Forbidden):
            await desk.catalog.delete_functions(["square~s1"], BOB)
        change = await desk.catalog.delete_functions(["square~s1"], None)
        assert (change.routes_gone, change.retired) == (("square~s1",), ("square~s1#1",))
        with pytest.raises(NotFound):
            desk.catalog.function("square~s1")
        assert not (await desk.catalog.drop_unused_bundles(0)).bundles_gone
        assert not (await desk.catalog.drop_unused_bundles(UNUSED_BUNDLE_KEPT_MS)).bundles_gone
        assert (await desk.catalog.drop_unused_bundles(UNUSED_BUNDLE_KEPT_MS + 1)).bundles_gone == ("sha256:1",)

    play(scene)


def test_a_bundle_of_somebody_else_stays() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        await desk.put("sha256:1", by=BOB)
        with pytest.raises(Forbidden, match="belongs to ann"):
            await desk.catalog.delete_bundle(Name("sha256:1", BOB))
        change = await desk.catalog.delete_bundle(Name("sha256:1", ADMIN))
        assert change.bundles_gone == ("sha256:1",)
        with pytest.raises(NotFound):
            desk.catalog.bundle("sha256:1")

    play(scene)


def test_near_names_are_offered() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        await desk.deploy()
        with pytest.raises(NotFound) as missing:
            desk.catalog.function("sqare")
        assert missing.value.near == ["square"]

    play(scene)


def test_the_last_key_that_may_do_everything_stays() -> None:
    async def scene(desk: Desk) -> None:
        def key(id_: str, name: str, *scopes: str) -> KeyCreate:
            return KeyCreate(id_, f"hash of {id_}", name, scopes, 0, ADMIN, "ann")

        await desk.catalog.create_key(key("key_1", "root", "admin"), 1)
        _, change = await desk.catalog.create_key(key("key_2", "ci", "deploy"), 1)
        assert (change.keys[0].sha256, change.keys[0].owner) == ("hash of key_2", "ann")
        await desk.catalog.create_key(key("key_3", "ci", "invoke"), 1)
        with pytest.raises(Conflict, match="last key with the scope admin"):
            await desk.catalog.revoke_key(Name("key_1", ADMIN))
        with pytest.raises(Conflict, match="2 keys are named 'ci'"):
            await desk.catalog.revoke_key(Name("ci", ADMIN))
        assert (await desk.catalog.revoke_key(Name("key_2", ADMIN))).keys_gone == ("key_2",)
        assert (await desk.catalog.revoke_key(Name("ci", ADMIN))).keys_gone == ("key_3",)
        with pytest.raises(NotFound):
            await desk.catalog.revoke_key(Name("ci", ADMIN))

    play(scene)


def test_a_key_that_expires_does_not_stand_in_for_the_last_admins() -> None:
    async def scene(desk: Desk) -> None:
        await desk.catalog.create_key(KeyCreate("key_1", "1", "root", ("admin",), 0, ADMIN), 1)
        await desk.catalog.create_key(KeyCreate("key_2", "2", "guest", ("admin",), 2000, ADMIN), 1)
        with pytest.raises(Conflict, match="does not expire"):
            await desk.catalog.revoke_key(Name("key_1", ADMIN))
        assert (await desk.catalog.revoke_key(Name("key_2", ADMIN))).keys_gone == ("key_2",)

    play(scene)


def test_who_leads_no_more_changes_nothing() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1")
        old = desk.catalog
        desk.store.drop_lease()
        await desk.lead("n2")
        with pytest.raises(StaleEpoch):
            await old.deploy(Deploy("sha256:1", ANN, "op"), 1)
        with pytest.raises(StaleEpoch):
            await old.create_key(KeyCreate("key_1", "x", "k", ("admin",), 0, ANN), 1)
        assert not old.functions
        assert not old.keys
        assert not desk.catalog.functions

    play(scene)


def test_a_record_that_cannot_be_read_is_said_and_not_guessed() -> None:
    async def scene(desk: Desk) -> None:
        for value in (b"no json", b"{}", b'{"schema": 99, "data": {}}', b'{"schema": 1, "data": {}}'):
            await desk.store.commit([Op(KEYS.name, "key_1", value)])
            with pytest.raises(Internal):
                await Catalog(desk.store, desk.epoch, 10).load()
        await desk.store.commit([Op(KEYS.name, "key_1", None)])

    play(scene)


def test_scaling_can_be_overridden_in_part() -> None:
    async def scene(desk: Desk) -> None:
        await desk.put("sha256:1", spec(scaling=Scaling(min_replicas=1, max_replicas=4)))
        await desk.deploy(overrides={"scaling": {"max_replicas": 2}})
        assert desk.catalog.versions["square#1"].spec.scaling == Scaling(min_replicas=1, max_replicas=2)

    play(scene)
