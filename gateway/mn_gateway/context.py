"""What the handlers of one gateway process share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from mn.formats.settings import Settings
from mn_gateway.access import Access, Sources
from mn_gateway.bodies import Budget
from mn_gateway.metrics import Metrics, Snapshot
from mn_gateway.pool import Pool
from mn_gateway.siblings import Siblings
from mn_gateway.watch import DisconnectWatch

UPLOADS_MAX = 4
BODIES_PER_QUEUE = 2
"""Bodies being read may hold this many times what one function's queue may."""


@dataclass(slots=True)
class Context:
    settings: Settings
    pool: Pool
    access: Access
    sources: Sources
    metrics: Metrics
    watch: DisconnectWatch
    bodies: Budget
    siblings: Siblings
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS_MAX))
    """Held while a bundle is received and unpacked."""
    draining: bool = field(default=False)
    """The process is stopping: not ready, while what runs goes on."""

    @classmethod
    def of(cls, settings: Settings, pool: Pool, index: int = 1) -> Context:
        metrics = Metrics()

        def snapshot() -> Snapshot:
            dispatcher = pool.dispatcher
            return metrics.snapshot(
                {
                    "queued_calls": dispatcher.queued_calls,
                    "queued_bytes": dispatcher.queued_bytes,
                    "running_calls": dispatcher.running_calls,
                    "connected": int(pool.connected),
                }
            )

        return cls(
            settings=settings,
            pool=pool,
            access=Access(settings, pool.directory),
            sources=Sources(settings),
            metrics=metrics,
            watch=DisconnectWatch(pool.dispatcher),
            bodies=Budget(max(settings.queue_bytes_max, settings.payload_bytes_max) * BODIES_PER_QUEUE),
            siblings=Siblings(settings.run_dir, index, snapshot),
        )
