"""Settings of a runtime: one frozen object per process, built once from a mapping; nothing else reads the environment.

Each field's value is, in this order: the command's flag, `MN_<NAME>` in the environment, `[runtime] <name>` in `config.toml`, the default.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mn.formats.errors import InvalidRequest

RUN_DIR_BYTES_MAX = 75
"""Room is left for the names in it, such as `sandboxes/sbx_<26 digits>`."""


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a runtime can be told. A port of 0 means: pick a free one and keep it."""

    home: Path = field(default=Path("~/.mn"), metadata={"doc": "folder of this runtime; one runtime per folder"})
    node_alias: str = _setting("", "short name of this node; made once and kept in the home when empty")
    api_host: str = _setting("127.0.0.1", "address at which the HTTP API listens")
    api_port: int = _setting(54001, "HTTP API port")
    dist_port: int = _setting(4370, "mesh port, opened when the node joins others")
    mapper_port: int = _setting(4369, "port mapper's port, opened when the node joins others")
    grpc_port: int = _setting(55051, "admin service's port")
    store_port: int = _setting(6379, "embedded store's port on loopback")
    store_bytes_max: int = _setting(
        1 << 30, "memory of the embedded store; a write beyond it is refused, nothing is evicted"
    )
    sentinel_port: int = _setting(26379, "Sentinel's port on loopback")
    redis_url: str = _setting("", "an external Redis or Valkey, instead of the embedded one")
    gateways: int = _setting(1, "gateway processes; more use more cores for HTTP")
    driver: str = _setting("bubblewrap", "how sandboxes are made: bubblewrap, or host_local, which isolates nothing")
    docker_network_mode: str = _setting(
        "", "`disabled`: this node runs outside container networks and is named by its IP"
    )
    spares: int = _setting(
        2, "started sandboxes kept ready per shape; each costs about 10 MB and saves 40 ms at a cold call"
    )
    slots: int = _setting(0, "replicas that may run at once; 0: as CPU and memory allow")
    cpu_overcommit: float = _setting(8.0, "cores promised per core that the machine has; calls that wait cost no CPU")
    lease_ttl_s: float = _setting(5.0, "leader lease; shorter finds a dead leader sooner and tolerates less delay")
    drain_s: float = _setting(30.0, "seconds that running calls get to finish when the runtime stops")
    interrupt_grace_s: float = _setting(2.0, "seconds between interrupting a call and killing its sandbox")
    start_timeout_s: float = _setting(60.0, "seconds within which a sandbox must be ready and have loaded its function")
    bundle_bytes_max: int = _setting(256 << 20, "packed size of a bundle")
    bundle_unpacked_bytes_max: int = _setting(1 << 30, "unpacked size of a bundle")
    bundle_files_max: int = _setting(20_000, "files in a bundle")
    payload_bytes_max: int = _setting(256 << 20, "size of a call's input, and of its result")
    queue_calls_max: int = _setting(10_000, "calls that one gateway queues per function")
    queue_bytes_max: int = _setting(256 << 20, "bytes of calls that one gateway queues per function")
    output_bytes_max: int = _setting(1 << 20, "output kept per call; what comes after is dropped with a note")
    call_depth_max: int = _setting(16, "how deep calls may nest")
    tmp_bytes_max: int = _setting(512 << 20, "size of a sandbox's /tmp and of its work directory")
    log_file_bytes_max: int = _setting(16 << 20, "size at which a log file is rotated")
    log_files_max: int = _setting(8, "rotated log files kept per function and process")
    logs_s: float = _setting(604800.0, "seconds after the last line at which a function's log files go")
    failures_max: int = _setting(1000, "failed calls kept for `mn debug`")
    failures_bytes_max: int = _setting(256 << 20, "bytes of failed calls kept")
    failures_s: float = _setting(86400.0, "seconds that failed calls are kept")
    versions_kept: int = _setting(10, "versions of a function kept besides the live one")
    ephemeral_s: float = _setting(600.0, "seconds after the last contact at which an ephemeral function is removed")
    auth_stale_s: float = _setting(3600.0, "seconds that a gateway honours its last copy of the keys without a leader")
    trusted_hosts: str = _setting("", "further Host names that the API answers to, comma-separated")
    cors_origins: str = _setting("", "origins that may call the API from a browser, comma-separated; none by default")
    log_level: str = _setting("info", "debug, info, warning or error")

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from flags (None values count as absent), the environment and the home's `config.toml`.

        Raises InvalidRequest naming the source of a value that cannot be read.
        """
        flags = {k: v for k, v in (flags or {}).items() if v is not None}
        environ = os.environ if environ is None else environ
        home = Path(flags.get("home") or environ.get("MN_HOME") or "~/.mn").expanduser().absolute()
        values: dict[str, Any] = {"home": home}
        from_file = _runtime_table(home, {spec.name for spec in dataclasses.fields(cls)} - {"home"})
        for spec in dataclasses.fields(cls):
            name = spec.name
            if name == "home":
                continue
            for source, table, key in (
                ("flag", flags, name),
                ("environment", environ, "MN_" + name.upper()),
                ("config.toml", from_file, name),
            ):
                if key in table and table[key] != "":
                    values[name] = _convert(type(spec.default), table[key], f"{key} ({source})")
                    break
        return cls(**values)

    def environ(self) -> dict[str, str]:
        """What to put in a child process's environment so that `load` there gives these same settings."""
        return {"MN_" + f.name.upper(): str(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def with_(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)

    # Places in the home.
    @property
    def bundles_dir(self) -> Path:
        return self.home / "bundles"

    @property
    def run_dir(self) -> Path:
        """Sockets and what tells of running processes. Socket paths end at 107 bytes, so a long home has a short folder elsewhere."""
        inside = self.home / "run"
        if len(os.fsencode(inside)) <= RUN_DIR_BYTES_MAX:
            return inside
        import hashlib  # costs memory that the supervisor of an ordinary home does not need

        return Path("/tmp") / f"mn-{os.geteuid()}-{hashlib.sha256(os.fsencode(inside)).hexdigest()[:12]}"  # noqa: S108

    @property
    def lock_file(self) -> Path:
        """Always in the home, where every host that shares it looks, and beside `run/`, which can be lost while processes run."""
        return self.home / "supervisor.lock"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def store_dir(self) -> Path:
        return self.home / "store"

    @property
    def endpoints_file(self) -> Path:
        return self.run_dir / "endpoints.json"

    @property
    def config_file(self) -> Path:
        return self.home / "config.toml"

    @property
    def node_name(self) -> str:
        return f"mirror_neuron@{self.node_alias or socket.gethostname()}"


def read_config(home: Path) -> dict[str, Any]:
    """The home's `config.toml`, or an empty table where there is none.

    Raises InvalidRequest when it is not TOML, or may not be read.
    """
    try:
        return tomllib.loads((home / "config.toml").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidRequest(
            f"{home} can't be a home: {error.filename}: {error.strerror}. Choose another folder: MN_HOME=…", path="home"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{home / 'config.toml'} is not valid TOML: {error}") from None


def _runtime_table(home: Path, known: Set[str]) -> dict[str, Any]:
    """`[runtime]` of the home's `config.toml`. Raises InvalidRequest for a key that is no setting."""
    table = read_config(home).get("runtime", {})
    where = home / "config.toml"
    if not isinstance(table, dict):
        raise InvalidRequest(f"{where}: runtime must be a table: [runtime]", path="runtime")
    for key in table:
        if key not in known:
            from difflib import get_close_matches  # costs memory that an ordinary start does not need

            near = get_close_matches(key, sorted(known), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
            raise InvalidRequest(f"{where}: [runtime] has no setting {key!r}; {hint}", path=f"runtime.{key}", near=near)
    return table


def _convert(kind: type, value: Any, where: str) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{where}: {value!r} is not a {kind.__name__}") from None
