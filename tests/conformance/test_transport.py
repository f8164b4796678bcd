"""One suite for every transport: memory, Unix sockets, TCP with mutual TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mn.formats.manifest import FunctionSpec
from mn_nodepool.mesh.memory import MemoryLink, memory_pair
from mn_nodepool.mesh.stream import StreamLink, dial_tcp, dial_unix, serve_tcp, serve_unix
from mn_nodepool.mesh.transport import Link
from mn_nodepool.wire.codec import HEADER, encode
from mn_nodepool.wire.messages import Chunk, Directory, Hello, Message, Result, Route, Slots
from tests.support.executors import until

Scene = Callable[["End", "End"], Awaitable[None]]
LIMIT_S = 60


class End:
    """Owner of one end; remembers what came, and can refuse it."""

    def __init__(self) -> None:
        self.link: Link
        self.got: list[tuple[Message, bytes]] = []
        self.lost_count = 0
        self.refuse: Exception | None = None

    def ready(self, link: Link) -> None:
        self.link = link

    def received(self, link: Link, message: Message, body: bytes) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.got.append((message, body))

    def lost(self, link: Link) -> None:
        self.lost_count += 1

    async def heard(self, count: int) -> list[tuple[Message, bytes]]:
        await until(lambda: len(self.got) >= count)
        return self.got


def certificate(folder: Path, name: str, issuer: str = "") -> None:
    """A throw-away key and certificate, its own or `issuer`'s."""
    signing = ["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key"] if issuer else []
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.pem", *signing],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    for name in ("node", "gateway", "stranger"):
        certificate(folder, name)
    return folder


