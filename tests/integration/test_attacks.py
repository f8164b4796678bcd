"""Hostile callers, hostile manifests and hostile functions against a running node: each gets a typed answer, and nobody else notices."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mn.formats.codecs import MEDIA_FRAMES, MEDIA_PICKLE, PICKLE_HEADER, REQUEST_ITEM
from tests.support.api import Api
from tests.support.runtime import Runtime, until

DIGEST = "sha256:" + "0" * 64
AT_ONCE = 20
FLOOD_MIB_MAX = 200
"""What the node may grow by while a function floods it; unbounded floods took a GiB in seconds."""
PAYLOAD_MIB = 256
"""What one call's input may have, and so what inputs that come in parts may take up together."""
ROUTES = [
    ("POST", "/v1/bundles", "deploy"),
    ("GET", "/v1/bundles", "read"),
    ("GET", f"/v1/bundles/{DIGEST}", "read"),
    ("GET", f"/v1/bundles/{DIGEST}/content", "read"),
    ("DELETE", f"/v1/bundles/{DIGEST}", "deploy"),
    ("GET", "/v1/functions", "read"),
    ("GET", "/v1/functions/x", "read"),
    ("PUT", "/v1/functions/x", "deploy"),
    ("DELETE", "/v1/functions/x", "deploy"),
    ("GET", "/v1/functions/x/versions", "read"),
    ("POST", "/v1/functions/x/rollback", "deploy"),
    ("POST", "/v1/functions/x/invoke", "invoke"),
    ("POST", "/v1/functions/x/map", "invoke"),
    ("GET", "/v1/functions/x/logs", "read"),
    ("GET", "/v1/invocations/inv_1/logs", "read"),
    ("GET", "/v1/invocations/inv_1/failure", "read"),
    ("POST", "/v1/scopes/s/contact", "deploy"),
    ("DELETE", "/v1/scopes/s", "deploy"),
    ("GET", "/v1/keys", "admin"),
    ("POST", "/v1/keys", "admin"),
    ("DELETE", "/v1/keys/key_1", "admin"),
    ("GET", "/v1/nodes", "read"),
]
HOSTILE = """
import base64, os, struct, sys, threading, time

HEADER = struct.Struct("<IBBI")
RESULT, ITEM, LOG, NESTED, CHUNK = 19, 20, 21, 22, 3

def frame(kind, body, flags=0, call=None):
    return HEADER.pack(len(body), kind, flags, number() if call is None else call) + body

def write(data):
    while data:
        data = data[os.write(3, data):]

def number():
    at = sys._getframe()
    while at is not None:
        for value in at.f_locals.values():
            if type(value).__name__ == "Call":
                return value.number
        at = at.f_back

def result(payload, status=0, flags=0):
    return frame(RESULT, struct.pack("<BBI", status, 0, 1) + payload, flags)

def hostile(how):
    if how == "garbage":
        write(os.urandom(100_000))
    elif how == "closes everything":
        os.closerange(0, 64)
    elif how == "stops itself":
        os.kill(os.getpid(), 19)
    elif how == "an error that breaks who reads it":
        write(result(b'{"slug": "timeout", "detail": "x", "self": 1, "retry_after_s": "a"}', 2))
        time.sleep(60)
    elif how == "an error without a bottom":
        write(result(b'{"a": ' + b"[" * 60_000, 1, 1) + frame(CHUNK, b"[" * 60_000))
        time.sleep(60)
    elif how == "a result without an end":
        write(result(bytes(60_000), flags=1))
        while True:
            write(frame(CHUNK, bytes(60_000), 1))
    elif how == "items for nobody":
        while True:
            write(frame(ITEM, bytes(1000)))
    elif how == "calls without an end":
        head = struct.pack("<IBBdH", number(), 0, 0, 0.0, 1) + b"x"
        for n in range(4000):
            write(frame(NESTED, head + bytes(60_000), 1, 0x80000000 | n))
        while True:
            for n in range(4000):
                write(frame(CHUNK, bytes(60_000), 1, 0x80000000 | n))
    elif how == "a flood of calls":
        for n in range(100_000):
            write(frame(NESTED, struct.pack("<IBBdH", number(), 0, 0, 0.0, 9) + b"neighbour", 0, 0x80000000 | n))
    elif how == "a flood of log frames":
        while True:
            write(frame(LOG, b"\\x01" + b"\\n" * 30_000))
    elif how == "a flood on raw stdout":
        while True:
            os.write(1, b"\\n" * 65_536)
    elif how == "breaks its own runner":
        for name, module in list(sys.modules.items()):
            if name.startswith("mn_runner"):
                for member in [m for m in vars(module) if not m.startswith("__")]:
                    setattr(module, member, None)
    elif how == "an exception that cannot be shown":
        class Bad(Exception):
            def __str__(self): raise RuntimeError("no")
            def __reduce__(self): raise RuntimeError("no")
        raise Bad
    elif how == "an exception of 20 MB":
        raise ValueError("x" * 20_000_000)
    elif how == "leaves threads that print":
        def talk():
            while True:
                print("still here")
        for _ in range(4):
            threading.Thread(target=talk, daemon=True).start()
    return how

"""
NEIGHBOUR = "def neighbour(x=None):\n    return x\n"
HOWS = [line.split('"')[1] for line in HOSTILE.splitlines() if "if how ==" in line]


