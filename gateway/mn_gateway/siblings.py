"""Gateway processes tell each other their numbers over Unix sockets, so that any one answers a scrape for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from mn_gateway.metrics import Snapshot

SNAPSHOT_BYTES_MAX = 16 << 20
SIBLINGS_MAX = 64
ASK_TIMEOUT_S = 1.0


def socket_path(run_dir: Path, index: int) -> Path:
    """Short, since a socket's path ends at 107 bytes."""
    return run_dir / f"gw-{index}.sock"


class Siblings:
    """Serves this process's snapshot, and gathers those of the others."""

    def __init__(self, run_dir: Path, index: int, snapshot: Callable[[], Snapshot]) -> None:
        self._path = socket_path(run_dir, index)
        self._snapshot = snapshot
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        self._path.chmod(0o600)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._path.unlink(missing_ok=True)

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(msgspec.msgpack.encode(self._snapshot()))
            await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()

    async def gather(self) -> list[Snapshot]:
        """This process's snapshot and those of all siblings that answer; one that is restarting is left out."""
        others = [path for path in sorted(self._path.parent.glob("gw-*.sock")) if path != self._path][:SIBLINGS_MAX]
        answers = await asyncio.gather(*(_ask(path) for path in others))
        return [self._snapshot(), *(answer for answer in answers if answer is not None)]


async def _ask(path: Path) -> Snapshot | None:
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=SNAPSHOT_BYTES_MAX)
            try:
                data = await reader.read(SNAPSHOT_BYTES_MAX)
                while chunk := await reader.read(SNAPSHOT_BYTES_MAX):
                    data += chunk
                    if len(data) > SNAPSHOT_BYTES_MAX:
                        return None
            finally:
                writer.close()
        return msgspec.msgpack.decode(data, type=Snapshot)
    except (OSError, TimeoutError, msgspec.MsgspecError):
        return None
