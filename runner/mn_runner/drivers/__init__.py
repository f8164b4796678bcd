"""Drivers: ways to isolate a child, behind the contract of `mn_runner.sandbox`."""

from __future__ import annotations

from mn.formats.errors import InvalidRequest
from mn.formats.settings import Settings
from mn_runner.sandbox import Driver


def make_driver(settings: Settings) -> Driver:
    """The driver that the settings name.

    Raises InvalidRequest for a name that there is not, and Refused when it can't work here.
    """
    if settings.driver == "bubblewrap":
        from mn_runner.drivers.bubblewrap import Bubblewrap

        return Bubblewrap(settings.run_dir, tmp_bytes_max=settings.tmp_bytes_max)
    if settings.driver == "host_local":
        from mn_runner.drivers.host_local import HostLocal

        return HostLocal(settings.run_dir)
    raise InvalidRequest(f"there is no driver {settings.driver!r}: use bubblewrap or host_local", path="driver")
