"""A function's entry in a manifest: the decorator's settings, checked, in the manifest's own words."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from mn.formats.errors import InvalidRequest
from mn.formats.manifest import FunctionSpec, check_spec
from mn.formats.resources import parse_duration, parse_size
from mn.functions import Function

DOC_CHARS_MAX = 4096
DEFAULT_CHARS_MAX = 200


def spec_of(
    function: Function[Any, Any], entry: str, main: bool, needs: tuple[str, ...], source: str
) -> dict[str, Any]:
    """The manifest's entry of a function.

    Raises InvalidRequest naming the function and the setting that is wrong.
    """
    raw = function.raw_function
    assert raw is not None
    settings = {key: _converted(function.name, key, value) for key, value in function.settings.items()}
    resources = _named(settings, {"cpu": "cpu", "memory": "memory_mb", "gpu": "gpu"})
    scaling = _named(
        settings,
        {
            "min_replicas": "min_replicas",
            "max_replicas": "max_replicas",
            "concurrency": "concurrency",
            "idle_timeout": "idle_s",
        },
    )
    parameters = _parameters(raw)
    spec: dict[str, Any] = {
        "name": function.name,
        "entry": entry,
        "main": main,
        "source": source,
        "environment": {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "requires_modules": list(needs)},
        "resources": resources,
        "scaling": scaling,
        **_named(settings, {"timeout": "timeout_s", "retries": "retries", "env": "env"}),
        "generator": function.is_generator,
        "raw": _is_raw(raw),
        "parameters": parameters,
        "doc": (inspect.getdoc(raw) or "")[:DOC_CHARS_MAX],
    }
    spec = {key: value for key, value in spec.items() if value is not False and value not in ({}, [], "")}
    _check_ranges(function, spec)
    return spec


_ARGUMENTS = {"memory_mb": "memory", "idle_s": "idle_timeout", "timeout_s": "timeout"}
"""What the decorator calls a field of the manifest, where the names differ."""


def _check_ranges(function: Function[Any, Any], spec: dict[str, Any]) -> None:
    try:
        check_spec(msgspec.convert(spec, FunctionSpec))
    except InvalidRequest as error:
        path = str(error.extra.get("path", ""))
        field = path.rpartition(".")[2]
        key = _ARGUMENTS.get(field, field)
        given = f"{key}={function.settings[key]!r}" if key in function.settings else key
        why = error.detail.removeprefix(f"manifest.json: {path}: ")
        raise InvalidRequest(f"@mn.function of {function.name}: {given}: {why}", path=key) from None


def _named(settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {theirs: settings[ours] for ours, theirs in names.items() if ours in settings}


def _memory_mb(value: str | int) -> int:
    """MiB, rounded up: what was asked for is what there is at least.

    Raises ValueError for a bare number below 1 MiB, which was meant as MiB.
    """
    if 0 < parse_size(value) < 1 << 20 and str(value).strip().isdecimal():
        raise ValueError(f'that is {value} bytes; write memory="{value}MiB"')
    return -(-parse_size(value) // (1 << 20))


def _env(value: Any) -> dict[str, str]:
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in dict(value).items()):
        raise ValueError("names and values must be text")
    return dict(value)


def _whole(value: Any) -> int:
    if int(value) != float(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "cpu": float,
    "memory": _memory_mb,
    "gpu": _whole,
    "timeout": parse_duration,
    "idle_timeout": parse_duration,
    "retries": _whole,
    "concurrency": _whole,
    "min_replicas": _whole,
    "max_replicas": _whole,
    "env": _env,
}


def _converted(function: str, key: str, value: Any) -> Any:
    try:
        return _CONVERT[key](value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"@mn.function of {function}: {key}={value!r}: {error}", path=key) from None


def _parameters(raw: Callable[..., Any]) -> list[dict[str, Any]]:
    found = []
    for parameter in inspect.signature(raw).parameters.values():
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        text = "" if annotation is parameter.empty else text
        described: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name.lower(), "annotation": text}
        if parameter.default is not parameter.empty:
            described["default"] = _shown(parameter.default)
        found.append(described)
    return found


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a help text is not worth a failed deploy over somebody's `__repr__`
        text = f"<{type(value).__name__}: {type(error).__name__}>"
    return text[:DEFAULT_CHARS_MAX]


def _is_raw(raw: Callable[..., Any]) -> bool:
    """One parameter, annotated `bytes`: it gets the body as it is."""
    parameters = list(inspect.signature(raw).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in positional and parameters[0].annotation in (bytes, "bytes")
