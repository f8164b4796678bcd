"""The store on Valkey or Redis (7.0 or newer).

Keys, all with the hash tag of their namespace, so that they share a slot:

    mn:{ns}:rec:<kind>       hash        id → `<version>:` + value
    mn:{ns}:op:<operation>   string      versions that a commit answered; a day
    mn:{ns}:lease            string      `<counter>:<holder>`; expires with the lease, by the server's clock
    mn:{ns}:epochs           integer     the highest counter ever given
    mn:{ns}:states, :values  hashes      accepted invocations that have no outcome
    mn:{ns}:sequence         integer     order of acceptance
    mn:{ns}:wait:<queue>     sorted set  index of those that wait
    mn:{ns}:busy:<queue>     sorted set  index of those that are leased
    mn:{ns}:out:<id>         string      an outcome; expires
    mn:{ns}:dedupe:<key>     string      the id that was accepted first; expires
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, OutOfMemoryError, RedisError

from mn.formats.errors import Internal, StoreFull, Unavailable
from mn_nodepool.store.base import (
    Claimed,
    Epoch,
    Op,
    Record,
    StaleEpoch,
    StoreUnavailable,
    VersionMismatch,
    check_ops,
)

OPERATION_MS = 86_400_000
"""How long a commit's answer is remembered under its operation id."""
TIMEOUT_S = 2.0
"""For connecting, for an answer, and for a free connection. Well under a leader's lease, so that it learns in time."""
CONNECTIONS_MAX = 16
LAPSED_MAX = 1000
"""Ended leases that one claim looks at; the rest is for the next."""
SCAN_COUNT = 500
READY_LIMIT_S = 60.0
"""A long append-only file is read before the server serves."""
POLL_FIRST_S = 0.01
POLL_LAST_S = 0.25

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_UNREACHABLE = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError)
_NOT_NOW = (
    "LOADING",
    "MASTERDOWN",
    "NOREPLICAS",
    "MISCONF",
    "BUSY",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "UNKILLABLE",
    "NOGOODSLAVE",
)
"""First words of refusals that pass, or that an operator can end. Any other refusal is a bug of ours."""


