"""Messages between mesh peers.

Data path (dispatcher ⇄ executor; a dispatcher sits in every gateway, and in every node for nested calls). `call` numbers are the dispatcher's,
unique per link. A payload over one chunk has `more` set and goes on in `Chunk` messages; the receiver's `Ack` opens the sender's window again.

    dispatcher → executor: Call, Chunk, Ack, Cancel, Backlog, Return
    executor → dispatcher: Slots, Grant, Recall, Item, Result, Failed, Busy, Chunk, Ack

Control path: `Ask` and its one `Answer` (ops and their bodies in `control.py`); `Tail` streams for followed logs; `Directory` is what the
leader publishes (names and keys) and `DirectoryChange` its deltas, in order under (epoch, seq).
Leader ⇄ executor: Start, Stop, ReportWanted; Observed, Idle, Report. `Start` and `Stop` name the epoch under which they were committed.

`version` strings are interned by both sides; a `Call` is encoded in under a microsecond.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mn.formats.manifest import FunctionSpec


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of all: encoded as arrays tagged by a number."""


class Hello(Message, tag=1, frozen=True):
    """First on every link, both ways."""

    peer: str
    role: str
    """`node` or `gateway`."""
    version: str
    cluster: str = ""


class Call(Message, tag=2, frozen=True):
    call: int
    version: str
    invocation: str
    codec: int
    timeout_ms: int
    """Milliseconds left when sent; 0: no deadline."""
    depth: int = 0
    more: bool = False
    queue_us: int = 0


class Chunk(Message, tag=3, frozen=True):
    call: int
    more: bool
    """False: the last of this payload."""
    up: bool = True
    """Towards the executor."""


class Ack(Message, tag=4, frozen=True):
    call: int
    chunks: int
    up: bool
    """Travels towards the executor, acknowledging a result's chunks."""


class Cancel(Message, tag=5, frozen=True):
    call: int
    timed_out: bool = False


class Backlog(Message, tag=6, frozen=True):
    """How many calls of a version wait at this dispatcher for want of a credit."""

    version: str
    queued: int


class Return(Message, tag=7, frozen=True):
    """Credits given back, after a `Recall` or because the dispatcher has no more use for them."""

    version: str
    credits: int


class Grant(Message, tag=8, frozen=True):
    """Credits given: the right to have that many more calls of a version at this executor at a time."""

    version: str
    credits: int


class Recall(Message, tag=9, frozen=True):
    """The executor wants credits back; idle ones return at once, others when their call ends."""

    version: str
    credits: int


class Slots(Message, tag=10, frozen=True):
    """All slots of a version at this executor, as of `seq`. None left: `slots` 0."""

    version: str
    seq: int
    slots: int
    idle: int


class Result(Message, tag=11, frozen=True):
    call: int
    status: int
    """`mn_runner.protocol.Status`."""
    codec: int
    run_us: int
    start_us: int
    """Between the executor's receipt of the call and the start of user code."""
    more: bool = False


class Item(Message, tag=12, frozen=True):
    """One value of a generator."""

    call: int
    codec: int
    more: bool = False


class Failed(Message, tag=13, frozen=True):
    """The executor could not bring the call to a result."""

    call: int
    slug: str
    detail: str
    extra: dict[str, Any]
    may_have_run: bool


class Busy(Message, tag=14, frozen=True):
    """Not taken: no slot. The call goes back to the head of its queue; its credit is void."""

    call: int


class Ask(Message, tag=20, frozen=True):
    id: int
    op: str
    body: msgspec.Raw


class Answer(Message, tag=21, frozen=True):
    id: int
    slug: str
    """Empty: fine, and `body` is the result. Otherwise a problem slug, with `detail` and `extra` in `body`."""
    body: msgspec.Raw


class Demand(Message, tag=22, frozen=True):
    """Dispatcher → leader: calls of a version that have no slot to go to; `queued` 0: there are none any more."""

    version: str
    queued: int
    running: int = 0
    run_us: int = 0
    """Mean time that a call of it runs, as far as is known (for one that never ended: as long as it has run); 0: unknown."""


