"""Which paths a bundle may have. Pure, and the same for packing and unpacking."""

from __future__ import annotations

import unicodedata

from mn.formats.errors import InvalidRequest

MANIFEST = "manifest.json"
PAYLOADS = "payloads"
PATH_BYTES_MAX = 1024
NAME_BYTES_MAX = 255
DEPTH_MAX = 32


class PathSet:
    """The paths of one bundle so far. Two that a file system which ignores case would confuse can't both be in it."""

    __slots__ = ("_kinds", "_spelling")

    def __init__(self) -> None:
        self._spelling: dict[str, str] = {}
        self._kinds: dict[str, bool] = {}

    def add_file(self, path: str) -> None:
        """Raises InvalidRequest when the path is not allowed or is there already."""
        check_path(path)
        if path != MANIFEST and not path.startswith(PAYLOADS + "/"):
            raise _refused(path, f"a bundle holds {MANIFEST} and files beneath {PAYLOADS}/, and nothing else")
        self._add_parents(path)
        if path in self._kinds:
            raise _refused(path, "it is there twice")
        self._add(path, is_folder=False)

    def add_folder(self, path: str) -> None:
        """Raises InvalidRequest when the path is not allowed or is a file."""
        check_path(path)
        if path != PAYLOADS and not path.startswith(PAYLOADS + "/"):
            raise _refused(path, f"a bundle has no folder but {PAYLOADS}/ at its top")
        self._add_parents(path)
        self._add(path, is_folder=True)

    def _add_parents(self, path: str) -> None:
        end = path.find("/")
        while end >= 0:
            self._add(path[:end], is_folder=True)
            end = path.find("/", end + 1)

    def _add(self, path: str, *, is_folder: bool) -> None:
        if (known := self._kinds.get(path)) is not None:
            if known != is_folder:
                raise _refused(path, "it is there both as a file and as a folder")
            return
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if (other := self._spelling.setdefault(folded, path)) != path:
            raise _refused(path, f"it differs from {other!r} in case or in the writing of accents only")
        self._kinds[path] = is_folder


def check_path(path: str) -> None:
    """Raise InvalidRequest, naming the path, unless it stays beneath the root and every system can write it."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise _refused(path, "its name is not UTF-8") from None
    if size > PATH_BYTES_MAX:
        raise _refused(path, f"its path has {size} bytes, over {PATH_BYTES_MAX}")
    if path.startswith("/"):
        raise _refused(path, "its path is absolute")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029\\" for c in path):
        raise _refused(path, "its path has a control character or a backslash")
    parts = path.split("/")
    if len(parts) > DEPTH_MAX:
        raise _refused(path, f"it lies {len(parts)} folders deep, over {DEPTH_MAX}")
    for part in parts:
        if part in ("", ".", ".."):
            raise _refused(path, f"its path has a part {part!r}")
        if len(part.encode()) > NAME_BYTES_MAX:
            raise _refused(path, f"a part of its path has over {NAME_BYTES_MAX} bytes")


def _refused(path: str, why: str) -> InvalidRequest:
    shown = path if len(path) <= 200 else path[:200] + "…"
    return InvalidRequest(f"bundle member {shown!r}: {why}", path=shown.encode("utf-8", "backslashreplace").decode())
