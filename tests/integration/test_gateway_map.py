"""Maps over HTTP: each item is a call of its own, answered as it ends."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mn.formats.codecs import MEDIA_FRAMES, MEDIA_NDJSON, PICKLE_HEADER, RESPONSE_ITEM, ItemStatus
from mn.formats.errors import CallTimeout
from tests.support.fake_pool import FakeCall, FakeDispatcher, GatewayThread, echo, eventually, never, raising

LINES = {"content-type": MEDIA_NDJSON}
FRAMES = {"content-type": MEDIA_FRAMES, "mn-item-codec": "pickle"}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path, payload_bytes_max=200_000) as running:
        running.pool.add_function("square")
        running.pool.add_function("never", never)
        yield running


def results(response: httpx.Response) -> tuple[dict[int, dict[str, Any]], int | None]:
    """Line per index, and the number in the last line."""
    lines = [json.loads(line) for line in response.text.splitlines()]
    end = lines.pop()["end"] if lines and "end" in lines[-1] else None
    return {line["index"]: line for line in lines}, end


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        index, status, codec, _, length = RESPONSE_ITEM.unpack(data[:12])
        found.append((index, status, codec, data[12 : 12 + length]))
        data = data[12 + length :]
    return found


def framed(items: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def test_every_item_is_answered_under_its_index_and_an_id_of_its_own(gateway: GatewayThread) -> None:
    body = "\n".join(json.dumps({"x": i}) for i in range(5000))
    with gateway.client() as client:
        response = client.post("/v1/functions/square/map", content=body, headers=LINES)
    lines, end = results(response)
    assert end == 5000
    assert [lines[i]["value"] for i in range(5000)] == [{"x": i} for i in range(5000)]
    whole = response.headers["mn-invocation-id"]
    assert {call.invocation for call in gateway.pool.dispatcher.started} == {f"{whole}.{i}" for i in range(5000)}


def test_frames_in_are_frames_out(gateway: GatewayThread) -> None:
    items = [PICKLE_HEADER + bytes([i]) * i for i in range(50)]
    with gateway.client() as client:
        response = client.post("/v1/functions/square/map", content=framed(items), headers=FRAMES)
    *found, end = frames(response.content)
    assert response.headers["content-type"] == MEDIA_FRAMES
    assert sorted(found) == [(i, ItemStatus.OK, 2, item) for i, item in enumerate(items)]
    assert end == (50, ItemStatus.END, 0, b"")


def test_a_map_of_nothing_ends_at_once(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        assert results(client.post("/v1/functions/square/map", headers=LINES)) == ({}, 0)


def test_an_item_that_fails_fails_alone(gateway: GatewayThread) -> None:
    def picky(dispatcher: FakeDispatcher, call: FakeCall) -> None:
        (raising if call.payload == b"13" else never if call.payload == b"7" else echo)(dispatcher, call)

    gateway.pool.add_function("picky", picky)
    body = "\n".join(str(i) for i in range(20))
    with gateway.client() as client:
        response = client.post("/v1/functions/picky/map", content=body, headers=LINES | {"mn-timeout": "0.1"})
        metrics = client.get("/metrics").text
    lines, end = results(response)
    assert (end, len(lines)) == (20, 20)
    assert lines[13]["error"]["type"] == "/problems/function-error"
    assert lines[7]["error"]["type"] == "/problems/timeout"
    assert lines[7]["error"]["instance"] == response.headers["mn-invocation-id"] + ".7"
    assert sum("value" in line for line in lines.values()) == 18
    assert "mn_map_items_total 20.0" in metrics
    assert 'mn_function_errors_total{function="picky"} 1.0' in metrics


def test_a_full_queue_makes_items_wait_instead_of_failing(gateway: GatewayThread) -> None:
    gateway.pool.dispatcher.capacity = 3
    with gateway.client() as client:
        lines, end = results(client.post("/v1/functions/square/map", content="1\n" * 500, headers=LINES))
    assert end == 500
    assert all(line["value"] == 1 for line in lines.values())


def test_an_item_waits_while_others_fill_the_queue(gateway: GatewayThread) -> None:
    dispatcher = gateway.pool.dispatcher
    dispatcher.capacity = 0
    timer = threading.Timer(0.3, lambda: setattr(dispatcher, "capacity", 10))
    timer.start()
    with gateway.client() as client:
        assert results(client.post("/v1/functions/square/map", content="1\n2\n", headers=LINES))[1] == 2
    timer.join()


def test_an_item_that_only_waited_does_not_time_out(gateway: GatewayThread) -> None:
    seen: dict[bytes, int] = {}

    def waits_once(dispatcher: FakeDispatcher, call: FakeCall) -> None:
        seen[call.payload] = seen.get(call.payload, 0) + 1
        if seen[call.payload] == 1:
            call.attempts, call.error = 0, CallTimeout("its turn did not come")
            dispatcher.finish(call)
        else:
            echo(dispatcher, call)

    gateway.pool.add_function("busy", waits_once)
    with gateway.client() as client:
        lines, end = results(client.post("/v1/functions/busy/map", content="1\n2\n3\n", headers=LINES))
    assert end == 3
    assert [lines[i]["value"] for i in range(3)] == [1, 2, 3]


def test_results_come_before_all_items_have_been_sent(gateway: GatewayThread) -> None:
    first_seen = threading.Event()

    def items() -> Iterator[bytes]:
        yield b"1\n"
        assert first_seen.wait(20)
        yield b"2\n"

    head = (
        f"POST /v1/functions/square/map HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
        f"content-type: {MEDIA_NDJSON}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as raw:
        raw.sendall(head.encode() + b"2\r\n1\n\r\n")
        received = b""
        while b'{"index":0,"value":1}' not in received:
            received += raw.recv(4096)
        raw.sendall(b"2\r\n2\n\r\n0\r\n\r\n")
        while b'{"end":2}' not in received:
            received += raw.recv(4096)


def test_a_client_that_sends_all_before_it_reads_is_served(gateway: GatewayThread) -> None:
    item = b'"' + b"x" * 20_000 + b'"\n'
    count = 2000
    head = (
        f"POST /v1/functions/square/map HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
        f"content-type: {MEDIA_NDJSON}\r\ncontent-length: {len(item) * count}\r\nconnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as raw:
        raw.sendall(head.encode())
        for _ in range(count):
            raw.sendall(item)
        received = bytearray()
        while chunk := raw.recv(1 << 20):
            received += chunk
    assert received.count(b'"index":') == count
    assert b'{"end":2000}' in received


def test_leaving_a_map_cancels_what_runs_of_it(gateway: GatewayThread) -> None:
    head = (
        f"POST /v1/functions/never/map HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
        f"content-type: {MEDIA_NDJSON}\r\ncontent-length: 6\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port)) as leaving:
        leaving.sendall(head.encode() + b"1\n2\n3\n")
        eventually(lambda: len(gateway.pool.dispatcher.running) == 3)
    eventually(lambda: len(gateway.pool.dispatcher.cancelled) == 3)


def test_a_stream_that_breaks_off_has_no_end(gateway: GatewayThread) -> None:
    def body() -> Iterator[bytes]:
        yield framed([b"1"] * 3)
        eventually(lambda: len(gateway.pool.dispatcher.started) == 3)
        yield struct.pack("<I", 10) + b"cut"

    received = b""
    with gateway.client() as client, pytest.raises(httpx.RemoteProtocolError):  # noqa: SIM117
        with client.stream("POST", "/v1/functions/square/map", content=body(), headers=FRAMES) as response:
            for chunk in response.iter_raw():
                received += chunk
    found = frames(received)
    assert ItemStatus.END not in {status for _, status, _, _ in found}
    assert json.loads(found[-1][3])["type"] == "/problems/invalid-request"


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "image/png"}, b"1", 415),
        ({"content-type": MEDIA_FRAMES}, struct.pack("<I", 200_001), 413),
        ({"content-type": MEDIA_FRAMES}, b"\1", 422),
        (LINES | {"mn-item-codec": "xml"}, b"1", 422),
        (LINES | {"mn-item-codec": "pickle"}, b"1", 422),
        (LINES | {"mn-item-codec": "raw"}, b"1", 422),
        (LINES | {"mn-timeout": "-1"}, b"1", 422),
        (LINES | {"authorization": "Bearer wrong"}, b"1", 401),
    ],
)
def test_a_wrong_map_is_a_problem(gateway: GatewayThread, headers: dict[str, str], content: bytes, status: int) -> None:
    with gateway.client() as client:
        response = client.post("/v1/functions/square/map", content=content, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert gateway.pool.dispatcher.started == []


def test_a_generator_cannot_be_mapped(gateway: GatewayThread) -> None:
    gateway.pool.add_generator("count", lambda call: iter(range(3)))
    with gateway.client() as client:
        response = client.post("/v1/functions/count/map", content="1", headers=LINES)
    assert response.status_code == 422
    assert "invoke" in response.json()["detail"]


def test_other_calls_are_answered_during_a_large_map(gateway: GatewayThread) -> None:
    body = "1\n" * 30_000
    done = threading.Event()

    def large() -> None:
        with gateway.client() as client:
            assert results(client.post("/v1/functions/square/map", content=body, headers=LINES))[1] == 30_000
        done.set()

    thread = threading.Thread(target=large)
    thread.start()
    answered = 0
    with gateway.client() as client:
        while not done.is_set():
            assert client.post("/v1/functions/square/invoke", json=1).json() == 1
            answered += 1
    thread.join()
    assert answered > 3
