"""How an executor shares a version's slots among dispatchers that compete for them."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mn.formats.manifest import Scaling
from mn_nodepool.executor.lane import VersionLane, water_level
from mn_nodepool.wire.messages import Grant, Recall, Slots, Start
from tests.support.links import RecordingLink, spec

V = "square#1"


def make_lane(slots: int) -> VersionLane:
    start = Start(1, "n", "alc", V, "sha256:0", spec(scaling=Scaling(concurrency=1)), {}, "ann", "default")
    lane = VersionLane(start, SimpleNamespace(time=float))  # type: ignore[arg-type]
    for number in range(slots):
        Replica(lane, str(number))
    return lane


class Replica:
    """A slot that runs a call until the test ends it."""

    def __init__(self, lane: VersionLane, name: str) -> None:
        self.lane = lane
        self.name = name
        self.idle_slots = 1
        self.pipelines = True
        self.stop_when_idle = ""
        self.running: dict[int, Any] = {}
        lane.replicas[name] = self  # type: ignore[assignment]
        lane.free.append(self)  # type: ignore[arg-type]

    def run(self, call: Any) -> None:
        self.running[id(call)] = call
        self.idle_slots -= 1
        if self in list[object](self.lane.free) and self.idle_slots <= 0:
            self.lane.free.remove(self)  # type: ignore[arg-type]

    def finish(self) -> Any:
        call = self.running.pop(next(iter(self.running)))
        self.idle_slots += 1
        self.lane.feed(self)  # type: ignore[arg-type]
        if self.idle_slots > 0 and self not in list[object](self.lane.free):
            self.lane.free.append(self)  # type: ignore[arg-type]
        return call


class Peer:
    """A dispatcher by the rules of the protocol: what it may do with credits, and the messages still on their way."""

    def __init__(self, lane: VersionLane) -> None:
        self.lane = lane
        self.link = RecordingLink()
        self.up: deque[tuple[str, int]] = deque()
        self.queue = self.idle = self.owed = self.running = 0
        self.told = -1

    def want(self, calls: int = 1) -> None:
        self.queue += calls
        self._pump()

    def _pump(self) -> None:
        while self.queue and self.idle:
            self.queue -= 1
            self.idle -= 1
            self.running += 1
            self.up.append(("call", 1))
        if self.queue != self.told:
            self.told = self.queue
            self.up.append(("backlog", self.queue))

    def hear(self) -> bool:
        """Take the next message from the executor."""
        if not self.link.sent:
            return False
        message, _ = self.link.sent.pop(0)
        if isinstance(message, Grant):
            self.idle += message.credits
            self.told = -1
        elif isinstance(message, Recall):
            now = min(self.idle, message.credits)
            self.idle -= now
            self.owed += message.credits - now
            if now:
                self.up.append(("return", now))
        elif isinstance(message, Slots) and not message.slots:
            self.idle = self.owed = 0
        self._pump()
        return True

    def speak(self) -> bool:
        """Hand the executor this dispatcher's next message."""
        if not self.up:
            return False
        kind, number = self.up.popleft()
        if kind == "call":
            self.lane.submit(SimpleNamespace(link=self.link, peer=self, invocation="inv", nested=0, chunks=None))  # type: ignore[arg-type]
        elif kind == "return":
            self.lane.returned(self.link, number)
        else:
            self.lane.holder(self.link).backlog = number
            self.lane.share()
        return True

    def answered(self) -> None:
        self.running -= 1
        if self.owed:
            self.owed -= 1
            self.up.append(("return", 1))
        else:
            self.idle += 1
        self._pump()


def finish_one(lane: VersionLane, choice: int = 0) -> bool:
    busy = [replica for replica in lane.replicas.values() if replica.running]
    if not busy:
        return False
    busy[choice % len(busy)].finish().peer.answered()  # type: ignore[attr-defined]
    return True


def quiet(peers: list[Peer]) -> None:
    """Deliver every message there is, and those that they cause."""
    for _ in range(10_000):
        if not sum(peer.hear() + peer.speak() for peer in peers):
            return
    raise AssertionError("dispatchers and executor go on telling each other things although nothing happens")


def busy_slots(lane: VersionLane) -> int:
    return sum(len(replica.running) for replica in lane.replicas.values())


