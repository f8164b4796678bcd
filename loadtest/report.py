"""What a command found: figures, and checks against bounds. Pure, but for the two functions that print."""

from __future__ import annotations

import json
import operator
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
}
DIGITS = 4
"""Significant ones, of a printed figure. A check compares the whole value."""


@dataclass(frozen=True, slots=True)
class Check:
    """A value and the bound that it has to keep."""

    name: str
    value: float
    relation: str
    bound: float

    @property
    def ok(self) -> bool:
        return RELATIONS[self.relation](self.value, self.bound)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": rounded(self.value),
            "bound": f"{self.relation} {self.bound:g}",
            "ok": self.ok,
        }


@dataclass(slots=True)
class Report:
    """One command's outcome."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def check(self, name: str, value: float, relation: str, bound: float) -> None:
        self.checks.append(Check(name, value, relation, bound))

    @property
    def exit_code(self) -> int:
        """1 when a check was missed."""
        return 0 if all(check.ok for check in self.checks) else 1

    def as_json(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "machine": dict(machine),
            "figures": rounded(self.figures),
            "checks": [check.as_json() for check in self.checks],
        }


def paired(system: Sequence[float], floor: Sequence[float]) -> float:
    """The median of the ratios of neighbours in time: what else the machine did then, it did to both.

    >>> paired([1.0, 20.0, 3.0], [2.0, 40.0, 4.0])
    0.5
    """
    return statistics.median(mine / theirs for mine, theirs in zip(system, floor, strict=True))


def summary(values: Sequence[float]) -> dict[str, float]:
    """The middle and the ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rounded(value: Any) -> Any:
    """The same figures with `DIGITS` significant digits; whole numbers stay whole.

    >>> rounded({"a": [0.123456, 1234567, 98765.4]})
    {'a': [0.1235, 1234567, 98765.4]}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else round(value, 1)
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def print_report(report: Report, machine: Mapping[str, Any]) -> None:
    """The JSON object on stdout, after the checks in words on stderr."""
    for check in report.checks:
        told = check.as_json()
        say(f"{'ok    ' if check.ok else 'MISSED'}  {check.name}: {told['value']} ({told['bound']})")
    print(json.dumps(report.as_json(machine), indent=2), flush=True)
