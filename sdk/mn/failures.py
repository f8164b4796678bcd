"""From a problem document to the exception that the caller sees."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from mn.formats.errors import FunctionFailed, InvalidRequest, MnError, NotFound, ProtocolError, error_from

NOTE_BYTES_MAX = 64 * 1024
"""Of a remote traceback; what is longer loses its middle."""
_RAISED = "  raised in sandbox of "
_SCOPE = re.compile(r"~[a-z0-9]{12}\b")
"""What an ephemeral function's name ends in: the pool's affair, not its author's."""
_OUR_FRAME = re.compile(r'(\s*)File "[^"]*/guest[^/"]*/mn/')
_STANDARD = frozenset({"type", "title", "status", "detail", "slug"})


def exception_of(function: str, raised: bool, payload: bytes) -> Exception:
    """What to raise for a failed call. `raised`: the user's code did, so its own exception is rebuilt where that can
    be done.
    """
    problem = problem_from(payload)
    return rebuilt(function, problem) if raised else error_of(problem)


def problem_from(payload: bytes) -> dict[str, Any]:
    """A problem document, as a dict."""
    try:
        problem = json.loads(payload)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        return {"slug": ProtocolError.slug, "detail": f"the answer is no problem document: {payload[:200]!r}"}
    return problem


def slug_of(problem: dict[str, Any]) -> str:
    return str(problem.get("slug") or str(problem.get("type", "")).rpartition("/")[2])


def error_of(problem: dict[str, Any]) -> MnError:
    """The platform's error that a problem document tells of."""
    detail = str(problem.get("detail") or problem.get("title") or "the gateway gave no reason")
    extra = {key: value for key, value in problem.items() if key not in _STANDARD}
    error = error_from(slug_of(problem), _SCOPE.sub("", detail), extra)
    near = [str(name) for name in extra.get("near") or ()]
    if near and not any(name in error.detail for name in near):
        error.add_note(f"  did you mean {', '.join(near)}?")
    if isinstance(error, NotFound):
        return error  # nothing was called, so there is nothing to look up by the call's id
    if instance := extra.get("instance") or extra.get("invocation"):
        error.add_note(f"  call {instance}")
    return error


def rebuilt(function: str, problem: dict[str, Any]) -> Exception:
    """The exception that user code raised in a sandbox, of its own type, with the remote traceback as a note."""
    told = problem.get("exception")
    told = told if isinstance(told, dict) else problem
    exception, why_not = _unpickled(function, told.get("pickle"))
    if told.get("pickle_error"):
        why_not = f"its type could not be rebuilt: {told['pickle_error']}"
    if exception is None:
        name = told.get("type") or "an exception"
        module = told.get("module")
        name = name if module in (None, "", "builtins") else f"{module}.{name}"
        extra = {key: value for key, value in problem.items() if key not in _STANDARD}
        exception = FunctionFailed(f"{name}: {told.get('message', '')}", **extra)
    else:
        # The calls in between told theirs in the remote traceback already, which grows by one level a call and not by
        # all.
        own = [note for note in getattr(exception, "__notes__", ()) if not note.startswith(_RAISED)]
        exception.__notes__ = own
    exception.add_note(remote_note(function, problem, str(told.get("traceback", "")), why_not))
    return exception


def _unpickled(function: str, pickled: object) -> tuple[Exception | None, str]:
    """The exception itself; or why it is not of its own type."""
    if not isinstance(pickled, str) or not pickled:
        return None, ""
    import base64

    from mn.formats.pickles import loads

    try:
        exception = loads(base64.b64decode(pickled, validate=True), f"the exception of {function}")
    except InvalidRequest as error:
        return None, error.detail
    except Exception as error:  # constructors of exceptions are user code
        return None, f"its type could not be rebuilt here: {type(error).__name__}: {error}"
    # What ends a process when a sandbox raises it, such as SystemExit, must not end the caller's.
    return (exception, "") if isinstance(exception, Exception) else (None, "")


def remade(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """An exception from its class, `args` and attributes, without its `__init__`, whose arguments it may not have
    kept. Pickles of a sandbox name this function.
    """
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def remote_note(function: str, problem: dict[str, Any], traceback: str, why_not: str) -> str:
    """Where it happened, the remote frames, and what to do next."""
    shown = str(problem.get("function") or function).partition("~")[0]
    if version := problem.get("version"):
        shown += f" v{str(version).rpartition('#')[2]}"
    invocation = problem.get("invocation") or problem.get("instance")
    head = f"{_RAISED}{shown}"
    head += f" on {problem['node']}" if problem.get("node") else ""
    head += f", call {invocation}" if invocation else ""
    lines = [head, textwrap.indent(_frames(traceback), "  ")]
    if why_not:
        lines.append(f"  {why_not}")
    if invocation:
        lines.append(f"  debug it here: mn debug {invocation}")
    return "\n".join(line for line in lines if line.strip())


def _frames(traceback: str) -> str:
    """The frames alone: the first line says what everybody knows, the last repeats the message."""
    lines = traceback.rstrip("\n").split("\n")
    if not lines or not lines[0].startswith("Traceback"):
        return traceback
    chained = any("During handling of" in line or "direct cause of" in line for line in lines)
    kept = lines if chained else [line for line in lines[1:] if line.startswith(" ")]
    text = "\n".join(_users(kept))
    half = NOTE_BYTES_MAX // 2
    return text if len(text) <= NOTE_BYTES_MAX else f"{text[:half]}\n  …\n{text[-half:]}"


def _users(lines: list[str]) -> Iterator[str]:
    """Without the frames of the SDK itself, through which a sandbox calls others."""
    hidden: int | None = None
    for line in lines:
        if hidden is not None and len(line) - len(line.lstrip()) > hidden:
            continue
        ours = _OUR_FRAME.match(line)
        hidden = len(ours[1]) if ours else None
        if not ours:
            yield line
