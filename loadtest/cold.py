"""First calls of functions against a bare start of the same sandbox: one with a spare, and fifty at once without."""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from loadtest import machine, sources, starts
from loadtest.report import Report, paired, say, summary
from loadtest.scratch import Failed, Runtime, runtime

BURST = 50
FIRST_CALL_MAX = 0.5
BURST_MAX = 1.5
BODY = json.dumps({"text": "x" * 80}).encode()
ANSWER_S = 120.0
PHASES = ("queue", "start", "run", "total")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="first calls with a spare, each after a bare start (30; quick: 8)")
    parser.add_argument("--bursts", type=int, help="bursts without spares, each after one of bare starts (5; quick: 2)")


@dataclass(frozen=True, slots=True)
class Answer:
    """A call that was answered with a result."""

    seconds: float
    """As its caller saw it."""
    phases: dict[str, float]
    """Milliseconds that the gateway tells: `queue` holds placement, the sandbox's start and its load."""


class Caller:
    """One connection to the gateway."""

    def __init__(self, it: Runtime) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(it.endpoints["api"]).netloc, timeout=ANSWER_S)
        self._connection.connect()
        self._headers = {"Authorization": f"Bearer {it.key}", "Content-Type": "application/json"}

    def call(self, name: str) -> Answer:
        """Raises Failed for any other answer than the result."""
        began = time.perf_counter()
        self._connection.request("POST", f"/v1/functions/{name}/invoke", BODY, self._headers)
        response = self._connection.getresponse()
        body = response.read()
        seconds = time.perf_counter() - began
        if response.status != 200 or json.loads(body) != json.loads(BODY)["text"]:
            raise Failed(f"{name} answered {response.status}: {body[:500].decode('utf-8', 'replace')}")
        return Answer(seconds, phases_of(response.headers["server-timing"]))

    def close(self) -> None:
        self._connection.close()


def phases_of(header: str) -> dict[str, float]:
    """Milliseconds by name.

    >>> phases_of("queue;dur=0.04, run;dur=2")
    {'queue': 0.04, 'run': 2.0}
    """
    parts = (part.strip().partition(";dur=") for part in header.split(","))
    return {name: float(milliseconds) for name, _, milliseconds in parts}


def run(options: argparse.Namespace) -> Report:
    report = Report()
    with starts.floor() as floor:
        floor.once()
        first_calls(report, floor, options.rounds or (8 if options.quick else 30))
        bursts(report, floor, options.bursts or (2 if options.quick else 5))
        say("where the floor's time goes ...")
        parts = floor.parts(5 if options.quick else 15)
        report.figures["floor_ms"] = {name: 1000 * statistics.median(seconds) for name, seconds in parts.items()}
    return report


def first_calls(report: Report, floor: starts.Floor, rounds: int) -> None:
    """A bare start and the first call of a function, by turns."""
    say("starting a runtime with spares ...")
    names = [f"first_{number}" for number in range(rounds + 1)]
    bare: list[float] = []
    answers: list[Answer] = []
    with runtime() as it:
        it.deploy(sources.many(it.home / "loadtest", names))
        caller = Caller(it)
        caller.call(names[0])
        for name in names[1:]:
            it.await_spares()
            bare.append(floor.once())
            answers.append(caller.call(name))
            _progress(f"first call {len(answers)}/{rounds}", answers[-1].seconds, bare[-1])
        caller.close()
    seconds = [answer.seconds for answer in answers]
    report.check("first call with a spare / bare start", paired(seconds, bare), "<=", FIRST_CALL_MAX)
    report.figures["first_call_with_spare"] = {
        "call_ms": _milliseconds(seconds),
        "floor_ms": _milliseconds(bare),
        "p50_call / p50_floor": statistics.median(seconds) / statistics.median(bare),
        "phases_ms": _phases(answers),
    }


def bursts(report: Report, floor: starts.Floor, rounds: int) -> None:
    """Fifty bare starts and the first calls of fifty functions, by turns."""
    say(f"starting a runtime without spares; {BURST} functions are called at once ...")
    bare: list[float] = []
    narrow: list[float] = []
    system: list[float] = []
    answers: list[Answer] = []
    side_by_side = machine.cores() + 1
    with runtime(MN_SPARES="0") as it:
        for number in range(rounds):
            names = [f"burst_{number}_{each}" for each in range(BURST)]
            it.deploy(sources.many(it.home / "loadtest", names))
            bare.append(floor.burst(BURST, BURST) / BURST)
            narrow.append(floor.burst(BURST, side_by_side) / BURST)
            seconds, answered = call_all(it, names)
            system.append(seconds / BURST)
            answers += answered
            _progress(f"burst {number + 1}/{rounds}, per sandbox", system[-1], min(bare[-1], narrow[-1]))
            _remove(it, names)
    # Whichever way of starting fifty is quicker here is the floor.
    quicker = [min(pair) for pair in zip(bare, narrow, strict=True)]
    report.check(f"unanswered of {BURST * rounds} calls in bursts", BURST * rounds - len(answers), "==", 0)
    report.check("burst without spares, per sandbox / bare starts", paired(system, quicker), "<=", BURST_MAX)
    report.figures["burst_without_spares"] = {
        "functions": BURST,
        "per_sandbox_ms": _milliseconds(system),
        "floor_per_sandbox_ms": _milliseconds(bare),
        f"floor_per_sandbox_{side_by_side}_at_once_ms": _milliseconds(narrow),
        "call_ms": _milliseconds([answer.seconds for answer in answers]),
        "phases_ms": _phases(answers),
    }


def call_all(it: Runtime, names: Sequence[str]) -> tuple[float, list[Answer]]:
    """Call all functions at the same time: seconds until the last answer, and the answers; a failure is told and left out."""
    callers = [Caller(it) for _ in names]
    gate = threading.Barrier(len(names) + 1)

    def one(caller: Caller, name: str) -> Answer | None:
        gate.wait()
        try:
            return caller.call(name)
        except (Failed, OSError, http.client.HTTPException) as error:
            say(f"no answer: {error}")
            return None

    with ThreadPoolExecutor(len(names)) as threads:
        running = [threads.submit(one, caller, name) for caller, name in zip(callers, names, strict=True)]
        gate.wait()
        began = time.perf_counter()
        answers = [answer for each in running if (answer := each.result()) is not None]
        seconds = time.perf_counter() - began
    for caller in callers:
        caller.close()
    return seconds, answers


def _remove(it: Runtime, names: Sequence[str]) -> None:
    with it.client() as client:
        for name in names:
            client.delete_function(name)
    it.await_sandboxes(0)


def _phases(answers: Sequence[Answer]) -> dict[str, float]:
    medians = {name: statistics.median(answer.phases[name] for answer in answers) for name in PHASES}
    outside = statistics.median(1000 * answer.seconds - answer.phases["total"] for answer in answers)
    return {**medians, "outside_the_gateway": outside}


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return summary([1000 * each for each in seconds])


def _progress(what: str, system: float, bare: float) -> None:
    say(f"{what}: {1000 * system:.1f} ms, floor {1000 * bare:.1f} ms ({system / bare:.2f} ×)")