@pytest.fixture(scope="module")
def targets(runtime: Runtime) -> Iterator[Api]:
    with Api(runtime) as api:
        api.deploy(NEIGHBOUR, "neighbour", scaling={"max_replicas": 2})
        assert api.result("neighbour", {"x": 1}) == 1
        yield api


def node_mib(runtime: Runtime) -> int:
    return int(psutil.Process(runtime.children()["node"]["pid"]).memory_info().rss) >> 20


def pids(runtime: Runtime) -> dict[str, int]:
    return {name: child["pid"] for name, child in runtime.children().items()}


class Neighbour:
    """Calls a function of somebody else's again and again, and keeps every answer that is not its result."""

    def __init__(self, runtime: Runtime) -> None:
        self._api = Api(runtime)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.calls = 0
        self.wrong: list[str] = []

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            answer = self._api.invoke("neighbour", {"x": 5}, 30)
            self.calls += 1
            if (answer.status_code, answer.text) != (200, "5"):
                self.wrong.append(answer.text)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._api.http.close()


@pytest.mark.parametrize("how", HOWS)
def test_a_function_that_turns_on_its_node_harms_itself_alone(runtime: Runtime, targets: Api, how: str) -> None:
    before, mib = pids(runtime), node_mib(runtime)
    with Neighbour(runtime) as neighbour:
        # Versions of their own, since one whose sandboxes keep dying has to wait for the next.
        targets.deploy(f"{HOSTILE}# {how}, once\n", "hostile")
        answer = targets.invoke("hostile", {"how": how}, 1.5)
        targets.deploy(f"{HOSTILE}# {how}, in a map\n", "hostile")
        line = json.dumps({"how": how}) + "\n"
        mapped = targets.http.post("/v1/functions/hostile/map", content=line, headers={"MN-Timeout": "1.5"})
        until(lambda: neighbour.calls > 3, "some calls of the neighbour")
    assert neighbour.wrong == []
    assert pids(runtime) == before
    assert node_mib(runtime) - mib < FLOOD_MIB_MAX + (PAYLOAD_MIB if how == "calls without an end" else 0)
    assert answer.status_code == 200 or answer.headers["content-type"] == "application/problem+json"
    first, end = mapped.text.splitlines()
    assert json.loads(first)["index"] == 0
    assert json.loads(end) == {"end": 1}


