"""`/v1/functions`: names, versions, deploying and rolling back; and `/v1/scopes`, which keep or drop ephemeral ones."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from mn.formats.errors import InvalidRequest, NotFound
from mn.formats.ids import FUNCTION_NAME
from mn.formats.manifest import Resources, Scaling
from mn_gateway.bundles import DIGEST
from mn_gateway.calls import near
from mn_gateway.endpoints import Endpoint, Exchange, json_response, new_operation
from mn_gateway.views import DeployedView, deployed_views
from mn_nodepool.wire.control import Contact, Deploy, FunctionList, FunctionView, Name, Rollback, VersionList
from mn_nodepool.wire.control import Empty as EmptyRequest

SCOPE = re.compile(r"[A-Za-z0-9]{1,32}\Z")


class FunctionPut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which bundle a name shall stand for, and settings that replace the manifest's."""

    bundle: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
    function: str | None = None
    """Its name in the manifest, when the bundle has several."""
    replace: bool = False
    """Even if the name is somebody else's or from another file."""
    resources: Resources | msgspec.UnsetType = msgspec.UNSET
    scaling: Scaling | msgspec.UnsetType = msgspec.UNSET
    timeout_s: float | msgspec.UnsetType = msgspec.UNSET
    retries: int | msgspec.UnsetType = msgspec.UNSET
    env: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


OVERRIDES = ("resources", "scaling", "timeout_s", "retries", "env")


class RollbackTo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    """0: the one before the live one."""


async def list_all(exchange: Exchange) -> Response:
    answer = await exchange.ask("functions.list", EmptyRequest())
    return json_response(FunctionList(tuple(f for f in answer.functions if f.namespace == exchange.namespace)))


async def _ask_about(exchange: Exchange, op: str, request: msgspec.Struct) -> Any:
    """Ask, and complete a NotFound with the names that look alike."""
    try:
        return await exchange.ask(op, request)
    except NotFound as error:
        if not error.extra.get("near"):
            error.extra["near"] = near(exchange.part("name"), exchange.context.pool.directory, exchange.namespace)
        raise


async def get(exchange: Exchange) -> Response:
    return json_response(await _ask_about(exchange, "functions.get", Name(exchange.part("name"), exchange.principal)))


async def delete(exchange: Exchange) -> Response:
    await _ask_about(exchange, "functions.delete", Name(exchange.part("name"), exchange.principal, new_operation()))
    return Response(status_code=204)


async def versions(exchange: Exchange) -> Response:
    answer = await _ask_about(exchange, "functions.versions", Name(exchange.part("name"), exchange.principal))
    return json_response(answer)


async def rollback(exchange: Exchange) -> Response:
    request = Rollback(exchange.part("name"), exchange.principal, new_operation(), exchange.body.version)
    answer = await _ask_about(exchange, "functions.rollback", request)
    return json_response(deployed_views(exchange.request, [answer])[0])


async def put(exchange: Exchange) -> Response:
    name, body = exchange.part("name"), exchange.body
    if not FUNCTION_NAME.match(name) or "~" in name:
        raise InvalidRequest(
            f"{name[:100]!r} is no function name: a letter or _, then letters, digits, _ . -, at most 100", path="name"
        )
    if not DIGEST.match(body.bundle):
        raise InvalidRequest(f"{body.bundle[:100]!r} is no digest: sha256: and 64 hex digits", path="bundle")
    bundle = await exchange.ask("bundles.get", Name(body.bundle, exchange.principal))
    inside = [spec.name for spec in bundle.functions]
    chosen = body.function or (name if name in inside else "")
    if not chosen and len(inside) != 1:
        raise InvalidRequest(f"the bundle has several functions; say which: {', '.join(inside[:20])}", path="function")
    if chosen and chosen not in inside:
        raise InvalidRequest(f"the bundle has no function {chosen!r}, but {', '.join(inside[:20])}", path="function")
    chosen = chosen or inside[0]
    given = {field: getattr(body, field) for field in OVERRIDES if getattr(body, field) is not msgspec.UNSET}
    request = Deploy(
        body.bundle,
        exchange.principal,
        new_operation(),
        names=(chosen,),
        rename=name if name != chosen else "",
        replace=body.replace,
        overrides=msgspec.to_builtins(given),
    )
    deployed = await exchange.ask("functions.deploy", request)
    return json_response(deployed_views(exchange.request, deployed.functions)[0])


def _contact(exchange: Exchange) -> Contact:
    scope = exchange.part("scope")
    if not SCOPE.match(scope):
        raise InvalidRequest(f"{scope[:50]!r} is no scope: 1 to 32 letters and digits", path="scope")
    return Contact((scope,), exchange.principal)


async def contact_scope(exchange: Exchange) -> Response:
    await exchange.ask("scopes.contact", _contact(exchange))
    return Response(status_code=204)


async def delete_scope(exchange: Exchange) -> Response:
    await exchange.ask("scopes.delete", _contact(exchange))
    return Response(status_code=204)


ENDPOINTS = (
    Endpoint(
        "GET", "/v1/functions", list_all, "List the functions", "read", {200: ("The functions", FunctionList)},
        tag="functions",
    ),
    Endpoint(
        "GET", "/v1/functions/{name}", get, "Show a function", "read", {200: ("The function", FunctionView)},
        errors=(404,), tag="functions",
    ),
    Endpoint(
        "PUT", "/v1/functions/{name}", put, "Deploy a bundle's function under a name", "deploy",
        {200: ("The name stands for this version now", DeployedView)}, body=FunctionPut, errors=(404, 409, 507),
        tag="functions",
    ),
    Endpoint(
        "DELETE", "/v1/functions/{name}", delete, "Delete a function and its versions", "deploy",
        {204: ("It is gone", None)}, errors=(404, 409), tag="functions",
    ),
    Endpoint(
        "GET", "/v1/functions/{name}/versions", versions, "List a function's versions", "read",
        {200: ("The versions", VersionList)}, errors=(404,), tag="functions",
    ),
    Endpoint(
        "POST", "/v1/functions/{name}/rollback", rollback, "Let the name stand for an earlier version", "deploy",
        {200: ("The name stands for this version now", DeployedView)}, body=RollbackTo, body_required=False,
        errors=(404, 409), tag="functions",
    ),
    Endpoint(
        "POST", "/v1/scopes/{scope}/contact", contact_scope, "Keep an ephemeral scope's functions", "deploy",
        {204: ("They stay for another while", None)}, errors=(404, 422), tag="functions",
    ),
    Endpoint(
        "DELETE", "/v1/scopes/{scope}", delete_scope, "Drop an ephemeral scope's functions", "deploy",
        {204: ("They are gone", None)}, errors=(404, 422), tag="functions",
    ),
)  # fmt: skip
