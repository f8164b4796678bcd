"""A progress bar on standard error while a map runs: on a terminal only, and one at a time."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REFRESH_S = 0.1

_shown = threading.Lock()


class Count:
    """Counts what is done, and shows nothing."""

    count = 0

    def done(self) -> None:
        """One more."""


class ShownCount(Count):
    """Counts what is done, and shows it now and then."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task, self._next = progress, task, 0.0

    def done(self) -> None:
        self.count += 1
        if (now := time.monotonic()) >= self._next:
            self._next = now + REFRESH_S
            self.show()

    def show(self) -> None:
        self._progress.update(self._task, completed=self.count)


@contextmanager
def bar(name: str, total: int | None) -> Iterator[Count]:
    """A bar for `total` items (None: unknown), when standard error is a terminal that shows none yet."""
    if not _is_terminal() or not _shown.acquire(blocking=False):
        yield Count()
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("about"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=1 / REFRESH_S) as progress:
            count = ShownCount(progress, progress.add_task(name, total=total))
            try:
                yield count
            finally:
                count.show()
    finally:
        _shown.release()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
