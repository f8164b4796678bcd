"""What to ship of a program so that its functions run elsewhere: its own source files, and pickles of what has no file.

Starting from the module that defines a function, imports are followed through the local modules (neither standard
library nor installed) that this process can find: a module ships as its file, a package as its folder. Everything else
that is imported has to be there already, and is listed, so that its absence is told in one sentence before the
function loads.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mn.formats.codecs import PICKLE_HEADER
from mn.formats.errors import InvalidRequest, TooLarge
from mn.formats.paths import PAYLOADS
from mn.formats.pickles import PROTOCOL, SANDBOX_MAIN, modules_of
from mn.functions import Function, is_in_file
from mn.manifests import spec_of

DATA_BYTES_MAX = 1 << 20
"""A file beside a package's modules that is larger does not travel with them."""
PACKAGE_BYTES_MAX = 64 << 20
PACKAGE_FILES_MAX = 10_000
_IDENTIFIER = re.compile(r"\W")


@dataclass
class Packed:
    """A bundle in the making."""

    files: dict[str, bytes | Path]
    manifest: bytes
    functions: dict[str, Function[Any, Any]]
    """By name."""
    modules: set[str]
    """Modules whose functions these are."""


@dataclass
class _Shipment:
    """Modules that travel, and the imports of theirs that don't."""

    files: dict[str, Path] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)


def pack_module(module: ModuleType, wanted: Iterable[Function[Any, Any]] = (), *, only: bool = False) -> Packed:
    """The bundle of a module's functions and, unless `only`, of those in the local modules that travel with it.

    `wanted` are deployed whether or not they can be found as attributes of a module.
    Raises InvalidRequest when two of them have one name, or one can't be packed.
    """
    shipment = _Shipment()
    in_file = has_source(module)
    if in_file:
        _ship(module, shipment)
    sources = [module] if only else _homes(module, shipment)
    functions: dict[str, Function[Any, Any]] = {}
    for function in (*wanted, *(each for home in sources for each in functions_of(home))):
        known = functions.setdefault(function.name, function)
        if known.raw_function is not function.raw_function:
            raise InvalidRequest(
                f"two functions are called {function.name!r}, at {_place(known)} and {_place(function)}: "
                "give one of them a name of its own, @mn.function(name=…)"
            )
    if wanted and only:
        functions = {each.name: each for each in wanted}
    files: dict[str, bytes | Path] = {}
    entries = {name: _entry(function, shipment, files) for name, function in functions.items()}
    needs = tuple(sorted(shipment.needs))
    files.update({f"{PAYLOADS}/{path}": file for path, file in shipment.files.items()})
    specs = [spec_of(function, *entries[name], needs, _source(function)) for name, function in functions.items()]
    manifest = json.dumps({"manifest_version": "1", "functions": specs}, indent=1, ensure_ascii=False).encode()
    return Packed(files, manifest, functions, {home.__name__ for home in sources})


def _place(function: Function[Any, Any]) -> str:
    """File name and line of a function's definition."""
    code = inspect.unwrap(function.raw_function).__code__ if function.raw_function is not None else None
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code is not None else "an unknown place"


def functions_of(module: ModuleType) -> list[Function[Any, Any]]:
    """The functions that a module defines, in its own order; those that it imported from others are not its."""
    mine = [
        value
        for value in vars(module).values()
        if isinstance(value, Function)
        and value.raw_function is not None
        and value.raw_function.__module__ == module.__name__
    ]
    return list({id(each.raw_function): each for each in reversed(mine)}.values())[::-1]


