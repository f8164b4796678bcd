"""Where the time of a warm call goes: py-spy on gateway, node and child while wrk loads them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil

from loadtest import sources
from loadtest.report import Report, say
from loadtest.scratch import Failed, Runtime, child, runtime
from loadtest.warm import CONNECTIONS, invoke_url, payload
from loadtest.wrk import Wrk

SAMPLES_PER_S = 400
LEAD_S = 2
"""wrk runs this much longer than py-spy, at both ends together."""
ENDING_S = 30
FRAME_CHARS = 90


class Share(NamedTuple):
    """A function's part of a process's samples."""

    function: str
    own: float
    """In the function itself."""
    below: float
    """In it and in what it called."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["warm"], help="the measurement to look into")
    parser.add_argument("--seconds", type=int, help="of sampling (10; quick: 3)")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help=f"of wrk ({CONNECTIONS})")
    parser.add_argument("--top", type=int, default=25, help="functions told of each process (25)")
    parser.add_argument("--lines", action="store_true", help="tell lines instead of functions")
    parser.add_argument("--folded", type=Path, help="folder for the whole stacks, in the folded format of flame graphs")


def run(options: argparse.Namespace) -> Report:
    program = find()
    seconds = options.seconds or (3 if options.quick else 10)
    report = Report()
    with runtime() as it, Wrk(it.key, payload()) as wrk, tempfile.TemporaryDirectory(prefix="mn-loadtest-") as folder:
        it.deploy(sources.echo(it.home / "loadtest", 1))
        it.await_sandboxes(1)
        wrk.run(invoke_url(it), options.connections, 1)
        with ExitStack() as stack:
            watching = {
                name: stack.enter_context(
                    child(_command(program, pid, seconds, Path(folder) / name, options.lines), stderr=subprocess.PIPE)
                )
                for name, pid in pids(it).items()
            }
            load = wrk.run(invoke_url(it), options.connections, seconds + LEAD_S)
            for name, process in watching.items():
                _, told = process.communicate(timeout=ENDING_S)
                if process.returncode:
                    raise Failed(f"py-spy can't look into the {name}: {told.strip()[-500:]}")
        for name in watching:
            folded = (Path(folder) / name).read_text()
            table = shares(folded.splitlines())[: options.top]
            say(f"\n{name}\n" + "\n".join(rows(table)))
            report.figures[name] = [share._asdict() for share in table]
            if options.folded:
                options.folded.mkdir(parents=True, exist_ok=True)
                (options.folded / f"{name}.folded").write_text(folded)
    report.figures["per_s_while_sampled"] = load.per_s
    return report


def find() -> str:
    """The program. Raises Failed with the line that installs it."""
    found = shutil.which("py-spy")
    if found is None:
        raise Failed("py-spy is not on PATH. Install it:  pip install py-spy")
    return found


def pids(it: Runtime) -> dict[str, int]:
    """The three processes that a warm call passes."""
    outer = psutil.Process(it.node()["sandboxes"][0]["pid"])
    inner = [process for process in outer.children(recursive=True) if not process.children()]
    running = it.endpoints["pids"]
    return {"gateway": running["gateway-1"], "node": running["node"], "child": inner[0].pid}


def _command(program: str, pid: int, seconds: int, output: Path, lines: bool) -> list[str]:
    return [
        program, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(SAMPLES_PER_S), "--format", "raw", "--nonblocking",
        "--output", str(output), *([] if lines else ["--function"]),
    ]  # fmt: skip


def shares(folded: Iterable[str]) -> list[Share]:
    """Functions of folded stacks (`outer;inner 12`), those with most samples of their own first.

    >>> shares(["main;work 3", "main 1"])
    [Share(function='work', own=0.75, below=0.75), Share(function='main', own=0.25, below=1.0)]
    """
    own: Counter[str] = Counter()
    below: Counter[str] = Counter()
    for line in folded:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own[frames[-1]] += int(count)
        for frame in set(frames):
            below[frame] += int(count)
    samples = max(1, own.total())
    return [Share(frame, own[frame] / samples, below[frame] / samples) for frame, _ in own.most_common()]


def rows(table: Iterable[Share]) -> Iterable[str]:
    yield "   own  below  function"
    for share in table:
        yield f"{share.own:6.1%} {share.below:6.1%}  {share.function[:FRAME_CHARS]}"
