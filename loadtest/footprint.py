"""What an idle runtime takes: memory of all its processes, of one spare, and the time that `import mn` adds."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from loadtest.report import Report, say, summary
from loadtest.scratch import Failed, Runtime, plain_environ, runtime, until

RUNTIME_MB_MAX = 200
SPARE_MB_MAX = 12
IMPORT_MS_MAX = 10
SETTLED = 0.005
"""Two readings that differ by less, as a part of the whole, are of a runtime at rest."""
BETWEEN_READINGS_S = 1.0
SETTLE_S = 60.0
MB = 10**6


class Memory(NamedTuple):
    """Of one process, in bytes."""

    proportional: int
    """Its own pages, and its part of those that it shares (`Pss`)."""
    private: int
    """Pages that nobody else has."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, help="pairs of Python starts, with and without the import (60; quick: 15)"
    )


def run(options: argparse.Namespace) -> Report:
    report = Report()
    say("starting a runtime and letting it settle ...")
    with runtime() as it:
        spares = it.await_spares()
        settle(it)
        memory(report, it, spares)
    imports(report, options.rounds or (15 if options.quick else 60))
    return report


def parse(rollup: str) -> Memory:
    """What `/proc/<pid>/smaps_rollup` says.

    >>> parse("Pss:  10 kB\\nPrivate_Clean: 1 kB\\nPrivate_Dirty: 2 kB\\n")
    Memory(proportional=10240, private=3072)
    """
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in rollup.splitlines())}

    def of(name: str) -> int:
        return 1024 * int(fields[name][0])

    return Memory(of("Pss"), of("Private_Clean") + of("Private_Dirty"))


def measure(process: psutil.Process) -> Memory:
    """Raises Failed where the system doesn't tell."""
    path = Path(f"/proc/{process.pid}/smaps_rollup")
    try:
        return parse(path.read_text())
    except (OSError, KeyError) as error:
        raise Failed(f"the memory of process {process.pid} can't be read ({error}); run it as root, on Linux") from None


def settle(it: Runtime) -> None:
    """Wait until nothing starts, ends, grows or shrinks any more."""
    before: dict[int, int] = {}

    def at_rest() -> bool:
        nonlocal before
        time.sleep(BETWEEN_READINGS_S)
        now = {process.pid: measure(process).proportional for process in it.processes()}
        same = now.keys() == before.keys() and abs(sum(now.values()) - sum(before.values())) < SETTLED * sum(
            now.values()
        )
        before = now
        return same

    until(at_rest, "a runtime at rest", SETTLE_S)


def memory(report: Report, it: Runtime, spares: int) -> None:
    """Every process by itself, and by what it belongs to."""
    names = {pid: name for name, pid in it.endpoints["pids"].items()}
    groups: dict[str, list[Memory]] = {}
    for name, pid in it.endpoints["pids"].items():
        groups[name] = [measure(psutil.Process(pid))]
    sandboxes = psutil.Process(it.endpoints["pids"]["node"]).children()
    for number, outer in enumerate(sandboxes, 1):
        groups[f"spare-{number}"] = [measure(each) for each in (outer, *outer.children(recursive=True))]
    counted = sum(len(group) for group in groups.values())
    present = {process.pid for process in it.processes()}
    if counted != len(present) or not names.keys() <= present or len(sandboxes) != spares:
        raise Failed(f"{counted} processes were measured of {len(present)}, and {len(sandboxes)} spares of {spares}")
    megabytes = {name: sum(each.proportional for each in group) / MB for name, group in groups.items()}
    of_spares = [size for name, size in megabytes.items() if name.startswith("spare-")]
    report.check("idle runtime, MB", sum(megabytes.values()), "<=", RUNTIME_MB_MAX)
    report.check("idle spare, MB", max(of_spares), "<=", SPARE_MB_MAX)
    report.figures |= {
        "processes": counted,
        "spares": spares,
        "proportional_mb": megabytes,
        "private_mb": {name: sum(each.private for each in group) / MB for name, group in groups.items()},
        "other_processes_of_this_python": _sharers(present),
    }


def _sharers(present: set[int]) -> int:
    """Processes besides this one and the runtime's that share the interpreter's pages, and so make each one's part smaller."""
    mine = psutil.Process().exe()
    found = 0
    for process in psutil.process_iter():
        try:
            found += process.pid not in present and process.pid != psutil.Process().pid and process.exe() == mine
        except (psutil.Error, OSError):
            continue
    return found


def imports(report: Report, rounds: int) -> None:
    """Python that does nothing, and Python that imports `mn`, by turns."""
    say("timing imports ...")
    seconds: dict[str, list[float]] = {"pass": [], "import mn": []}
    for program in seconds:
        _time(program)
    for _ in range(rounds):
        for program, times in seconds.items():
            times.append(_time(program))
    added = [1000 * (mine - bare) for mine, bare in zip(seconds["import mn"], seconds["pass"], strict=True)]
    report.check("import mn, ms over bare Python", statistics.median(added), "<=", IMPORT_MS_MAX)
    report.figures["python_ms"] = {name: summary([1000 * each for each in times]) for name, times in seconds.items()}


def _time(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", program], env=plain_environ(), check=True, start_new_session=True)
    return time.perf_counter() - began
