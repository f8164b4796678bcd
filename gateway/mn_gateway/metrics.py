"""Counters: plain integers while serving, Prometheus text when scraped.

A snapshot is made of dictionaries and lists, so that one gateway process can add up its own and its siblings'.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)
FUNCTIONS_MAX = 1000
"""Functions counted by name; what comes after is counted together."""
OTHER = "(other)"
FUNCTION_ERROR = "function-error"


class FunctionStats(msgspec.Struct):
    """What one function's calls came to."""

    ok: int = 0
    errors: dict[str, int] = {}
    """Problem slug → calls."""
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count a call that was answered with a result."""
        self.ok += 1
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1

    def failed(self, slug: str) -> None:
        self.errors[slug] = self.errors.get(slug, 0) + 1


class Snapshot(msgspec.Struct):
    """All numbers of one process, or of several added up."""

    functions: dict[str, FunctionStats] = {}
    responses: dict[int, int] = {}
    """HTTP status → answers."""
    items: int = 0
    gauges: dict[str, int] = {}
    processes: int = 1


class Metrics:
    """One process's numbers."""

    def __init__(self) -> None:
        self.functions: dict[str, FunctionStats] = {}
        self.responses = [0] * 600
        self.items = 0

    def of(self, function: str) -> FunctionStats:
        """Where to count a function's calls; an ephemeral function counts under the name without its scope."""
        stats = self.functions.get(function)
        if stats is not None:
            return stats
        name = function.partition("~")[0]
        if name not in self.functions and len(self.functions) >= FUNCTIONS_MAX:
            name = OTHER
        return self.functions.setdefault(name, FunctionStats())

    def snapshot(self, gauges: dict[str, int]) -> Snapshot:
        responses = {status: count for status, count in enumerate(self.responses) if count}
        return Snapshot(self.functions, responses, self.items, gauges)


def add_up(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum over processes."""
    total = Snapshot(processes=0)
    for one in snapshots:
        total.processes += one.processes
        total.items += one.items
        total.responses = dict(Counter(total.responses) + Counter(one.responses))
        for name, value in one.gauges.items():
            total.gauges[name] = total.gauges.get(name, 0) + value
        for name, stats in one.functions.items():
            mine = total.functions.setdefault(name, FunctionStats())
            mine.ok += stats.ok
            mine.seconds += stats.seconds
            mine.errors = dict(Counter(mine.errors) + Counter(stats.errors))
            mine.buckets = [a + b for a, b in zip(mine.buckets, stats.buckets, strict=True)]
    return total


class _Rendering(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Any]:
        yield from self._calls()
        responses = CounterMetricFamily("mn_http_responses", "HTTP answers by status", labels=["status"])
        for status, count in sorted(self._snapshot.responses.items()):
            responses.add_metric([str(status)], count)
        yield responses
        yield CounterMetricFamily("mn_map_items", "Items of maps that ended", value=self._snapshot.items)
        yield GaugeMetricFamily("mn_gateway_processes", "Gateway processes", value=self._snapshot.processes)
        for name, value in sorted(self._snapshot.gauges.items()):
            yield GaugeMetricFamily(f"mn_gateway_{name}", name.replace("_", " "), value=value)

    def _calls(self) -> Iterable[Any]:
        calls = CounterMetricFamily("mn_invocations", "Calls by outcome", labels=["function", "outcome"])
        raised = CounterMetricFamily("mn_function_errors", "Calls in which the user's code raised", labels=["function"])
        failed = CounterMetricFamily(
            "mn_platform_errors", "Calls that the platform failed", labels=["function", "problem"]
        )
        seconds = HistogramMetricFamily(
            "mn_invocation_seconds", "Time from request to answer of calls with a result", labels=["function"]
        )
        for name, stats in sorted(self._snapshot.functions.items()):
            calls.add_metric([name, "ok"], stats.ok)
            for slug, count in sorted(stats.errors.items()):
                calls.add_metric([name, slug], count)
                if slug != FUNCTION_ERROR:
                    failed.add_metric([name, slug], count)
            raised.add_metric([name], stats.errors.get(FUNCTION_ERROR, 0))
            cumulated, buckets = 0, []
            for bound, count in zip((*BUCKETS_S, "+Inf"), stats.buckets, strict=True):
                cumulated += count
                buckets.append((str(bound), float(cumulated)))
            seconds.add_metric([name], buckets, stats.seconds)
        yield from (calls, raised, failed, seconds)


def render(snapshot: Snapshot) -> bytes:
    """The Prometheus text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Rendering(snapshot))
    return generate_latest(registry)
