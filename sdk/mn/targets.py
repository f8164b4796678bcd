"""`hello.py`, `hello.py::square`, `pkg.mod::f`: from what a person writes to functions."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from mn.formats.errors import InvalidRequest, NotFound
from mn.functions import Function
from mn.packing import functions_of, importable, is_installed


@dataclass(frozen=True, slots=True)
class Target:
    """A module, and those of its functions that are meant."""

    module: ModuleType
    chosen: tuple[Function[Any, Any], ...] = ()
    """Empty: all."""

    @property
    def functions(self) -> tuple[Function[Any, Any], ...]:
        return self.chosen or tuple(functions_of(self.module))

    def __iter__(self) -> Iterator[Function[Any, Any]]:
        return iter(self.functions)


def load_target(text: str) -> Target:
    """Import a file or module, afresh, and find the functions that are meant.

    Raises NotFound for a file, module or function that is not there, InvalidRequest when there is no function at all;
    what the file itself raises at import passes through.
    """
    place, _, name = text.partition("::")
    module = _import_file(Path(place)) if place.endswith(".py") or os.sep in place else _import_name(place)
    found = functions_of(module)
    if not found:
        raise InvalidRequest(f"{place} has no function of MirrorNeuron's: put @mn.function above one")
    if not name:
        return Target(module)
    for function in found:
        if name in (function.name, function.raw_function and function.raw_function.__qualname__):
            return Target(module, (function,))
    near = get_close_matches(name, [function.name for function in found], n=3, cutoff=0.4)
    listed = ", ".join(function.name for function in found)
    raise NotFound(f"{place} has no function {name!r}; it has {listed}", near=near)


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    root, names = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    _forget_below(root)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    name = ".".join(names)
    if len(names) == 1 and (importable(name) != name or name in sys.stdlib_module_names):
        return _import_as(importable(name) if importable(name) != name else f"{name}_", path)
    return importlib.import_module(name)


def _import_as(name: str, path: Path) -> ModuleType:
    """Import a file whose own name can't be imported, or would be another module's."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _forget_below(root: Path) -> None:
    """Make the next import read the user's own files again: a saved file is deployed as it is now."""
    prefix = str(root.resolve()) + os.sep
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and os.path.realpath(file).startswith(prefix) and not is_installed(file):
            del sys.modules[name]


def _import_name(name: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise NotFound(f"there is no module {name!r} here, and no file of that name; a file ends in .py") from None
        raise