def has_source(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and str(file).endswith(".py") and os.path.exists(str(file))


def _homes(module: ModuleType, shipment: _Shipment) -> list[ModuleType]:
    return [module] + [
        found
        for name in sorted(shipment.modules)
        if (found := sys.modules.get(name)) is not None and found is not module and isinstance(found, ModuleType)
    ]


def _entry(function: Function[Any, Any], shipment: _Shipment, files: dict[str, bytes | Path]) -> tuple[str, bool]:
    """(entry, main) of a function; what has no file is pickled into `files`."""
    raw = function.raw_function
    assert raw is not None
    module = sys.modules.get(raw.__module__)
    if module is not None and is_in_file(raw) and module_name(module) in shipment.modules:
        main = module.__name__ == "__main__"
        return f"{module_name(module)}:{raw.__qualname__}", main
    path = f"functions/{function.name}.pickle"
    data = pickled(function)
    files[f"{PAYLOADS}/{path}"] = PICKLE_HEADER + data
    for name in modules_of(data):
        if name.partition(".")[0] not in ("mn", "cloudpickle", "__main__"):
            _need(name, shipment)
    return f"pickle:{path}", False


def pickled(function: Function[Any, Any]) -> bytes:
    """A function by value, with the functions that it calls and that importing a file does not bring back.

    A sandbox that unpickles it has another `__main__` than this process, so that those of a script go by value too.

    Raises InvalidRequest when it holds what can't be pickled.
    """
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            raw = value.raw_function if isinstance(value, Function) else None
            if raw is not None and (raw.__module__ == "__main__" or not is_in_file(raw)):
                return object.__new__, (Function,), dict(value.__dict__)
            return super().reducer_override(value)

    buffer = io.BytesIO()
    try:
        Pickler(buffer, PROTOCOL).dump(function.raw_function)
    except Exception as error:
        raise InvalidRequest(
            f"{function.name} {_why_pickled(function)}, and it can't be pickled: {type(error).__name__}: {error}; "
            "define it at the top of a module, or keep what can't travel out of it"
        ) from error
    return buffer.getvalue()


def _why_pickled(function: Function[Any, Any]) -> str:
    module = sys.modules.get(getattr(function.raw_function, "__module__", ""))
    return "is not there when its file is imported" if module is not None and has_source(module) else "has no file"


def _ship(module: ModuleType, shipment: _Shipment) -> None:
    """Add a module, or the package that it is in, and what that imports."""
    name = module_name(module)
    if name in shipment.modules:
        return
    file = Path(str(module.__file__)).resolve()
    top = name.partition(".")[0]
    if "." not in name and not hasattr(module, "__path__"):
        shipment.modules.add(name)
        shipment.files[f"{name}.py"] = file
        _follow(file, name, shipment)
        return
    levels = name.count(".") + (file.name == "__init__.py")
    folder = file.parents[levels - 1] if levels else file.parent
    _ship_package(top, folder, shipment)
    # A namespace folder may hold the module without being a package's.
    shipment.modules.add(name)


def _ship_package(top: str, folder: Path, shipment: _Shipment) -> None:
    size = count = 0
    modules: list[tuple[Path, str]] = []
    for path in _package_files(folder):
        relative = path.relative_to(folder)
        length = path.stat().st_size
        if path.suffix == ".py":
            parts = [top, *relative.with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            shipment.modules.add(name)
            modules.append((path, name))
        elif length > DATA_BYTES_MAX:
            continue
        size, count = size + length, count + 1
        if size > PACKAGE_BYTES_MAX or count > PACKAGE_FILES_MAX:
            raise TooLarge(
                f"the package {top} in {folder} is larger than {PACKAGE_BYTES_MAX >> 20} MiB or {PACKAGE_FILES_MAX} "
                "files, too much to travel with a function: put the function into a smaller package",
                limit_bytes=PACKAGE_BYTES_MAX,
            )
        shipment.files[f"{top}/{relative.as_posix()}"] = path
    for path, name in modules:
        _follow(path, name, shipment)


def _package_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix not in (".pyc", ".pyo") and path.is_file():
                yield path


def _follow(file: Path, name: str, shipment: _Shipment) -> None:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for imported, required in imports_of(file.read_bytes(), package):
        _need(imported, shipment, required)


def _need(name: str, shipment: _Shipment, required: bool = True) -> None:
    """Ship a module that is local; of another, note that it has to be there when it is `required`."""
    top = name.partition(".")[0]
    if (
        top in sys.stdlib_module_names
        or top in ("mn", "cloudpickle", "__main__", SANDBOX_MAIN)
        or top in shipment.modules
    ):
        return
    found = sys.modules.get(top)
    origin = getattr(found, "__file__", None) if found is not None else _origin(top)
    if origin and origin.endswith(".py") and not is_installed(origin):
        if found is None:
            found = ModuleType(top)
            found.__file__ = origin
            if os.path.basename(origin) == "__init__.py":
                found.__path__ = [os.path.dirname(origin)]
        _ship(found, shipment)
    elif required:
        shipment.needs.add(top)


def _origin(top: str) -> str | None:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None else None


def imports_of(source: bytes, package: str) -> list[tuple[str, bool]]:
    """(module, whether importing the source needs it) for each import in it, absolute. Pure.

    Not needed at once is what is imported inside a function, under `try` with a handler, or under `if`.
    Source that is not Python has no imports.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: dict[str, bool] = {}

    def visit(node: ast.AST, required: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.name] = found.get(alias.name, False) or required
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            if base:
                found[base] = found.get(base, False) or required
        lazy = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If, ast.Try)
        for child in ast.iter_child_nodes(node):
            visit(child, required and not isinstance(node, lazy))

    visit(tree, True)
    return list(found.items())


def module_name(module: ModuleType) -> str:
    """The name by which a sandbox imports a module: its own, or for a script its file's."""
    if module.__name__ != "__main__":
        return module.__name__
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name)
    return importable(Path(str(module.__file__)).stem)


def importable(stem: str) -> str:
    """A file's name as a module name: `01-load` → `_01_load`."""
    name = _IDENTIFIER.sub("_", stem)
    return name if name[:1].isalpha() or name.startswith("_") else f"_{name}"


@lru_cache(maxsize=1)
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")} | {str(Path(__file__).parent)}
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)


def is_installed(file: str) -> bool:
    """Whether a file belongs to the standard library, to an installed package or to MirrorNeuron, rather than to the
    user's own code.
    """
    real = os.path.realpath(file)
    return real.startswith(_installed_folders()) or any(
        part in ("site-packages", "dist-packages") for part in Path(real).parts
    )


def _source(function: Function[Any, Any]) -> str:
    """Where a function is written: its file's folder and name, which are the same in every checkout, and its qualified
    name.
    """
    raw = function.raw_function
    assert raw is not None
    file = Path(raw.__code__.co_filename)
    place = f"{file.parent.name}/{file.name}" if is_in_file(raw) else "prompt"
    return f"{place}::{raw.__qualname__}"[:4096]
