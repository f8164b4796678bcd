"""MirrorNeuron: functions on the machines that you own.

>>> import mn
>>> @mn.function(cpu=1, memory="512MiB")
... def square(x: int) -> int:
...     return x * x
>>> square.remote(4)                                                                                # doctest: +SKIP
16

Everything loads on first use, so that `import mn` costs next to nothing, in a sandbox too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mn.client import Client as Client
    from mn.formats import errors as errors
    from mn.functions import Function as Function
    from mn.functions import function as function
    from mn.functions import lookup as lookup

__version__ = "0.1.0"
__all__ = ["Client", "Function", "__version__", "errors", "function", "lookup"]

_HOMES = {
    "Client": "mn.client",
    "Function": "mn.functions",
    "errors": "mn.formats.errors",
    "function": "mn.functions",
    "lookup": "mn.functions",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mn' has no attribute {name!r}")
    import sys

    __import__(home)
    module = sys.modules[home]
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
