"""The book of what functions print: found again by function and invocation, bounded on disk, followed live."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from mn_nodepool.executor.output import FOLLOWERS_QUEUE_MAX, Line, LogBook

NOW_S = 1_700_000_000


def play(tmp_path: Path, scene: Callable[[LogBook], Awaitable[None]], *, file_bytes_max: int = 1 << 20) -> None:
    async def main() -> None:
        clock = itertools.count(NOW_S * 1000)
        async with asyncio.timeout(30):
            await scene(LogBook(tmp_path, file_bytes_max=file_bytes_max, files_max=3, now_ms=lambda: next(clock)))

    asyncio.run(main())


async def history(book: LogBook, function: str = "", invocation: str = "", limit: int = 100) -> list[str]:
    batches = [batch async for batch in book.tail(function, invocation, follow=False, limit=limit)]
    return [line["m"] for batch in batches for line in batch]


def test_lines_are_found_by_function_and_by_invocation_with_its_nested_calls(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        book.write("f", "inv_1", 1, "one\ntwo\n")
        book.write("f", "inv_2", 2, "mentions inv_1\n")
        book.write("g", "inv_1.7", 1, "nested\n")
        book.write("g", "inv_11", 1, "another\n")
        assert await history(book, "f") == ["one", "two", "mentions inv_1"]
        assert await history(book, invocation="inv_1") == ["one", "two", "nested"]
        assert await history(book, "f", limit=1) == ["mentions inv_1"]
        assert await history(book, "f", limit=0) == []
        assert await history(book, "nobody") == []

    play(tmp_path, scene)


def test_lines_of_an_invocation_are_found_among_many_that_only_mention_it(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        book.write("f", "inv_1", 1, "mine\n")
        book.write("f", "inv_2", 1, "about inv_1\n" * 50)
        assert await history(book, "f", "inv_1", limit=10) == ["mine"]

    play(tmp_path, scene)


def test_files_rotate_and_the_oldest_go(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        for number in range(200):
            book.write("f", "inv", 1, f"{number} " + "x" * 100)
            book.flush()
        files = sorted(tmp_path.iterdir())
        assert len(files) == 3
        assert sum(path.stat().st_size for path in files) < 3 * (2000 + 300)
        lines = [int(line.split()[0]) for line in await history(book, "f", limit=1000)]
        assert lines == list(range(lines[0], 200)), "the last ones, without a gap"

    play(tmp_path, scene, file_bytes_max=2000)


def test_what_is_not_a_line_is_passed_over(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        (tmp_path / "f.log").write_bytes(b'{"t": 1}\n[]\n\xff\xfe\n{"half')
        book.write("f", "inv", 1, "\nfine ☃ \x00\x1b[31m\n")
        assert (await history(book, "f"))[-1] == "fine ☃ \x00\x1b[31m"

    play(tmp_path, scene)


def test_followers_get_history_and_then_what_is_printed(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        book.write("f", "inv_1", 1, "before\n")
        feed = book.tail("f", "", follow=True, limit=10)
        assert [line["m"] for line in await anext(feed)] == ["before"]
        book.write("g", "inv_2", 1, "not for us\n")
        book.write("f", "inv_3", 2, "now\n")
        assert [(line["m"], line["s"]) for line in await anext(feed)] == [("now", 2)]
        await feed.aclose()

    play(tmp_path, scene)


def test_a_slow_follower_is_told_how_much_it_missed(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        feed = book.tail("f", "", follow=True, limit=10)
        await anext(feed)
        book.write("f", "inv", 1, "line\n" * (FOLLOWERS_QUEUE_MAX + 7))
        got: list[Line] = []
        while not got or not got[-1]["m"].startswith("["):
            got += await anext(feed)
        assert got[-1]["m"].startswith("[7 lines")
        assert await history(book, "f", limit=1) == ["line"], "on disk nothing is missed"
        await feed.aclose()

    play(tmp_path, scene)


def test_files_that_nobody_writes_any_more_go(tmp_path: Path) -> None:
    async def scene(book: LogBook) -> None:
        for name, age_s in (("old", 7200), ("fresh", 60)):
            book.write(name, "inv", 1, "line\n")
            book.flush()
            os.utime(tmp_path / f"{name}.log", (NOW_S - age_s, NOW_S - age_s))
        book.expire(3600)
        assert [path.name for path in tmp_path.iterdir()] == ["fresh.log"]

    play(tmp_path, scene)
