"""What a dispatcher knows of one version: who waits, and which credits it has where."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mn_nodepool.mesh.transport import Link

if TYPE_CHECKING:
    import asyncio

    from mn_nodepool.dispatch.pending import PendingCall


class Credit:
    """Rights to send calls of one version to one executor."""

    __slots__ = ("generation", "idle", "link", "owed", "slots")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.idle = 0
        self.owed = 0
        """Recalled while in use: to be returned as their calls end."""
        self.slots = 0
        """Announced by the executor."""
        self.generation = 0
        """Grows when all credits become void; a call sent before that brings none back."""

    def void(self) -> None:
        self.idle = self.owed = 0
        self.generation += 1


class Lane:
    """One version at this dispatcher."""

    __slots__ = (
        "credits",
        "queue",
        "queued_bytes",
        "reason",
        "reported",
        "retired",
        "run_us",
        "running",
        "timer",
        "version",
    )

    def __init__(self, version: str) -> None:
        self.version = version
        self.queue: deque[PendingCall] = deque()
        self.queued_bytes = 0
        self.credits: dict[Link, Credit] = {}
        self.running = 0
        self.run_us = 0.0
        """Moving mean of how long user code ran."""
        self.reported = 0
        """Length of the queue that executors were told last."""
        self.retired = False
        """It goes when its last call has ended."""
        self.timer: asyncio.TimerHandle | None = None
        self.reason = ""
        """Why the leader can't place it, while it can't."""

    def pick(self) -> Credit | None:
        """The executor with most idle credits, or None."""
        best: Credit | None = None
        most = 0
        for credit in self.credits.values():
            if credit.idle > most:
                best, most = credit, credit.idle
        return best

    def has_slots(self) -> bool:
        """Whether any executor has announced slots."""
        return any(credit.slots for credit in self.credits.values())

    def credit_at(self, link: Link) -> Credit:
        credit = self.credits.get(link)
        if credit is None:
            credit = self.credits[link] = Credit(link)
        return credit
