"""How much a sandbox may print. The child keeps the same bound, but user code can write around the child."""

from __future__ import annotations

LINE_COST_BYTES = 32
"""What a line costs besides its text: a flood of empty lines is a flood."""
SLACK = 3
"""How much more than its setting a call may use up, so that the child's own cut, which says so nicely, comes first."""
CUT = b"[output dropped here: more was printed than is kept]\n"


class OutputAllowance:
    """Renewed by every call that starts; what is printed between calls counts for the last one.

    >>> allowance = OutputAllowance(100)
    >>> [allowance.take(text)[:7] for text in (b"a" * 250, b"b" * 250, b"c")]
    [b'aaaaaaa', b'[output', b'']
    """

    __slots__ = ("_left", "_max")

    def __init__(self, bytes_max: int) -> None:
        self._max = self._left = SLACK * bytes_max

    def renew(self) -> None:
        self._left = self._max

    def take(self, text: bytes) -> bytes:
        """What is kept of it: all, a note where the allowance ends, and nothing beyond."""
        left = self._left
        if left <= 0:
            return b""
        self._left = left - len(text) - LINE_COST_BYTES * text.count(b"\n")
        return text if self._left > 0 else CUT
