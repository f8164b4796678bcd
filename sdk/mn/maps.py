"""`map` and `starmap`: many calls over one stream, their results in order, lazily.

Inputs are taken as calls end. With `order_outputs` a slow first item holds back the results behind it; when `HELD_MAX`
of them (or `HELD_BYTES_MAX`) are held, no further input is taken until the slow item is there, so that memory stays
bounded however long the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mn.functions import Function

WINDOW_HTTP = 4096
WINDOW_NESTED = 64
"""Calls without an answer: through the gateway, and from inside a sandbox."""
HELD_MAX = 20_000
HELD_BYTES_MAX = 256 << 20

Item = tuple[int, int, int, bytes]


class Rows:
    """Tuples of arguments, and what is known of them beforehand."""

    def __init__(self, rows: Iterable[tuple[Any, ...]], total: int | None, ready: bool) -> None:
        self.rows = iter(rows)
        self.total = total
        """How many there are, when that is known."""
        self.ready = ready
        """They are in memory: taking the next one does not block."""

    @classmethod
    def of_iterables(cls, iterables: tuple[Iterable[Any], ...]) -> Rows:
        if not iterables:
            raise TypeError("map needs at least one iterable of arguments")
        sized = [len(each) for each in iterables if isinstance(each, Sized)]
        ready = len(sized) == len(iterables)
        return cls(zip(*iterables, strict=False), min(sized) if ready else None, ready)

    @classmethod
    def of_tuples(cls, rows: Iterable[tuple[Any, ...]]) -> Rows:
        ready = isinstance(rows, Sized)
        return cls((tuple(row) for row in rows), len(rows) if isinstance(rows, Sized) else None, ready)


class Payloads:
    """The encoded inputs of one stream of calls. It ends early, with `more` still true, when too much is held back."""

    def __init__(self, function: Function[Any, Any], rows: Rows, held: Held) -> None:
        self.ready = rows.ready
        self.more = True
        self._rows, self._function, self._held = rows.rows, function, held

    def __iter__(self) -> Iterator[bytes]:
        from pickle import dumps

        from mn.call import encode
        from mn.formats.codecs import PICKLE_HEADER

        held, function, shares_main = self._held, self._function, self._function.shares_main
        for row in self._rows:
            try:
                data = dumps((row, {}), 5)
            except Exception:  # of any type: whatever plain pickle can't do, `encode` does by value or explains
                data = b""
            if data and (shares_main or b"__main__" not in data):
                yield PICKLE_HEADER + data
            else:
                yield encode(function, row, {})
            if held.full:
                return
        self.more = False


class Held:
    """Results that wait for an earlier one."""

    def __init__(self) -> None:
        self.waiting: dict[int, Item] = {}
        self.size = 0

    @property
    def full(self) -> bool:
        return len(self.waiting) >= HELD_MAX or self.size >= HELD_BYTES_MAX

    def put(self, item: Item) -> None:
        self.waiting[item[0]] = item
        self.size += len(item[3])

    def take(self, index: int) -> Item | None:
        item = self.waiting.pop(index, None)
        if item is not None:
            self.size -= len(item[3])
        return item


def run(function: Function[Any, Any], rows: Rows, order_outputs: bool, return_exceptions: bool) -> Iterator[Any]:
    """Yield the results of all rows."""
    from mn.call import decode
    from mn.progress import bar

    held = Held()
    with bar(function.name, rows.total) as progress:
        for _, status, codec, payload in _answers(function, rows, held, order_outputs, progress.done):
            if status == 0 and codec == 2:
                yield decode(function, status, codec, payload)
                continue
            try:
                value = decode(function, status, codec, payload)
            except Exception as error:
                if not return_exceptions:
                    raise
                value = error
            yield value


def _answers(function: Function[Any, Any], rows: Rows, held: Held, ordered: bool, done: Any) -> Iterator[Item]:
    """Answers to all rows, over as many streams as it takes: nearly always one."""
    from mn.call import PICKLE, inside_sandbox, transport

    carrier, name = transport(), function.pool_name()
    window = WINDOW_NESTED if inside_sandbox() else WINDOW_HTTP
    payloads = Payloads(function, rows, held)
    while payloads.more:
        expected = 0
        for item in carrier.map(name, PICKLE, payloads, function.timeout, window):
            done()
            if not ordered:
                yield item
                continue
            if item[0] != expected:
                held.put(item)
                continue
            yield item
            expected += 1
            while held.waiting and (following := held.take(expected)) is not None:
                yield following
                expected += 1
