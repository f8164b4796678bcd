"""Archives, made the way that `tar`, `zip` or somebody malicious would make them."""

from __future__ import annotations

import io
import tarfile
import zipfile

MANIFEST = b'{"name": "hello"}'


def tar_of(
    *members: tuple[str | tarfile.TarInfo, bytes],
    mode: str = "w:gz",
    manifest: bool = True,
    format: int = tarfile.PAX_FORMAT,
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in (*([("manifest.json", MANIFEST)] if manifest else []), *members):
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as zipped:
        for name, data in (("manifest.json", MANIFEST), *members):
            zipped.writestr(name, data)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info