def test_the_whole_capacity_is_used_when_it_does_not_divide_evenly() -> None:
    lane = make_lane(3)
    peers = [Peer(lane), Peer(lane)]
    for peer in peers:
        peer.want(50)
    for _ in range(20):
        quiet(peers)
        assert busy_slots(lane) == 3
        finish_one(lane)
    quiet(peers)
    assert sorted(peer.running for peer in peers) == [1, 2]


def test_what_one_does_not_need_goes_to_the_other_at_once() -> None:
    lane = make_lane(10)
    modest, greedy = Peer(lane), Peer(lane)
    modest.want(1)
    greedy.want(100)
    quiet([modest, greedy])
    assert (modest.running, greedy.running) == (1, 9)


def test_one_slot_goes_round_among_those_who_wait() -> None:
    lane = make_lane(1)
    first, second = Peer(lane), Peer(lane)
    first.want(10)
    quiet([first, second])
    second.want(10)
    served: list[str] = []
    for _ in range(10):
        quiet([first, second])
        served.append("first" if first.running else "second")
        assert first.running + second.running == 1
        finish_one(lane)
    assert served.count("second") >= 4, served


def test_an_idle_hoard_is_recalled_for_who_waits() -> None:
    lane = make_lane(4)
    hoarder, late = Peer(lane), Peer(lane)
    hoarder.want(4)
    quiet([hoarder, late])
    for _ in range(4):
        finish_one(lane)
    quiet([hoarder, late])
    late.want(4)
    quiet([hoarder, late])
    assert late.running == 4


def test_who_is_busy_keeps_a_fair_share_and_who_comes_gets_one() -> None:
    lane = make_lane(4)
    busy, late = Peer(lane), Peer(lane)
    busy.want(4)
    quiet([busy, late])
    late.want(100)
    quiet([busy, late])
    for turn in range(40):
        finish_one(lane, turn)
        busy.want(1)
        quiet([busy, late])
    assert late.running == 2
    assert busy.running == 2


def test_credits_follow_the_slots_down() -> None:
    lane = make_lane(4)
    peer = Peer(lane)
    peer.want(4)
    quiet([peer])
    gone = lane.replicas.pop("3")
    for call in gone.running.values():
        call.peer.answered()  # type: ignore[attr-defined]
    lane.announce([peer.link])
    lane.shrink()
    quiet([peer])
    assert lane.holder(peer.link).granted == 3
    assert peer.idle + peer.running == 3


@given(st.integers(0, 60), st.lists(st.integers(0, 40), min_size=1, max_size=8))
@settings(max_examples=500, deadline=None)
def test_the_level_is_max_min_fair(capacity: int, demands: list[int]) -> None:
    level = water_level(capacity, demands)
    shares = [min(demand, level) for demand in demands]
    assert sum(shares) <= capacity
    unmet = [d for d in demands if d > level]
    assert not unmet or capacity - sum(shares) < len(unmet), "there was enough to raise everybody who lacks"


@given(
    slots=st.integers(1, 5), dispatchers=st.integers(1, 4), run_us=st.sampled_from([0, 2000, 100_000]), seed=st.integers(0, 1 << 30)
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_credits_are_never_too_many_and_no_slot_idles_while_a_call_waits(slots: int, dispatchers: int, run_us: int, seed: int) -> None:  # fmt: skip
    chance = random.Random(seed)
    lane = make_lane(slots)
    lane.run_us = run_us
    peers = [Peer(lane) for _ in range(dispatchers)]
    wanted = 0
    for _ in range(chance.randrange(150)):
        peer = chance.choice(peers)
        match chance.randrange(4):
            case 0:
                calls = chance.randrange(1, 8)
                wanted += calls
                peer.want(calls)
            case 1:
                peer.hear()
            case 2:
                peer.speak()
            case _:
                finish_one(lane, chance.randrange(8))
        held = [lane.holder(peer.link) for peer in peers]
        assert all(0 <= holder.recalled <= holder.granted for holder in held)
        assert sum(holder.granted for holder in held) <= lane.capacity() + lane.lent
    quiet(peers)
    waiting = sum(peer.queue for peer in peers)
    assert not waiting or busy_slots(lane) == slots, "a call waits and a slot is idle"
    while finish_one(lane, chance.randrange(8)):
        quiet(peers)
    assert sum(peer.queue + peer.running for peer in peers) == 0
    assert all(lane.holder(peer.link).granted == peer.idle for peer in peers), "both sides count the same credits"
