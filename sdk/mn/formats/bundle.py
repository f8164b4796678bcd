"""Bundles as bytes: packing them, unpacking them safely, and the digest that names them.

A bundle is `manifest.json` and regular files beneath `payloads/`. Its digest is the SHA-256 of a canonical list (path,
whether executable, SHA-256 of the bytes), so a tar and a zip of the same files are the same bundle. Explicit folders,
times, owners and other mode bits do not count.

`extract` reads archives that anybody may have made. It trusts no size in a header, writes regular files and folders
only, and does so through descriptors opened beneath the given folder without following links.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from mn.formats.archives import members_of
from mn.formats.errors import InvalidRequest, TooLarge
from mn.formats.paths import MANIFEST, PAYLOADS, PathSet

CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may hold."""

    bytes_max: int = 1 << 30
    """Of all files, unpacked."""
    files_max: int = 20_000
    """Files, and also folders that the archive lists."""
    manifest_bytes_max: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a bundle."""

    path: str
    """With `/`, from the bundle's root: `manifest.json` or `payloads/…`."""
    executable: bool
    sha256: str
    """64 hex digits."""


@dataclass(frozen=True, slots=True)
class Extracted:
    digest: str
    """`sha256:<64 hex digits>`."""
    files: int
    size_bytes: int
    manifest: bytes


def digest_of(entries: Iterable[Entry]) -> str:
    """The digest of a bundle with these files, in whatever order they come."""
    digest = hashlib.sha256(b"mn-bundle-1\n")
    for path, entry in sorted((entry.path.encode(), entry) for entry in entries):
        digest.update(b"%s %s %s\n" % (b"x" if entry.executable else b"-", entry.sha256.encode(), path))
    return f"sha256:{digest.hexdigest()}"


def pack(files: Mapping[str, bytes | Path], manifest: bytes) -> bytes:
    """A tar.gz of these files, by path in the bundle (`payloads/…`). The same files give the same bytes.

    A file given as bytes is not executable; one given as a path is what its owner's mode says.
    Raises InvalidRequest for a path that `extract` would refuse.
    """
    packed = io.BytesIO()
    write_archive(packed, files, manifest)
    return packed.getvalue()


def write_archive(out: IO[bytes], files: Mapping[str, bytes | Path], manifest: bytes) -> None:
    """Like `pack`, but written to a file as it is made."""
    paths = PathSet()
    contents: dict[str, bytes | Path] = {MANIFEST: manifest, **files}
    with (
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(contents, key=str.encode):
            paths.add_file(path)
            _add(tar, path, contents[path])


def _add(tar: tarfile.TarFile, path: str, content: bytes | Path) -> None:
    info = tarfile.TarInfo(path)
    info.mode = 0o644
    if isinstance(content, bytes):
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        return
    with content.open("rb") as file:
        status = os.fstat(file.fileno())
        info.size = status.st_size
        if status.st_mode & stat.S_IXUSR:
            info.mode = 0o755
        tar.addfile(info, file)


def read_folder(folder: Path) -> tuple[dict[str, bytes | Path], bytes]:
    """The files and the manifest of an unpacked bundle, as `pack` takes them.

    Raises InvalidRequest when it has no manifest, or a file that is neither a regular file nor a folder.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise InvalidRequest(f"{folder} has no {MANIFEST}: a bundle is {MANIFEST} and a folder {PAYLOADS}/") from None
    return {path.relative_to(folder).as_posix(): path for path in sorted(_files_below(folder / PAYLOADS))}, manifest


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in (*names, *folders):
            mode = (path := Path(parent, name)).lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InvalidRequest(f"{path} is neither a file nor a folder; a bundle holds nothing else")
            if stat.S_ISREG(mode):
                yield path


def extract(archive: BinaryIO, into: Path, limits: Limits | None = None) -> Extracted:
    """Unpack a tar, tar.gz or zip (told by its first bytes) into a folder that exists and is empty.

    `archive` must be seekable. Files are written with mode 0444 or 0555. On any error all that was written is removed.
    Raises InvalidRequest, naming the member, and TooLarge, naming the limit.
    """
    limits = limits or Limits()
    with _Writer(into) as writer:
        manifest: bytes | None = None
        entries: list[Entry] = []
        size = listed = 0
        paths = PathSet()
        for member in members_of(archive, limits.files_max):
            listed += 1
            if listed > limits.files_max + 1:
                raise TooLarge(f"the archive has more than {limits.files_max} members", limit_files=limits.files_max)
            if member.folder:
                if member.path != ".":
                    paths.add_folder(member.path)
                continue
            paths.add_file(member.path)
            room = limits.bytes_max - size
            kept: list[bytes] | None = [] if member.path == MANIFEST else None
            written, sha256 = writer.write(member.path, member.executable, _bounded(member.chunks, room, limits, kept))
            if kept is not None:
                manifest = b"".join(kept)
            size += written
            entries.append(Entry(member.path, member.executable, sha256))
        if manifest is None:
            raise InvalidRequest(f"the archive has no {MANIFEST} at its top", path=MANIFEST)
        writer.keep()
    return Extracted(digest_of(entries), len(entries), size, manifest)


def _bounded(chunks: Iterable[bytes], room: int, limits: Limits, kept: list[bytes] | None) -> Iterator[bytes]:
    """Pass chunks on, and keep a copy of a manifest's; the bytes that really come are what is counted."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > room:
            raise TooLarge(
                f"the files are larger than {limits.bytes_max} bytes when unpacked", limit_bytes=limits.bytes_max
            )
        if kept is not None:
            if total > limits.manifest_bytes_max:
                raise TooLarge(
                    f"{MANIFEST} is larger than {limits.manifest_bytes_max} bytes",
                    limit_bytes=limits.manifest_bytes_max,
                )
            kept.append(chunk)
        yield chunk


class _Writer:
    """Writes files beneath a folder, and removes them again unless told to keep them."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._made: list[tuple[str, bool]] = []
        self._folders: set[str] = set()
        self._kept = False

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._kept:
                self._remove()
        finally:
            os.close(self._root)

    def keep(self) -> None:
        self._kept = True

    def write(self, path: str, executable: bool, chunks: Iterable[bytes]) -> tuple[int, str]:
        """Write one new file; (bytes, SHA-256 in hex)."""
        folder = self._open_folder(path.rpartition("/")[0])
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path.rpartition("/")[2], flags, 0o600, dir_fd=folder)
        finally:
            os.close(folder)
        self._made.append((path, False))
        digest, size = hashlib.sha256(), 0
        with open(descriptor, "wb", buffering=0) as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
            os.fchmod(descriptor, 0o555 if executable else 0o444)
        return size, digest.hexdigest()

    def _open_folder(self, path: str) -> int:
        """A descriptor of a folder beneath the root, made where it is missing."""
        current = os.dup(self._root)
        walked = ""
        for name in path.split("/") if path else ():
            walked = f"{walked}/{name}" if walked else name
            try:
                if walked not in self._folders:
                    os.mkdir(name, 0o755, dir_fd=current)
                    self._folders.add(walked)
                    self._made.append((walked, True))
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            finally:
                os.close(current)
            current = below
        return current

    def _remove(self) -> None:
        for path, is_folder in reversed(self._made):
            folder = self._open_folder(path.rpartition("/")[0])
            try:
                name = path.rpartition("/")[2]
                os.rmdir(name, dir_fd=folder) if is_folder else os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
