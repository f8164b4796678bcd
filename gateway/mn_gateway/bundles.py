"""A bundle's way from a request's body to its place in the home, and back. Blocking; runs in worker threads."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import IO, Any, cast

from mn.formats.bundle import Extracted, Limits, extract, read_folder, write_archive
from mn.formats.errors import Internal, InvalidRequest
from mn.formats.manifest import FunctionSpec, parse_manifest
from mn.formats.settings import Settings

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
INCOMING = ".incoming-"
PIECE_BYTES = 256 * 1024
PIECES_MAX = 8
"""Packed pieces that wait for a slow client."""
PUT_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Received:
    """A bundle in its place."""

    extracted: Extracted
    functions: tuple[FunctionSpec, ...]
    new: bool
    """It was not there before."""


def folder_of(settings: Settings, digest: str) -> Path:
    """Where a bundle's files lie. The digest must have been checked against `DIGEST`."""
    return settings.bundles_dir / digest.replace(":", "-")


def incoming(settings: Settings) -> Path:
    """A fresh folder for one upload, in the file system in which bundles end up."""
    settings.bundles_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{INCOMING}{os.getpid()}-", dir=settings.bundles_dir))


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def sweep(settings: Settings) -> None:
    """Remove what uploads of processes that are gone have left."""
    for folder in settings.bundles_dir.glob(INCOMING + "*"):
        pid = folder.name[len(INCOMING) :].partition("-")[0]
        if not pid.isdigit() or int(pid) == os.getpid() or not _alive(int(pid)):
            discard(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def take_in(settings: Settings, upload: Path) -> Received:
    """Unpack `upload/archive`, check it and move it to its place.

    Raises InvalidRequest or TooLarge; then nothing is left but `upload`, which is the caller's to discard.
    """
    content = upload / "content"
    content.mkdir(mode=0o755)
    limits = Limits(bytes_max=settings.bundle_unpacked_bytes_max, files_max=settings.bundle_files_max)
    with open(upload / "archive", "rb") as archive:
        extracted = extract(archive, content, limits)
    functions = parse_manifest(extracted.manifest).functions
    for index, spec in enumerate(functions):
        _check_entry(content, spec, f"functions[{index}].entry" if len(functions) > 1 else "entry")
    _sync(content)
    place = folder_of(settings, extracted.digest)
    try:
        os.rename(content, place)
    except OSError:
        if not (place / "manifest.json").is_file():
            raise
        return Received(extracted, functions, new=False)
    _sync_folder(settings.bundles_dir)
    return Received(extracted, functions, new=True)


def _check_entry(content: Path, spec: FunctionSpec, path: str) -> None:
    module, _, rest = spec.entry.partition(":")
    payloads = content / "payloads"
    if module == "pickle":
        candidates = [payloads / rest]
    else:
        stem = payloads.joinpath(*module.split("."))
        candidates = [stem.with_name(stem.name + ".py"), stem / "__init__.py"]
    if not any(candidate.is_file() for candidate in candidates):
        expected = " or ".join(str(candidate.relative_to(content)) for candidate in candidates)
        raise InvalidRequest(f"manifest.json: {path}: {spec.entry!r} needs {expected} in the bundle", path=path)


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Stopped(Exception):
    """Nobody reads any more."""


class _Pipe(io.RawIOBase):
    """What the packing thread writes to: a bounded queue of pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: Queue[bytes | BaseException | None] = Queue(PIECES_MAX)
        self.stopped = Event()
        self._buffer = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._buffer += data
        if len(self._buffer) >= PIECE_BYTES:
            self.hand_over()
        return len(data)

    def hand_over(self) -> None:
        if self._buffer:
            piece, self._buffer = bytes(self._buffer), bytearray()
            self.put(piece)

    def put(self, piece: bytes | BaseException | None) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(Full):
                self.pieces.put(piece, timeout=PUT_POLL_S)
                return
        raise _Stopped


def packed(folder: Path) -> Iterator[bytes]:
    """A bundle as tar.gz, in pieces, made while it is read."""
    pipe = _Pipe()
    thread = Thread(target=_pack_into, args=(pipe, folder), name="pack", daemon=True)
    thread.start()
    try:
        while True:
            try:
                piece = pipe.pieces.get(timeout=PUT_POLL_S)
            except Empty:
                if not thread.is_alive() and pipe.pieces.empty():
                    raise Internal("packing the bundle ended without a word") from None
                continue
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        pipe.stopped.set()


def _pack_into(pipe: _Pipe, folder: Path) -> None:
    try:
        try:
            files, manifest = read_folder(folder)
            write_archive(cast(IO[bytes], pipe), files, manifest)
            pipe.hand_over()
            pipe.put(None)
        except _Stopped:
            raise
        except Exception as error:  # it is raised again by whoever reads
            pipe.put(error)
    except _Stopped:
        return
