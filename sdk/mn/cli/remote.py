"""The client of the cluster that this command talks to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mn.formats.settings import Settings, read_config

if TYPE_CHECKING:
    from mn.client import Client


def client() -> Client:
    """By `MN_URL` and `MN_KEY`, else the configuration in the home."""
    from mn import config
    from mn.client import Client

    context = config.load()
    return Client(context.url, context.key)


def local_client(settings: Settings, api: str) -> Client:
    """Of the runtime in a home, whatever cluster the configuration points to."""
    from mn.client import Client

    return Client(api, read_config(settings.home).get("client", {}).get("key", ""))
