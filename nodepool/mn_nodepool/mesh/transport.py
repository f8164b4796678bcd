"""The transport's port: a link to one peer.

Messages on a link arrive in the order in which they were sent, or the link is lost. `send` never blocks and never raises: on a lost link it
does nothing, since the owner hears of the loss through `lost`. Who sends payloads bounds them by windows, not by the link.
"""

from __future__ import annotations

from typing import Protocol

from mn_nodepool.wire.messages import Message


class Link(Protocol):
    peer: str
    """Who is at the other end, from its `Hello`; empty before."""
    closed: bool

    def send(self, message: Message, body: bytes | memoryview = b"") -> None: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """Whoever owns one end of a link."""

    def received(self, link: Link, message: Message, body: bytes) -> None:
        """One message. An exception raised here closes the link, so that the peer dials again; within a process, where nobody would, it is
        reported and the next message comes."""

    def lost(self, link: Link) -> None:
        """The link is gone, greeted or not; called once."""
