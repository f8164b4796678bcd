"""What the leader lets whom do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mn.formats.errors import Forbidden
from mn.formats.ids import NodeId
from mn.formats.settings import Settings
from mn_nodepool.clock import SystemClock
from mn_nodepool.control.leader import Leader
from mn_nodepool.wire.control import BundlePut, Contact, Deploy, Principal
from tests.support.links import spec
from tests.support.memory_store import MemoryStore

ANN, BOB = Principal("key_a", "ann"), Principal("key_b", "bob")


def test_an_ephemeral_scope_is_dropped_by_its_owner_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        store = MemoryStore(lambda: 0.0)
        epoch = await store.acquire_lease("n1", 1e9)
        assert epoch is not None
        leader = Leader(Settings(home=tmp_path), NodeId("n1"), store, epoch, SystemClock(), lambda *_: None)
        await leader.establish()
        try:
            await leader.ask("bundles.put", BundlePut("sha256:1", (spec(),), 1, 100, ANN))
            await leader.ask("functions.deploy", Deploy("sha256:1", ANN, "op_1", scope="s1"))
            with pytest.raises(Forbidden):
                await leader.ask("scopes.delete", Contact(("s1",), BOB))
            assert "square~s1" in leader.catalog.functions
            await leader.ask("scopes.delete", Contact(("s1",), ANN))
            assert "square~s1" not in leader.catalog.functions
        finally:
            await leader.revoke()

    asyncio.run(scene())