class _Script:
    """A Lua script and the hash by which a server that saw it once knows it."""

    def __init__(self, name: str) -> None:
        self.text = (Path(__file__).parent / "scripts" / f"{name}.lua").read_text("utf-8")
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class RedisStore:
    """`base.Store` on one server, with one long-lived client that never repeats a command by itself.

    `url` is `redis://host:port/db` (`rediss://` for TLS); `timeout_s` bounds connecting and each answer.
    """

    def __init__(
        self, url: str, *, password: str = "", namespace: str = "default", timeout_s: float = TIMEOUT_S
    ) -> None:
        if not _NAMESPACE.match(namespace):
            raise ValueError(f"{namespace!r} is no namespace: 1 to 64 letters, digits, _ . or -")
        self._prefix = f"mn:{{{namespace}}}:"
        self.address = address_of(url)
        self._client = connect(url, password=password, timeout_s=timeout_s)
        self._commit, self._lease = _Script("commit"), _Script("lease")
        self._enqueue, self._claim, self._finish = _Script("enqueue"), _Script("claim"), _Script("finish")

    async def get(self, kind: str, id: str) -> Record | None:
        stored = await self._command("HGET", self._records(kind), id)
        return None if stored is None else _record(id, stored)

    async def scan(self, kind: str) -> AsyncIterator[Record]:
        # The server may show an entry twice while its hash is being resized.
        seen: set[bytes] = set()
        cursor = 0
        while True:
            cursor, entries = await self._command("HSCAN", self._records(kind), cursor, "COUNT", SCAN_COUNT)
            for id, stored in entries.items():
                if id not in seen:
                    seen.add(id)
                    yield _record(id.decode(), stored)
            if int(cursor) == 0:
                return

    async def commit(self, ops: Sequence[Op], *, fence: Epoch | None = None, operation: str = "") -> list[int]:
        check_ops(ops)
        kinds = {kind: index for index, kind in enumerate(dict.fromkeys(op.kind for op in ops), start=2)}
        keys = [self._key("lease"), *map(self._records, kinds), *([self._key("op:" + operation)] if operation else [])]
        args: list[str | bytes | int] = [_lease_text(fence) if fence else "", OPERATION_MS if operation else 0]
        for op in ops:
            args += (kinds[op.kind], op.id, op.expect, "del" if op.value is None else "set", op.value or b"")
        verdict, *rest = await self._run(self._commit, keys, args)
        if verdict == b"stale":
            raise StaleEpoch(_stale_detail(fence, rest[0].decode()))
        if verdict == b"mismatch":
            op, found = ops[int(rest[0])], int(rest[1])
            raise VersionMismatch(
                f"{op.kind} {op.id!r} is at version {found}, not {op.expect} (0: absent)",
                kind=op.kind,
                id=op.id,
                found=found,
            )
        return [int(version) for version in rest[0].split()]

    async def acquire_lease(self, holder: str, ttl_s: float, *, above: int = 0) -> Epoch | None:
        lease = await self._run_lease("acquire", holder, _ms(ttl_s), above)
        return None if lease is None else _epoch(lease)

    async def renew_lease(self, epoch: Epoch, ttl_s: float) -> bool:
        return bool(await self._run_lease("renew", _lease_text(epoch), _ms(ttl_s)))

    async def release_lease(self, epoch: Epoch) -> None:
        await self._run_lease("release", _lease_text(epoch))

    async def leader(self) -> Epoch | None:
        lease = await self._command("GET", self._key("lease"))
        return None if lease is None else _epoch(lease)

    async def enqueue(
        self, queue: str, id: str, value: bytes, *, dedupe: str = "", dedupe_s: float = 86400.0
    ) -> tuple[str, bool]:
        keys = [self._key(name) for name in (f"wait:{queue}", "states", "values", "sequence", f"out:{id}")]
        if dedupe:
            keys.append(self._key("dedupe:" + dedupe))
        first, new = await self._run(self._enqueue, keys, [id, value, queue, _ms(dedupe_s)])
        return first.decode(), bool(new)

    async def claim(self, queue: str, holder: str, lease_s: float, *, now_ms: int) -> Claimed | None:
        token = secrets.token_hex(16)
        args: list[str | bytes | int] = [now_ms, now_ms + _ms(lease_s), token, holder, LAPSED_MAX]
        answer = await self._run(self._claim, self._invocations(queue), args)
        if answer is None:
            return None
        id, value, attempt = answer
        return Claimed(id.decode(), value, int(attempt), token)

    async def finish(self, id: str, token: str, outcome: bytes, *, keep_s: float = 86400.0) -> bool:
        state = await self._command("HGET", self._key("states"), id)
        if state is None:
            return False
        # A script is told all its keys, and an invocation never changes its queue.
        queue = str(msgspec.msgpack.decode(state)[0])
        keys = [*self._invocations(queue), self._key("out:" + id)]
        return bool(await self._run(self._finish, keys, [id, token, outcome, _ms(keep_s)]))

    async def outcome(self, id: str) -> bytes | None:
        stored: bytes | None = await self._command("GET", self._key("out:" + id))
        return stored

    async def ping(self) -> None:
        await self._command("PING")

    async def server(self) -> str:
        """What the server calls itself, for people: `valkey 9.1`, `redis 7.0`."""
        info = await self._command("INFO", "server")
        valkey = info.get("valkey_version")
        return f"valkey {_minor(valkey)}" if valkey else f"redis {_minor(info['redis_version'])}"

    async def close(self) -> None:
        await self._client.aclose()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _records(self, kind: str) -> str:
        return self._key("rec:" + kind)

    def _invocations(self, queue: str) -> list[str]:
        return [self._key(name) for name in (f"wait:{queue}", f"busy:{queue}", "states", "values")]

    async def _run_lease(self, *args: str | int) -> Any:
        return await self._run(self._lease, [self._key("lease"), self._key("epochs")], args)

    async def _run(self, script: _Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        try:
            return await self._command("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            # Nothing ran: a server that was restarted, or that has not seen the script, says so first.
            return await self._command("EVAL", script.text, len(keys), *keys, *args)

    async def _command(self, *words: str | bytes | int) -> Any:
        try:
            return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise
        except OutOfMemoryError as error:
            raise StoreFull(
                f"the store at {self.address} is full; nothing was written. "
                "Delete what is not needed, or raise its memory limit"
            ) from error
        except _UNREACHABLE as error:
            raise self._unavailable(error) from error
        except RedisError as error:
            if str(error).startswith(_NOT_NOW):
                raise self._unavailable(error) from error
            raise Internal(f"the store at {self.address} refused a command: {error}") from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        reason = str(error) or type(error).__name__
        return StoreUnavailable(
            f"the store at {self.address} did not answer ({reason}); a write may or may not have happened. "
            "`mn runtime status` shows what runs"
        )


def connect(url: str, *, password: str = "", timeout_s: float = TIMEOUT_S) -> redis.asyncio.Redis:
    """A client with one bounded pool. It gives up at once instead of retrying: a repeated create could apply twice."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS_MAX,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
        retry_on_timeout=False,
        **({"password": password} if password else {}),
    )
    return redis.asyncio.Redis.from_pool(pool)


def address_of(url: str) -> str:
    """`host:port` of a store's URL, which may hold a password that no message should show."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


async def wait_ready(
    url: str, *, password: str = "", limit_s: float = READY_LIMIT_S, alive: Callable[[], bool] = lambda: True
) -> None:
    """Return when a store, embedded or external, answers PING.

    Raises Unavailable after `limit_s` seconds, and at once when `alive` says that its process ended or when it refuses
    the password, since waiting heals neither.
    """
    client = connect(url, password=password)
    reason, delay_s = "no answer", POLL_FIRST_S
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    await client.execute_command("PING")  # type: ignore[no-untyped-call]
                    return
                except AuthenticationError as error:
                    raise Unavailable(
                        f"the store at {address_of(url)} refuses the password ({error}). "
                        "Give it in the URL: MN_REDIS_URL=redis://:PASSWORD@HOST:PORT/0"
                    ) from error
                except (RedisError, OSError) as error:
                    reason = str(error) or type(error).__name__
                if not alive():
                    raise Unavailable(f"the store at {address_of(url)} ended while it started; logs/store.log says why")
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, POLL_LAST_S)
    except TimeoutError:
        raise Unavailable(f"the store at {address_of(url)} was not ready within {limit_s:g} s ({reason})") from None
    finally:
        await client.aclose()


def _record(id: str, stored: bytes) -> Record:
    version, _, value = stored.partition(b":")
    return Record(id, int(version), value)


def _lease_text(epoch: Epoch) -> str:
    return f"{epoch.counter}:{epoch.holder}"


def _epoch(lease: bytes) -> Epoch:
    counter, _, holder = lease.decode().partition(":")
    return Epoch(int(counter), holder)


def _stale_detail(fence: Epoch | None, lease: str) -> str:
    held = f"the lease is {lease}" if lease else "nobody holds the lease"
    return f"a write under epoch {_lease_text(fence) if fence else '?'} was refused: {held}"


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _minor(version: object) -> str:
    return ".".join(str(version).split(".")[:2])
