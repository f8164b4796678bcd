"""The failure ring and the fence: what a node keeps on disk, across restarts and within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mn.formats.errors import NotFound
from mn_nodepool.executor.failures import FailureRing
from mn_nodepool.executor.fence import Fence
from mn_nodepool.wire.control import FailureRecord
from tests.support.links import spec


def record(invocation: str, *, at_s: float = 1000.0, size: int = 10) -> FailureRecord:
    problem = {"type": "ValueError", "message": "no"}
    return FailureRecord(
        invocation, "f", "f#1", "sha256:1", "n", int(at_s * 1000), 0, b"x" * size, problem, "printed\n", spec()
    )


def ring(folder: Path, *, count_max: int = 3, bytes_max: int = 1 << 20, keep_s: float = 100.0) -> FailureRing:
    return FailureRing(folder, count_max=count_max, bytes_max=bytes_max, keep_s=keep_s)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_is_given_back_as_it_was_and_outlives_the_process(tmp_path: Path) -> None:
    ring(tmp_path).add(record("inv_1"))
    assert ring(tmp_path).get("inv_1") == record("inv_1")


def test_the_oldest_go_by_number_by_size_and_by_age(tmp_path: Path) -> None:
    failures = ring(tmp_path)
    for number in range(5):
        failures.add(record(f"inv_{number}"))
    assert kept(tmp_path) == ["inv_2", "inv_3", "inv_4"]
    with pytest.raises(NotFound, match="kept for"):
        failures.get("inv_0")
    failures.add(record("inv_late", at_s=1101.0))
    assert kept(tmp_path) == ["inv_late"]
    small = ring(tmp_path / "small", bytes_max=2000, count_max=100)
    for number in range(5):
        small.add(record(f"inv_{number}", size=800))
    assert 1 <= len(kept(tmp_path / "small")) <= 2
    assert "inv_4" in kept(tmp_path / "small")
    small.add(record("inv_huge", size=5000))
    assert "inv_huge" not in kept(tmp_path / "small")


def test_a_repeated_failure_replaces_the_one_before(tmp_path: Path) -> None:
    failures = ring(tmp_path)
    for size in (10, 20):
        failures.add(record("inv_1", size=size))
    assert len(failures.get("inv_1").payload) == 20
    assert kept(tmp_path) == ["inv_1"]


@pytest.mark.parametrize("name", ["../escape", "inv_../x", "inv_a/b", "", "inv_", "inv_" + "x" * 300, ".new"])
def test_names_from_callers_never_become_other_paths(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ring"
    failures = ring(folder)
    failures.add(record(name))
    assert kept(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["ring"]
    with pytest.raises(NotFound):
        failures.get(name)


def test_what_cannot_be_read_any_more_is_not_found(tmp_path: Path) -> None:
    failures = ring(tmp_path)
    failures.add(record("inv_1"))
    (tmp_path / "inv_1").write_bytes(b"\x93broken")
    with pytest.raises(NotFound, match="not readable"):
        failures.get("inv_1")
    assert kept(tmp_path) == []


def test_the_fence_lets_newer_leaders_in_and_keeps_older_ones_out_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "epoch.json"
    fence = Fence(file)
    assert fence.admits(5, "n1")
    assert fence.admits(5, "n1")
    assert not fence.admits(5, "n2"), "one epoch has one leader"
    assert not fence.admits(4, "n1")
    again = Fence(file)
    assert not again.admits(4, "n1")
    assert not again.admits(5, "n2")
    assert again.admits(6, "n2")
    assert not again.admits(5, "n1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counter": "x", "leader": "n"}', '{"counter": 3}'])
def test_a_fence_whose_file_is_damaged_starts_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "epoch.json").write_text(text)
    assert Fence(tmp_path / "epoch.json").admits(1, "n1")