class Unplaced(Message, tag=23, frozen=True):
    """Leader → dispatchers: why a version's demand cannot be met now. `final`: fail what waits; otherwise it goes on waiting."""

    version: str
    slug: str
    detail: str
    extra: dict[str, Any]
    final: bool


class Route(msgspec.Struct, array_like=True, frozen=True):
    """What a gateway needs to know to call a function."""

    name: str
    version: str
    owner: str
    namespace: str
    spec: FunctionSpec
    digest: str = ""
    created_ms: int = 0


class KeyEntry(msgspec.Struct, array_like=True, frozen=True):
    """What a gateway needs to know to check an API key."""

    sha256: str
    id: str
    name: str
    owner: str
    namespace: str
    scopes: tuple[str, ...]
    expires_ms: int = 0
    """Milliseconds since the epoch; 0: never."""


class Directory(Message, tag=24, frozen=True):
    """All that the leader publishes, as of (epoch, seq)."""

    epoch: int
    seq: int
    leader: str
    routes: tuple[Route, ...]
    keys: tuple[KeyEntry, ...]


class DirectoryChange(Message, tag=25, frozen=True):
    epoch: int
    seq: int
    routes: tuple[Route, ...] = ()
    routes_gone: tuple[str, ...] = ()
    keys: tuple[KeyEntry, ...] = ()
    keys_gone: tuple[str, ...] = ()
    """Ids."""


class DirectoryWanted(Message, tag=29, frozen=True):
    """A change was missed: send the whole Directory."""


class TailStart(Message, tag=26, frozen=True):
    """Ask for log lines of a function or invocation; answered by `Tail`s under the same id until `TailStop` or the end."""

    id: int
    function: str
    invocation: str
    follow: bool
    limit: int


class Tail(Message, tag=27, frozen=True):
    id: int
    lines: bytes
    """A JSON array of log records."""
    end: bool = False


class TailStop(Message, tag=28, frozen=True):
    id: int


class Start(Message, tag=30, frozen=True):
    """Leader → executor: run a sandbox for an allocation that is committed."""

    epoch: int
    leader: str
    allocation: str
    version: str
    digest: str
    spec: FunctionSpec
    siblings: dict[str, str]
    owner: str
    namespace: str


class Stop(Message, tag=31, frozen=True):
    """Leader → executor: end an allocation; what runs may finish first when `drain`."""

    epoch: int
    leader: str
    allocation: str
    reason: str
    drain: bool = True


class Observed(Message, tag=32, frozen=True):
    """Executor → leader: what became of an allocation: `ready`, `failed`, `refused` or `gone`."""

    allocation: str
    version: str
    state: str
    slug: str = ""
    detail: str = ""
    extra: dict[str, Any] = {}


class Idle(Message, tag=33, frozen=True):
    """Executor → leader: an allocation had no call for its function's `idle_s`."""

    allocation: str
    version: str


class ReportWanted(Message, tag=34, frozen=True):
    """Leader → executor: send a Report."""


class AllocationReport(msgspec.Struct, array_like=True, frozen=True):
    allocation: str
    version: str
    sandbox: str
    state: str
    slots: int
    busy: int
    idle_ms: int
    """Since its last call ended; 0 while one runs."""
    pid: int = 0
    lent: bool = False
    """All its calls wait for calls of their own; it uses no CPU."""


class Report(Message, tag=35, frozen=True):
    """Executor → leader: all that it runs, and what the machine has. Also sent first on every link."""

    node: str
    epoch: int
    """Highest seen."""
    cpu: float
    memory_mb: int
    gpus: int
    driver: str
    python: tuple[str, ...]
    layers: tuple[str, ...]
    spares: int
    allocations: tuple[AllocationReport, ...]
    memory_used_mb: int = 0
    started_ms: int = 0
    version: str = ""
    address: str = ""
    pool: str = "default"


AnyMessage = (
    Hello | Call | Chunk | Ack | Cancel | Backlog | Return | Grant | Recall | Slots | Result | Item | Failed | Busy | Ask | Answer
    | Demand | Unplaced | Directory | DirectoryChange | TailStart | Tail | TailStop
    | DirectoryWanted | Start | Stop | Observed | Idle | ReportWanted | Report
)  # fmt: skip
