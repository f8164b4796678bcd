"""Clients that take their time: they hold nothing that others need."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import httpx
import pytest

from tests.support.fake_pool import GatewayThread, eventually


def connect(gateway: GatewayThread, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    client.sendall(sent)
    return client


def test_a_connection_without_a_request_is_closed_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mn_gateway.server.HEAD_S", 0.2)
    with GatewayThread(tmp_path / "x") as gateway, contextlib.ExitStack() as stack:
        silent = stack.enter_context(connect(gateway))
        slow = stack.enter_context(connect(gateway, b"POST /v1/bundles HTTP/1.1\r\nhost: localhost\r\nx: "))
        kept = stack.enter_context(connect(gateway, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"))
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        assert (silent.recv(1), slow.recv(1)) == (b"", b"")
        # The one that had an answer is as welcome as before, and its second request must come whole as well.
        kept.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert kept.recv(1) == b""


def test_uploads_that_stall_leave_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mn_gateway.bodies.STALL_S_MAX", 0.3)
    with GatewayThread(tmp_path / "x") as gateway, contextlib.ExitStack() as stack:
        head = (
            f"POST /v1/bundles HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
            "content-length: 1000\r\n\r\nabc"
        )
        stalled = [stack.enter_context(connect(gateway, head.encode())) for _ in range(6)]
        for client in stalled:
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 422")
            assert b"nothing more of the body came" in answer
        eventually(lambda: not list(gateway.settings.bundles_dir.iterdir()))


def test_many_idle_connections_keep_nobody_out(tmp_path: Path) -> None:
    with GatewayThread(tmp_path / "x") as gateway, contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(gateway))
        assert httpx.get(f"{gateway.url}/healthz", trust_env=False).status_code == 200