def test_a_name_survives_whatever_is_done_to_it_at_once(api: Api) -> None:
    digests = []
    for text in ("one", "two", "three"):
        api.deploy(f"def contested():\n    return {text!r}\n", "contested")
        digests.append(api.http.get("/v1/functions/contested").json()["digest"])
    path = "/v1/functions/contested"

    def act(number: int) -> httpx.Response:
        if number % 4 == 0:
            return api.http.delete(path)
        if number % 4 == 1:
            return api.http.post(f"{path}/rollback", content=b"{}")
        if number % 4 == 2:
            return api.invoke("contested", timeout_s=20)
        return api.http.put(path, json={"bundle": digests[number % 3], "replace": True})

    with ThreadPoolExecutor(AT_ONCE) as many:
        answers = list(many.map(act, range(3 * AT_ONCE)))
    assert {answer.status_code for answer in answers} <= {200, 204, 404, 409}, [a.text for a in answers]
    assert api.http.put(path, json={"bundle": digests[1], "replace": True}).status_code == 200
    assert api.result("contested") == "two"
    versions = [it["number"] for it in api.http.get(f"{path}/versions").json()["versions"]]
    assert versions == sorted(set(versions))


def test_deployments_of_one_name_at_once_make_a_version_each(api: Api) -> None:
    def deploy(number: int) -> int:
        [function] = api.deploy(f"def crowded():\n    return {number}\n", "crowded")
        return int(function["version"])

    with ThreadPoolExecutor(8) as many:
        assert sorted(many.map(deploy, range(8))) == list(range(1, 9))
    assert api.result("crowded") in range(8)


def test_calls_of_a_function_that_is_deleted_all_end(api: Api) -> None:
    api.deploy(
        "import time\n\ndef doomed(s):\n    time.sleep(s)\n    return s\n", "doomed", scaling={"max_replicas": 1}
    )
    with ThreadPoolExecutor(8) as many:
        calls = [many.submit(api.invoke, "doomed", {"s": 0.5}, 20) for _ in range(8)]
        until(lambda: api.sandboxes("doomed"), "a sandbox that starts")
        assert api.http.delete("/v1/functions/doomed").status_code == 204
        assert {call.result().status_code for call in calls} <= {200, 404, 502}
    until(lambda: not api.sandboxes("doomed"), "the end of its sandboxes")


@pytest.mark.parametrize("scope", ["invoke", "deploy", "read"])
def test_a_key_gets_no_further_than_its_scope(api: Api, scope: str) -> None:
    made = api.http.post("/v1/keys", json={"name": f"only {scope}", "scopes": [scope]}).json()
    keyed = httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {made['key']}"}, trust_env=False)
    with keyed as client:
        until(lambda: client.get("/v1/nodes").status_code != 401, "the key")
        for method, path, wanted in ROUTES:
            status = client.request(method, path).status_code
            assert (status == 403) == (wanted != scope), (method, path, status)
            assert client.request(method, path, headers={"authorization": "Bearer mnk_x"}).status_code == 401
    assert api.http.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert httpx.get(f"{api.url}/v1/nodes", headers=keyed.headers, trust_env=False).status_code == 401


def _deeply(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "a~b"},
        {"name": "a/b"},
        {"name": "a\nX-Header: 1"},
        {"name": "a" * 101},
        {"name": "\ud800"},
        {"entry": "../../etc/passwd:x"},
        {"entry": "pickle:../../../etc/passwd"},
        {"unknown": 1},
        {"timeout_s": 1e308},
        {"timeout_s": -1},
        {"retries": 10**18},
        {"scaling": {"concurrency": 10**12}},
        {"scaling": {"max_replicas": 10**30}},
        {"scaling": {"min_replicas": 5, "max_replicas": 1}},
        {"resources": {"memory_mb": -1}},
        {"resources": {"cpu": 1e400}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x\0y"}},
        {"parameters": [{"x": _deeply(600)}]},
    ],
    ids=lambda settings: ascii(settings)[:40],
)
def test_a_hostile_manifest_is_refused_whole(api: Api, settings: dict[str, Any]) -> None:
    before = sorted(it["name"] for it in api.http.get("/v1/functions").json()["functions"])
    rest = {key: value for key, value in settings.items() if key != "name"}
    answer = api.post("def refused():\n    return 1\n", settings.get("name", "refused"), **rest)
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert sorted(it["name"] for it in api.http.get("/v1/functions").json()["functions"]) == before


