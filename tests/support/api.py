"""A runtime driven over plain HTTP, and programs of a user's run against it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from mn.formats.settings import read_config
from tests.support.runtime import Runtime, until

SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")


class Api:
    """A runtime's HTTP API with the key of its `config.toml`. What it deployed is deleted on leaving the context."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.url = str(runtime.endpoints["api"])
        self.key = str(read_config(runtime.home)["client"]["key"])
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False, timeout=60
        )
        self.deployed: set[str] = set()

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(httpx.TransportError):
            for name in self.deployed:
                self.http.delete(f"/v1/functions/{name}")
        self.http.close()

    def deploy(self, source: str, *names: str, **settings: Any) -> list[dict[str, Any]]:
        """Deploy functions of one module's source, all with the same settings of the manifest."""
        answer = self.post(source, *names, **settings)
        assert answer.status_code in (200, 201), answer.text
        self.deployed.update(names)
        deployed: list[dict[str, Any]] = answer.json()["functions"]
        return deployed

    def post(self, source: str, *names: str, **settings: Any) -> httpx.Response:
        """The answer to such a deployment."""
        functions = [{"name": name, "entry": f"code:{name}", **settings} for name in names]
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for path, data in (
                ("manifest.json", json.dumps({"manifest_version": "1", "functions": functions})),
                ("payloads/code.py", source),
            ):
                info = tarfile.TarInfo(path)
                info.size = len(data.encode())
                tar.addfile(info, io.BytesIO(data.encode()))
        return self.http.post("/v1/bundles?deploy=true&replace=true", content=archive.getvalue())

    def invoke(self, name: str, value: Any = None, timeout_s: float | None = None) -> httpx.Response:
        """One call with a JSON value; None sends an empty body."""
        headers = {} if timeout_s is None else {"MN-Timeout": str(timeout_s)}
        content = b"" if value is None else json.dumps(value).encode()
        return self.http.post(f"/v1/functions/{name}/invoke", content=content, headers=headers)

    def result(self, name: str, value: Any = None) -> Any:
        answer = self.invoke(name, value)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def lines(self, function: str = "", invocation: str = "") -> list[str]:
        """What a function, or one call, has printed so far."""
        path = f"/v1/functions/{function}/logs" if function else f"/v1/invocations/{invocation}/logs"
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return [json.loads(line)["m"].rstrip("\n") for line in answer.text.splitlines()]

    def printed(self, text: str, function: str) -> None:
        """Wait until a function has printed a line that contains a text."""
        until(lambda: any(text in line for line in self.lines(function)), f"{text!r} in the log of {function}")

    def sandboxes(self, function: str) -> list[dict[str, Any]]:
        """A function's sandboxes that are ready for calls."""
        node = self.http.get("/v1/nodes").json()["nodes"][0]
        return [
            it for it in node["sandboxes"] if it["version"].partition("#")[0] == function and it["state"] == "ready"
        ]

    def spares(self) -> int:
        return int(self.http.get("/v1/nodes").json()["nodes"][0]["spares"])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            sample = SAMPLE.match(line)
            if sample and sample["name"] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"] or ""))
                total += float(sample["value"]) if labels.items() <= found.items() else 0
        return total


def python(
    runtime: Runtime, *arguments: str, cwd: Path, code: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a user's program against a runtime: a script's path, or `-c` code."""
    argv = [sys.executable, *arguments] if code is None else [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        argv, env=runtime.environ, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options
    )
