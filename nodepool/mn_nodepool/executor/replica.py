"""A sandbox from the executor's side: its lifecycle, the calls in it, and its end.

Whatever ends a sandbox (its process, its socket, a violation, a kill), `die` runs once, and every call in it gets its answer there.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Protocol

import structlog

from mn.formats.codecs import Codec
from mn.formats.errors import FunctionFailed, MnError, SandboxLost, error_from
from mn_nodepool.executor import endings
from mn_nodepool.executor.allowance import OutputAllowance
from mn_nodepool.executor.calls import RunningCall
from mn_nodepool.executor.lane import VersionLane
from mn_nodepool.executor.nested import NestedCalls
from mn_nodepool.executor.session import ChildSession, OutputPipe, open_output, open_session
from mn_nodepool.wire.messages import Ack, Chunk, Failed, Item, Result
from mn_nodepool.wire.untrusted import read_object
from mn_runner.protocol import (
    CALL_HEAD,
    CHUNK_BYTES,
    CONTROL,
    HEADER,
    MORE,
    NESTED_BIT,
    REASON_CANCELLED,
    REASON_TIMEOUT,
    REASON_WITHDRAWN,
    RESULT_HEAD,
    U32,
    Kind,
    Status,
    Violation,
    frame,
)  # fmt: skip
from mn_runner.sandbox import TRANSITIONS, Death, Driver, Handle, State

log = structlog.get_logger("executor")

_CALL, _CHUNK, _ACK, _RESULT, _ITEM, _LOG = (
    int(Kind.CALL),
    int(Kind.CHUNK),
    int(Kind.ACK),
    int(Kind.RESULT),
    int(Kind.ITEM),
    int(Kind.LOG),
)
_NESTED, _CANCEL, _READY, _LOADED = int(Kind.NESTED), int(Kind.CANCEL), int(Kind.READY), int(Kind.LOADED)
_STATUS_MAX, _CODEC_MAX = int(max(Status)), int(max(Codec))
SPARE_OUTPUT_BYTES = 64 * 1024
EXIT_WAIT_S = 1.0
"""After its socket closed, a sandbox's process has this long to end by itself, so that its exit code can be told."""


class ReplicaOwner(Protocol):
    """What a replica tells its executor."""

    def ended(self, call: RunningCall) -> None:
        """The call left the replica with an answer sent."""

    def failed(self, call: RunningCall, problem: dict[str, Any]) -> None:
        """The call failed in a way worth keeping for `mn debug`."""

    def write_output(self, call: RunningCall | None, lane: VersionLane | None, stream: int, text: bytes) -> None: ...

    def died(self, replica: Replica, reason: str) -> None:
        """It is dead; every call in it has been answered."""


