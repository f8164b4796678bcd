"""Calls over HTTP: codecs, keys, limits, every way to fail, streams, clients that leave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from mn.formats.codecs import MEDIA_PICKLE, PICKLE_HEADER, RESPONSE_ITEM
from mn.formats.errors import SandboxLost
from mn_gateway.calls import InvocationIds
from tests.support.fake_pool import (
    FakeCall,
    FakeDispatcher,
    GatewayThread,
    UserError,
    eventually,
    failing,
    later_ms,
    never,
    raising,
)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path, payload_bytes_max=200_000) as running:
        running.pool.add_function("square")
        running.pool.add_function("blob", raw=True)
        running.pool.add_function("bad", raising)
        running.pool.add_function("never", never)
        yield running


def invoke(client: httpx.Client, name: str, **options: Any) -> httpx.Response:
    return client.post(f"/v1/functions/{name}/invoke", **options)


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    body: dict[str, Any] = response.json()
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def test_a_call_answers_with_the_result_its_id_and_its_timing(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        response = invoke(client, "square", json={"x": 12})
    assert response.json() == {"x": 12}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["mn-invocation-id"].startswith("inv_")
    names = [part.split(";")[0].strip() for part in response.headers["server-timing"].split(",")]
    assert names == ["queue", "start", "run", "total"]
    assert "server" not in response.headers


def test_invocation_ids_differ(gateway: GatewayThread) -> None:
    ids = InvocationIds()
    assert len({ids() for _ in range(2000)}) == 2000


def test_what_curl_says_of_json_is_read_as_json(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        response = invoke(
            client, "square", content=b'{"x": 1}', headers={"content-type": "application/x-www-form-urlencoded"}
        )
    assert response.json() == {"x": 1}


def test_a_pickle_passes_untouched(gateway: GatewayThread) -> None:
    payload = PICKLE_HEADER + b"not opened here \x00\xff"
    with gateway.client() as client:
        response = invoke(client, "square", content=payload, headers={"content-type": MEDIA_PICKLE})
    assert response.content == payload
    assert response.headers["content-type"] == MEDIA_PICKLE


@pytest.mark.parametrize("media", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_a_function_of_bytes_takes_any_body(gateway: GatewayThread, media: str) -> None:
    with gateway.client() as client:
        response = invoke(client, "blob", content=b"\x89PNG", headers={"content-type": media})
    assert (response.content, response.headers["content-type"]) == (b"\x89PNG", "application/octet-stream")


def test_other_media_need_a_function_of_bytes(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        response = invoke(client, "square", content=b"\x89PNG", headers={"content-type": "image/png"})
    assert "application/json" in problem(response, 415, "unsupported-media-type")["supported"]


def test_a_large_body_arrives_whole(gateway: GatewayThread) -> None:
    body = bytes(range(256)) * 700
    with gateway.client() as client:
        assert invoke(client, "blob", content=body).content == body
        assert invoke(client, "blob", content=iter([body[:100], body[100:]])).content == body


def test_too_large_a_body_is_refused_with_the_limit(gateway: GatewayThread) -> None:
    body = b"x" * 200_001
    with gateway.client() as client:
        assert problem(invoke(client, "blob", content=body), 413, "too-large")["limit_bytes"] == 200_000
        assert problem(invoke(client, "blob", content=iter([body])), 413, "too-large")["limit_bytes"] == 200_000
        assert invoke(client, "blob", content=body[:-1]).status_code == 200


def test_without_a_good_key_there_is_no_call(gateway: GatewayThread) -> None:
    unknown = "mnk_" + "0" * 11 + "_" + "0" * 22 + "_000000"
    for key in ("", "wrong", unknown, gateway.admin[:-1]):
        with gateway.client(key) as client:
            response = invoke(client, "square", json=1)
            problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")
    assert gateway.pool.dispatcher.started == []


def test_a_key_ends_when_it_expires_or_is_revoked(gateway: GatewayThread) -> None:
    gone = gateway.pool.add_key("invoke", expires_ms=later_ms(-1))
    good = gateway.pool.add_key("invoke", expires_ms=later_ms(3600))
    with gateway.client(gone.secret) as client:
        assert "expired" in problem(invoke(client, "square", json=1), 401, "unauthenticated")["detail"]
    with gateway.client(good.secret) as client:
        assert invoke(client, "square", json=1).status_code == 200
        del gateway.pool.directory.keys[good.sha256]
        problem(invoke(client, "square", json=1), 401, "unauthenticated")


def test_a_missing_scope_is_named(gateway: GatewayThread) -> None:
    key = gateway.pool.add_key("read", "deploy")
    with gateway.client(key.secret) as client:
        body = problem(invoke(client, "square", json=1), 403, "forbidden")
    assert body["scope"] == "invoke"
    assert "invoke" in body["detail"]


def test_an_unknown_function_is_answered_with_near_names_of_the_own_namespace(gateway: GatewayThread) -> None:
    gateway.pool.add_function("squares", namespace="other")
    with gateway.client() as client:
        body = problem(invoke(client, "squar", json=1), 404, "not-found")
        assert body["near"] == ["square"]
        assert body["instance"].startswith("inv_")
        problem(invoke(client, "squares", json=1), 404, "not-found")


@pytest.mark.parametrize("value", ["0", "-1", "abc", "nan", "inf", ""])
def test_a_wrong_timeout_is_refused(gateway: GatewayThread, value: str) -> None:
    with gateway.client() as client:
        response = invoke(client, "square", json=1, headers={"mn-timeout": value})
    assert problem(response, 422, "invalid-request")["path"] == "MN-Timeout"


def test_the_timeout_goes_with_the_call(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        body = problem(invoke(client, "never", json=1, headers={"mn-timeout": "0.05"}), 504, "timeout")
        assert invoke(client, "square", json=1).status_code == 200
    assert body["instance"].startswith("inv_")
    assert [call.timeout_s for call in gateway.pool.dispatcher.started] == [0.05, None]


def test_a_users_exception_is_a_problem_of_its_own_kind(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        response = invoke(client, "bad", json=1)
        body = problem(response, 500, "function-error")
        metrics = client.get("/metrics").text
    assert body["exception"]["type"] == "ValueError"
    assert body["detail"] == "ValueError: not a PDF"
    assert (body["function"], body["version"], body["node"]) == ("bad", "bad#1", "mirror_neuron@fake")
    assert body["instance"] == response.headers["mn-invocation-id"]
    assert body["output"].endswith("last words\n")
    assert len(body["output"]) == 4096
    assert 'mn_function_errors_total{function="bad"} 1.0' in metrics
    assert "mn_platform_errors_total{" not in metrics


def test_a_lost_sandbox_is_a_problem_of_the_platform(gateway: GatewayThread) -> None:
    died = failing(lambda: SandboxLost("it was killed by SIGKILL", signal="SIGKILL", may_have_run=True))
    gateway.pool.add_function("dies", died)
    with gateway.client() as client:
        body = problem(invoke(client, "dies", json=1), 502, "sandbox-lost")
        metrics = client.get("/metrics").text
    assert (body["signal"], body["may_have_run"]) == ("SIGKILL", True)
    assert 'mn_platform_errors_total{function="dies",problem="sandbox-lost"} 1.0' in metrics
    assert 'mn_function_errors_total{function="dies"} 0.0' in metrics


def test_a_full_queue_says_when_to_come_again(gateway: GatewayThread) -> None:
    gateway.pool.dispatcher.capacity = 0
    with gateway.client() as client:
        response = invoke(client, "square", json=1)
    problem(response, 429, "queue-full")
    assert response.headers["retry-after"] == "2"


def test_keys_are_honoured_for_a_while_without_a_leader(gateway: GatewayThread) -> None:
    directory = gateway.pool.directory
    with gateway.client() as client:
        directory.silent_s = gateway.settings.auth_stale_s - 1
        assert invoke(client, "square", json=1).status_code == 200
        directory.silent_s = gateway.settings.auth_stale_s + 1
        response = invoke(client, "square", json=1)
        problem(response, 503, "no-leader")
        assert int(response.headers["retry-after"]) > 0


def test_before_the_first_directory_there_is_no_leader(gateway: GatewayThread) -> None:
    gateway.pool.directory.synced = False
    with gateway.client() as client:
        response = invoke(client, "square", json=1)
        problem(response, 503, "no-leader")
        assert int(response.headers["retry-after"]) > 0
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_a_client_that_leaves_cancels_its_call(gateway: GatewayThread) -> None:
    head = f"POST /v1/functions/never/invoke HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", gateway.port)) as leaving:
            leaving.sendall(f"{head}content-length: 1\r\n\r\n1".encode())
            eventually(lambda: gateway.pool.dispatcher.running)
        eventually(lambda: not gateway.pool.dispatcher.running)
    assert len(gateway.pool.dispatcher.cancelled) == 3


def test_a_client_that_leaves_while_sending_starts_nothing(gateway: GatewayThread) -> None:
    head = f"POST /v1/functions/blob/invoke HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.admin}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as leaving:
        leaving.sendall(f"{head}content-length: 100\r\n\r\n12345".encode())
    with gateway.client() as client:
        assert invoke(client, "square", json=1).status_code == 200
    assert [call.route.name for call in gateway.pool.dispatcher.started] == ["square"]


def test_a_slow_call_is_answered_although_it_is_watched(gateway: GatewayThread) -> None:
    def slow(dispatcher: FakeDispatcher, call: FakeCall) -> None:
        call.result = b'"slow"'
        asyncio.get_running_loop().call_later(0.3, dispatcher.finish, call)

    gateway.pool.add_function("slow", slow)
    with gateway.client() as client:
        assert [invoke(client, "slow", json=1).json() for _ in range(2)] == ["slow", "slow"]
    assert gateway.pool.dispatcher.cancelled == []


def test_a_generators_values_come_as_lines(gateway: GatewayThread) -> None:
    gateway.pool.add_generator("count", lambda call: iter(range(100)))
    with gateway.client() as client:
        response = invoke(client, "count", json=1)
    lines = [msgspec.json.decode(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [line["value"] for line in lines[:-1]] == list(range(100))
    assert lines[-1] == {"end": 100}


def test_a_generators_values_come_as_frames_to_a_pickle_caller(gateway: GatewayThread) -> None:
    gateway.pool.add_generator("count", lambda call: iter([1, 2]))
    with gateway.client() as client:
        response = invoke(client, "count", content=PICKLE_HEADER, headers={"content-type": MEDIA_PICKLE})
    heads, data = [], response.content
    while data:
        index, status, _, _, length = RESPONSE_ITEM.unpack(data[:12])
        heads.append((index, status, data[12 : 12 + length]))
        data = data[12 + length :]
    assert heads == [(0, 0, b"1"), (1, 0, b"2"), (2, 255, b"")]


def test_a_generator_that_raises_says_so_where_it_stops(gateway: GatewayThread) -> None:
    def values(after: int) -> Iterator[int]:
        yield from range(after)
        raise UserError("no more")

    gateway.pool.add_generator("breaks", lambda call: values(2))
    gateway.pool.add_generator("refuses", lambda call: values(0))
    with gateway.client() as client:
        lines = [msgspec.json.decode(line) for line in invoke(client, "breaks", json=1).text.splitlines()]
        problem(invoke(client, "refuses", json=1), 500, "function-error")
    assert [line.get("value") for line in lines[:2]] == [0, 1]
    assert lines[2]["error"]["exception"]["message"] == "no more"


def test_leaving_a_generator_cancels_it(gateway: GatewayThread) -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    gateway.pool.add_generator("forever", lambda call: forever())
    with gateway.client() as client, client.stream("POST", "/v1/functions/forever/invoke", json=1) as response:
        next(response.iter_lines())
    eventually(lambda: gateway.pool.dispatcher.cancelled)


def test_only_known_hosts_are_answered(tmp_path: Path) -> None:
    with GatewayThread(tmp_path, trusted_hosts="mn.example") as gateway:
        gateway.pool.add_function("square")
        with gateway.client() as client:
            for path in ("/healthz", "/v1/functions", "/docs"):
                problem(client.get(path, headers={"host": "evil.example"}), 403, "forbidden")
            problem(invoke(client, "square", json=1, headers={"host": "evil.example:54001"}), 403, "forbidden")
            for host in ("mn.example", "localhost:1", "[::1]:54001", "127.0.0.1"):
                assert invoke(client, "square", json=1, headers={"host": host}).status_code == 200


def test_pages_may_call_only_when_configured(tmp_path: Path) -> None:
    origin = {"origin": "https://page.example"}
    with GatewayThread(tmp_path / "a") as gateway, gateway.client() as client:
        gateway.pool.add_function("square")
        problem(invoke(client, "square", json=1, headers=origin), 403, "forbidden")
        assert "access-control-allow-origin" not in client.get("/healthz").headers
    with GatewayThread(tmp_path / "b", cors_origins="https://page.example") as gateway, gateway.client() as client:
        gateway.pool.add_function("square")
        response = invoke(client, "square", json=1, headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        problem(invoke(client, "square", json=1, headers={"origin": "https://other.example"}), 403, "forbidden")
        preflight = client.options(
            "/v1/functions/square/invoke", headers=origin | {"access-control-request-method": "POST"}
        )
        assert (preflight.status_code, "POST" in preflight.headers["access-control-allow-methods"]) == (204, True)


def test_what_is_not_http_gets_a_problem_too(gateway: GatewayThread) -> None:
    for text in (b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
            raw.sendall(text)
            answer = raw.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"application/problem+json" in answer