def contexts(pki: Path, dialler: str = "gateway") -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server's and client's; each trusts the other's certificate alone."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pki / "node.pem", pki / "node.key")
    server.load_verify_locations(pki / "gateway.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_cert_chain(pki / f"{dialler}.pem", pki / f"{dialler}.key")
    client.load_verify_locations(pki / "node.pem")
    return server, client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(params=["memory", "unix", "tcp", "tls"])
def play(request: pytest.FixtureRequest, tmp_path: Path, pki: Path) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        async def main() -> None:
            async with asyncio.timeout(LIMIT_S):
                await _joined(request.param, tmp_path, pki, scene)

        asyncio.run(main())

    return run


async def _joined(kind: str, folder: Path, pki: Path, scene: Scene) -> None:
    node, gateway = End(), End()
    if kind == "memory":
        node.link, gateway.link = memory_pair(node, gateway, names=("node", "gateway"), loop=asyncio.get_running_loop())
        await scene(node, gateway)
        return

    def served() -> StreamLink:
        return StreamLink(Hello("node", "node", "1.0"), node, node.ready)

    def dialled() -> StreamLink:
        return StreamLink(Hello("gateway", "gateway", "1.2"), gateway, gateway.ready)

    tls = contexts(pki) if kind == "tls" else (None, None)
    if kind == "unix":
        server = await serve_unix(folder / "mesh.sock", served)
        await dial_unix(folder / "mesh.sock", dialled)
    else:
        port = free_port()
        server = await serve_tcp("127.0.0.1", port, served, tls[0])
        await dial_tcp("127.0.0.1", port, dialled, tls[1])
    await until(lambda: hasattr(node, "link") and hasattr(gateway, "link"))
    try:
        await scene(node, gateway)
    finally:
        gateway.link.close()
        node.link.close()
        server.close()
        await until(lambda: node.lost_count and gateway.lost_count)


def test_peers_know_each_other_by_name(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        assert (node.link.peer, gateway.link.peer) == ("gateway", "node")

    play(scene)


def test_messages_arrive_in_order_with_their_bodies_both_ways(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        for number in range(2000):
            node.link.send(Result(number, 0, 0, 1, 2), b"%d" % number)
            gateway.link.send(Slots("f#1", number, 1, 1))
        expected = [(Result(number, 0, 0, 1, 2), b"%d" % number) for number in range(2000)]
        assert await gateway.heard(2000) == expected
        assert [message.seq for message, _ in await node.heard(2000)] == list(range(2000))  # type: ignore[attr-defined]

    play(scene)


def test_a_body_may_be_a_view_of_what_changes_later(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        data = bytearray(b"before")
        node.link.send(Chunk(1, False), memoryview(data))
        data[:] = b"after!"
        assert await gateway.heard(1) == [(Chunk(1, False), b"before")]

    play(scene)


def test_large_bodies_and_long_messages_pass(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        spec = FunctionSpec("f", "app:f", doc="d" * 1000)
        whole = Directory(1, 1, "n", tuple(Route(f"f{n}", f"f{n}#1", "a", "d", spec) for n in range(2000)), ())
        node.link.send(whole)
        for number in range(50):
            node.link.send(Chunk(number, True), bytes([number]) * 65536)
        got = await gateway.heard(51)
        assert got[0][0] == whole
        assert [body for _, body in got[1:]] == [bytes([number]) * 65536 for number in range(50)]

    play(scene)


def test_the_loss_of_a_link_is_told_once_to_both_and_sending_goes_on_harmlessly(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        node.link.send(Slots("f#1", 1, 1, 1))
        await gateway.heard(1)
        gateway.link.close()
        gateway.link.close()
        await until(lambda: node.lost_count and gateway.lost_count)
        node.link.send(Slots("f#1", 2, 1, 1))
        gateway.link.send(Slots("f#1", 2, 1, 1))
        node.link.close()
        await asyncio.sleep(0.01)
        assert (node.lost_count, gateway.lost_count) == (1, 1)
        assert node.link.closed
        assert gateway.link.closed
        assert (len(node.got), len(gateway.got)) == (0, 1)

    play(scene)


def test_a_receiver_that_fails_loses_its_link_where_it_can_be_dialled_again(play: Callable[[Scene], None]) -> None:
    async def scene(node: End, gateway: End) -> None:
        gateway.refuse = RuntimeError("a bug")
        node.link.send(Slots("f#1", 1, 1, 1))
        if isinstance(node.link, MemoryLink):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gateway.refuse = None
            node.link.send(Slots("f#1", 2, 1, 1))
            assert await gateway.heard(1) == [(Slots("f#1", 2, 1, 1), b"")]
        else:
            node.link.send(Slots("f#1", 2, 1, 1))
            await until(lambda: node.lost_count and gateway.lost_count)
            assert (node.lost_count, gateway.lost_count) == (1, 1)

    play(scene)


def hung_up_on(first: bytes, tmp_path: Path) -> End:
    """A node that a peer says `first` to, and waits until it hangs up."""
    node = End()

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            link = StreamLink(Hello("node", "node", "1.0"), node, node.ready)
            server = await serve_unix(tmp_path / "mesh.sock", lambda: link)
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "mesh.sock"))
            writer.write(first)
            await reader.read()
            writer.close()
            server.close()
            await until(lambda: node.lost_count)

    asyncio.run(main())
    return node


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 64,
        encode(Slots("f#1", 1, 1, 1)),
        encode(Hello("", "gateway", "1.0")),
        encode(Hello("gateway", "gateway", "2.0")),
        HEADER.pack(3, 3, 0, 0) + b"\x93\x01\x01",
    ],
)
def test_who_does_not_greet_properly_is_hung_up_on(first: bytes, tmp_path: Path) -> None:
    node = hung_up_on(first, tmp_path)
    assert not hasattr(node, "link"), "a stranger was let in"
    assert node.lost_count == 1
    assert not node.got


def test_garbage_after_the_greeting_ends_the_link_and_what_came_before_it_counts(tmp_path: Path) -> None:
    node = End()

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            server = await serve_unix(
                tmp_path / "mesh.sock", lambda: StreamLink(Hello("node", "node", "1.0"), node, node.ready)
            )
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "mesh.sock"))
            writer.write(encode(Hello("gateway", "gateway", "1.9")) + encode(Slots("f#1", 1, 1, 1)))
            await node.heard(1)
            writer.write(b"\xff" * 100)
            await until(lambda: node.lost_count)
            writer.close()
            server.close()

    asyncio.run(main())
    assert (len(node.got), node.lost_count) == (1, 1)


def test_a_peer_without_a_known_certificate_does_not_get_through(tmp_path: Path, pki: Path) -> None:
    node, stranger = End(), End()

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            server_tls, client_tls = contexts(pki, "stranger")
            port = free_port()
            server = await serve_tcp(
                "127.0.0.1", port, lambda: StreamLink(Hello("node", "node", "1"), node, node.ready), server_tls
            )
            try:
                await dial_tcp(
                    "127.0.0.1",
                    port,
                    lambda: StreamLink(Hello("x", "gateway", "1"), stranger, stranger.ready),
                    client_tls,
                )
                await until(lambda: stranger.lost_count)
            except OSError:
                stranger.lost_count += 1
            server.close()

    asyncio.run(main())
    assert not hasattr(node, "link")
    assert not stranger.got


def test_a_socket_that_a_dead_process_left_is_replaced_and_private(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "mesh.sock"
        for _ in range(2):
            server = await serve_unix(path, lambda: StreamLink(Hello("node", "node", "1"), End()))
            assert path.stat().st_mode & 0o777 == 0o600
            server.close()
        with pytest.raises(OSError):
            await dial_unix(tmp_path / "nobody.sock", lambda: StreamLink(Hello("x", "gateway", "1"), End()))

    asyncio.run(main())
