"""Folders of sandboxes: filled by hard links, removed without following anything that a sandbox planted."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_readable(folder: Path) -> None:
    """A folder that a sandbox's own uid can read, whatever this process's umask."""
    folder.mkdir()
    folder.chmod(0o755)


def fill(source: Path, target: Path) -> None:
    """Put the regular files and directories beneath `source` into `target`, which exists; links and anything else are left out.

    Files are hard links where that gives a file that everybody may read; a private or foreign one is copied.
    """
    for entry in os.scandir(source):
        place = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            make_readable(place)
            fill(Path(entry.path), place)
        elif entry.is_file(follow_symlinks=False):
            _put_file(entry, place)


def _put_file(entry: os.DirEntry[str], place: Path) -> None:
    mode = entry.stat(follow_symlinks=False).st_mode
    if mode & 0o444 == 0o444:
        try:
            os.link(entry.path, place, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
        else:
            return
    shutil.copyfile(entry.path, place, follow_symlinks=False)
    place.chmod(0o555 if mode & 0o100 else 0o444)


def remove(parent: Path, name: str) -> None:
    """Remove `parent/name` and all beneath, whatever it is, through descriptors and without following links. Idempotent."""
    try:
        folder = os.open(parent, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        _remove_entry(folder, name)
    finally:
        os.close(folder)


def _remove_entry(folder: int, name: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
            return
        inner = os.open(name, _DIRECTORY, dir_fd=folder)
    except FileNotFoundError:
        return
    except PermissionError:
        # A folder that its owner made unreadable; never a link, or the open would have failed otherwise.
        os.chmod(name, 0o700, dir_fd=folder)
        inner = os.open(name, _DIRECTORY, dir_fd=folder)
    try:
        os.fchmod(inner, 0o700)
        for entry in os.listdir(inner):
            _remove_entry(inner, entry)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=folder)
