"""HTTP alone: with tar and curl and nothing of ours on the client's side, a bundle becomes a function that is called, rolled back and read about."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.api import Api
from tests.support.runtime import until

MANIFEST = {
    "manifest_version": "1",
    "name": "shout",
    "type": "function",
    "entry": "voice:shout",
    "resources": {"cpu": 1, "memory_mb": 256},
    "scaling": {"min_replicas": 0, "max_replicas": 20, "concurrency": 1, "idle_s": 300},
    "timeout_s": 30,
}
FIRST = "def shout(text):\n    print('shouting', text)\n    return text.upper() + '!'\n"


class Curl:
    """`curl` and `tar` in a folder, as a user's shell would run them."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api, self.folder = api, folder

    def __call__(self, path: str, *options: str) -> tuple[int, Any]:
        argv = ["curl", "-s", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {self.api.key}", *options]
        done = subprocess.run([*argv, self.api.url + path], capture_output=True, text=True, check=True, cwd=self.folder)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body) if body.startswith(("{", '"', "[")) else body

    def post_bundle(self, source: str, **manifest: Any) -> tuple[int, Any]:
        """Write manifest and source, pack them with tar, post the archive."""
        (self.folder / "payloads").mkdir(exist_ok=True)
        (self.folder / "payloads" / "voice.py").write_text(source)
        (self.folder / "manifest.json").write_text(json.dumps({**MANIFEST, **manifest}))
        subprocess.run(["tar", "czf", "shout.tgz", "manifest.json", "payloads"], cwd=self.folder, check=True)
        self.api.deployed.add("shout")
        return self("/v1/bundles?deploy=true", "-H", "Content-Type: application/gzip", "--data-binary", "@shout.tgz")


@pytest.fixture
def curl(api: Api, tmp_path: Path) -> Curl:
    if shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    return Curl(api, tmp_path)


def test_a_bundle_of_tar_is_deployed_called_rolled_back_and_its_logs_are_read(curl: Curl) -> None:
    status, posted = curl.post_bundle(FIRST)
    assert status == 201
    assert posted["digest"].startswith("sha256:")
    [function] = posted["functions"]
    assert function["name"] == "shout"
    first = function["version"]
    assert function["url"] == f"{curl.api.url}/v1/functions/shout/invoke"
    call = "/v1/functions/shout/invoke"
    assert curl(call, "-d", '{"text": "hello"}') == (200, "HELLO!")

    assert curl.post_bundle(FIRST.replace("'!'", "'?!'"))[1]["functions"][0]["version"] == first + 1
    assert curl(call, "-d", '"again"') == (200, "AGAIN?!")

    assert curl("/v1/functions/shout/rollback", "-X", "POST")[1]["version"] == first
    assert curl(call, "-d", '{"text": "hello"}') == (200, "HELLO!")
    assert [it["number"] for it in curl("/v1/functions/shout/versions")[1]["versions"]] == [first, first + 1]

    curl.api.printed("shouting again", "shout")
    invocation = curl.api.http.post(call, content=b'"once"').headers["mn-invocation-id"]
    until(lambda: "shouting once" in str(curl(f"/v1/invocations/{invocation}/logs")[1]), "the call's own log")


def test_the_same_bundle_posted_again_changes_nothing(curl: Curl) -> None:
    first = curl.post_bundle(FIRST)[1]
    status, again = curl.post_bundle(FIRST)
    assert status == 200
    assert again["digest"] == first["digest"]
    assert again["functions"][0]["changed"] is False
    assert again["functions"][0]["version"] == first["functions"][0]["version"]


def test_a_manifests_wrong_field_is_named_and_nothing_is_deployed(curl: Curl) -> None:
    status, problem = curl.post_bundle(FIRST, scaling={"min_replicas": 0, "max_replica": 2})
    assert status == 422
    assert problem["path"].startswith("scaling")
    assert "max_replica" in problem["detail"]
    status, problem = curl("/v1/functions/shout")
    assert status == 404


def test_an_answer_carries_its_id_and_its_timing(curl: Curl) -> None:
    curl.post_bundle(FIRST)
    answer = curl.api.invoke("shout", {"text": "x"})
    assert answer.headers["mn-invocation-id"].startswith("inv_")
    assert [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")] == [
        "queue",
        "start",
        "run",
        "total",
    ]


def test_wrong_arguments_and_a_broken_body_are_told_apart_from_the_functions_own_errors(curl: Curl) -> None:
    curl.post_bundle(FIRST)
    call = "/v1/functions/shout/invoke"
    status, problem = curl(call, "-d", '{"text":')
    assert (status, problem["type"]) == (400, "/problems/invalid-json")
    status, problem = curl(call, "-d", '{"volume": 11}')
    assert (status, problem["type"]) == (422, "/problems/invalid-request")
    assert "volume" in problem["detail"]
    status, problem = curl(call, "-d", "7")
    assert (status, problem["exception"]["type"]) == (500, "AttributeError")


def test_bytes_go_in_and_out_as_they_are(api: Api) -> None:
    api.deploy("def flip(data: bytes) -> bytes:\n    return data[::-1]\n", "flip", raw=True)
    answer = api.http.post(
        "/v1/functions/flip/invoke", content=b"\x00\xffab", headers={"Content-Type": "application/octet-stream"}
    )
    assert answer.content == b"ba\xff\x00"
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_generators_values_come_as_lines(api: Api) -> None:
    api.deploy("def count(n):\n    yield from range(n)\n", "count", generator=True)
    answer = api.invoke("count", {"n": 3})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["value"] for line in lines[:-1]] == [0, 1, 2]
    assert lines[-1] == {"end": 3}


def test_a_map_of_lines_answers_every_item_with_its_own_id_and_error(api: Api) -> None:
    api.deploy("def half(x):\n    return 10 // x\n", "half")
    answer = api.http.post(
        "/v1/functions/half/map", content=b"1\n0\n5\n", headers={"Content-Type": "application/x-ndjson"}
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1] == {"end": 3}
    first, second, third = sorted(lines[:-1], key=lambda line: int(line["index"]))
    assert (first["value"], third["value"]) == (10, 2)
    assert second["error"]["exception"]["type"] == "ZeroDivisionError"
    assert second["error"]["instance"] == f"{answer.headers['mn-invocation-id']}.1"
