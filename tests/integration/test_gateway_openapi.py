"""The published description against the running API: generated requests, and every answer must be as described."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mn.formats.bundle import pack
from tests.support.fake_pool import GatewayThread

MANIFEST = json.dumps({"name": "square", "entry": "m:square"}).encode()
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 504]  # a deadline of a millisecond may pass
[[operations]]
include-path = "/v1/functions/{name}/map"
checks.negative_data_rejection.enabled = false  # it wants headers refused that nobody described
"""
SERIALIZERS = """
import json

import schemathesis

@schemathesis.serializer("application/x-ndjson", "application/vnd.mn.frames")
def raw(context, value):
    return value if isinstance(value, (bytes, str)) else json.dumps(value, default=str).encode()
"""
EXCLUDED = "positive_data_acceptance"
"""No schema says which bytes are an archive, nor which functions a bundle has."""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayThread]:
    with GatewayThread(tmp_path / "home") as running:
        running.pool.follow_ends = True
        running.pool.add_function("square")
        running.pool.add_function("0", raw=True)
        with running.client() as client:
            client.post("/v1/bundles", content=pack({"payloads/m.py": b"square = abs"}, MANIFEST)).raise_for_status()
        yield running


def test_schemathesis_finds_nothing(gateway: GatewayThread, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "serializers.py").write_text(SERIALIZERS)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {gateway.admin}", "--exclude-checks", EXCLUDED),
        *("--max-examples", "10", "--phases", "examples,coverage,fuzzing", "--generation-deterministic"),
        *("--request-timeout", "20", "--no-color"),
    ]
    env = os.environ | {"SCHEMATHESIS_HOOKS": "serializers", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_problem_status_of_a_call_is_described(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    described = set(paths["/v1/functions/{name}/invoke"]["post"]["responses"])
    wanted = {200, 400, 401, 403, 404, 413, 415, 422, 429, 499, 500, 502, 503, 504}
    assert described >= {str(status) for status in wanted}
