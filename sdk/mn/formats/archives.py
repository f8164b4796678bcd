"""Tar, tar.gz and zip files as a stream of members, for archives that anybody may have made.

Only headers' meaning is taken from `tarfile` and `zipfile`; what they would do with links, devices, sparse files and
extended headers is refused here, and nothing of an archive is held in memory but one header or one chunk of data.
"""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

from mn.formats.errors import InvalidRequest, TooLarge

CHUNK_BYTES = 256 * 1024
EXTENDED_HEADER_BYTES_MAX = 64 * 1024
"""Of a tar's pax or long-name header."""
HEADERS_PER_FILE_MAX = 3
PADDING_BYTES_MAX = 1 << 20
"""Zeros after the end of a tar."""
ZIP_ENTRY_BYTES = 256
"""What a zip's directory may take per file, on average: it is read as a whole."""
_BLOCK = 512
_T = TypeVar("_T")
_UNREADABLE = (
    EOFError,
    OSError,
    zlib.error,
    zipfile.BadZipFile,
    struct.error,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)


class Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder. `chunks` must be read to its end before the next member is asked for."""

    path: str
    folder: bool
    executable: bool
    chunks: Iterator[bytes]


def members_of(archive: BinaryIO, files_max: int) -> Iterator[Member]:
    """The members, in the archive's order; what kind of archive it is, its first bytes tell.

    Raises InvalidRequest for a member that is neither file nor folder and for an archive that is damaged or cut off.
    """
    archive.seek(0)
    magic = archive.read(_BLOCK)
    archive.seek(0)
    if magic[:2] == b"\x1f\x8b":
        members = _tar_members(gzip.GzipFile(fileobj=archive, mode="rb"), files_max)
    elif magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        members = _zip_members(archive, files_max)
    elif magic[257:262] == b"ustar" or _is_old_tar(magic):
        members = _tar_members(archive, files_max)
    else:
        raise InvalidRequest("the body is neither a tar, a tar.gz nor a zip file")
    yield from _explained(members)


def _explained(parts: Iterator[_T]) -> Iterator[_T]:
    """The same parts; what the readers raise for damage becomes InvalidRequest."""
    try:
        yield from parts
    except _UNREADABLE as error:
        raise InvalidRequest(f"the archive is damaged or cut off: {error}") from None


def _is_old_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _tar_members(stream: Reader, files_max: int) -> Iterator[Member]:
    extended: dict[str, str] = {}
    for _ in range(HEADERS_PER_FILE_MAX * (files_max + 2)):
        block = _exactly(stream, _BLOCK)
        if not block.strip(b"\0"):
            _check_padding(stream)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError):
            raise InvalidRequest("the archive is damaged: a tar header is not valid") from None
        if info.size < 0:
            raise InvalidRequest(f"archive member {info.name!r}: its size is negative")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
            extended |= _extended_header(info, _padded(stream, info.size))
            continue
        yield (member := _tar_member(stream, info, extended))
        for _ in member.chunks:
            raise InvalidRequest(f"archive member {member.path!r}: a folder has no contents")
        extended = {}
    raise TooLarge(
        f"the archive has more than {HEADERS_PER_FILE_MAX} headers for each of {files_max} files", limit_files=files_max
    )


def _tar_member(stream: Reader, info: tarfile.TarInfo, extended: dict[str, str]) -> Member:
    name = extended.get("path", info.name)
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or "GNU.sparse" in extended:
        raise InvalidRequest(
            f"archive member {name!r}: it is neither a file nor a folder, and a bundle holds nothing else"
        )
    size = info.size
    if "size" in extended:
        if not extended["size"].isdecimal() or len(extended["size"]) > 15:
            raise InvalidRequest(f"archive member {name!r}: its size is not valid")
        size = int(extended["size"])
    folder = info.type == tarfile.DIRTYPE
    return Member(
        _relative(name, folder),
        folder,
        bool(info.mode & stat.S_IXUSR) and not folder,
        _explained(_tar_chunks(stream, size)),
    )


def _tar_chunks(stream: Reader, size: int) -> Iterator[bytes]:
    left = size
    while left:
        chunk = stream.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise EOFError("it ends within a file")
        left -= len(chunk)
        yield chunk
    if size % _BLOCK:
        _exactly(stream, _BLOCK - size % _BLOCK)


def _extended_header(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """The keywords of a pax header, or the path of a GNU long-name header.

    A global header (`git archive` writes one, with a comment) must not rename files.
    """
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "strict")}
    keywords: dict[str, str] = {}
    position = 0
    while position < len(data):
        length, space, _ = data[position : position + 20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data) - position:
            raise InvalidRequest("the archive is damaged: a tar's extended header is not valid")
        record = data[position + len(length) + 1 : position + int(length)]
        key, equals, value = record.partition(b"=")
        if not equals or value[-1:] != b"\n":
            raise InvalidRequest("the archive is damaged: a tar's extended header is not valid")
        if (word := b"GNU.sparse" if key.startswith(b"GNU.sparse") else key) in (b"path", b"size", b"GNU.sparse"):
            keywords[word.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        position += int(length)
    if info.type == tarfile.XGLTYPE:
        if keywords:
            raise InvalidRequest("the archive has a global header that renames or resizes files")
        return {}
    return keywords


def _padded(stream: Reader, size: int) -> bytes:
    if size > EXTENDED_HEADER_BYTES_MAX:
        raise TooLarge(
            f"a tar's extended header is larger than {EXTENDED_HEADER_BYTES_MAX} bytes",
            limit_bytes=EXTENDED_HEADER_BYTES_MAX,
        )
    return _exactly(stream, size + -size % _BLOCK)[:size]


def _check_padding(stream: Reader) -> None:
    """Read to the very end: it is there that a gzip's checksum is, and nothing else may be."""
    padding = 0
    while chunk := stream.read(CHUNK_BYTES):
        padding += len(chunk)
        if chunk.strip(b"\0") or padding > PADDING_BYTES_MAX:
            raise InvalidRequest("the archive goes on after its end")


