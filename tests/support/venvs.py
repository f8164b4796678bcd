"""Virtual environments for tests that install: made with a pip cache that outlives them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_S = 600


class Venv:
    """One virtual environment, used as a user's shell would use it: with nothing of the test's own environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run([sys.executable, "-m", "venv", str(folder)])

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python3*/site-packages"))

    def names(self) -> set[str]:
        """What lies in site-packages."""
        return {path.name for path in self.site_packages.iterdir()}

    def pip(self, *arguments: str) -> None:
        self.run([self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])

    def run(
        self, argv: Sequence[str], *, check: bool = True, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MN_", "PYTHON"))}
        done = subprocess.run(
            argv,
            env={**plain, "NO_COLOR": "1", **environ},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def mn(self, *arguments: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run([str(self.folder / "bin" / "mn"), *arguments], check=check, **environ)
