"""The supervisor's loop: start in phases, restart what crashes, end in reverse order."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mn.formats import processes
from mn.formats.errors import Cancelled, Unavailable
from mn_nodepool.supervisor.children import Child, last_lines, rotate, spawn
from mn_nodepool.supervisor.home import write_private
from mn_nodepool.supervisor.restart import next_delay_s

START_S = 60.0
"""Seconds within which every child must be ready."""
READY_POLL_S = 0.01
ROTATE_EVERY_S = 30.0
TROUBLE_S = 1.0


@dataclass(slots=True)
class Running:
    """A child and its latest process."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    started: str = ""
    spawned_at: float = 0.0
    delay_s: float = 0.0
    restart_at: float | None = None
    restarts: int = 0


class Supervisor:
    """Runs children until it is told to stop. One thread; it sleeps unless a signal comes or a restart is due."""

    def __init__(
        self,
        phases: Sequence[Sequence[Child]],
        run_dir: Path,
        *,
        log_bytes_max: int = 16 << 20,
        log_files_max: int = 8,
    ) -> None:
        self._phases = [[Running(child) for child in phase] for phase in phases]
        self._run_dir = run_dir
        self._log_bytes_max, self._log_files_max = log_bytes_max, log_files_max
        self._stopping = False
        self._hurry = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # Children hold the read end; the write end is this process's alone, so it closes when this process dies,
        # however it dies.
        self._alive_read, self._alive_write = os.pipe()

    @property
    def pids(self) -> dict[str, int]:
        return {it.child.name: it.process.pid for it in self._all() if it.process is not None}

    def run(self, on_ready: Callable[[dict[str, int]], None]) -> None:
        """Start everything, call `on_ready` with the pids, and supervise until SIGTERM or SIGINT.

        Raises Unavailable with the last lines of its log when a child does not come up, after ending the others.
        """
        with self._signals():
            try:
                self._start()
                on_ready(self.pids)
                self._supervise()
            finally:
                self._stop()

    def _all(self) -> list[Running]:
        return [it for phase in self._phases for it in phase]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def on_stop(_number: int, _frame: object) -> None:
            self._hurry = self._stopping
            self._stopping = True

        before = {number: signal.signal(number, on_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _sleep(self, seconds: float) -> None:
        """Until a signal comes, at most so long."""
        if select.select([self._wake_read], [], [], max(0.0, seconds))[0]:
            os.read(self._wake_read, 4096)

    def _start(self) -> None:
        deadline = time.monotonic() + START_S
        for phase in self._phases:
            for it in phase:
                self._spawn(it)
            self._note()
            waiting = list(phase)
            while waiting and not self._stopping:
                self._check_starting(waiting, deadline)
                waiting = [it for it in waiting if it.process is None or not it.child.is_ready(it.process.pid)]
                if waiting:
                    self._sleep(READY_POLL_S)
            if self._stopping:
                raise Cancelled("it was told to stop before it was ready")

    def _check_starting(self, waiting: list[Running], deadline: float) -> None:
        for it in waiting:
            code = it.process.poll() if it.process else None
            if code is not None:
                raise Unavailable(_could_not_start(it.child, f"ended at its start ({_ending(code)})"))
        if time.monotonic() > deadline:
            raise Unavailable(_could_not_start(waiting[0].child, f"was not ready within {START_S:.0f} s"))

    def _spawn(self, it: Running) -> None:
        it.process = spawn(it.child, self._alive_read)
        it.started = processes.started(it.process.pid)
        it.spawned_at = time.monotonic()
        it.restart_at = None

    def _supervise(self) -> None:
        rotate_at = time.monotonic() + ROTATE_EVERY_S
        while not self._stopping:
            now = time.monotonic()
            due = [it.restart_at for it in self._all() if it.restart_at is not None]
            self._sleep(min([rotate_at, *due]) - now)
            try:
                self._restart_ended()
                if time.monotonic() >= rotate_at:
                    rotate_at += ROTATE_EVERY_S
                    for it in self._all():
                        rotate(it.child.log, self._log_bytes_max, self._log_files_max)
            except OSError as error:
                # A full disk, or no process to be had: what runs goes on, the rest is tried again.
                say(f"trying again in {TROUBLE_S:g} s: {error}")
                self._sleep(TROUBLE_S)

    def _restart_ended(self) -> None:
        now = time.monotonic()
        changed = False
        for it in self._all():
            if it.process is not None and (code := it.process.poll()) is not None:
                it.delay_s = next_delay_s(it.delay_s, now - it.spawned_at)
                it.restart_at = now + it.delay_s
                it.process = None
                say(f"{it.child.name} ended ({_ending(code)}); restarting in {it.delay_s:.1f} s")
                changed = True
            if it.restart_at is not None and now >= it.restart_at and not self._stopping:
                self._spawn(it)
                it.restarts += 1
                changed = True
        if changed:
            self._note()

    def _note(self) -> None:
        """Note who runs, for `mn runtime status` and for the repair after this process was killed."""
        children = {
            it.child.name: {"pid": it.process.pid, "started": it.started, "restarts": it.restarts}
            for it in self._all()
            if it.process is not None
        }
        me = {"pid": os.getpid(), "started": processes.started(os.getpid())}
        noted = {"supervisor": me, "children": children, "stopping": self._stopping}
        write_private(self._run_dir / "children.json", json.dumps(noted))

    def _stop(self) -> None:
        """End all in the order of `Child.stop_rank`; those of one rank together."""
        self._stopping = True
        try:
            self._note()
        except OSError as error:
            say(f"can't note that it stops: {error}")
        for rank in sorted({it.child.stop_rank for it in self._all()}):
            self._end([it for it in self._all() if it.child.stop_rank == rank])

    def _end(self, group: list[Running]) -> None:
        asked_at = time.monotonic()
        live = [(it, it.process) for it in group if it.process is not None]
        for _, process in live:
            process.terminate()
        while live := [(it, process) for it, process in live if process.poll() is None]:
            deadline = asked_at + min(it.child.stop_s for it, _ in live)
            if time.monotonic() >= deadline or self._hurry:
                for it, process in live:
                    say(f"killing {it.child.name}, which did not end by itself")
                    process.kill()
                    process.wait()
            else:
                self._sleep(deadline - time.monotonic())
        for it in group:
            it.process = None


def _could_not_start(child: Child, what: str) -> str:
    tail = last_lines(child.log)
    said = "\n".join("  " + line for line in tail.splitlines())
    return (
        f"{child.name} {what}.\n{said}\n  All of it: {child.log}" if said else f"{child.name} {what}; it said nothing."
    )


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def say(text: str) -> None:
    """A line for the supervisor's log."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}", file=sys.stderr, flush=True)
