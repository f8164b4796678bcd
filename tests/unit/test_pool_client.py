"""A gateway's link to its node: up again by itself, whatever ended it, and never silently waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from mn.formats.errors import NotFound, Unavailable
from mn.formats.settings import Settings
from mn_nodepool.client import RECONNECT_FIRST_S, PoolClient, Problem, distribution_version, mesh_socket
from mn_nodepool.mesh.stream import StreamLink, serve_unix
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.codec import encode
from mn_nodepool.wire.control import Empty, KeyList
from mn_nodepool.wire.messages import Answer, Ask, Hello, Message
from tests.support.executors import until


class Node:
    """Answers asks by op: `keys.list` with none, `functions.list` with an error, others never."""

    def __init__(self, settings: Settings) -> None:
        self.path = mesh_socket(settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.links: list[Link] = []
        self.server: asyncio.AbstractServer

    async def serve(self) -> None:
        hello = Hello("node", "node", distribution_version())
        self.server = await serve_unix(self.path, lambda: StreamLink(hello, self, self.links.append))

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if isinstance(message, Ask) and message.op == "keys.list":
            link.send(Answer(message.id, "", msgspec.Raw(msgspec.msgpack.encode(KeyList(())))))
        elif isinstance(message, Ask) and message.op == "functions.list":
            problem = msgspec.msgpack.encode(Problem("no such thing", {"near": ["x"]}))
            link.send(Answer(message.id, "not-found", msgspec.Raw(problem)))

    def lost(self, link: Link) -> None:
        self.links = [each for each in self.links if each is not link]

    def close(self) -> None:
        self.server.close()
        for link in self.links:
            link.close()


def test_it_comes_back_after_hang_ups_restarts_and_early_starts(tmp_path: Path) -> None:
    async def main() -> None:
        settings = Settings(home=tmp_path)
        client, node = PoolClient(settings, "gateway-1"), Node(settings)
        await client.start()
        with pytest.raises(Unavailable):
            await client.ask("keys.list", Empty())
        hung_up = 0

        def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal hung_up
            hung_up += 1
            writer.close()

        rude = await asyncio.start_unix_server(hang_up, str(node.path))
        await until(lambda: hung_up >= 2)
        rude.close()
        for _ in range(2):
            await node.serve()
            await client.wait_connected()
            assert await client.ask("keys.list", Empty()) == KeyList(())
            node.close()
            await until(lambda: not client.connected)
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_node_that_hangs_up_after_its_greeting_is_dialled_ever_more_rarely(tmp_path: Path) -> None:
    async def main() -> None:
        settings = Settings(home=tmp_path)
        client, dials = PoolClient(settings, "gateway-1"), list[float]()
        clock = asyncio.get_running_loop().time

        def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            dials.append(clock())
            writer.write(encode(Hello("node", "node", distribution_version())))
            writer.close()

        path = mesh_socket(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        async with await asyncio.start_unix_server(greet, str(path)):
            await client.start()
            await until(lambda: len(dials) >= 4)
            await client.close()
        assert dials[3] - dials[2] >= 2 * RECONNECT_FIRST_S

    asyncio.run(asyncio.wait_for(main(), 30))


def test_requests_end_with_an_answer_an_error_or_the_link(tmp_path: Path) -> None:
    async def main() -> None:
        settings = Settings(home=tmp_path)
        client, node = PoolClient(settings, "gateway-1"), Node(settings)
        await node.serve()
        await client.start()
        await client.wait_connected()
        with pytest.raises(NotFound) as missing:
            await client.ask("functions.list", Empty())
        assert missing.value.near == ["x"]
        with pytest.raises(Unavailable, match="did not answer within"):
            await client.ask("nodes.list", Empty(), timeout_s=0.05)
        waiting = asyncio.ensure_future(client.ask("nodes.list", Empty()))
        following = asyncio.ensure_future(_all(client))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        node.close()
        with pytest.raises(Unavailable, match="may have been carried out"):
            await waiting
        assert await following == []
        await client.close()

    async def _all(client: PoolClient) -> list[object]:
        return [batch async for batch in client.tail("f", "", True, 10)]

    asyncio.run(asyncio.wait_for(main(), 30))
