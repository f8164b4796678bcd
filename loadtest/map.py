"""A map of trivial items through two sandboxes against a pool of two processes."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from loadtest.report import Report, paired, say, summary
from loadtest.scratch import Failed, Runtime, child, runtime

SCRIPT = Path(__file__).parent / "mapping.py"
ITEMS = 10_000
SPEED_UP_MIN = 2.0
COUNTER = "mn_map_items_total"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="times that pool and system take turns (9; quick: 3)")


def run(options: argparse.Namespace) -> Report:
    rounds = options.rounds or (3 if options.quick else 9)
    say("starting a runtime ...")
    with runtime() as it:
        told = run_script(it, rounds)
        counted = items_counted(it)
    if told["driver"] != "bubblewrap":
        raise Failed(f"this compares with bubblewrap's sandboxes, not with {told['driver']}")
    report = Report()
    system, pool = told["seconds"]["system"], told["seconds"]["pool"]
    best = min(told["pool_chunked_seconds"], key=lambda chunk: statistics.median(told["pool_chunked_seconds"][chunk]))
    report.check("pool's seconds with chunk 1 / system's", paired(pool, system), ">=", SPEED_UP_MIN)
    report.check("items without an invocation of their own", told["items_mapped"] - counted, "==", 0)
    report.figures |= {
        "items": ITEMS,
        "rounds": rounds,
        "max_replicas": told["sandboxes"],
        "driver": told["driver"],
        "system": {"seconds": summary(system), "items_per_s": ITEMS / statistics.median(system)},
        "pool_chunk_1": {"seconds": summary(pool), "items_per_s": ITEMS / statistics.median(pool)},
        "pool_best_chunk": {"chunk": int(best), "seconds": summary(told["pool_chunked_seconds"][best])},
        "turns": told["seconds"],
        "invocations": counted,
    }
    return report


def run_script(it: Runtime, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-P", str(SCRIPT), str(ITEMS), str(rounds)]
    with child(command, it.environ, stdout=subprocess.PIPE) as process:
        text, _ = process.communicate()
        if process.returncode:
            raise Failed(f"the script ended with exit code {process.returncode}")
    return dict(json.loads(text))


def items_counted(it: Runtime) -> int:
    """Items that the gateway counted as invocations."""
    with it.client() as client:
        lines = client.metrics().splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(COUNTER + " "))
