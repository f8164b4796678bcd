"""What functions print: one file of JSON lines per function, rotated by size, and a live feed for who follows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

FLUSH_EVERY_S = 0.1
FOLLOWERS_QUEUE_MAX = 10_000
"""Lines a slow follower may lag behind; then it is told how many it missed."""
READ_BYTES_MAX = 64 << 20


class Line(TypedDict):
    """One line of output."""

    t: int
    """Milliseconds since the epoch."""
    f: str
    """Function."""
    i: str
    """Invocation; empty for output between calls."""
    s: int
    """1: stdout, 2: stderr."""
    m: str
    """Text without its line end."""


class _Follower:
    """Somebody who reads along."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Line] = asyncio.Queue(FOLLOWERS_QUEUE_MAX)
        self.missed = 0

    def tell(self, line: Line) -> None:
        if self.queue.full():
            self.missed += 1
        else:
            self.queue.put_nowait(line)

    async def batch(self) -> list[Line]:
        """What came; after a gap, a line of the platform's that tells of it."""
        lines = [await self.queue.get()]
        while not self.queue.empty() and len(lines) < 500:
            lines.append(self.queue.get_nowait())
        return lines

    def gap(self, function: str, invocation: str, now_ms: int) -> Line | None:
        missed, self.missed = self.missed, 0
        if not missed:
            return None
        text = f"[{missed} lines of this node are not shown here: they came faster than they were read]"
        return {"t": now_ms, "f": function, "i": invocation, "s": 2, "m": text}


class LogBook:
    """Writes lines and answers who reads them."""

    def __init__(self, folder: Path, *, file_bytes_max: int, files_max: int, now_ms: Callable[[], int]) -> None:
        self._folder = folder
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._now_ms = now_ms
        self._pending: dict[str, list[Line]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._followers: set[_Follower] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, function: str, invocation: str, stream: int, text: str) -> None:
        """Add output; it is on disk within 0.1 s."""
        now = self._now_ms()
        lines = self._pending.setdefault(function, [])
        for part in text.splitlines():
            line: Line = {"t": now, "f": function, "i": invocation, "s": stream, "m": part}
            lines.append(line)
            for follower in self._followers:
                follower.tell(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_EVERY_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._pending = self._pending, {}
        for function, lines in pending.items():
            with self._open(function) as file:
                file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))

    def _open(self, function: str) -> BinaryIO:
        path = self._path(function)
        try:
            full = path.stat().st_size >= self._file_bytes_max
        except FileNotFoundError:
            full = False
        if full:
            for number in range(self._files_max - 1, 0, -1):
                older = path.with_suffix(f".log.{number}")
                if older.exists():
                    older.replace(
                        path.with_suffix(f".log.{number + 1}")
                    ) if number + 1 < self._files_max else older.unlink()
            path.replace(path.with_suffix(".log.1"))
        return open(path, "ab")

    def _path(self, function: str) -> Path:
        return self._folder / f"{function}.log"

    def _read(self, function: str, invocation: str, limit: int) -> list[Line]:
        """The last `limit` lines, oldest first."""
        if limit <= 0:
            return []
        if function:
            paths = [self._path(function).with_suffix(f".log.{n}") for n in range(self._files_max, 0, -1)] + [
                self._path(function)
            ]
        else:
            paths = sorted(self._folder.glob("*.log*"), key=lambda p: p.stat().st_mtime)
        found: list[Line] = []
        needle = invocation.encode()
        for path in reversed([p for p in paths if p.exists()]):
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - READ_BYTES_MAX))
                matching = [raw for raw in file if needle in raw]
            if not invocation:
                matching = matching[-limit:]
            lines = [line for raw in matching if (line := _parse(raw)) and _matches(line, invocation)]
            found = lines + found
            if len(found) >= limit:
                break
        found.sort(key=lambda line: line["t"])
        return found[-limit:]

    async def tail(
        self, function: str, invocation: str, *, follow: bool, limit: int
    ) -> AsyncGenerator[list[Line], None]:
        """Batches of lines of a function or an invocation (one of both may be empty); goes on for ever when following."""
        follower = _Follower()
        self.flush()
        if follow:
            self._followers.add(follower)
        try:
            yield await asyncio.to_thread(self._read, function, invocation, limit)
            while follow:
                batch = [
                    line
                    for line in await follower.batch()
                    if (not function or line["f"] == function) and _matches(line, invocation)
                ]
                if gap := follower.gap(function, invocation, self._now_ms()):
                    batch.append(gap)
                if batch:
                    yield batch
        finally:
            self._followers.discard(follower)

    def expire(self, keep_s: float) -> None:
        """Delete files that nobody has written to for `keep_s` seconds."""
        oldest = self._now_ms() / 1000 - keep_s
        for path in self._folder.glob("*.log*"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def _matches(line: Line, invocation: str) -> bool:
    return not invocation or line["i"] == invocation or line["i"].startswith(invocation + ".")


def _parse(raw: bytes) -> Line | None:
    try:
        value: Any = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(value, dict) or not {"t", "f", "i", "s", "m"} <= value.keys():
        return None
    return Line(t=value["t"], f=value["f"], i=value["i"], s=value["s"], m=value["m"])
