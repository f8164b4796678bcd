"""A blocking node's end of the child protocol, for tests that drive one sandbox."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mn.formats.codecs import PICKLE_HEADER, Codec
from mn_runner.protocol import (
    CALL_HEAD,
    CONTROL,
    MORE,
    NESTED_HEAD,
    REPLY_HEAD,
    RESULT_HEAD,
    U32,
    WINDOW_CHUNKS,
    FrameReader,
    Kind,
    Status,
    frame,
    frames_of,
)

WAIT_S = 30.0


@dataclass
class Nested:
    """A call that user code made."""

    number: int
    parent: int
    codec: int
    mode: int
    seconds: float
    name: str
    payload: bytes


@dataclass
class Outcome:
    """All that came of one call."""

    status: int = -1
    codec: int = -1
    run_us: int = 0
    payload: bytes = b""
    items: list[bytes] = field(default_factory=list)
    output: str = ""

    def json(self) -> Any:
        return json.loads(self.payload)

    def value(self) -> Any:
        """The result, with an assertion that it is one."""
        assert self.status == Status.OK, self.payload.decode()
        return self.json() if self.codec == Codec.JSON else self.payload


class Session:
    """Speaks to a child over `protocol` and `control` descriptors, which it owns. `answer` replies to nested calls."""

    def __init__(self, protocol: int, control: int, answer: Callable[[Nested], Any] | None = None) -> None:
        self._socket = socket.socket(fileno=protocol)
        self._socket.settimeout(WAIT_S)
        self._control = control
        self._reader = FrameReader()
        self._numbers = 0
        self._parts: dict[int, tuple[int, bytes]] = {}
        self._taken: dict[int, int] = {}
        self.answer = answer
        self.outcomes: dict[int, Outcome] = {}
        self.finished: set[int] = set()
        self.nested: deque[Nested] = deque()
        self.cancelled_nested: list[int] = []
        self.output = ""
        self.ready: dict[str, Any] | None = None
        self.loaded: dict[str, Any] | None = None

    def wait_ready(self) -> dict[str, Any]:
        self.until(lambda: self.ready is not None)
        assert self.ready is not None
        return self.ready

    def load(self, entry: str, root: str, **members: Any) -> dict[str, Any]:
        """LOAD a version; {} or the error that LOADED tells of."""
        load = {"version": "f#1", "name": "f", "entry": entry, "root": root, **members}
        self.send(frame(Kind.LOAD, 0, json.dumps(load).encode()))
        self.until(lambda: self.loaded is not None)
        assert self.loaded is not None
        return self.loaded

    def start(
        self,
        payload: Any = None,
        codec: int = Codec.JSON,
        seconds: float = 0.0,
        depth: int = 0,
        raw: bytes | None = None,
    ) -> int:
        """Send a CALL; its number."""
        self._numbers += 1
        data = raw if raw is not None else json.dumps(payload).encode() if payload is not None else b""
        self.outcomes[self._numbers] = Outcome()
        head = CALL_HEAD.pack(seconds, codec, depth, 5) + b"inv_1"
        self.send_payload(Kind.CALL, self._numbers, head, data)
        return self._numbers

    def finish(self, number: int) -> Outcome:
        self.until(lambda: number in self.finished)
        return self.outcomes[number]

    def call(self, payload: Any = None, **arguments: Any) -> Outcome:
        return self.finish(self.start(payload, **arguments))

    def call_pickle(self, *args: Any, **kwargs: Any) -> Outcome:
        import pickle

        return self.call(raw=PICKLE_HEADER + pickle.dumps((args, kwargs), 5), codec=Codec.PICKLE)

    def cancel(self, number: int, reason: int) -> None:
        os.write(self._control, CONTROL.pack(number, reason))

    def reply(self, nested: Nested, payload: bytes, status: int = Status.OK, codec: int = Codec.JSON) -> None:
        self.send_payload(Kind.REPLY, nested.number, REPLY_HEAD.pack(status, codec), payload)

    def item(self, nested: Nested, payload: bytes, codec: int = Codec.JSON) -> None:
        self.send_payload(Kind.ITEM, nested.number, bytes((codec,)), payload)

    def stop(self) -> None:
        self.send(frame(Kind.STOP, 0))

    def close(self) -> None:
        self._socket.close()
        os.close(self._control)

    def send(self, data: bytes) -> None:
        """Write, reading meanwhile: a child that can't write would not read."""
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([self._socket], [self._socket], [], WAIT_S)
            assert readable or writable, "the child takes nothing"
            if writable:
                view = view[self._socket.send(view[:65536]) :]
            elif readable:
                self._read()

    def send_payload(self, kind: int, number: int, head: bytes, payload: bytes) -> None:
        self._taken[number] = 0
        for sent, piece in enumerate(frames_of(kind, number, head, payload)):
            self.until(lambda sent=sent: sent - self._taken[number] <= WINDOW_CHUNKS)
            self.send(piece)

    def until(self, condition: Callable[[], bool], wait_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + wait_s
        while not condition():
            assert time.monotonic() < deadline, "the child did not do what was waited for"
            self._read()

    def _read(self) -> None:
        data = self._socket.recv(1 << 18)
        if not data:
            raise EOFError("the child closed its socket")
        for kind, flags, number, body in self._reader.feed(data):
            self._on_frame(kind, flags, number, body)

    def _on_frame(self, kind: int, flags: int, number: int, body: bytes) -> None:
        if kind == Kind.CHUNK:
            kind, start = self._parts.pop(number)
            body = start + body
            self.send(frame(Kind.ACK, number, U32.pack(1)))
        if flags & MORE:
            self._parts[number] = (kind, body)
            return
        if kind == Kind.READY:
            self.ready = json.loads(body)
        elif kind == Kind.LOADED:
            self.loaded = json.loads(body)
        elif kind == Kind.ACK:
            self._taken[number] += U32.unpack(body)[0]
        elif kind == Kind.LOG:
            self._on_log(number, body)
        elif kind == Kind.NESTED:
            self._on_nested(number, body)
        elif kind == Kind.CANCEL:
            self.cancelled_nested.append(number)
        elif kind == Kind.ITEM:
            self.outcomes[number].items.append(body[1:])
        elif kind == Kind.RESULT:
            outcome = self.outcomes[number]
            assert number not in self.finished, "a second result"
            outcome.status, outcome.codec, outcome.run_us = RESULT_HEAD.unpack_from(body)
            outcome.payload = body[RESULT_HEAD.size :]
            self.finished.add(number)
        else:
            raise AssertionError(f"frame {kind}")

    def _on_log(self, number: int, body: bytes) -> None:
        text = body[1:].decode()
        if number in self.outcomes:
            self.outcomes[number].output += text
        else:
            self.output += text

    def _on_nested(self, number: int, body: bytes) -> None:
        parent, codec, mode, seconds, size = NESTED_HEAD.unpack_from(body)
        name = body[NESTED_HEAD.size : NESTED_HEAD.size + size].decode()
        nested = Nested(number, parent, codec, mode, seconds, name, body[NESTED_HEAD.size + size :])
        if self.answer is None:
            self.nested.append(nested)
        else:
            self.answer(nested)
