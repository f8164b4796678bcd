"""`/v1/keys`. A secret exists here for the time of one answer; the leader gets its hash."""

from __future__ import annotations

import os
import time
from typing import Annotated

import msgspec
from starlette.responses import Response

from mn.formats.keys import KEY_ENTROPY_BYTES, new_key
from mn_gateway.endpoints import Endpoint, Exchange, json_response, new_operation
from mn_gateway.views import KeyScope, KeyView, KeyViews, NewKeyView, key_fields
from mn_nodepool.wire.control import Empty, KeyCreate, Name

EXPIRES_S_MAX = 10 * 365 * 86400


class KeyPost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    scopes: Annotated[tuple[KeyScope, ...], msgspec.Meta(min_length=1, max_length=4)]
    expires_s: Annotated[float, msgspec.Meta(gt=0, le=EXPIRES_S_MAX)] | None = None
    """Seconds from now; None: never."""
    owner: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    """To whom what it deploys belongs; None: the key's name."""


async def list_all(exchange: Exchange) -> Response:
    answer = await exchange.ask("keys.list", Empty())
    mine = [record for record in answer.keys if record.namespace == exchange.namespace]
    return json_response(KeyViews(tuple(KeyView(**key_fields(record)) for record in mine)))


async def post(exchange: Exchange) -> Response:
    body = exchange.body
    key = new_key(os.urandom(KEY_ENTROPY_BYTES))
    expires_ms = 0 if body.expires_s is None else int((time.time() + body.expires_s) * 1000)
    scopes = tuple(dict.fromkeys(body.scopes))
    request = KeyCreate(key.id, key.sha256, body.name, scopes, expires_ms, exchange.principal, body.owner or body.name)
    record = await exchange.ask("keys.create", request)
    view = NewKeyView(**key_fields(record), key=key.secret)
    return json_response(view, 201, {"cache-control": "no-store"})


async def revoke(exchange: Exchange) -> Response:
    await exchange.ask("keys.revoke", Name(exchange.part("id"), exchange.principal, new_operation()))
    return Response(status_code=204)


ENDPOINTS = (
    Endpoint("GET", "/v1/keys", list_all, "List the API keys", "admin", {200: ("The keys", KeyViews)}, tag="keys"),
    Endpoint(
        "POST", "/v1/keys", post, "Make an API key", "admin", {201: ("The key, shown once", NewKeyView)},
        body=KeyPost, errors=(409, 507), tag="keys",
    ),
    Endpoint(
        "DELETE", "/v1/keys/{id}", revoke, "Revoke an API key", "admin", {204: ("It is revoked", None)},
        errors=(404, 409), tag="keys",
    ),
)  # fmt: skip
