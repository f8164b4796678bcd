"""`/v1/nodes`: the machines of the pool."""

from __future__ import annotations

from starlette.responses import Response

from mn_gateway.endpoints import Endpoint, Exchange, json_response
from mn_nodepool.wire.control import Empty, NodeList


async def list_all(exchange: Exchange) -> Response:
    return json_response(await exchange.ask("nodes.list", Empty()))


ENDPOINTS = (
    Endpoint(
        "GET", "/v1/nodes", list_all, "List nodes and executor pools", "read",
        {200: ("Nodes and pools", NodeList)}, tag="nodes",
    ),
)  # fmt: skip
