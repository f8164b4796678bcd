"""What all tests share: the number of rounds of fault tests, and one runtime for those that only use one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.runtime import Runtime

ROUNDS_DEFAULT = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=ROUNDS_DEFAULT, help="how often each fault test repeats its fault")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: looks for rare faults; `make soak` runs it with many rounds")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime that many tests use and none stops or breaks."""
    with Runtime(tmp_path_factory.mktemp("runtime")) as running:
        running.start()
        yield running
