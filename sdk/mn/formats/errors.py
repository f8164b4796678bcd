"""Every error that MirrorNeuron raises, and the one table that gives each its HTTP status and exit code.

    MnError
    ├── RequestError             the caller's fault: repeating the same request fails again
    │   ├── InvalidRequest           a field is wrong; `path` names it
    │   ├── InvalidJson              the body is not JSON
    │   ├── Unauthenticated          no key, or not a valid one
    │   ├── Forbidden                the key lacks a scope, or the request came from a wrong host or origin
    │   ├── NotFound                 nothing has that name; `near` lists similar ones
    │   ├── Conflict                 the name or the version belongs to somebody or something else
    │   ├── TooLarge                 over a limit; `limit_bytes` says which
    │   └── UnsupportedMedia         a body of a type that this endpoint does not read
    ├── CapacityError            nothing is wrong, there is no room: try again later
    │   ├── QueueFull                the function's queue is full
    │   ├── StoreFull                the store accepts no more
    │   └── Unschedulable            no node of the pool can run it
    ├── PlatformError            MirrorNeuron's fault, or a machine's
    │   ├── SandboxLost              the sandbox died during the call; `may_have_run`
    │   ├── SandboxUnavailable       no sandbox could be started for the function
    │   ├── NoLeader                 no leader at the moment
    │   ├── Unavailable              the service can't be reached, or is stopping
    │   ├── Internal                 a bug of ours
    │   └── ProtocolError            a peer broke a protocol; what it broke is closed
    ├── CallError                how one call ended
    │   ├── CallTimeout              its deadline passed
    │   └── Cancelled                its caller went away
    └── FunctionFailed           the user's code raised; the platform worked

Where a remote exception can be rebuilt, callers see its own type instead of `FunctionFailed`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MnError(Exception):
    """Base of all; `detail` is one sentence for people, `extra` the machine-readable members of its problem document."""

    slug: ClassVar[str] = "internal"

    def __init__(self, detail: str = "", **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.detail, self.extra)


def _rebuild(cls: type[MnError], detail: str, extra: dict[str, Any]) -> MnError:
    return cls(detail, **extra)


class RequestError(MnError):
    slug = "invalid-request"


class InvalidRequest(RequestError):
    slug = "invalid-request"


class InvalidJson(RequestError):
    slug = "invalid-json"


class Unauthenticated(RequestError):
    slug = "unauthenticated"


class Forbidden(RequestError):
    slug = "forbidden"


class NotFound(RequestError):
    slug = "not-found"


class Conflict(RequestError):
    slug = "conflict"


class TooLarge(RequestError):
    slug = "too-large"


class UnsupportedMedia(RequestError):
    slug = "unsupported-media-type"


class CapacityError(MnError):
    slug = "queue-full"


class QueueFull(CapacityError):
    slug = "queue-full"


class StoreFull(CapacityError):
    slug = "store-full"


class Unschedulable(CapacityError):
    slug = "unschedulable"


class PlatformError(MnError):
    slug = "internal"


class SandboxLost(PlatformError):
    slug = "sandbox-lost"


class SandboxUnavailable(PlatformError):
    slug = "sandbox-unavailable"


class NoLeader(PlatformError):
    slug = "no-leader"


class Unavailable(PlatformError):
    slug = "unavailable"


class Internal(PlatformError):
    slug = "internal"


class ProtocolError(PlatformError):
    slug = "protocol-error"


class CallError(MnError):
    slug = "timeout"


class CallTimeout(CallError):
    slug = "timeout"


class Cancelled(CallError):
    slug = "cancelled"


class FunctionFailed(MnError):
    slug = "function-error"


class Outcome:
    """How an error looks outside: problem title, HTTP status, process exit code."""

    __slots__ = ("cls", "exit_code", "status", "title")

    def __init__(self, cls: type[MnError], title: str, status: int, exit_code: int) -> None:
        self.cls, self.title, self.status, self.exit_code = cls, title, status, exit_code


OUTCOMES: dict[str, Outcome] = {
    outcome.cls.slug: outcome
    for outcome in (
        Outcome(FunctionFailed, "The function raised an exception", 500, 1),
        Outcome(InvalidRequest, "The request is not valid", 422, 2),
        Outcome(InvalidJson, "The body is not JSON", 400, 2),
        Outcome(UnsupportedMedia, "The body's media type is not supported here", 415, 2),
        Outcome(TooLarge, "The request is too large", 413, 2),
        Outcome(Unauthenticated, "A valid API key is needed", 401, 3),
        Outcome(Forbidden, "The key does not allow this", 403, 3),
        Outcome(NotFound, "Nothing has that name", 404, 4),
        Outcome(Conflict, "It conflicts with what exists", 409, 5),
        Outcome(QueueFull, "The function's queue is full", 429, 6),
        Outcome(StoreFull, "The store accepts no more", 507, 6),
        Outcome(Unschedulable, "No node can run it", 503, 6),
        Outcome(CallTimeout, "The deadline passed", 504, 7),
        Outcome(Cancelled, "The call was cancelled", 499, 7),
        Outcome(SandboxLost, "The sandbox died", 502, 8),
        Outcome(SandboxUnavailable, "No sandbox could be started", 502, 8),
        Outcome(NoLeader, "There is no leader at the moment", 503, 9),
        Outcome(Unavailable, "The service is not available", 503, 9),
        Outcome(ProtocolError, "A peer broke the protocol", 502, 70),
        Outcome(Internal, "MirrorNeuron failed", 500, 70),
    )
}
"""Problem slug → outcome. A problem's `type` is `/problems/<slug>`."""


def outcome_of(error: MnError) -> Outcome:
    return OUTCOMES[error.slug]


def error_from(slug: str, detail: str, extra: dict[str, Any]) -> MnError:
    """The error that a problem document (or a peer's failure frame) tells of; unknown slugs become `Internal`."""
    outcome = OUTCOMES.get(slug)
    error = (outcome.cls if outcome else Internal)(detail)
    error.extra.update(extra)  # not as keyword arguments: a sandbox chooses these names
    return error
