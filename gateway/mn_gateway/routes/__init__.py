"""Every endpoint, in the order in which the documentation shows them."""

from __future__ import annotations

from mn_gateway.endpoints import Endpoint
from mn_gateway.routes import bundles, functions, invocations, keys, nodes, system

ENDPOINTS: tuple[Endpoint, ...] = (
    *bundles.ENDPOINTS,
    *functions.ENDPOINTS,
    *invocations.ENDPOINTS,
    *keys.ENDPOINTS,
    *nodes.ENDPOINTS,
    *system.ENDPOINTS,
)
