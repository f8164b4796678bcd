"""Problem documents (RFC 9457): the one place where an error becomes an HTTP answer."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from mn.formats.codecs import MEDIA_PROBLEM
from mn.formats.errors import OUTCOMES, FunctionFailed, MnError, Unauthenticated
from mn_gateway.pool import Call
from mn_nodepool.wire.untrusted import read_object

OUTPUT_TAIL_BYTES = 4096
"""How much of a failed call's output its problem carries."""
RETRY_STATUSES = frozenset({429, 503, 507})
RETRY_AFTER_S_MAX = 86_400
Headers = list[tuple[bytes, bytes]]
_CONTENT_TYPE = (b"content-type", MEDIA_PROBLEM.encode())
_OWN_MEMBERS = frozenset({"type", "title", "status", "detail", "instance"})
_encoder = msgspec.json.Encoder(enc_hook=str)


def document(error: MnError, instance: str = "") -> dict[str, Any]:
    """The problem's members; `instance` is the id of the invocation that it is about."""
    outcome = OUTCOMES[error.slug]
    members = {
        "type": f"/problems/{error.slug}",
        "title": outcome.title,
        "status": outcome.status,
        "detail": error.detail or outcome.title,
    }
    if instance:
        members["instance"] = instance
    return members | {name: value for name, value in error.extra.items() if name not in _OWN_MEMBERS}


def encode(problem: dict[str, Any]) -> bytes:
    return _encoder.encode(problem)


def answer(problem: dict[str, Any]) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a problem."""
    body = encode(problem)
    status: int = problem["status"]
    headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(body))]
    if status in RETRY_STATUSES:
        headers.append((b"retry-after", b"%d" % _retry_after_s(problem.get("retry_after_s"))))
    if status == OUTCOMES[Unauthenticated.slug].status:
        headers.append((b"www-authenticate", b'Bearer realm="mirrorneuron"'))
    if instance := problem.get("instance"):
        headers.append((b"mn-invocation-id", instance.encode()))
    return status, headers, body


def _retry_after_s(value: Any) -> int:
    """Whole seconds; 1 where the problem (a sandbox's, perhaps) says nothing sensible."""
    sensible = isinstance(value, int | float) and 0 < value <= RETRY_AFTER_S_MAX
    return math.ceil(value) if sensible else 1


def not_allowed(method: str, allow: str) -> dict[str, Any]:
    """405: the path exists, the method does not."""
    return {
        "type": "/problems/method-not-allowed",
        "title": "The method is not allowed here",
        "status": 405,
        "detail": f"{method} is not possible here; possible are {allow}",
    }


def slug_of(call: Call) -> str:
    """The slug of the problem with which a call ended; empty when it has a result."""
    if call.error is not None:
        return call.error.slug
    return FunctionFailed.slug if call.status else ""


def of_call(call: Call) -> dict[str, Any]:
    """The problem of a call that did not end well: the user's exception, or what the platform says."""
    problem = document(call.error or _function_failed(call), call.invocation)
    problem["function"], problem["version"] = call.route.name, call.route.version
    if call.node:
        problem["node"] = call.node
    if call.attempts > 1:
        problem["attempts"] = call.attempts
    if output := call.output or str(problem.pop("output", "")):
        problem["output"] = output.encode()[-OUTPUT_TAIL_BYTES:].decode(errors="ignore")
    return problem


def _function_failed(call: Call) -> FunctionFailed:
    try:
        exception = read_object(call.result)
    except ValueError:
        exception = {"type": "Exception", "module": "", "message": "its description could not be read", "traceback": ""}
    kind, message = exception.get("type", "Exception"), str(exception.get("message", ""))
    text = f"{kind}: {message[:1000]}" if message else str(kind)
    # These belong to the call, whatever ended it.
    exception.pop("node", None)
    return FunctionFailed(text, output=exception.pop("output", ""), exception=exception)
