"""Calls of a version with `concurrency` above one: each in a thread, while the main thread reads."""

from __future__ import annotations

from _queue import SimpleQueue
from _thread import allocate_lock, get_ident, start_new_thread

from mn_runner.inside.calls import Call, Seat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mn_runner.inside.serve import Child


class Threads:
    """As many workers as calls may run at once, and one more for each slot that a waiting call lends."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._lock = allocate_lock()
        self._idle: list[SimpleQueue[Call]] = []

    def serve(self) -> None:
        child = self._child
        while not (child.stopping and not child.queue and not child.running.calls):
            if not child.channel.read_idle(calls_run=True):
                child.channel.wait(lambda: child.queue or child.stopping, child.bell, interruptible=False)

    def wake(self) -> None:
        """Start what may start. From any thread."""
        child = self._child
        while True:
            with self._lock:
                call = child.claim() if child.queue and child.can_start() else None
                if call is None:
                    break
                inbox = self._idle.pop() if self._idle else None
            if inbox is not None:
                inbox.put(call)
            else:
                start_new_thread(self._work, (call,))
        child.bell.ring()

    def run_queued(self) -> bool:
        return False

    def _work(self, call: Call) -> None:
        child = self._child
        seat = child.running.seats[get_ident()] = Seat()
        inbox: SimpleQueue[Call] = SimpleQueue()
        while True:
            child.run(call, seat)
            with self._lock:
                surplus = len(self._idle) >= (child.function.concurrency if child.function else 0)
                if not surplus:
                    self._idle.append(inbox)
            self.wake()
            if surplus:
                del child.running.seats[seat.ident]
                return
            call = inbox.get()
