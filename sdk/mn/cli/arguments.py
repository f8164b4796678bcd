"""A function's parameters as command-line options: `--x 12` for `def square(x: int)`."""

from __future__ import annotations

import argparse
import inspect
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mn.formats.errors import InvalidRequest

RESERVED_JSON = "json"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"{message}\n{self.format_usage().strip()}")


def parse(
    function: Callable[..., Any], name: str, prog: str, tokens: Sequence[str]
) -> tuple[list[Any], dict[str, Any], bool]:
    """Positional and keyword arguments for `function` from command-line tokens, and whether `--json` was among them.

    `--help` lists the parameters and exits. Raises InvalidRequest for what does not fit the signature.
    """
    signature = inspect.signature(function)
    parser = _Parser(prog=prog, description=inspect.getdoc(function) or f"Call {name}.", allow_abbrev=False)
    hints = _hints(function)
    for parameter in signature.parameters.values():
        _add(parser, parameter, hints.get(parameter.name, parameter.annotation))
    if RESERVED_JSON not in signature.parameters:
        parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON document")
    given = vars(parser.parse_args(list(tokens)))
    as_json = bool(given.pop("as_json", False))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(pair.split("=", 1) for pair in value)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[parameter.name] = value
    return args, kwargs, as_json


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}  # an annotation that can't be evaluated here only makes the option an untyped one


def _add(parser: argparse.ArgumentParser, parameter: inspect.Parameter, annotation: Any) -> None:
    flag = "--" + parameter.name.replace("_", "-")
    flags = [flag] if flag == "--" + parameter.name else [flag, "--" + parameter.name]
    required = parameter.default is parameter.empty
    kind = _plain(annotation)
    label = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    about = "" if annotation is parameter.empty else str(label)
    about += "" if required else f" (default {parameter.default!r})"
    options: dict[str, Any] = {
        "dest": parameter.name,
        "default": argparse.SUPPRESS,
        "help": about.strip().replace("%", "%%"),
    }
    if parameter.kind is parameter.VAR_POSITIONAL:
        parser.add_argument(*flags, nargs="*", type=_converter(kind, flag), **options)
    elif parameter.kind is parameter.VAR_KEYWORD:
        parser.add_argument(*flags, nargs="*", metavar="NAME=VALUE", **options)
    elif kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, required=required, **options)
    else:
        parser.add_argument(
            *flags, type=_converter(kind, flag), required=required, metavar=parameter.name.upper(), **options
        )


def _plain(annotation: Any) -> Any:
    """The type beneath `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [one for one in typing.get_args(annotation) if one is not type(None)]
        return inner[0] if len(inner) == 1 else Any
    return annotation


def _converter(kind: Any, flag: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if kind is bytes:
            return Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
        if kind in (int, float, str, Path):
            return kind(text)
        try:
            return json.loads(text)
        except ValueError:
            if kind is Any or kind is inspect.Parameter.empty:
                return text
            raise InvalidRequest(f"{flag}: {text!r} is not JSON, which a {kind} takes") from None

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert
