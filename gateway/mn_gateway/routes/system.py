"""Health, metrics and the documentation: what needs no key."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from mn.formats.errors import NoLeader, Unavailable
from mn_gateway import openapi
from mn_gateway.docs_page import CONTENT_SECURITY_POLICY, render_page
from mn_gateway.endpoints import Endpoint, Exchange, json_response
from mn_gateway.metrics import add_up, render


class Alive(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct, frozen=True):
    leader: str
    """The node that leads, as last heard."""
    ready: Literal[True] = True


async def healthz(_: Exchange) -> Response:
    return json_response(Alive())


async def readyz(exchange: Exchange) -> Response:
    pool = exchange.context.pool
    if exchange.context.draining:
        raise Unavailable("this gateway is stopping", retry_after_s=5)
    if not pool.connected:
        raise Unavailable("the link to the node is down; it is tried again", retry_after_s=1)
    if not pool.directory.synced:
        raise NoLeader("this gateway has not heard from the leader yet", retry_after_s=1)
    return json_response(Ready(pool.directory.leader))


async def metrics(exchange: Exchange) -> Response:
    total = add_up(await exchange.context.siblings.gather())
    return Response(render(total), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def openapi_json(_: Exchange) -> Response:
    return json_response(_document())


async def docs(_: Exchange) -> Response:
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}
    return Response(render_page(_document()), media_type="text/html; charset=utf-8", headers=headers)


@lru_cache(maxsize=1)
def _document() -> openapi.Document:
    from mn_gateway.routes import ENDPOINTS as ALL  # this module is a part of it

    return openapi.document(ALL)


ENDPOINTS = (
    Endpoint("GET", "/healthz", healthz, "Is the process alive?", answers={200: ("Yes", Alive)}, tag="system"),
    Endpoint(
        "GET", "/readyz", readyz, "Can it serve?", answers={200: ("Yes", Ready)}, errors=(503,), tag="system"
    ),
    Endpoint(
        "GET", "/metrics", metrics, "Prometheus metrics of all gateway processes (needs `read` when exposed)",
        answers={200: ("The metrics", ("text/plain",))}, errors=(401, 403, 503), tag="system",
    ),
    Endpoint(
        "GET", "/openapi.json", openapi_json, "This API as OpenAPI 3.1",
        answers={200: ("The document", ("application/json",))}, tag="system",
    ),
    Endpoint(
        "GET", "/docs", docs, "This API as a page", answers={200: ("The page", ("text/html",))}, tag="system"
    ),
)  # fmt: skip
