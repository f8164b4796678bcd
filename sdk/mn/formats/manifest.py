"""`manifest.json`: what a bundle holds and how its functions want to run.

One function per manifest, or several under `functions`; both normalise to a tuple of `FunctionSpec`. Unknown fields are refused, so
that a misspelt limit is not silently ignored.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from mn.formats.errors import InvalidRequest
from mn.formats.ids import FUNCTION_NAME

ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z|pickle:[A-Za-z0-9_./-]+\Z")
MANIFEST_BYTES_MAX = 1 << 20
FUNCTIONS_MAX = 1000
PARAMETERS_MAX = 256


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the interpreter must offer."""

    python: str | None = None
    """`major.minor`; None accepts the node's."""
    packages: tuple[str, ...] = ()
    requires_modules: tuple[str, ...] = ()
    """Top-level modules that the code imports and the bundle does not bring; checked before anything is unpickled."""


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one replica needs."""

    cpu: float = 1.0
    """Cores."""
    memory_mb: int = 512
    """MiB."""
    gpu: int = 0


class Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many replicas there may be, and when they go."""

    min_replicas: int = 0
    max_replicas: int = 100
    concurrency: int = 1
    """Calls that one replica serves at a time."""
    idle_s: float = 300.0
    """Seconds without a call after which a replica above the minimum ends."""


class FunctionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One function: its code's place in the bundle and its settings."""

    name: str
    entry: str
    """`module:qualified.name` beneath `payloads/`, or `pickle:path` of a pickled callable."""
    type: Literal["function"] = "function"
    main: bool = False
    """The module was the caller's `__main__`; its classes keep that identity on both sides."""
    source: str = ""
    """Where the code came from, to tell a new version from another function of the same name."""
    environment: Environment = Environment()
    resources: Resources = Resources()
    scaling: Scaling = Scaling()
    timeout_s: float = 300.0
    retries: int = 0
    """Times that a call may run again after its sandbox was lost or its code raised."""
    env: dict[str, str] = {}
    """Environment variables inside the sandbox."""
    generator: bool = False
    raw: bool = False
    """The function has one parameter annotated `bytes` and gets the raw body."""
    parameters: tuple[dict[str, Any], ...] = ()
    """For help texts: `name`, `kind`, `annotation`, `default` (as text) of each parameter."""
    doc: str = ""


class _Single(FunctionSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    manifest_version: Literal["1"] = "1"


class _Many(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    functions: tuple[FunctionSpec, ...]
    manifest_version: Literal["1"] = "1"


class Manifest(msgspec.Struct, frozen=True):
    """A validated manifest."""

    functions: tuple[FunctionSpec, ...]


def parse_manifest(data: bytes) -> Manifest:
    """Read and validate a manifest.

    Raises InvalidRequest with the offending field's `path`.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise InvalidRequest(f"manifest.json is larger than {MANIFEST_BYTES_MAX} bytes", path="")
    try:
        several = isinstance(probe := msgspec.json.decode(data), dict) and "functions" in probe
        functions = msgspec.json.decode(data, type=_Many).functions if several else (_narrow(data),)
    except msgspec.ValidationError as error:
        raise _invalid(error, "manifest.json") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"manifest.json is not JSON: {error}", path="") from None
    prefix = "functions[{}]." if several else ""
    if not 1 <= len(functions) <= FUNCTIONS_MAX:
        raise InvalidRequest(f"a manifest has 1 to {FUNCTIONS_MAX} functions, not {len(functions)}", path="functions")
    seen: set[str] = set()
    for index, spec in enumerate(functions):
        check_spec(spec, prefix.format(index))
        if spec.name in seen:
            raise InvalidRequest(f"the name {spec.name!r} is there twice", path=prefix.format(index) + "name")
        seen.add(spec.name)
    return Manifest(functions)


def _narrow(data: bytes) -> FunctionSpec:
    single = msgspec.json.decode(data, type=_Single)
    return FunctionSpec(**{name: getattr(single, name) for name in FunctionSpec.__struct_fields__})


def _invalid(error: msgspec.ValidationError, what: str) -> InvalidRequest:
    text, _, where = str(error).partition(" - at `$")
    return InvalidRequest(f"{what}: {text}", path=where.rstrip("`").lstrip("."))


def _is_plain(value: Any) -> bool:
    """Text, a flag or nothing: what every record, frame and page can carry, unlike nested or huge values."""
    return value is None or isinstance(value, str | bool)


def check_spec(spec: FunctionSpec, prefix: str = "") -> None:
    """Raise InvalidRequest with the field's `path` (after `prefix`) for a value outside its range."""
    scaling, resources, environment = spec.scaling, spec.resources, spec.environment
    checks = (
        (FUNCTION_NAME.match(spec.name) and "~" not in spec.name, "name",
         f"{spec.name!r} is no function name: a letter or _, then letters, digits, _ . -, at most 100"),
        (ENTRY.match(spec.entry) and ".." not in spec.entry, "entry", f"{spec.entry!r} is not module:name"),
        (environment.python is None or re.fullmatch(r"3\.\d{1,2}", environment.python), "environment.python",
         f"{environment.python!r} is not a version such as 3.11"),
        (not environment.packages, "environment.packages", "this release builds no environments: bring pure-Python code in the bundle"),
        (0 < resources.cpu <= 1024, "resources.cpu", "must be above 0 and at most 1024 cores"),
        (1 <= resources.memory_mb <= 1 << 24, "resources.memory_mb", "must be 1 to 16777216 MiB"),
        (0 <= resources.gpu <= 64, "resources.gpu", "must be 0 to 64"),
        (0 <= scaling.min_replicas <= 1000, "scaling.min_replicas", "must be 0 to 1000"),
        (1 <= scaling.max_replicas <= 1000, "scaling.max_replicas", "must be 1 to 1000"),
        (scaling.min_replicas <= scaling.max_replicas, "scaling.min_replicas", "must not be above max_replicas"),
        (1 <= scaling.concurrency <= 1000, "scaling.concurrency", "must be 1 to 1000"),
        (0 <= scaling.idle_s <= 31536000, "scaling.idle_s", "must be 0 to 31536000 seconds"),
        (0 < spec.timeout_s <= 31536000, "timeout_s", "must be above 0 and at most 31536000 seconds"),
        (0 <= spec.retries <= 100, "retries", "must be 0 to 100"),
        (len(spec.env) <= 200 and all(k and "=" not in k and "\0" not in k + v and len(v) < 65536 for k, v in spec.env.items()),
         "env", "at most 200 variables, names without =, values below 64 KiB"),
        (len(spec.parameters) <= PARAMETERS_MAX and all(_is_plain(value) for it in spec.parameters for value in it.values()),
         "parameters", f"at most {PARAMETERS_MAX}, each with texts alone"),
        (len(spec.doc) <= 65536 and len(spec.source) <= 4096, "doc", "texts are too long"),
    )  # fmt: skip
    for fine, path, message in checks:
        if not fine:
            raise InvalidRequest(f"manifest.json: {prefix}{path}: {message}", path=prefix + path)
