"""Management over HTTP: bundles, functions, keys, logs, nodes, and how requests that are wrong are told so."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mn.formats.bundle import pack
from mn.formats.errors import NoLeader
from mn.formats.manifest import FunctionSpec
from mn_nodepool.wire.control import FailureRecord
from tests.support.fake_pool import GatewayThread, eventually

CODE = b"def make(x): return x\n"


def manifest(**changes: Any) -> bytes:
    return json.dumps({"manifest_version": "1", "name": "thumbnail", "entry": "thumb:make"} | changes).encode()


def bundle(**changes: Any) -> bytes:
    return pack({"payloads/thumb.py": CODE}, manifest(**changes))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path, bundle_bytes_max=1 << 20, bundle_files_max=50) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def test_a_bundle_is_stored_deployed_called_and_got_back(gateway: GatewayThread, client: httpx.Client) -> None:
    response = client.post("/v1/bundles?deploy=true", content=bundle(), headers={"content-type": "application/gzip"})
    assert response.status_code == 201
    body = response.json()
    assert body["functions"] == [
        {
            "name": "thumbnail",
            "version": 1,
            "url": f"{gateway.url}/v1/functions/thumbnail/invoke",
            "changed": True,
        }
    ]
    folder = gateway.settings.bundles_dir / body["digest"].replace(":", "-")
    assert (folder / "payloads" / "thumb.py").read_bytes() == CODE
    assert client.post(body["functions"][0]["url"], json={"url": 1}).json() == {"url": 1}
    content = client.get(f"/v1/bundles/{body['digest']}/content")
    with tarfile.open(fileobj=io.BytesIO(content.content)) as tar:
        assert sorted(tar.getnames()) == ["manifest.json", "payloads/thumb.py"]
    again = client.post("/v1/bundles", content=content.content)
    assert (again.status_code, again.json()) == (200, {"digest": body["digest"]})
    assert [found["digest"] for found in client.get("/v1/bundles").json()["bundles"]] == [body["digest"]]
    assert client.get(f"/v1/bundles/{body['digest']}").json()["files"] == 2
    assert sorted(path.name for path in gateway.settings.bundles_dir.iterdir()) == [folder.name]


@pytest.mark.parametrize(
    ("body", "status", "path"),
    [
        (b"no archive", 422, None),
        (bundle()[:60], 422, None),
        (bundle(scaling={"max_replicaz": 3}), 422, "scaling"),
        (bundle(timeout_s=-1), 422, "timeout_s"),
        (bundle(entry="elsewhere:make"), 422, "entry"),
        (pack({f"payloads/{i}.py": b"" for i in range(60)}, manifest()), 413, None),
        (os.urandom((1 << 20) + 1), 413, None),
    ],
)
def test_a_wrong_bundle_leaves_nothing(
    gateway: GatewayThread, client: httpx.Client, body: bytes, status: int, path: str | None
) -> None:
    response = client.post("/v1/bundles?deploy=1", content=body)
    assert response.status_code == status
    if path is not None:
        assert response.json()["path"] == path
    if status == 413 and len(body) > 1 << 20:
        assert response.json()["limit_bytes"] == 1 << 20
    assert not gateway.settings.bundles_dir.exists() or list(gateway.settings.bundles_dir.iterdir()) == []
    assert gateway.pool.asked == []


def test_an_upload_that_breaks_off_leaves_nothing(gateway: GatewayThread, client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        yield bundle()[:100]
        raise RuntimeError("the client dies")

    with pytest.raises(RuntimeError), gateway.client() as dying:
        dying.post("/v1/bundles", content=pieces())
    eventually(lambda: gateway.settings.bundles_dir.exists() and not list(gateway.settings.bundles_dir.iterdir()))
    assert gateway.pool.asked == []


def test_the_same_bundle_posted_at_once_is_stored_once(gateway: GatewayThread) -> None:
    statuses: list[int] = []

    def post() -> None:
        with gateway.client() as own:
            statuses.append(own.post("/v1/bundles", content=bundle()).status_code)

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 5 + [201]
    assert len(list(gateway.settings.bundles_dir.iterdir())) == 1


def test_a_name_is_put_rolled_back_and_deleted(client: httpx.Client) -> None:
    digest = client.post("/v1/bundles", content=bundle()).json()["digest"]
    for version in (1, 2):
        put = client.put("/v1/functions/small", json={"bundle": digest, "timeout_s": 5, "scaling": {"max_replicas": 2}})
        assert (put.status_code, put.json()["version"]) == (200, version)
    shown = client.get("/v1/functions/small").json()
    assert (shown["spec"]["timeout_s"], shown["spec"]["scaling"]["max_replicas"]) == (5, 2)
    assert [f["name"] for f in client.get("/v1/functions").json()["functions"]] == ["small"]
    assert client.get("/v1/functions/small/versions").json()["live"] == 2
    assert client.post("/v1/functions/small/rollback").json()["version"] == 1
    assert client.post("/v1/functions/small/rollback", json={"version": 2}).json()["version"] == 2
    assert client.delete(f"/v1/bundles/{digest}").status_code == 409
    assert client.delete("/v1/functions/small").status_code == 204
    assert client.get("/v1/functions/smal").status_code == 404
    assert client.delete(f"/v1/bundles/{digest}").status_code == 204


def test_one_of_several_functions_must_be_named(client: httpx.Client) -> None:
    several = json.dumps(
        {"functions": [{"name": "a", "entry": "thumb:make"}, {"name": "b", "entry": "thumb:make"}]}
    ).encode()
    digest = client.post("/v1/bundles", content=pack({"payloads/thumb.py": CODE}, several)).json()["digest"]
    unclear = client.put("/v1/functions/c", json={"bundle": digest})
    assert (unclear.status_code, unclear.json()["path"]) == (422, "function")
    assert client.put("/v1/functions/c", json={"bundle": digest, "function": "x"}).status_code == 422
    assert client.put("/v1/functions/c", json={"bundle": digest, "function": "b"}).status_code == 200
    assert client.put("/v1/functions/a", json={"bundle": digest}).status_code == 200


def test_ephemeral_functions_live_in_a_scope(client: httpx.Client) -> None:
    deployed = client.post("/v1/bundles?deploy=true&scope=abc123", content=bundle()).json()["functions"][0]
    assert deployed["name"] == "thumbnail~abc123"
    assert client.post(deployed["url"], json=1).json() == 1
    assert client.post("/v1/scopes/abc123/contact").status_code == 204
    assert client.delete("/v1/scopes/abc123").status_code == 204
    assert client.post(deployed["url"], json=1).status_code == 404
    assert client.post("/v1/scopes/a-b/contact").json()["path"] == "scope"


def test_a_key_is_shown_once_works_and_is_revoked(gateway: GatewayThread, client: httpx.Client) -> None:
    gateway.pool.add_function("square")
    made = client.post("/v1/keys", json={"name": "ci", "scopes": ["invoke"], "expires_s": 3600})
    assert made.status_code == 201
    key = made.json()
    with gateway.client(key["key"]) as own:
        assert own.post("/v1/functions/square/invoke", json=1).status_code == 200
        assert own.get("/v1/keys").json()["scope"] == "admin"
        assert client.delete(f"/v1/keys/{key['id']}").status_code == 204
        assert own.post("/v1/functions/square/invoke", json=1).status_code == 401
    listed = client.post("/v1/keys", json={"name": "other", "scopes": ["read"]}).json()
    shown = client.get("/v1/keys")
    assert "other" in [found["name"] for found in shown.json()["keys"]]
    assert listed["key"] not in shown.text
    assert "sha256" not in shown.text
    sent = [request for op, request in gateway.pool.asked if op == "keys.create"]
    assert all(key["key"] not in repr(request) for request in sent)


@pytest.mark.parametrize(
    ("body", "status", "path"),
    [
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[]", 422, ""),
        (b'{"name": "x"}', 422, ""),
        (b'{"name": "x", "scopes": ["all"]}', 422, "scopes[0]"),
        (b'{"name": "x", "scopes": ["read"], "expires_s": -1}', 422, "expires_s"),
        (b'{"name": "x", "scopes": ["read"], "colour": "red"}', 422, ""),
        (b'{"name": "' + b"x" * (1 << 20) + b'"}', 413, None),
    ],
)
def test_a_wrong_body_is_told_where(client: httpx.Client, body: bytes, status: int, path: str | None) -> None:
    response = client.post("/v1/keys", content=body)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    if path is not None:
        assert response.json()["path"] == path


def test_query_parameters_are_checked(client: httpx.Client) -> None:
    for query in ("follow=perhaps", "limit=0", "limit=x", "limt=5", "limit=1&limit=2"):
        assert client.get(f"/v1/invocations/inv_1/logs?{query}").status_code == 422


def test_logs_are_lines_or_events(gateway: GatewayThread, client: httpx.Client) -> None:
    gateway.pool.add_function("square")
    gateway.pool.log_lines = [{"t": i, "f": "square", "i": "inv_1", "s": 1, "m": f"line {i}"} for i in range(5)]
    lines = client.get("/v1/functions/square/logs?limit=2").text.splitlines()
    assert [json.loads(line)["m"] for line in lines] == ["line 3", "line 4"]
    assert len(client.get("/v1/invocations/inv_1/logs").text.splitlines()) == 5
    assert client.get("/v1/functions/sqare/logs").json()["near"] == ["square"]
    with client.stream("GET", "/v1/functions/square/logs?follow=1&limit=1") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = (json.loads(line[6:])["m"] for line in response.iter_lines() if line.startswith("data: "))
        assert next(events) == "line 4"
        gateway.pool.more_lines.put_nowait({"t": 9, "f": "square", "i": "inv_2", "s": 1, "m": "new"})
        assert next(events) == "new"


def test_a_failed_call_is_given_with_its_input(gateway: GatewayThread, client: httpx.Client) -> None:
    spec = FunctionSpec(name="f", entry="m:f")
    record = FailureRecord("inv_1", "f", "f#1", "sha256:0", "n", 1, 0, b"\x00\xff", {"status": 500}, "out", spec)
    gateway.pool.failures["inv_1"] = record
    assert client.get("/v1/invocations/inv_1/failure").json()["payload"] == "AP8="
    assert client.get("/v1/invocations/inv_2/failure").status_code == 404


def test_nodes_and_pools_are_listed(client: httpx.Client) -> None:
    body = client.get("/v1/nodes").json()
    assert [node["role"] for node in body["nodes"]] == ["leader"]
    assert body["executor_pools"][0]["slots"] == 8


def test_without_a_leader_management_waits(gateway: GatewayThread, client: httpx.Client) -> None:
    async def ask(op: str, request: Any, timeout_s: float = 30) -> Any:
        raise NoLeader("an election is under way", retry_after_s=3)

    gateway.pool.ask = ask  # type: ignore[method-assign]
    response = client.get("/v1/nodes")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")


def test_scopes_are_separate(gateway: GatewayThread) -> None:
    for scope, path, status in (
        ("read", "/v1/functions", 200),
        ("deploy", "/v1/functions", 403),
        ("read", "/v1/keys", 403),
    ):
        with gateway.client(gateway.pool.add_key(scope).secret) as own:
            assert own.get(path).status_code == status


def test_wrong_paths_and_methods_are_problems(client: httpx.Client) -> None:
    assert client.get("/v2/functions").json()["type"] == "/problems/not-found"
    for method, path, allow in (
        ("PATCH", "/v1/keys", "GET, HEAD, POST"),
        ("GET", "/v1/functions/f/invoke", "POST"),
        ("DELETE", "/healthz", "GET, HEAD"),
    ):
        response = client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allow)
        assert response.headers["content-type"] == "application/problem+json"
    assert client.head("/healthz").status_code == 200


def test_the_documentation_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "/v1/functions/{name}/invoke" in page.text
    assert "<script" not in page.text
    assert "src=" not in page.text
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert document["components"]["schemas"]["KeyPost"]["additionalProperties"] is False


def test_metrics_need_a_key_when_exposed(tmp_path: Path) -> None:
    with GatewayThread(tmp_path / "x", api_host="0.0.0.0") as exposed:
        with exposed.client("") as client:
            assert client.get("/metrics").status_code == 401
            assert client.get("/healthz").status_code == 200
        with exposed.client() as client:
            assert "mn_gateway_connected 1.0" in client.get("/metrics").text
