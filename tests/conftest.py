"""What all tests share: the number of rounds of fault tests, one runtime for those that only use one, and what CI makes of skips."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.support.api import Api
from tests.support.runtime import Runtime

ROUNDS_DEFAULT = 3
NOT_INSTALLABLE = ("Linux only", "ordinary user")
"""In the reasons of skips that are fine on CI too: another operating system or user can't be installed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=ROUNDS_DEFAULT, help="how often each fault test repeats its fault")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: looks for rare faults; `make soak` runs it with many rounds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, a skipped test failed: what it lacks can be installed."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(fine in reason for fine in NOT_INSTALLABLE):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, which CI=true does not allow: {reason}"
    return report


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime that many tests use and none stops or breaks."""
    with Runtime(tmp_path_factory.mktemp("runtime")) as running:
        running.start()
        yield running


@pytest.fixture
def api(runtime: Runtime) -> Iterator[Api]:
    """The shared runtime's HTTP API; the test's functions are gone afterwards."""
    with Api(runtime) as api:
        yield api
