"""A real runtime in a throw-away home, driven by the `mn` command as a user drives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

MN = (sys.executable, "-P", "-c", "from mn.cli.main import main; main()")
WAIT_S = 60.0


def until(condition: Callable[[], Any], what: str = "the condition", seconds: float = WAIT_S) -> Any:
    """Wait for a condition to hold and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about within {seconds:.0f} s"
        time.sleep(0.02)
    return value


class Runtime:
    """One home. Leaving the context stops the runtime and removes the home."""

    def __init__(self, home: Path, **environ: str) -> None:
        self.home = home
        self._environ = environ

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.home.exists():
            self.mn("runtime", "reset", "--yes")
            shutil.rmtree(self.home, ignore_errors=True)

    @property
    def environ(self) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MN_")}
        return {**plain, "MN_HOME": str(self.home), "NO_COLOR": "1", **self._environ}

    def mn(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `mn …` against this home."""
        done = subprocess.run(
            [*MN, *arguments], env=self.environ, capture_output=True, text=True, timeout=180, check=False, **options
        )
        if check:
            assert done.returncode == 0, f"mn {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.mn(*arguments, "--json").stdout)

    def start(self, *arguments: str) -> dict[str, Any]:
        return dict(self.json("runtime", "start", "--ports", "auto", *arguments))

    @property
    def endpoints(self) -> dict[str, Any]:
        return dict(json.loads((self.home / "run" / "endpoints.json").read_text()))

    def children(self) -> dict[str, dict[str, Any]]:
        """name → pid, start and restarts of each child that the supervisor runs at the moment."""
        return dict(json.loads((self.home / "run" / "children.json").read_text())["children"])

    def processes(self) -> list[psutil.Process]:
        """Every live process that belongs to this home: by its environment or its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("MN_HOME") == str(self.home) or str(self.home) in " ".join(
                    process.cmdline()
                )
                if mine and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found
