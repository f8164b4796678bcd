"""`/v1/bundles`: bundles come in, are listed, go out again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import Response, StreamingResponse

from mn.formats.errors import InvalidRequest, NotFound
from mn.formats.settings import Settings
from mn_gateway import bodies, bundles
from mn_gateway.endpoints import Endpoint, Exchange, json_response, new_operation
from mn_gateway.views import BundleReceived, Scope, deployed_views
from mn_nodepool.wire.control import BundleList, BundlePut, BundleRecord, Deploy, Empty, Name

ARCHIVES = ("application/gzip", "application/zip", "application/x-tar", "application/octet-stream")
GZIP = "application/gzip"


class Posted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    deploy: Annotated[bool, msgspec.Meta(description="make a version of each of its functions")] = False
    replace: Annotated[bool, msgspec.Meta(description="even if a name is somebody else's or from another file")] = False
    scope: Annotated[Scope | None, msgspec.Meta(description="deploy as ephemeral functions `name~scope`")] = None


async def post(exchange: Exchange) -> Response:
    settings, query = exchange.context.settings, exchange.query
    request = exchange.request
    limit = settings.bundle_bytes_max
    bodies.check_length(dict(request.scope["headers"]), limit, "a bundle", "bundle_bytes_max")
    async with exchange.context.uploads:
        upload = await run_in_threadpool(bundles.incoming, settings)
        try:
            pieces = bodies.chunks(request.receive, limit, "a bundle", "bundle_bytes_max")
            await _save(pieces, upload / "archive")
            received = await run_in_threadpool(bundles.take_in, settings, upload)
        finally:
            await run_in_threadpool(bundles.discard, upload)
    extracted = received.extracted
    put = BundlePut(extracted.digest, received.functions, extracted.files, extracted.size_bytes, exchange.principal)
    await exchange.ask("bundles.put", put)
    if not query.deploy:
        return json_response(BundleReceived(extracted.digest), 201 if received.new else 200)
    deploy = Deploy(
        extracted.digest, exchange.principal, new_operation(), replace=query.replace, scope=query.scope or ""
    )
    deployed = await exchange.ask("functions.deploy", deploy)
    views = deployed_views(exchange.request, deployed.functions)
    return json_response(BundleReceived(extracted.digest, views), 201 if received.new else 200)


async def _save(pieces: AsyncIterator[bytes], file: Path) -> None:
    with await run_in_threadpool(open, file, "xb") as out:
        async for piece in pieces:
            await run_in_threadpool(out.write, piece)


def digest_in(exchange: Exchange) -> str:
    """The digest in the path, with `sha256:` before it or not. Raises InvalidRequest."""
    text = exchange.part("digest")
    digest = text if text.startswith("sha256:") else f"sha256:{text.removeprefix('sha256-')}"
    if not bundles.DIGEST.match(digest):
        raise InvalidRequest(f"{text[:100]!r} is no digest: sha256: and 64 hex digits", path="digest")
    return digest


async def list_all(exchange: Exchange) -> Response:
    return json_response(await exchange.ask("bundles.list", Empty()))


async def get(exchange: Exchange) -> Response:
    return json_response(await exchange.ask("bundles.get", Name(digest_in(exchange), exchange.principal)))


async def delete(exchange: Exchange) -> Response:
    await exchange.ask("bundles.delete", Name(digest_in(exchange), exchange.principal, new_operation()))
    return Response(status_code=204)


async def content(exchange: Exchange) -> Response:
    digest = digest_in(exchange)
    await exchange.ask("bundles.get", Name(digest, exchange.principal))
    folder = await run_in_threadpool(_present, exchange.context.settings, digest)
    name = f"{digest.replace(':', '-')[:19]}.tar.gz"
    return StreamingResponse(
        iterate_in_threadpool(bundles.packed(folder)),
        media_type=GZIP,
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )


def _present(settings: Settings, digest: str) -> Path:
    folder = bundles.folder_of(settings, digest)
    if not (folder / "manifest.json").is_file():
        raise NotFound(f"the files of {digest} are not on this node any more; post the bundle again", near=[])
    return folder


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/bundles", post, "Post a bundle: tar.gz, tar or zip, told by content", "deploy",
        {201: ("It is stored now", BundleReceived), 200: ("It was there already", BundleReceived)},
        query=Posted, body_media=ARCHIVES, errors=(404, 409, 413, 422, 507), tag="bundles",
    ),
    Endpoint(
        "GET", "/v1/bundles", list_all, "List the bundles", "read", {200: ("The bundles", BundleList)}, tag="bundles"
    ),
    Endpoint(
        "GET", "/v1/bundles/{digest}", get, "Show a bundle", "read", {200: ("The bundle", BundleRecord)},
        errors=(404, 422), tag="bundles",
    ),
    Endpoint(
        "DELETE", "/v1/bundles/{digest}", delete, "Remove a bundle that no version uses", "deploy",
        {204: ("It is gone", None)}, errors=(404, 409, 422), tag="bundles",
    ),
    Endpoint(
        "GET", "/v1/bundles/{digest}/content", content, "Get a bundle's files as tar.gz", "read",
        {200: ("The bundle", (GZIP,))}, errors=(404, 422), tag="bundles",
    ),
)  # fmt: skip
