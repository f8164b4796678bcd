"""Warm calls against a bare HTTP echo: throughput, latency, errors, and what they cost the store."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from loadtest import floor, sources
from loadtest.commands import StoreCommands, Window, caused
from loadtest.report import Report, paired, say, summary
from loadtest.scratch import Failed, Runtime, runtime
from loadtest.wrk import Load, Wrk
from mn.formats.settings import Settings

FUNCTION = "echo"
CONNECTIONS = 32
PAYLOAD_BYTES = 100
THROUGHPUT_MIN = 0.45
P50_MAX = 4.5
CALLS = 1_000_000
RENEWALS_PER_LEASE = 4
LEASE_TTL_S = float(Settings().lease_ttl_s)
PLATFORM_ERRORS = "mn_platform_errors_total"
CANCELLED = 'problem="cancelled"'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="times that floor and system take turns (7; quick: 3)")
    parser.add_argument("--seconds", type=int, help="of each turn (5; quick: 2)")
    parser.add_argument("--replicas", type=int, default=1, help="sandboxes of the function (1)")
    parser.add_argument("--calls", type=int, help="calls, at least, none of which may fail (1000000; quick: 20000)")


def payload() -> bytes:
    """A JSON object of `PAYLOAD_BYTES`."""
    frame = len(json.dumps({"text": ""}))
    return json.dumps({"text": "x" * (PAYLOAD_BYTES - frame)}).encode()


def invoke_url(it: Runtime) -> str:
    return f"{it.endpoints['api']}/v1/functions/{FUNCTION}/invoke"


def run(options: argparse.Namespace) -> Report:
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = options.seconds or (2 if options.quick else 5)
    calls = options.calls or (20_000 if options.quick else CALLS)
    report = Report()
    say("starting a runtime and the floor's server ...")
    with runtime() as it, floor.running() as floor_url:
        facts = setup(it, options.replicas)
        with Wrk(it.key, payload()) as wrk:
            warm_up(it, wrk, floor_url)
            turns = take_turns(wrk, floor_url, invoke_url(it), rounds, seconds)
            with StoreCommands(it) as store:
                idle, busy, last = soak(wrk, store, invoke_url(it), turns, calls, seconds)
        facts["platform_errors"] = platform_errors(it)
    judge(report, turns, [*last], idle, busy)
    report.figures |= {"setup": facts, "rounds": rounds, "seconds": seconds}
    return report


def setup(it: Runtime, replicas: int) -> dict[str, Any]:
    """Deploy, make sure that the system is the one to be measured, and tell of it."""
    it.deploy(sources.echo(it.home / "loadtest", replicas))
    it.await_sandboxes(replicas)
    pids = it.endpoints["pids"]
    gateways = [name for name in pids if name.startswith("gateway")]
    driver = it.node()["driver"]
    if len(gateways) != 1 or pids["node"] in (pids["supervisor"], pids[gateways[0]]) or driver != "bubblewrap":
        raise Failed(f"this compares one gateway, a node of its own and bubblewrap, not {pids} with {driver}")
    with it.client() as client:
        client.invoke(FUNCTION, payload())
        if client.invoke(FUNCTION, payload()).json() != json.loads(payload())["text"]:
            raise Failed("the function did not answer with its argument")
    return {
        "gateways": 1,
        "driver": driver,
        "replicas": replicas,
        "payload_bytes": len(payload()),
        "authentication": True,
        "metrics": True,
    }


def warm_up(it: Runtime, wrk: Wrk, floor_url: str) -> None:
    """Load both for a moment, and let the runtime settle."""
    for url in (invoke_url(it), floor_url):
        wrk.run(url, CONNECTIONS, 1)
    it.await_spares()


def take_turns(wrk: Wrk, floor_url: str, system_url: str, rounds: int, seconds: int) -> dict[str, list[Load]]:
    """Floor and system by turns, with many connections and with one."""
    turns: dict[str, list[Load]] = {"floor_32": [], "system_32": [], "floor_1": [], "system_1": []}
    for number in range(1, rounds + 1):
        for connections, suffix in ((CONNECTIONS, "32"), (1, "1")):
            for url, side in ((floor_url, "floor"), (system_url, "system")):
                turns[f"{side}_{suffix}"].append(wrk.run(url, connections, seconds))
        last = {name: loads[-1] for name, loads in turns.items()}
        say(
            f"round {number}/{rounds}: at {CONNECTIONS} connections {last['system_32'].per_s:.0f}/s, floor {last['floor_32'].per_s:.0f}/s "
            f"({last['system_32'].per_s / last['floor_32'].per_s:.2f} ×); "
            f"p50 at 1 {last['system_1'].p50_us} µs, floor {last['floor_1'].p50_us} µs ({last['system_1'].p50_us / last['floor_1'].p50_us:.2f} ×)"
        )
    return turns


def soak(
    wrk: Wrk, store: StoreCommands, url: str, turns: dict[str, list[Load]], calls: int, seconds: int
) -> tuple[Window, Window, list[Load]]:
    """The rest of the calls, and the store's commands in that time and in an idle one before: idle, busy, all loads of the system."""
    before = store.read()
    say("watching the store while the runtime is idle ...")
    time.sleep(max(2 * LEASE_TTL_S, seconds))
    idle = store.since(before)
    loads = [*turns["system_32"], *turns["system_1"]]
    left = calls - sum(load.requests for load in loads)
    rate = min(load.per_s for load in turns["system_32"])
    before = store.read()
    while True:
        # At least one load, so that the busy window is one; never so long that an early end would lose much.
        loads.append(wrk.run(url, CONNECTIONS, min(30.0, max(2 * LEASE_TTL_S, left / rate))))
        left = calls - sum(load.requests for load in loads)
        say(f"{calls - left} of {calls} calls, {sum(load.errors for load in loads)} errors")
        if left <= 0:
            return idle, store.since(before), loads


def judge(report: Report, turns: dict[str, list[Load]], loads: list[Load], idle: Window, busy: Window) -> None:
    throughput = paired([load.per_s for load in turns["system_32"]], [load.per_s for load in turns["floor_32"]])
    p50 = paired([load.p50_us for load in turns["system_1"]], [load.p50_us for load in turns["floor_1"]])
    by_calls = caused(idle, busy, LEASE_TTL_S / RENEWALS_PER_LEASE)
    calls = sum(load.requests for load in loads)
    report.check("throughput at 32 connections / floor", throughput, ">=", THROUGHPUT_MIN)
    report.check("p50 at 1 connection / floor", p50, "<=", P50_MAX)
    report.check(f"errors in {calls} calls", sum(load.errors for load in loads), "==", 0)
    report.check("store commands caused by calls", sum(by_calls.values()), "==", 0)
    for name, measured in turns.items():
        report.figures[name] = {
            "per_s": summary([load.per_s for load in measured]),
            "p50_us": summary([load.p50_us for load in measured]),
            "p99_us": summary([load.p99_us for load in measured]),
        }
    report.figures["calls"] = calls
    report.figures["turns"] = {name: [asdict(load) for load in measured] for name, measured in turns.items()}
    report.figures["store_commands"] = {
        "idle": {**idle._asdict()},
        "busy": {**busy._asdict()},
        "caused_by_calls": by_calls,
    }


def platform_errors(it: Runtime) -> int:
    """Calls that the system counted as failed by itself. Those in flight when wrk hangs up are cancelled, as they should be."""
    with it.client() as client:
        lines = client.metrics().splitlines()
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in lines
        if line.startswith(PLATFORM_ERRORS) and CANCELLED not in line
    )
