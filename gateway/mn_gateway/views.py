"""What HTTP shows where it differs from what the leader answers, and the field types that several endpoints share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from starlette.requests import Request

from mn_nodepool.wire.control import DeployedFunction, KeyRecord

Scope = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]{1,32}$")]
"""An ephemeral scope."""
KeyScope = Literal["invoke", "deploy", "read", "admin"]


class DeployedView(msgspec.Struct, frozen=True):
    """A function that was deployed."""

    name: str
    version: int
    url: str
    """Where to call it."""
    changed: bool
    """A new version was made or the name moved to another one."""


class BundleReceived(msgspec.Struct, frozen=True, omit_defaults=True):
    digest: str
    functions: tuple[DeployedView, ...] | None = None
    """With `deploy`."""


class KeyView(msgspec.Struct, frozen=True):
    """An API key without its secret."""

    id: str
    name: str
    owner: str
    namespace: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int
    """Milliseconds since the epoch; 0: never."""


class KeyViews(msgspec.Struct, frozen=True):
    keys: tuple[KeyView, ...]


class NewKeyView(KeyView, frozen=True, kw_only=True):
    key: str
    """The secret; shown this once."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457. Further members depend on the type."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    """The invocation's id, where there is one."""


def function_url(request: Request, name: str) -> str:
    """The absolute address at which to call a function, by the host that the caller used."""
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}/v1/functions/{quote(name, safe='~')}/invoke"


def deployed_views(request: Request, functions: Iterable[DeployedFunction]) -> tuple[DeployedView, ...]:
    return tuple(DeployedView(f.name, f.version, function_url(request, f.name), f.changed) for f in functions)


def key_fields(record: KeyRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in KeyView.__struct_fields__}
