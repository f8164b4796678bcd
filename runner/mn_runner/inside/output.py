"""What user code prints: text that goes to the node line by line, tagged with the call that printed it and bounded per call."""

from __future__ import annotations

import io
import os

from mn_runner.protocol import HEADER, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from mn_runner.inside.calls import Call, Running
    from mn_runner.inside.channel import Channel

LOG = int(Kind.LOG)
FRAME_BYTES = 32 * 1024
HELD_BYTES = 8 * 1024
"""An unfinished line longer than this goes out as it is."""


class Output(io.TextIOBase):
    """Stands for `sys.stdout` (stream 1) or `sys.stderr` (stream 2)."""

    encoding = "utf-8"
    errors = "backslashreplace"
    newlines = None

    def __init__(self, stream: int, channel: Channel, running: Running) -> None:
        self._stream = stream
        self._channel = channel
        self._running = running
        self._held: dict[int, str] = {}
        self.name = "<stdout>" if stream == 1 else "<stderr>"
        self.mode = "w"
        self.buffer = _Bytes(self)

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._channel.forked:
            os.write(self._stream, text.encode("utf-8", "backslashreplace"))
            return len(text)
        call = self._running.current()
        number = call.number if call else 0
        held = self._held.pop(number, "") + text
        end = held.rfind("\n") + 1
        if len(held) - end > HELD_BYTES:
            end = len(held)
        if end < len(held):
            self._held[number] = held[end:]
        if end:
            self._send(call, held[:end])
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        self.write("".join(lines))

    def flush(self) -> None:
        call = self._running.current() if not self._channel.forked else None
        self.end_of(call)

    def end_of(self, call: Call | None) -> None:
        """Send what `call` left without a newline."""
        if self._held:
            rest = self._held.pop(call.number if call else 0, "")
            if rest:
                self._send(call, rest)

    def fileno(self) -> int:
        return self._stream

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def _send(self, call: Call | None, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if call is not None:
            if call.output_left <= 0:
                return
            if len(data) > call.output_left:
                data = data[: call.output_left] + b"\n[output truncated here: the call printed more than is kept]\n"
                call.output_left = 0
            else:
                call.output_left -= len(data)
        number = call.number if call else 0
        for start in range(0, len(data), FRAME_BYTES):
            part = data[start : start + FRAME_BYTES]
            self._channel.send(HEADER.pack(1 + len(part), LOG, 0, number) + bytes((self._stream,)) + part)


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`: bytes are text in UTF-8 here."""

    def __init__(self, text: Output) -> None:
        self._text = text

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._text.flush()

    def fileno(self) -> int:
        return self._text.fileno()