def _exactly(stream: Reader, size: int) -> bytes:
    data = stream.read(size)
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise EOFError("it ends too early")
        data += more
    return data


def _zip_members(archive: BinaryIO, files_max: int) -> Iterator[Member]:
    _check_zip_directory(archive, files_max)
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            name = info.orig_filename
            if name != info.filename:
                raise InvalidRequest(f"archive member {name!r}: its name is ambiguous")
            mode = info.external_attr >> 16
            kind = stat.S_IFMT(mode)
            folder = name.endswith("/")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind and (kind == stat.S_IFDIR) != folder):
                raise InvalidRequest(
                    f"archive member {name!r}: it is neither a file nor a folder, and a bundle holds nothing else"
                )
            if info.flag_bits & 1:
                raise InvalidRequest(f"archive member {name!r}: it is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidRequest(f"archive member {name!r}: it is compressed by a method other than deflate")
            yield Member(
                _relative(name, folder),
                folder,
                bool(mode & stat.S_IXUSR) and not folder,
                _explained(_zip_chunks(zipped, info)),
            )


def _zip_chunks(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    total = 0
    with zipped.open(info) as file:
        while chunk := file.read(CHUNK_BYTES):
            total += len(chunk)
            yield chunk
    if total != info.file_size:
        raise EOFError(f"{info.filename!r} has {total} bytes instead of {info.file_size}")


def _check_zip_directory(archive: BinaryIO, files_max: int) -> None:
    """Refuse a directory that would take much memory: `zipfile` reads it as a whole, whatever it states."""
    size = archive.seek(0, io.SEEK_END)
    archive.seek(max(0, size - 22 - 0xFFFF - 20))
    tail = archive.read()
    start = len(tail) - 22
    if tail[start : start + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < 22:
        raise InvalidRequest("the archive is damaged or cut off: a zip's directory is missing")
    if start >= 20 and tail[start - 20 : start - 16] == b"PK\x06\x07":
        raise InvalidRequest("zip64 archives are not read; make a tar.gz")
    directory_bytes_max = ZIP_ENTRY_BYTES * (files_max + 1)
    if struct.unpack_from("<I", tail, start + 12)[0] > directory_bytes_max:
        raise TooLarge(
            f"the zip's directory is larger than {directory_bytes_max} bytes, too many or too long names",
            limit_bytes=directory_bytes_max,
        )
    archive.seek(0)


def _relative(name: str, folder: bool) -> str:
    """The path without what `tar` and `zip` put around it: a leading `./`, a folder's last slash."""
    while name.startswith("./") and len(name) > 2:
        name = name[2:]
    return name[:-1] if folder and name.endswith("/") and len(name) > 1 else name
