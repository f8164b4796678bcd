"""What is told of calls that failed in a sandbox, or whose sandbox died."""

from __future__ import annotations

import json
from typing import Any

from mn.formats.errors import SandboxLost, SandboxUnavailable
from mn.formats.ids import display_name
from mn_nodepool.executor.calls import RunningCall
from mn_nodepool.wire.messages import Failed
from mn_runner.protocol import CHUNK_BYTES, REASON_CANCELLED, REASON_TIMEOUT, Status
from mn_runner.sandbox import Death

NEVER_RAN = frozenset({"invalid-json", "invalid-request"})
"""Answers of a child that did not get as far as user code."""
_SLUGS = {REASON_TIMEOUT: "timeout", REASON_CANCELLED: "cancelled"}


def add_context(problem: dict[str, Any], call: RunningCall, status: int, node: str) -> bool:
    """Put to a child's problem where it happened and what was printed; whether it is worth keeping for `mn debug`."""
    problem["output"] = call.output_tail()
    problem["node"] = node
    if status == Status.FUNCTION_ERROR:
        return True
    problem.setdefault("may_have_run", str(problem.get("slug")) not in NEVER_RAN)
    return problem.get("slug") == "timeout"


def encoded(problem: dict[str, Any], as_it_came: bytes) -> bytes:
    """The problem as a payload. What a sandbox wrote can grow when it is written anew; a frame between peers must not."""
    told = json.dumps(problem).encode()
    return told if len(told) <= CHUNK_BYTES else as_it_came


def facts_of(death: Death, sandbox: str) -> dict[str, Any]:
    """Members that every answer about a dead sandbox has."""
    return {
        "exit_code": death.exit_code,
        "signal": death.signal,
        "out_of_memory": death.out_of_memory,
        "sandbox": sandbox,
    }


def not_started(sentence: str, facts: dict[str, Any]) -> dict[str, Any]:
    """In place of READY or LOADED, when neither will come."""
    detail = f"the sandbox died while it started: {sentence}"
    return {"error": {"slug": SandboxUnavailable.slug, "detail": detail, **facts}}


def failure_of(call: RunningCall, sentence: str, facts: dict[str, Any], started: bool) -> Failed:
    """The answer to a call that was in a sandbox when it died."""
    slug = _SLUGS.get(call.cancel_reason, SandboxLost.slug)
    end = f"died during the call: {sentence}" if started else "died before the call started"
    detail = f"the sandbox of {display_name(call.lane.function)} {end}"
    return Failed(call.number, slug, detail, {**facts, "output": call.output_tail(), "cause": sentence}, started)