class Replica:
    """One sandbox, spare or loaded."""

    def __init__(self, sandbox: str, driver: Driver, owner: ReplicaOwner, interrupt_grace_s: float) -> None:
        self.sandbox = sandbox
        self.allocation = ""
        self.state = State.STARTING
        self.running: dict[int, RunningCall] = {}
        self.idle_slots = 0
        self.pipelines = True
        """False once a call here turned out slow while others rode behind it."""
        self.lane: VersionLane | None = None
        self.handle: Handle | None = None
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.loaded: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.last_used = 0.0
        self.stop_when_idle = ""
        self.nested: NestedCalls
        self._driver = driver
        self._owner = owner
        self._grace_s = interrupt_grace_s
        self._loop = asyncio.get_running_loop()
        self._session: ChildSession
        self._output: OutputPipe
        self._allowance = OutputAllowance(SPARE_OUTPUT_BYTES)
        self._next = 0
        self._in_free = False
        self._last: RunningCall | None = None
        self._dying: asyncio.Task[Death] | None = None
        self._kill_reason = ""

    # Lifecycle.

    def _move(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise AssertionError(f"sandbox {self.sandbox}: {self.state} → {to} is no legal move")
        self.state = to

    async def open(self, handle: Handle) -> None:
        """Take over a started sandbox and wait until its child says READY."""
        self.handle = handle
        self._session = await open_session(self, handle.protocol)
        self._output = await open_output(self, handle.output)
        handle.exited.add_done_callback(lambda _: self.session_lost("its process ended"))
        await self.ready
        if self.state is State.STARTING:
            self._move(State.SPARE)

    async def load(self, lane: VersionLane, allocation: str, description: dict[str, Any]) -> None:
        """Become a replica of a version.

        Raises what the child says: FunctionFailed when importing the code raised, other MnErrors for what is missing.
        """
        self._move(State.LOADING)
        self.lane, self.allocation = lane, allocation
        self._allowance = OutputAllowance(description["output_bytes_max"])
        self._session.send(frame(Kind.LOAD, 0, json.dumps(description).encode()))
        answer = await self.loaded
        error = answer.get("error")
        if error:
            raise self._load_error(error)
        if self.state is not State.LOADING:
            raise SandboxLost(self._kill_reason or "the sandbox died while its code was loaded")
        self._move(State.READY)
        self.idle_slots = lane.start.spec.scaling.concurrency
        self.last_used = self._loop.time()
        self._settle()

    def _load_error(self, error: dict[str, Any]) -> MnError:
        if "slug" in error:
            return error_from(str(error.pop("slug")), str(error.pop("detail", "")), error)
        return FunctionFailed(
            f"{error.get('type')}: {error.get('message')} (while its module was imported)", exception=error
        )

    def stop(self, reason: str) -> None:
        """End it when the calls in it have ended; takes no more."""
        self.stop_when_idle = reason
        self._leave_free()
        if not self.running:
            self.die(reason)

    # Calls.

    def run(self, call: RunningCall) -> None:
        """Send a call to the child."""
        self._next = slot = (self._next + 1) & 0x7FFF_FFFF or 1
        call.replica, call.slot = self, slot
        self._allowance.renew()
        self.running[slot] = call
        self.idle_slots -= 1
        if self._in_free and self.idle_slots <= 0:
            self._leave_free()
        identity = call.invocation.encode()
        head = CALL_HEAD.pack(call.deadline_ms / 1000, call.codec, call.depth, len(identity)) + identity
        payload = call.payload
        flags = 0 if call.input_complete and not call.chunks else MORE
        self._session.send(HEADER.pack(len(head) + len(payload), _CALL, flags, slot) + head + payload)
        if call.chunks:
            last = len(call.chunks) - 1
            for index, chunk in enumerate(call.chunks):
                self.send_chunk(call, chunk, more=index < last or not call.input_complete)

    def send_chunk(self, call: RunningCall, chunk: bytes, *, more: bool) -> None:
        self._session.send(HEADER.pack(len(chunk), _CHUNK, MORE if more else 0, call.slot) + chunk)

    def send_ack(self, call: RunningCall, chunks: int) -> None:
        call.unacknowledged -= chunks
        self._session.send(HEADER.pack(4, _ACK, 0, call.slot) + U32.pack(chunks))

    def send_frame(self, data: bytes) -> None:
        self._session.send(data)

    def interrupt(self, call: RunningCall, *, timed_out: bool) -> None:
        """Interrupt the call inside the sandbox; kill the sandbox when that does not end it within the grace."""
        if call.cancel_reason:
            return
        call.cancel_reason = REASON_TIMEOUT if timed_out else REASON_CANCELLED
        if not self._control(call, call.cancel_reason):
            return
        why = f"a call that {'passed its deadline' if timed_out else 'was cancelled'} could not be interrupted within {self._grace_s:g} s"
        call.kill_timer = self._loop.call_later(self._grace_s, self.die, why)

    def withdraw_queued(self) -> None:
        """The call that runs is slow: take back those that ride behind it."""
        self.pipelines = False
        riding = list(self.running.values())[self._started() :]
        for call in reversed(riding):
            if not call.withdrawn and not call.cancel_reason:
                call.withdrawn = True
                if not self._control(call, REASON_WITHDRAWN):
                    return

    def _control(self, call: RunningCall, reason: int) -> bool:
        """Tell the child by the control pipe; False when that ended the sandbox."""
        assert self.handle is not None
        try:
            os.write(self.handle.control, CONTROL.pack(call.slot, reason))
        except OSError:
            self.die("its control pipe is full or closed")
            return False
        return True

    def _started(self) -> int:
        """How many of `running`, oldest first, may have begun: one for each slot, and one for each that a waiting call lends."""
        concurrency = self.lane.start.spec.scaling.concurrency if self.lane else 1
        return concurrency + sum(1 for call in self.running.values() if call.nested)

    def _settle(self) -> None:
        """After a slot became idle: feed it, and say when it stays idle."""
        lane = self.lane
        if lane is None or self.state is not State.READY:
            return
        if self.stop_when_idle:
            if not self.running:
                self.die(self.stop_when_idle)
            return
        if lane.queue:
            lane.feed(self)
        if self.idle_slots > 0 and not self._in_free:
            self._in_free = True
            lane.free.append(self)

    def _leave_free(self) -> None:
        if self._in_free:
            self._in_free = False
            assert self.lane is not None
            self.lane.free.remove(self)

    # Frames.

    def frame(self, kind: int, flags: int, call: int, body: bytes) -> None:
        if kind == _RESULT:
            self._on_result(flags, call, body)
        elif call & NESTED_BIT:
            self.nested.frame(kind, flags, call, body)
        elif kind == _LOG:
            self._printed(self.running.get(call), body[0], body[1:])
        elif kind in (_CHUNK, _ITEM, _ACK):
            self._on_part(kind, flags, call, body)
        elif kind == _READY and self.state is State.STARTING and not self.ready.done():
            self.ready.set_result(_json(body))
        elif kind == _LOADED and self.state is State.LOADING and not self.loaded.done():
            answer = _json(body)
            if not isinstance(answer.get("error", {}), dict):
                raise Violation("a LOADED whose error is no JSON object")
            self.loaded.set_result(answer)
        else:
            raise Violation(f"a frame of kind {kind} while {self.state}")

    def _on_result(self, flags: int, number: int, body: bytes) -> None:
        call = self.running.get(number)
        if call is None or call.result_open:
            raise Violation(f"a result of call {number}, which does not run")
        if len(body) < RESULT_HEAD.size:
            raise Violation("a result too short for its head")
        status, codec, run_us = RESULT_HEAD.unpack_from(body)
        payload = body[RESULT_HEAD.size :]
        if len(payload) > CHUNK_BYTES or status > _STATUS_MAX or codec > _CODEC_MAX:
            raise Violation(f"a result of status {status}, codec {codec} and {len(payload)} bytes in one frame")
        if call.withdrawn and status == Status.PLATFORM_ERROR and _json(payload).get("slug") == "withdrawn":
            self._take_back(call)
            return
        more = bool(flags & MORE)
        now = self._loop.time()
        start_us = max(0, int((now - call.received) * 1e6) - run_us)
        if status:
            payload = payload if more else self._with_context(call, status, payload)
        call.link.send(Result(call.number, status, codec, run_us, start_us, more), payload)
        lane = self.lane
        assert lane is not None
        lane.ended(run_us)
        if more:
            call.result_open = True
            # Items that are still on their way do not narrow the result's own window.
            call.passing, call.unacknowledged = len(payload), 0
        else:
            self._done(call, now)

    def _with_context(self, call: RunningCall, status: int, payload: bytes) -> bytes:
        problem = _json(payload)
        node = str(self.handle.extra.get("node", "")) if self.handle else ""
        if endings.add_context(problem, call, status, node):
            self._owner.failed(call, problem)
        return endings.encoded(problem, payload)

    def _done(self, call: RunningCall, now: float) -> None:
        del self.running[call.slot]
        if call.kill_timer is not None:
            call.kill_timer.cancel()
        self._last = call
        self.idle_slots += 1
        self.last_used = now
        self._owner.ended(call)
        self._settle()

    def _take_back(self, call: RunningCall) -> None:
        """A call that rode behind a slow one comes back unstarted: another replica may take it."""
        del self.running[call.slot]
        self.idle_slots += 1
        if call.cancel_reason:
            if call.kill_timer is not None:
                call.kill_timer.cancel()
            slug = "timeout" if call.cancel_reason == REASON_TIMEOUT else "cancelled"
            call.link.send(Failed(call.number, slug, "the call was still waiting for a slot", {}, False))
            self._owner.ended(call)
            return
        call.replica, call.withdrawn = None, False
        assert self.lane is not None
        self.lane.queue.appendleft(call)
        for replica in list(self.lane.free):
            self.lane.feed(replica)

    def _on_part(self, kind: int, flags: int, number: int, body: bytes) -> None:
        call = self.running.get(number)
        if call is None:
            raise Violation(f"a frame of kind {kind} for call {number}, which does not run")
        more = bool(flags & MORE)
        if kind != _ACK and len(body) > CHUNK_BYTES + 1:
            raise Violation(f"{len(body)} bytes of a payload in one frame, over {CHUNK_BYTES}")
        if kind == _ITEM:
            if body[0] > _CODEC_MAX or call.result_open:
                raise Violation(f"an item of codec {body[0]}, or after the result")
            call.pass_part(len(body), self.nested.payload_bytes_max, first=True)
            call.link.send(Item(call.number, body[0], more), body[1:])
        elif kind == _ACK:
            call.link.send(Ack(call.number, U32.unpack(body)[0], False))
        else:
            call.pass_part(len(body), self.nested.payload_bytes_max, first=False)
            call.link.send(Chunk(call.number, more, False), body)
            if not more and call.result_open:
                self._done(call, self._loop.time())

    # Death.

    def session_lost(self, reason: str) -> None:
        if self._dying is None and self.state is not State.DEAD:
            self._dying = self._loop.create_task(self._after_eof(reason))

    async def _after_eof(self, reason: str) -> Death:
        assert self.handle is not None
        await asyncio.wait([self.handle.exited], timeout=EXIT_WAIT_S)
        if not self.handle.exited.done():
            self._kill_reason = reason
        return await self._end(reason)

    def raw_output(self, data: bytes) -> None:
        call = next(iter(self.running.values()), None) or self._last
        if not self._printed(call, 2 if self.lane is None else 1, data):
            self._output.slow_down()

    def _printed(self, call: RunningCall | None, stream: int, text: bytes) -> bool:
        kept = self._allowance.take(text)
        if kept:
            self._owner.write_output(call, self.lane, stream, kept)
        return bool(kept)

    def die(self, reason: str) -> None:
        """End it now. Idempotent."""
        if self._dying is None:
            self._kill_reason = reason
            self._dying = self._loop.create_task(self._end(reason))

    async def gone(self) -> None:
        """Wait until nothing is left of it."""
        if self._dying is not None:
            await asyncio.shield(self._dying)

    async def _end(self, reason: str) -> Death:
        if State.STOPPING in TRANSITIONS[self.state]:
            self._move(State.STOPPING)
        self._leave_free()
        handle = self.handle
        death = Death(None, None)
        if handle is not None:
            try:
                death = await self._driver.destroy(handle, reason)
            except (MnError, OSError) as error:
                log.exception(
                    "a sandbox could not be removed", action="sandbox_left", sandbox=self.sandbox, reason=str(error)
                )
            await asyncio.wait([self._output.ended], timeout=EXIT_WAIT_S)
            self._session.close()
            os.close(handle.control)
            if self._output.transport is not None:
                self._output.transport.close()
        self.state = State.DEAD
        self._answer_all(reason, death)
        self._owner.died(self, reason)
        return death

    def _answer_all(self, reason: str, death: Death) -> None:
        sentence = reason if self._kill_reason else death.sentence()
        facts = endings.facts_of(death, self.sandbox)
        for future in (self.ready, self.loaded):
            if not future.done():
                future.set_result(endings.not_started(sentence, facts))
        begun = self._started()
        for index, call in enumerate(list(self.running.values())):
            if call.kill_timer is not None:
                call.kill_timer.cancel()
            failure = endings.failure_of(call, sentence, facts, index < begun)
            call.link.send(failure)
            if failure.may_have_run:
                self._owner.failed(call, {**failure.extra, "slug": failure.slug, "detail": failure.detail})
            self._owner.ended(call)
        self.running.clear()
        if hasattr(self, "nested"):
            self.nested.close()


def _json(body: bytes) -> dict[str, Any]:
    try:
        return read_object(body)
    except ValueError as error:
        raise Violation(str(error)) from None
