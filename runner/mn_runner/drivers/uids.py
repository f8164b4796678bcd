"""Uids for sandboxes of a node that is root: one for each that lives, none used again while anything of it may be left."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FIRST = 200_000
COUNT = 60_000
LOCKS = Path("/run/mirrorneuron/uids")


class Uids:
    """Takes numbers that no other process of this machine has taken, in turn, so that a freed one is used last.

    A number is held by a lock on a file named after it: two runtimes on one machine never share one, and a killed one leaves none behind.
    """

    def __init__(self, folder: Path = LOCKS) -> None:
        self._folder = folder
        self._held: dict[int, int] = {}
        self._next = os.getpid() % COUNT

    def take(self) -> int:
        """A number that is nobody's until it is given back.

        Raises OSError when the folder of locks can't be written, and RuntimeError when all numbers are taken.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for _ in range(COUNT):
            uid = FIRST + self._next
            self._next = (self._next + 1) % COUNT
            if uid in self._held:
                continue
            fd = self._lock(self._folder / str(uid))
            if fd is not None:
                self._held[uid] = fd
                return uid
        raise RuntimeError(f"all {COUNT} uids for sandboxes are taken")

    def give_back(self, uid: int) -> None:
        """After the last process and file of it are gone. Idempotent."""
        fd = self._held.pop(uid, None)
        if fd is not None:
            (self._folder / str(uid)).unlink(missing_ok=True)
            os.close(fd)

    @staticmethod
    def _lock(path: Path) -> int | None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink == 0:
            # Its last holder removed it between our open and our lock.
            os.close(fd)
            return None
        return fd
