"""An event loop with virtual time: when nothing is ready, its clock jumps to the next timer. What waits for seconds takes none."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
TURNS_MAX = 300_000
"""Turns of the loop in one test; more means that it waits for what never comes."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never blocks: a wait in which nothing became ready moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turns += 1
        if timeout is None or self.turns > TURNS_MAX:
            raise AssertionError("the test waits for something that nothing will bring about")
        ready = super().select(0)
        if not ready:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sockets within the process work as ever; threads do not, since time would run away from them."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtual(test: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine to its end; what it left running is cancelled."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(test)


async def settle(turns: int = 20) -> None:
    """Let everything that is ready happen, without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)
