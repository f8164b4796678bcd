"""How an endpoint is declared: once, for the router, the validation and `/openapi.json`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mn.formats.codecs import MEDIA_JSON
from mn.formats.errors import Internal, InvalidJson, InvalidRequest, TooLarge
from mn.formats.ids import new_ulid
from mn_gateway.access import principal_of
from mn_gateway.context import Context
from mn_nodepool.wire.control import Principal
from mn_nodepool.wire.messages import KeyEntry

JSON_BODY_BYTES_MAX = 1 << 20


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


@dataclass(slots=True)
class Exchange:
    """One request to a handler: who asks, and what, validated."""

    context: Context
    request: Request
    key: KeyEntry | None
    query: Any
    body: Any
    """An instance of the endpoint's body type; None where it has none or reads the stream itself."""

    @property
    def principal(self) -> Principal:
        if self.key is None:
            raise Internal("an endpoint without a key acted on somebody's behalf")
        return principal_of(self.key)

    @property
    def namespace(self) -> str:
        return self.principal.namespace

    def part(self, name: str) -> str:
        """A part of the path."""
        value: str = self.request.path_params[name]
        return value

    async def ask(self, op: str, request: msgspec.Struct) -> Any:
        return await self.context.pool.ask(op, request)


Handler = Callable[[Exchange], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    handler: Handler | None
    """None: answered ahead of the router."""
    summary: str
    scope: str = ""
    """What the key needs; empty: no key."""
    answers: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    """Status → what it means, and the type of its JSON, a tuple of media types, or None for no body."""
    query: type[msgspec.Struct] = NoQuery
    body: type[msgspec.Struct] | None = None
    body_media: tuple[str, ...] = ()
    """Of a body that is read as a stream."""
    body_required: bool = True
    headers: Mapping[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Request headers → what they mean, and their schema."""
    errors: tuple[int, ...] = ()
    """Problem statuses besides those that follow from the rest."""
    tag: str = ""


def new_operation() -> str:
    """An id under which the leader does a thing once."""
    return "op_" + new_ulid()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, MEDIA_JSON)


def read_query(request: Request, kind: type[msgspec.Struct]) -> Any:
    """The query parameters. Raises InvalidRequest for an unknown, repeated or wrong one."""
    pairs = request.query_params.multi_items()
    values = dict(pairs)
    if len(values) != len(pairs):
        raise InvalidRequest("a query parameter is there twice", path="")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error, "query") from None


async def read_json(request: Request, kind: type[msgspec.Struct], required: bool) -> Any:
    """A JSON body. Raises InvalidJson, or InvalidRequest with the field's `path`."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > JSON_BODY_BYTES_MAX:
            raise TooLarge(f"this body may have {JSON_BODY_BYTES_MAX} bytes", limit_bytes=JSON_BODY_BYTES_MAX)
    if not data and not required:
        return kind()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, "body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson(f"the body is not JSON: {error}") from None


def _invalid(error: msgspec.ValidationError, what: str) -> InvalidRequest:
    text, _, where = str(error).partition(" - at `$")
    return InvalidRequest(f"{what}: {text}", path=where.rstrip("`").lstrip("."))
