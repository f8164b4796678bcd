"""What callers are told when a call came to no result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mn.formats.errors import CallTimeout, MnError, QueueFull, TooLarge, error_from
from mn.formats.ids import display_name
from mn_nodepool.dispatch.lane import Lane
from mn_nodepool.dispatch.pending import PendingCall
from mn_nodepool.wire.untrusted import read_object


class Bounds(NamedTuple):
    """Of one version at one dispatcher."""

    queue_calls_max: int
    queue_bytes_max: int
    result_bytes_max: int


def queue_full(call: PendingCall, lane: Lane, bounds: Bounds) -> QueueFull:
    wait_s = len(lane.queue) * lane.run_us / 1e6 / max(1, lane.running)
    return QueueFull(
        f"{len(lane.queue)} calls of {_name(call)} wait here already ({lane.queued_bytes} bytes); the limits are "
        f"{bounds.queue_calls_max} calls and {bounds.queue_bytes_max} bytes",
        retry_after_s=max(1, round(wait_s)),
    )


def timed_out(call: PendingCall, extra: Mapping[str, Any]) -> CallTimeout:
    """It ran into its deadline; `extra` is what the executor says of it."""
    error = CallTimeout(f"{_name(call)} did not end within {_limit_s(call):.3g} s")
    error.extra.update(extra, timeout_s=round(_limit_s(call), 3))
    return error


def never_started(call: PendingCall, lane: Lane) -> CallTimeout:
    why = lane.reason or f"{len(lane.queue)} calls were waiting and {lane.running} running"
    return CallTimeout(
        f"the call waited {_limit_s(call):.3g} s for a sandbox of {_name(call)} and got none: {why}",
        timeout_s=round(_limit_s(call), 3),
        may_have_run=False,
    )


def too_large(call: PendingCall, limit: int) -> TooLarge:
    what = "an item" if call.item_parts is not None else "the result"
    return TooLarge(
        f"{what} of {_name(call)} is larger than {limit} bytes (setting payload_bytes_max)",
        limit_bytes=limit,
        may_have_run=True,
    )


def platform_error(call: PendingCall, document: bytes) -> MnError:
    """What a child says of a call that it could not run or that was ended."""
    try:
        problem = read_object(document)
        slug, detail = str(problem.pop("slug")), str(problem.pop("detail"))
    except (ValueError, KeyError):
        problem, slug = {"may_have_run": True}, "sandbox-lost"
        detail = "the sandbox answered with something that is no problem document"
    return timed_out(call, problem) if call.timed_out else error_from(slug, detail, problem)


def _limit_s(call: PendingCall) -> float:
    return call.deadline - call.created


def _name(call: PendingCall) -> str:
    return display_name(call.route.name)
