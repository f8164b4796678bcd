"""Calls in the child, who runs them, and how one is interrupted without tearing a frame.

A thread that runs calls has a `Seat`. Its `shield` is zero exactly while user code is on top of its stack, and only then an interruption is
raised there; whatever touches the socket or the child's own state raises the shield first, and what came meanwhile is raised when it falls.
"""

from __future__ import annotations

from _contextvars import ContextVar
from _thread import allocate_lock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

TIMEOUT = 1
CANCELLED = 2
WITHDRAWN = 3


class Interrupted(BaseException):
    """Raised in user code when its call ends from outside. Not an Exception, so that `except Exception` lets it pass."""


class CallTimedOut(Interrupted):
    """The call's deadline passed."""


class CallCancelled(Interrupted):
    """The caller went away."""


class Call:
    """One invocation from its CALL frame to its RESULT."""

    __slots__ = (
        "codec",
        "deadline",
        "depth",
        "id",
        "nested",
        "number",
        "output_left",
        "payload",
        "raised",
        "reason",
        "seat",
        "task",
    )

    def __init__(
        self, number: int, deadline: float, codec: int, depth: int, id: str, payload: bytes, output_left: int
    ) -> None:
        self.number = number
        self.deadline = deadline
        """On `time.monotonic()`; 0: none."""
        self.codec = codec
        self.depth = depth
        self.id = id
        self.payload = payload
        self.output_left = output_left
        self.nested = 0
        """Calls of its own that it waits for; while there are any, its slot is lent."""
        self.seat: Seat | None = None
        self.task: Any = None
        self.reason = 0
        self.raised = False

    def interruption(self) -> Interrupted:
        """The exception for its reason; raised at most once in a call."""
        self.raised = True
        return (
            CallTimedOut("the call's deadline passed") if self.reason == TIMEOUT else CallCancelled("the caller left")
        )


class Seat:
    """A thread's place for calls; they stack up where a waiting call lends its slot to another."""

    __slots__ = ("call", "gate", "ident", "main", "shield")

    def __init__(self, main: bool = False) -> None:
        self.call: Call | None = None
        self.shield = 1
        self.main = main
        self.ident = get_ident()
        self.gate = allocate_lock()

    def __enter__(self) -> Seat:
        """Raise the shield."""
        if self.main:
            self.shield += 1
        else:
            with self.gate:
                self.shield += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Let it fall; raises the interruption that waited for that."""
        self._set_shield(self.shield - 1)

    def arm(self) -> None:
        """User code is next; raises an interruption that came before it."""
        self._set_shield(0)

    def disarm(self) -> None:
        """User code is through: what comes now is too late."""
        self._set_shield(1)
        if not self.main and self.call is not None and self.call.raised:
            # It may have been sent to this thread and not have arrived.
            _raise_in(self.ident, None)

    def _set_shield(self, shield: int) -> None:
        # A thread's shield and its interruption change under the gate, since the main thread interrupts it from outside. The main thread's
        # own come from a signal handler on its stack, which must not wait for a lock that the interrupted code may hold.
        if self.main:
            self.shield = shield
            due = self._is_due()
        else:
            with self.gate:
                self.shield = shield
                due = self._is_due()
                if due and self.call is not None:
                    self.call.raised = True
        if due and self.call is not None:
            raise self.call.interruption()

    def _is_due(self) -> bool:
        call = self.call
        return call is not None and call.reason != 0 and not call.raised and self.shield == 0

    def interrupt(self, call: Call) -> None:
        """Raise in `call`'s user code where that is on top; otherwise its reason waits until it is. Main thread only."""
        if self.call is not call:
            return
        if self.main:
            if self._is_due():
                raise call.interruption()
            return
        with self.gate:
            if self._is_due():
                call.raised = True
                _raise_in(self.ident, CallTimedOut if call.reason == TIMEOUT else CallCancelled)


def _raise_in(ident: int, kind: type[BaseException] | None) -> None:
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind) if kind else None)


class Running:
    """The calls that run here, by number, and which of them a line of output or a nested call belongs to."""

    __slots__ = ("calls", "seats", "task_call", "thread_calls")

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.seats: dict[int, Seat] = {}
        self.thread_calls: dict[int, Call | None] = {}
        """By thread: the call that started it."""
        self.task_call: ContextVar[Call | None] = ContextVar("mn_call", default=None)

    def seat(self) -> Seat:
        """This thread's seat; a fresh one for a thread that user code started."""
        return self.seats.get(get_ident()) or Seat()

    def current(self) -> Call | None:
        """The call that the running code belongs to: this thread's, this task's, that which started this thread, or the only one there is."""
        ident = get_ident()
        seat = self.seats.get(ident)
        if seat is not None and seat.call is not None:
            return seat.call
        call = self.task_call.get() or self.thread_calls.get(ident)
        if call is None or call.number not in self.calls:
            return next(iter(self.calls.values()), None) if len(self.calls) == 1 else None
        return call

    def follow_threads(self) -> None:
        """Remember for each thread that user code starts which call started it. To be done before `threading` is imported."""
        import _thread

        for name in ("start_new_thread", "start_joinable_thread"):
            start = getattr(_thread, name, None)
            if start is not None:
                setattr(_thread, name, self._following(start))

    def _following(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def start_followed(function: Callable[..., Any], *rest: Any, **options: Any) -> Any:
            call = self.current()

            def run(*args: Any, **kwargs: Any) -> None:
                self.thread_calls[get_ident()] = call
                try:
                    function(*args, **kwargs)
                finally:
                    del self.thread_calls[get_ident()]

            return start(run, *rest, **options)

        return start_followed

    def lent(self) -> int:
        """Calls that wait for calls of their own."""
        return sum(1 for call in list(self.calls.values()) if call.nested)
