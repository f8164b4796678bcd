"""A link whose other end is the test."""

from __future__ import annotations

from typing import Any, TypeVar

from mn.formats.manifest import FunctionSpec, Resources, Scaling
from mn_nodepool.wire.messages import Message, Route

M = TypeVar("M", bound=Message)


class RecordingLink:
    """Keeps what is sent until the test takes it."""

    def __init__(self, peer: str = "node") -> None:
        self.peer = peer
        self.closed = False
        self.sent: list[tuple[Message, bytes]] = []

    def send(self, message: Message, body: bytes | memoryview = b"") -> None:
        if not self.closed:
            self.sent.append((message, bytes(body)))

    def close(self) -> None:
        self.closed = True

    def take(self, kind: type[M]) -> list[M]:
        """Messages of a kind that came since they were taken last; others stay."""
        found = [message for message, _ in self.sent if isinstance(message, kind)]
        self.sent = [pair for pair in self.sent if not isinstance(pair[0], kind)]
        return found

    def bodies(self, kind: type[Message]) -> list[bytes]:
        return [body for message, body in self.sent if isinstance(message, kind)]


def spec(name: str = "square", *, scaling: Scaling | None = None, resources: Resources | None = None, **members: Any) -> FunctionSpec:  # fmt: skip
    return FunctionSpec(
        name, f"app:{name}", scaling=scaling or Scaling(), resources=resources or Resources(), **members
    )


def route(name: str = "square", number: int = 1, **members: Any) -> Route:
    return Route(name, f"{name}#{number}", "ann", "default", spec(name, **members))
