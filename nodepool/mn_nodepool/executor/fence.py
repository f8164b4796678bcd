"""The highest epoch that this executor has seen, kept on disk: a leader of an older one, or another leader of the same one, is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Fence:
    """Persisted (counter, leader)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.counter = 0
        self.leader = ""
        try:
            kept = json.loads(file.read_text())
            self.counter, self.leader = int(kept["counter"]), str(kept["leader"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self.counter = 0

    def admits(self, counter: int, leader: str) -> bool:
        """True for the epoch seen last and for newer ones, which are on disk before this returns."""
        if (counter, leader) == (self.counter, self.leader):
            return True
        if counter <= self.counter:
            return False
        temporary = self._file.with_suffix(".new")
        with open(temporary, "w") as out:
            json.dump({"counter": counter, "leader": leader}, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self._file)
        self.counter, self.leader = counter, leader
        return True
