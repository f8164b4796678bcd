"""`python -P -m mn_gateway.serve`: a gateway process, with its settings in the environment."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import uvloop

from mn.formats.settings import Settings
from mn_gateway.server import run
from mn_nodepool.client import PoolClient
from mn_nodepool.logging import configure_logging


def main() -> int:
    settings = Settings.load()
    index = int(os.environ.get("MN_GATEWAY_INDEX", "1"))
    configure_logging(settings.log_level)
    # What the server itself would say of each connection is noise; what fails here is told by the gateway.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    uvloop.run(_serve(settings, index))
    return 0


async def _serve(settings: Settings, index: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run(settings, index, PoolClient(settings, f"{settings.node_name}/gateway-{index}"), stop)


if __name__ == "__main__":
    sys.exit(main())
