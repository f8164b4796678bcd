"""What a bundle's archive may be: the same files are the same bundle, and nothing gets outside, whatever it says."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mn.formats.bundle import Extracted, Limits, extract, pack, read_folder
from mn.formats.errors import InvalidRequest, MnError, TooLarge
from tests.support.archives import MANIFEST, special, tar_of, zip_of, zip_special

FILES = {
    "payloads/hello.py": b"def f(): return 1\n",
    "payloads/pkg/__init__.py": b"",
    "payloads/pkg/dätä.bin": bytes(range(256)) * 3000,
}


def unpack(archive: bytes, folder: Path, **limits: int) -> Extracted:
    folder.mkdir()
    return extract(io.BytesIO(archive), folder, Limits(**limits))


def test_packing_is_deterministic_and_unpacking_gives_the_files_back(tmp_path: Path) -> None:
    archive = pack(FILES, MANIFEST)
    assert archive == pack(dict(reversed(FILES.items())), MANIFEST)
    found = unpack(archive, tmp_path / "out")
    assert (found.files, found.manifest) == (4, MANIFEST)
    assert found.size_bytes == sum(map(len, FILES.values())) + len(MANIFEST)
    for path, data in FILES.items():
        assert (tmp_path / "out" / path).read_bytes() == data
        assert stat.S_IMODE((tmp_path / "out" / path).stat().st_mode) == 0o444


def test_tar_zip_and_folder_of_the_same_files_are_the_same_bundle(tmp_path: Path) -> None:
    digests = {
        unpack(pack(FILES, MANIFEST), tmp_path / "a").digest,
        unpack(tar_of(*FILES.items(), mode="w"), tmp_path / "b").digest,
        unpack(tar_of(*FILES.items(), format=tarfile.GNU_FORMAT), tmp_path / "c").digest,
        unpack(zip_of(*FILES.items()), tmp_path / "d").digest,
        unpack(pack(*read_folder(tmp_path / "a")), tmp_path / "e").digest,
    }
    assert len(digests) == 1
    assert next(iter(digests)).startswith("sha256:")


def test_an_executable_file_stays_one_and_makes_another_bundle(tmp_path: Path) -> None:
    info = tarfile.TarInfo("payloads/run.sh")
    info.mode = 0o755
    found = unpack(tar_of((info, b"#!")), tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a/payloads/run.sh").stat().st_mode) == 0o555
    assert unpack(zip_of((zip_special("payloads/run.sh", 0o100755), b"#!")), tmp_path / "b").digest == found.digest
    assert unpack(tar_of(("payloads/run.sh", b"#!")), tmp_path / "c").digest != found.digest
    assert unpack(pack(*read_folder(tmp_path / "a")), tmp_path / "d").digest == found.digest


def test_what_tar_writes_for_a_dot_folder_is_read(tmp_path: Path) -> None:
    archive = tar_of(
        (special("./", tarfile.DIRTYPE), b""), (special("./payloads/", tarfile.DIRTYPE), b""), ("./payloads/a.py", b"1")
    )
    assert unpack(archive, tmp_path / "out").files == 2


def test_long_names_are_read_in_both_formats(tmp_path: Path) -> None:
    name = "payloads/" + "/".join(["x" * 100] * 5)
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        assert unpack(tar_of((name, b"1"), format=form), tmp_path / str(number)).files == 2


def cut(archive: bytes, keep: float) -> bytes:
    return archive[: int(len(archive) * keep)]


def gzip_bomb() -> bytes:
    info = tarfile.TarInfo("payloads/zeros")
    info.size = 64 << 20
    head = tarfile.TarInfo("manifest.json")
    head.size = 2
    return gzip.compress(head.tobuf() + b"{}".ljust(512, b"\0") + info.tobuf() + bytes(info.size) + bytes(1024))


def lying_zip() -> bytes:
    """The directory says one byte, the data are many."""
    archive = bytearray(zip_of(("payloads/a", b"\0" * 100_000)))
    where = archive.rindex(b"PK\x01\x02")
    struct.pack_into("<I", archive, where + 24, 1)
    return bytes(archive)


def sparse() -> bytes:
    info = tarfile.TarInfo("payloads/sparse")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return tar_of((info, b"x"))


def pax_names(path: str) -> bytes:
    info = tarfile.TarInfo("payloads/fine")
    info.pax_headers = {"path": path}
    return tar_of((info, b"x"))


def huge_extended_header() -> bytes:
    info = special("x", tarfile.XHDTYPE)
    return tar_of((info, b"0" * (1 << 20)))


NASTY: dict[str, Callable[[], bytes]] = {
    "absolute": lambda: tar_of(("/payloads/a", b"x")),
    "absolute pax": lambda: pax_names("/tmp/mn-escape"),
    "parent": lambda: tar_of(("payloads/../../a", b"x")),
    "parent pax": lambda: pax_names("payloads/../../a"),
    "parent zip": lambda: zip_of(("payloads/../../a", b"x")),
    "absolute zip": lambda: zip_of(("/etc/passwd", b"x")),
    "backslash": lambda: zip_of(("payloads\\..\\a", b"x")),
    "inner dot": lambda: tar_of(("payloads/./a", b"x")),
    "double slash": lambda: tar_of(("payloads//a", b"x")),
    "symlink": lambda: tar_of((special("payloads/a", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "symlink then file": lambda: tar_of((special("payloads/a", tarfile.SYMTYPE, "/tmp"), b""), ("payloads/a/b", b"x")),
    "hard link": lambda: tar_of((special("payloads/a", tarfile.LNKTYPE, "manifest.json"), b"")),
    "device": lambda: tar_of((special("payloads/a", tarfile.CHRTYPE), b"")),
    "fifo": lambda: tar_of((special("payloads/a", tarfile.FIFOTYPE), b"")),
    "sparse": sparse,
    "zip symlink": lambda: zip_of((zip_special("payloads/a", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "zip device": lambda: zip_of((zip_special("payloads/a", stat.S_IFBLK | 0o777), b"")),
    "duplicate": lambda: tar_of(("payloads/a", b"x"), ("payloads/a", b"y")),
    "duplicate manifest": lambda: tar_of(("manifest.json", b"x")),
    "case": lambda: tar_of(("payloads/A.py", b"x"), ("payloads/a.py", b"y")),
    "case of a folder": lambda: tar_of(("payloads/A/x", b"x"), ("payloads/a/y", b"y")),
    "unicode forms": lambda: tar_of(("payloads/\u00e9", b"x"), ("payloads/e\u0301", b"y")),
    "file and folder": lambda: tar_of(("payloads/a", b"x"), ("payloads/a/b", b"y")),
    "folder and file": lambda: tar_of(("payloads/a/b", b"x"), ("payloads/a", b"y")),
    "control character": lambda: tar_of(("payloads/a\nb", b"x")),
    "escape character": lambda: tar_of(("payloads/\x1b[2J", b"x")),
    "long part": lambda: tar_of(("payloads/" + "x" * 256, b"x")),
    "long path": lambda: tar_of(("payloads/" + "/".join(["x" * 200] * 6), b"x")),
    "deep": lambda: tar_of(("payloads" + "/a" * 40, b"x")),
    "outside payloads": lambda: tar_of(("setup.py", b"x")),
    "payloads is a file": lambda: tar_of(("payloads", b"x")),
    "no manifest": lambda: tar_of(("payloads/a", b"x"), manifest=False),
    "manifest is a folder": lambda: tar_of((special("manifest.json", tarfile.DIRTYPE), b""), manifest=False),
    "cut tar.gz": lambda: cut(tar_of(("payloads/a", os.urandom(50_000))), 0.7),
    "cut gzip trailer": lambda: tar_of(("payloads/a", b"x"))[:-4],
    "cut tar": lambda: tar_of(("payloads/a", os.urandom(50_000)), mode="w")[:20_000],
    "cut zip": lambda: cut(zip_of(("payloads/a", os.urandom(50_000))), 0.7),
    "tar without end": lambda: tar_of(("payloads/a", b"x"), mode="w")[: 4 * 512],
    "tar with more behind": lambda: tar_of(("payloads/a", b"x"), mode="w") + b"x",
    "huge extended header": huge_extended_header,
    "global rename": lambda: tar_of((special("g", tarfile.XGLTYPE), b"15 path=payload\n")),
    "lying zip": lying_zip,
    "lzma zip": lambda: zip_of(("payloads/a", b"x"), method=zipfile.ZIP_LZMA),
    "nothing": lambda: b"",
    "text": lambda: b"hello" * 500,
    "gzip of text": lambda: gzip.compress(b"hello" * 500),
}


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_archive_is_refused_in_words_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidRequest, TooLarge)) as refused:
        unpack(NASTY[name](), tmp_path / "out")
    assert len(refused.value.detail) > 15
    assert [path for path in tmp_path.rglob("*") if path != tmp_path / "out"] == []


def test_a_refusal_names_the_member(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"payloads/\.\./\.\./a"):
        unpack(tar_of(("payloads/../../a", b"x")), tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "limits"),
    [
        (gzip_bomb, {"bytes_max": 1 << 20}),
        (lambda: zip_of(("payloads/a", bytes(4 << 20))), {"bytes_max": 1 << 20}),
        (lambda: tar_of(*((f"payloads/{n}", b"") for n in range(60))), {"files_max": 50}),
        (lambda: zip_of(*((f"payloads/{n}", b"") for n in range(60))), {"files_max": 50}),
        (lambda: tar_of(*((special(f"payloads/{n}", tarfile.DIRTYPE), b"") for n in range(60))), {"files_max": 50}),
        (lambda: tar_of(*((special("g", tarfile.XGLTYPE), b"") for n in range(300))), {"files_max": 50}),
        (lambda: zip_of(*((f"payloads/{n:0>250}", b"") for n in range(60))), {"files_max": 50}),
        (lambda: tar_of(("payloads/a", b"x")), {"manifest_bytes_max": 3}),
    ],
)
def test_limits_count_what_really_comes(make: Callable[[], bytes], limits: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(TooLarge) as refused:
        unpack(make(), tmp_path / "out", **limits)
    assert any(key.startswith("limit_") for key in refused.value.extra)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_planted_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/payloads").symlink_to(outside)
    with pytest.raises(OSError):
        extract(io.BytesIO(pack(FILES, MANIFEST)), tmp_path / "out")
    assert list(outside.iterdir()) == []


def test_packing_refuses_what_unpacking_would(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    (tmp_path / "payloads").mkdir()
    (tmp_path / "payloads/link").symlink_to("/etc/passwd")
    with pytest.raises(MnError, match="link"):
        read_folder(tmp_path)
    with pytest.raises(InvalidRequest, match=r"twice|case"):
        pack({"payloads/a": b"", "payloads/A": b""}, MANIFEST)
