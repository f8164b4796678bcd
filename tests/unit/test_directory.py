"""The last copy of names and keys: complete and in order, or asked for anew; and used on while the leader is away."""

from __future__ import annotations

from mn_nodepool.directory import DirectoryView
from mn_nodepool.wire.messages import Directory, DirectoryChange, KeyEntry
from tests.support.links import route

KEY = KeyEntry("hash", "key_1", "ci", "ann", "default", ("invoke",))


class Seen:
    """A view, and what it told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.view = DirectoryView(lambda: self.now)
        self.retired: list[tuple[str, str]] = []
        self.changes = 0
        self.view.on_retired.append(lambda version, name: self.retired.append((version, name)))
        self.view.on_change.append(self._changed)

    def _changed(self, _: DirectoryView) -> None:
        self.changes += 1

    def live(self) -> dict[str, str]:
        return {name: known.version for name, known in self.view.routes.items()}


def test_changes_follow_a_whole_copy_in_order() -> None:
    seen = Seen()
    assert seen.view.apply(Directory(1, 5, "n1", (route("f"),), (KEY,)))
    assert seen.view.apply(DirectoryChange(1, 6, (route("f", 2), route("g"))))
    assert seen.live() == {"f": "f#2", "g": "g#1"}
    assert seen.retired == [("f#1", "f")]
    assert seen.view.apply(DirectoryChange(1, 7, routes_gone=("g", "unknown")))
    assert seen.retired[1:] == [("g#1", "")]
    assert seen.changes == 3
    assert (seen.view.epoch, seen.view.seq, seen.view.leader) == (1, 7, "n1")
    assert seen.view.keys == {KEY.sha256: KEY}


def test_a_gap_is_noticed_and_changes_nothing() -> None:
    seen = Seen()
    seen.view.apply(Directory(1, 5, "n1", (route("f"),), ()))
    for change in (DirectoryChange(1, 7, (route("g"),)), DirectoryChange(2, 6, (route("g"),)), DirectoryChange(1, 5)):
        assert not seen.view.apply(change)
    assert seen.live() == {"f": "f#1"}


def test_an_older_copy_is_passed_over_and_a_newer_epoch_replaces_all() -> None:
    seen = Seen()
    seen.view.apply(Directory(2, 5, "n1", (route("f"), route("g")), (KEY,)))
    assert seen.view.apply(Directory(1, 99, "old", (), ()))
    assert seen.live() == {"f": "f#1", "g": "g#1"}
    assert seen.view.apply(Directory(3, 0, "n2", (route("f", 2),), ()))
    assert (seen.live(), seen.view.leader, seen.view.keys) == ({"f": "f#2"}, "n2", {})
    assert sorted(seen.retired) == [("f#1", "f"), ("g#1", "")]


def test_a_revoked_key_opens_nothing_any_more() -> None:
    seen = Seen()
    seen.view.apply(Directory(1, 0, "n1", (), (KEY,)))
    other = KeyEntry("hash2", "key_2", "ci", "ann", "default", ())
    seen.view.apply(DirectoryChange(1, 1, keys=(other,), keys_gone=("key_1",)))
    assert set(seen.view.keys) == {"hash2"}


def test_the_copy_ages_only_while_the_leader_is_away() -> None:
    seen = Seen()
    assert seen.view.stale_s() == float("inf")
    seen.view.apply(Directory(1, 0, "n1", (route("f"),), ()))
    seen.now = 1000.0
    assert seen.view.stale_s() == 0
    seen.view.lost()
    seen.now = 1060.0
    seen.view.lost()
    assert (seen.view.stale_s(), seen.view.leader) == (60.0, "")
    assert seen.live() == {"f": "f#1"}, "calls go on with the last copy"
    seen.view.apply(Directory(2, 0, "n1", (route("f"),), ()))
    assert (seen.view.stale_s(), seen.view.leader) == (0.0, "n1")
