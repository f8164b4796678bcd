"""`mn doctor`: what this machine can do, and the command that fixes each gap."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import typer

from mn.cli.local import require_node
from mn.cli.output import Json, paint, print_json
from mn.formats.errors import Internal

MARKS = {"ok": ("✓", "32"), "warn": ("!", "33"), "missing": ("✗", "31")}


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(as_json: Json = False) -> None:
    """Check what this machine can do, and print the command that fixes each gap.

    Exit code 1 when something that a node needs is missing.
    """
    require_node()
    argv = [sys.executable, "-P", "-m", "mn_nodepool.doctor", "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise Internal(f"the doctor ended with exit code {done.returncode} and no report") from None
    if as_json:
        print_json(report)
    else:
        for check in report["checks"]:
            mark, colour = MARKS[check["state"]]
            print(f"{paint(mark, colour)} {check['name']:<18} {check['detail']}")
            if check["fix"]:
                print(f"  {'':<18} fix: {check['fix']}")
    if not report["ok"]:
        raise typer.Exit(1)
