"""The cluster that this command talks to."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mn.formats.errors import FunctionFailed, MnError
from mn.formats.settings import Settings, read_config

if TYPE_CHECKING:
    from mn.client import Client


def client() -> Client:
    """Of the context in force (see `mn.config`)."""
    from mn.client import Client

    return Client()


def local_client(settings: Settings, api: str) -> Client:
    """Of the runtime in a home, whatever cluster the configuration points to."""
    from mn.client import Client

    return Client(api, read_config(settings.home).get("client", {}).get("key", ""))


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """Around a remote call: an exception of the function itself, of whatever type, becomes FunctionFailed."""
    try:
        yield
    except MnError:
        raise
    except Exception as error:
        failed = FunctionFailed("".join(traceback.format_exception_only(error)).split("\n", 1)[0])
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error
