"""The systemd unit that starts a runtime with its machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mn.cli.local import supervisor_process
from mn.formats.errors import Conflict, NotFound, Unavailable
from mn.formats.settings import Settings

SYSTEMD = Path("/run/systemd/system")
STOP_MARGIN_S = 30
CLIENT_SETTINGS = frozenset({"MN_URL", "MN_KEY"})


def unit_name(home: Path, default_home: Path) -> str:
    """`mirrorneuron.service`, or one with a mark for another than the usual home, so that both can be enabled."""
    if home == default_home:
        return "mirrorneuron.service"
    return f"mirrorneuron-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}.service"


def unit_text(settings: Settings, python: str, system: bool, environ: Mapping[str, str]) -> str:
    """The unit: the supervisor in the foreground, told of readiness by itself, with this shell's `MN_*` settings."""
    kept = {name: value for name, value in environ.items() if name.startswith("MN_") and name not in CLIENT_SETTINGS}
    kept["MN_HOME"] = str(settings.home)
    lines = "\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(kept.items()))
    return f"""[Unit]
Description=MirrorNeuron runtime in {settings.home}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={_quoted(python)} -P -m mn_nodepool.supervisor
{lines}
Restart=on-failure
RestartSec=2
KillMode=mixed
TimeoutStopSec={int(2 * settings.drain_s) + STOP_MARGIN_S}
Delegate=yes
LimitNOFILE=65536

[Install]
WantedBy={"multi-user.target" if system else "default.target"}
"""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def enable(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Install the unit and start it; the unit's file.

    Raises Unavailable where systemd does not run, and Conflict while the runtime runs outside of it.
    """
    _require_systemd()
    path = _unit_path(settings)
    if supervisor_process(settings) is not None and not path.exists():
        raise Conflict("the runtime runs already, outside systemd; stop it first: mn runtime stop")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(unit_text(settings, sys.executable, _is_system(), environ), "utf-8")
    path.chmod(0o600)
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", path.name)
    return path


def disable(settings: Settings) -> Path:
    """Stop and remove the unit. Raises NotFound when there is none."""
    _require_systemd()
    path = _unit_path(settings)
    if not path.exists():
        raise NotFound(f"the runtime in {settings.home} is not enabled: there is no {path}")
    _systemctl("disable", "--now", path.name)
    path.unlink()
    _systemctl("daemon-reload")
    return path


def _is_system() -> bool:
    return os.geteuid() == 0


def _unit_path(settings: Settings) -> Path:
    folder = Path("/etc/systemd/system") if _is_system() else Path("~/.config/systemd/user").expanduser()
    return folder / unit_name(settings.home, Path("~/.mn").expanduser())


def _require_systemd() -> None:
    if not SYSTEMD.is_dir():
        raise Unavailable(
            "systemd does not run here. Let the service manager that does start this command:\n"
            "  mn runtime start --foreground"
        )


def _systemctl(*arguments: str) -> None:
    scope = () if _is_system() else ("--user",)
    done = subprocess.run(["systemctl", *scope, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        command = " ".join(("systemctl", *scope, *arguments))
        raise Unavailable(f"`{command}` failed: {done.stderr.strip() or done.stdout.strip()}")
