"""A gateway's side of the SDK's wire, in this process: it answers calls with plain callables and keeps what was uploaded."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from mn.formats.bundle import extract
from mn.formats.codecs import (
    MEDIA_FRAMES,
    MEDIA_PICKLE,
    MEDIA_PROBLEM,
    PICKLE_HEADER,
    REQUEST_ITEM,
    RESPONSE_ITEM,
    Codec,
    ItemStatus,
)
from mn.formats.errors import OUTCOMES

INVOCATION = "inv_01STUB"


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


class StubGateway:
    """`functions` are what calls run, by name without scope; `raw_answers` replace whole results, as payload bytes."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.raw_answers: dict[str, bytes] = {}
        self.problems: dict[str, tuple[str, dict[str, Any]]] = {}
        self.bundles: list[dict[str, Any]] = []
        self.bundle_files: list[dict[str, bytes]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.map_items = 0
        self.map_cut_after: int | None = None
        self.map_first_last = False
        """Answer the first item of each map after all others."""
        self.disconnected = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def scopes(self) -> set[str]:
        return {path.partition("scope=")[2] for _, path, _ in self.requests if "scope=" in path}


@contextlib.contextmanager
def running() -> Iterator[StubGateway]:
    stub = StubGateway()
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()


def failed(error: Exception, name: str) -> dict[str, Any]:
    """The problem document of an exception that user code raised."""
    told = {
        "type": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(Exception):
        told["pickle"] = base64.b64encode(PICKLE_HEADER + pickle.dumps(error, 5)).decode()
    problem = {"type": "/problems/function-error", "title": "raised", "status": 500, "detail": str(error)}
    where = {"function": name, "version": f"{name}#3", "node": "mirror_neuron@mn-1", "instance": INVOCATION}
    return {**problem, "exception": told, **where, "output": ""}


def _handler(stub: StubGateway) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Tests say what they want to see."""

        def _chunks(self) -> Iterator[bytes]:
            """The body as it comes."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def _answer(self, status: int, media: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("MN-Invocation-Id", INVOCATION)
            self.end_headers()
            self.wfile.write(body)

        def _json(self, value: Any, status: int = 200) -> None:
            self._answer(status, "application/json", json.dumps(value).encode())

        def _problem(self, slug: str, detail: str, **extra: Any) -> None:
            outcome = OUTCOMES[slug]
            document = {"type": f"/problems/{slug}", "title": outcome.title, "status": outcome.status, "detail": detail}
            self._answer(outcome.status, MEDIA_PROBLEM, json.dumps({**document, **extra}).encode())

        def do_POST(self) -> None:
            stub.requests.append((self.command, self.path, dict(self.headers)))
            if self.path.startswith("/v1/bundles"):
                self._deploy(b"".join(self._chunks()))
            elif self.path.endswith("/invoke"):
                self._invoke(self.path.split("/")[-2].partition("~")[0])
            elif self.path.endswith("/map"):
                try:
                    self._map(self.path.split("/")[-2].partition("~")[0])
                except (ConnectionError, ValueError):
                    stub.disconnected.set()
                    self.close_connection = True
            else:
                b"".join(self._chunks())
                self._json({})

        def do_GET(self) -> None:
            stub.requests.append((self.command, self.path, dict(self.headers)))
            if self.headers.get("Authorization") != "Bearer mnk_test":
                self._problem("unauthenticated", "the key is not valid")
            elif self.path == "/v1/functions":
                self._json({"functions": [{"name": name} for name in stub.functions]})
            else:
                self._problem("not-found", "there is no function squar", near=["square"])

        def do_DELETE(self) -> None:
            stub.requests.append((self.command, self.path, dict(self.headers)))
            self.send_response(204)
            self.end_headers()

        def _deploy(self, archive: bytes) -> None:
            if "deploy" in stub.problems:
                slug, extra = stub.problems["deploy"]
                self._problem(slug, **extra)
                return
            with tempfile.TemporaryDirectory() as folder:
                found = extract(BytesIO(archive), Path(folder))
                files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
            manifest = json.loads(found.manifest)
            stub.bundles.append(manifest)
            stub.bundle_files.append(files)
            functions = [
                {"name": each["name"], "version": 1, "url": f"{stub.url}/v1/functions/{each['name']}", "changed": True}
                for each in manifest["functions"]
            ]
            self._json({"digest": found.digest, "functions": functions}, 201)

        def _invoke(self, name: str) -> None:
            payload = b"".join(self._chunks())
            if name in stub.problems:
                slug, extra = stub.problems[name]
                self._problem(slug, **extra)
            elif name in stub.raw_answers:
                self._answer(200, MEDIA_PICKLE, stub.raw_answers[name])
            else:
                status, value = run(name, payload)
                if status:
                    self._answer(500, MEDIA_PROBLEM, value)
                elif hasattr(value, "__next__"):
                    self._stream(value)
                else:
                    self._answer(200, MEDIA_PICKLE, PICKLE_HEADER + pickle.dumps(value, 5))

        def _start_stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", MEDIA_FRAMES)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _frame(self, index: int, status: int, codec: int, payload: bytes) -> None:
            data = RESPONSE_ITEM.pack(index, status, codec, 0, len(payload)) + payload
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        def _stream(self, values: Iterator[Any]) -> None:
            self._start_stream()
            count = 0
            for value in values:
                self._frame(count, ItemStatus.OK, Codec.PICKLE, PICKLE_HEADER + pickle.dumps(value, 5))
                count += 1
            self._frame(count, ItemStatus.END, 0, b"")
            self.wfile.write(b"0\r\n\r\n")

        def _map(self, name: str) -> None:
            if name in stub.problems:
                slug, extra = stub.problems[name]
                self._problem(slug, **extra)
                self.close_connection = True
                return
            self._start_stream()
            buffer, count = b"", 0
            late: tuple[int, int, int, bytes] | None = None
            for chunk in self._chunks():
                buffer += chunk
                batch: list[bytes] = []
                while len(buffer) >= 4 and len(buffer) >= 4 + (size := REQUEST_ITEM.unpack_from(buffer)[0]):
                    batch.append(buffer[4 : 4 + size])
                    buffer = buffer[4 + size :]
                # Backwards, so that order is the client's work.
                for offset in reversed(range(len(batch))):
                    if stub.map_cut_after is not None and stub.map_items >= stub.map_cut_after:
                        self.close_connection = True
                        return
                    status, value = run(name, batch[offset])
                    if status == 0:
                        value = PICKLE_HEADER + pickle.dumps(value, 5)
                    frame = (count + offset, status, Codec.JSON if status else Codec.PICKLE, value)
                    if frame[0] == 0 and stub.map_first_last:
                        late = frame
                    else:
                        self._frame(*frame)
                    stub.map_items += 1
                count += len(batch)
            if late:
                self._frame(*late)
            self._frame(count, ItemStatus.END, 0, b"")
            self.wfile.write(b"0\r\n\r\n")

    def run(name: str, payload: bytes) -> tuple[int, Any]:
        args, kwargs = pickle.loads(payload[8:])
        try:
            return ItemStatus.OK, stub.functions[name](*args, **kwargs)
        except Exception as error:
            return ItemStatus.FUNCTION_ERROR, json.dumps(failed(error, name)).encode()

    return Handler