class Canary:
    """Whoever unpickles it leaves a file on the machine it runs on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


BIRD = """
import os

class Bird:
    def __reduce__(self):
        return open, (os.environ["CANARY"], "w")

class Sings(Exception):
    def __reduce__(self):
        return open, (os.environ["CANARY"], "w")

def bird(how="value"):
    print("a bird", how)
    if how == "error":
        raise Sings("la")
    return Bird()
"""


def test_nothing_outside_a_sandbox_unpickles(runtime: Runtime, api: Api, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    api.deploy(BIRD, "bird", env={"CANARY": str(canary)})
    armed = PICKLE_HEADER + pickle.dumps(((Canary(canary),), {}), 5)
    media = {"content-type": MEDIA_PICKLE}
    path = "/v1/functions/bird"
    assert api.http.post(f"{path}/invoke", content=armed, headers=media).status_code in (422, 500)
    framed = {"content-type": MEDIA_FRAMES, "MN-Item-Codec": "pickle"}
    assert (
        api.http.post(f"{path}/map", content=REQUEST_ITEM.pack(len(armed)) + armed, headers=framed).status_code == 200
    )
    failed = ""
    for how in ("value", "error"):
        plain = PICKLE_HEADER + pickle.dumps(((how,), {}), 5)
        answer = api.http.post(f"{path}/invoke", content=plain, headers=media)
        failed = answer.headers["mn-invocation-id"]
        assert answer.status_code == (200 if how == "value" else 500), answer.text
    assert api.http.get(f"/v1/invocations/{failed}/failure").status_code == 200
    for command in (
        ("call", "bird", "--how", "error"),
        ("logs", "bird"),
        ("logs", failed),
        ("function", "show", "bird"),
        ("function", "list"),
        ("node", "list"),
    ):
        runtime.mn(*command, check=False)
    assert not canary.exists()


def test_a_pickled_function_is_opened_by_its_sandbox_alone(runtime: Runtime, api: Api, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "bundle"
    (folder / "payloads").mkdir(parents=True)
    (folder / "payloads" / "f.pickle").write_bytes(PICKLE_HEADER + pickle.dumps(Canary(canary), 5))
    (folder / "manifest.json").write_text(
        json.dumps({"manifest_version": "1", "name": "egg", "entry": "pickle:f.pickle"})
    )
    runtime.mn("bundle", "validate", str(folder))
    api.deployed.add("egg")
    runtime.mn("bundle", "push", "--deploy", str(folder))
    assert api.invoke("egg", timeout_s=30).status_code != 200
    runtime.mn("function", "show", "egg")
    assert not canary.exists()


def test_ephemeral_functions_leave_no_sandbox_behind(runtime: Runtime, api: Api) -> None:
    api.deploy("def mayfly():\n    return 1\n", "mayfly")
    digest = api.http.get("/v1/functions/mayfly").json()["digest"]
    content = api.http.get(f"/v1/bundles/{digest}/content").content
    for number in range(AT_ONCE):
        answer = api.http.post(f"/v1/bundles?deploy=true&scope=fly{number}", content=content)
        assert answer.status_code == 200, answer.text
        assert api.result(f"mayfly~fly{number}") == 1
        assert api.http.delete(f"/v1/scopes/fly{number}").status_code == 204
    names = [it["name"] for it in api.http.get("/v1/functions").json()["functions"]]
    assert not [name for name in names if "~fly" in name]
    folder = runtime.home / "run" / "sandboxes"

    def tidy() -> bool:
        live = {it["sandbox"] for it in api.http.get("/v1/nodes").json()["nodes"][0]["sandboxes"]}
        return not [it for it in live if "mayfly~" in it] and len(os.listdir(folder)) <= len(live) + api.spares() + 2

    until(tidy, "folders of live sandboxes alone")
