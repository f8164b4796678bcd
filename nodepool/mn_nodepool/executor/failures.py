"""The failure ring: calls that failed, with their input, for a day and within bounds of number and size. For `mn debug`."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path

import msgspec

from mn.formats.errors import NotFound
from mn_nodepool.wire.control import FailureRecord

_NAME = re.compile(r"inv_[0-9A-Za-z.]+\Z")
_decoder = msgspec.msgpack.Decoder(FailureRecord)
_encoder = msgspec.msgpack.Encoder()


class FailureRing:
    """One file per failed call, in a folder that only this node reads."""

    def __init__(self, folder: Path, *, count_max: int, bytes_max: int, keep_s: float) -> None:
        self._folder = folder
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._keep_s = keep_s
        self._sizes: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(folder.glob("inv_*"), key=lambda p: p.stat().st_mtime):
            status = path.stat()
            self._sizes[path.name] = (status.st_size, status.st_mtime)
            self._bytes += status.st_size

    def add(self, record: FailureRecord) -> None:
        """Keep a failure; the oldest go when there are too many."""
        if not _NAME.match(record.invocation) or len(record.invocation) > 200:
            return
        data = _encoder.encode(record)
        if len(data) > self._bytes_max:
            return
        self._drop(record.invocation)
        temporary = self._folder / ".new"
        temporary.write_bytes(data)
        os.replace(temporary, self._folder / record.invocation)
        self._sizes[record.invocation] = (len(data), record.at_ms / 1000)
        self._bytes += len(data)
        self.expire(record.at_ms / 1000)

    def expire(self, now_s: float) -> None:
        """Remove what is too old or too much; `now_s` is seconds since the epoch."""
        while self._sizes:
            name, (_, at) = next(iter(self._sizes.items()))
            if len(self._sizes) <= self._count_max and self._bytes <= self._bytes_max and now_s - at <= self._keep_s:
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        entry = self._sizes.pop(name, None)
        if entry is not None:
            self._bytes -= entry[0]
            (self._folder / name).unlink(missing_ok=True)

    def get(self, invocation: str) -> FailureRecord:
        """Raises NotFound when there is no such failure, or no longer."""
        if invocation not in self._sizes:
            raise NotFound(
                f"no failure of {invocation} is kept here: failed calls are kept for {self._keep_s / 3600:g} h, the last {self._count_max}"
            )
        try:
            return _decoder.decode((self._folder / invocation).read_bytes())
        except (FileNotFoundError, msgspec.DecodeError):
            self._drop(invocation)
            raise NotFound(f"the failure of {invocation} is not readable any more") from None
