"""Records as bytes: JSON with the version of their schema."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from mn.formats.errors import Internal

SCHEMA = 1
T = TypeVar("T", bound=msgspec.Struct)


class Kind(Generic[T]):
    """One kind of record: its name in the store and its type."""

    def __init__(self, name: str, type_: type[T]) -> None:
        self.name = name
        self._type = type_

    def dump(self, value: T) -> bytes:
        return msgspec.json.encode({"schema": SCHEMA, "data": value})

    def load(self, data: bytes) -> T:
        """Raises Internal for a record that this version cannot read."""
        try:
            envelope: dict[str, Any] = msgspec.json.decode(data)
            if envelope["schema"] != SCHEMA:
                raise Internal(f"a {self.name} record has schema {envelope['schema']}, this version reads {SCHEMA}")
            return msgspec.convert(envelope["data"], self._type)
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise Internal(f"a {self.name} record cannot be read: {error}") from None
