"""Becoming a version: from LOAD's JSON to a callable."""

from __future__ import annotations

import os
import sys

from mn_runner.inside.failures import LACKING, Refusal, function_error, lacking_module
from mn_runner.inside.values import MINOR, unpickled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR = 0x20, 0x80, 0x200
MAIN_WHILE_LOADING = "__mn_main__"
"""Name of a script's module while its body runs, so that `if __name__ == "__main__"` stays closed."""


class Function:
    """The loaded version: what to call and how it is called."""

    __slots__ = (
        "call",
        "concurrency",
        "depth_max",
        "generator",
        "is_async",
        "name",
        "output_bytes_max",
        "payload_bytes_max",
        "raw",
        "version",
    )

    def __init__(self, load: dict[str, Any], call: Callable[..., Any]) -> None:
        self.call = call
        self.name: str = load.get("name") or "function"
        self.version: str = load.get("version") or self.name
        self.concurrency = max(1, int(load.get("concurrency") or 1))
        self.generator = bool(load.get("generator"))
        self.raw = bool(load.get("raw"))
        self.output_bytes_max = int(load.get("output_bytes_max") or 1 << 20)
        self.payload_bytes_max = int(load.get("payload_bytes_max") or 256 << 20)
        self.depth_max = int(load.get("depth_max") or 16)
        self.is_async = bool(_flags(call) & (CO_COROUTINE | CO_ASYNC_GENERATOR))


def _flags(call: Any) -> int:
    """Code flags of what is called in the end, through methods, partials and callable objects."""
    for _ in range(16):
        code = getattr(call, "__code__", None)
        if code is not None:
            return int(code.co_flags)
        call = getattr(call, "__func__", None) or getattr(call, "func", None) or vars(type(call)).get("__call__")
        if call is None:
            break
    return 0


def load_function(load: dict[str, Any]) -> Function:
    """Import or unpickle the version's entry.

    Raises Refusal for what the version asks of its environment in vain; whatever user code raises at import passes through.
    """
    wanted = load.get("python") or MINOR
    if wanted != MINOR:
        raise Refusal(
            "invalid-request",
            f"{load.get('name')} was deployed for Python {wanted} and this sandbox runs {MINOR}; deploy it with python={MINOR!r}",
        )
    os.environ.update(load.get("env") or {})
    root = load["root"]
    if root not in sys.path:
        sys.path.insert(0, root)
    _check_modules(load)
    entry: str = load["entry"]
    kind, _, rest = entry.partition(":")
    if kind == "pickle":
        found = _from_pickle(os.path.join(root, rest))
    elif load.get("main"):
        found = _attribute(_import_main(root, kind), rest, entry)
    else:
        found = _attribute(__import__(kind, fromlist=["*"]), rest, entry)
    call = getattr(found, "raw_function", found)
    if not callable(call):
        raise Refusal(
            "invalid-request", f"{entry} is a {type(call).__name__}, not a function; name a function in `entry`"
        )
    return Function(load, call)


def _check_modules(load: dict[str, Any]) -> None:
    wanted = load.get("requires_modules")
    if not wanted:
        return
    from importlib.util import find_spec

    missing = []
    for name in wanted:
        try:
            if name not in sys.modules and find_spec(name) is None:
                missing.append(name)
        except (ImportError, ValueError):
            missing.append(name)
    if missing:
        raise Refusal(
            "invalid-request",
            f"{load.get('name')} needs {', '.join(missing)}, {LACKING}",
            missing_modules=missing,
        )


def _from_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        return unpickled(file.read(), "the function and what it refers to")


def _import_main(root: str, module: str) -> Any:
    """Run a script's file as a module that is `__main__` in `sys.modules`, and by name once its body is through.

    What it defines calls itself `__main__`, as in the process that the file was deployed from: pickles of it resolve at both ends.
    """
    path = os.path.join(root, *module.split(".")) + ".py"
    namespace = type(sys)(MAIN_WHILE_LOADING)
    namespace.__file__ = path
    namespace.__package__ = module.rpartition(".")[0]
    sys.modules["__main__"] = sys.modules[MAIN_WHILE_LOADING] = namespace
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, namespace.__dict__)  # noqa: S102
    namespace.__name__ = "__main__"
    _rename_module(list(vars(namespace).values()))
    return namespace


def _rename_module(values: list[Any]) -> None:
    function = type(_rename_module)
    while values:
        value = values.pop()
        if isinstance(value, (type, function)) and value.__module__ == MAIN_WHILE_LOADING:
            value.__module__ = "__main__"
            if isinstance(value, type):
                values.extend(vars(value).values())


def _attribute(module: Any, qualname: str, entry: str) -> Any:
    found = module
    for name in qualname.split("."):
        if not hasattr(found, name):
            raise Refusal(
                "invalid-request", f"{entry}: {module.__file__} has no {qualname}; check `entry` in the manifest"
            )
        found = getattr(found, name)
    return found


def load_error(error: BaseException, load: dict[str, Any]) -> dict[str, Any]:
    """LOADED's `error`: a problem's members, and the exception's where user code raised it."""
    import json

    if isinstance(error, Refusal):
        return {"slug": error.slug, "detail": error.detail, **error.extra}
    told: dict[str, Any] = json.loads(function_error(error))
    told["slug"] = "function-error"
    told["detail"] = f"importing {load.get('entry')} raised {told['type']}: {told['message']}"
    if lacking := lacking_module(error):
        told["detail"] += f"; {lacking}"
    return told
