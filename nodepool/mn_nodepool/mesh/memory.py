"""Links within one process: what is sent is handed over at the loop's next turn, unencoded."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from mn_nodepool.mesh.transport import Receiver
from mn_nodepool.wire.messages import Message

log = structlog.get_logger("mesh")


class MemoryLink:
    """One end of a pair made by `memory_pair`."""

    def __init__(self, peer: str, loop: asyncio.AbstractEventLoop) -> None:
        self.peer = peer
        self.closed = False
        self._loop = loop
        self._other: MemoryLink
        self._receiver: Receiver
        self._inbox: deque[tuple[Message, bytes]] = deque()

    def send(self, message: Message, body: bytes | memoryview = b"") -> None:
        other = self._other
        if self.closed:
            return
        if not other._inbox:
            self._loop.call_soon(other._deliver)
        other._inbox.append((message, bytes(body)))

    def _deliver(self) -> None:
        inbox = self._inbox
        for _ in range(len(inbox)):
            if self.closed:
                return
            message, body = inbox[0]
            try:
                self._receiver.received(self, message, body)
            except Exception:
                log.exception("handling a message failed", action="mesh_failed", peer=self.peer)
            inbox.popleft()
        if inbox:
            self._loop.call_soon(self._deliver)

    def close(self) -> None:
        for end in (self, self._other):
            if not end.closed:
                end.closed = True
                self._loop.call_soon(end._receiver.lost, end)


def memory_pair(
    first: Receiver, second: Receiver, *, names: tuple[str, str], loop: asyncio.AbstractEventLoop
) -> tuple[MemoryLink, MemoryLink]:
    """Two joined links; `first` owns the first and sees the peer `names[1]`, and the other way round."""
    a, b = MemoryLink(names[1], loop), MemoryLink(names[0], loop)
    a._other, b._other = b, a
    a._receiver, b._receiver = first, second
    return a, b
