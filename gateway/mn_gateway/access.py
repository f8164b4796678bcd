"""Who may: API keys, and the hosts and origins from which a request may come."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping

from mn.formats.errors import Forbidden, NoLeader, Unauthenticated
from mn.formats.keys import hash_key, looks_valid
from mn.formats.settings import Settings
from mn_gateway.pool import DirectoryView
from mn_nodepool.wire.control import Principal
from mn_nodepool.wire.messages import KeyEntry

SCOPES = ("invoke", "deploy", "read", "admin")
CACHED_KEYS_MAX = 4096
CACHED_HOSTS_MAX = 256
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - recognised here, bound by whoever sets it


def is_loopback(host: str) -> bool:
    return host in LOOPBACK_NAMES


class Access:
    """Checks keys against the directory, so that a revocation holds from the moment at which it arrives.

    What is cached per `Authorization` header is its hash alone, and only of keys that were valid once.
    """

    def __init__(self, settings: Settings, directory: DirectoryView) -> None:
        self._directory = directory
        self._stale_s_max = settings.auth_stale_s
        self._hash_of: dict[bytes, str] = {}

    def key_of(self, authorization: bytes | None) -> KeyEntry:
        """The key that a request brings.

        Raises Unauthenticated, or NoLeader when there is no copy of the keys that may be honoured.
        """
        directory = self._directory
        if not directory.synced:
            raise NoLeader("this gateway has not heard from the leader yet; try again in a second", retry_after_s=1)
        if directory.stale_s() > self._stale_s_max:
            raise NoLeader(
                f"the leader was last heard more than {self._stale_s_max:.0f} s ago, too long to honour keys; "
                "see `mn runtime status`",
                retry_after_s=5,
            )
        digest = self._hash_of.get(authorization) if authorization is not None else None
        if digest is None:
            digest = self._hash(authorization)
        entry = directory.keys.get(digest)
        if entry is None:
            raise Unauthenticated(
                "no such API key, or it was revoked. Was it the last one? On the runtime's machine: mn runtime stop, "
                "remove `key` from the home's config.toml, mn runtime start, which makes another"
            )
        if entry.expires_ms and time.time() * 1000 >= entry.expires_ms:
            raise Unauthenticated(f"the API key {entry.name!r} has expired; `mn key create` makes a new one")
        if authorization is not None and authorization not in self._hash_of:
            if len(self._hash_of) >= CACHED_KEYS_MAX:
                self._hash_of.clear()
            self._hash_of[authorization] = digest
        return entry

    def _hash(self, authorization: bytes | None) -> str:
        if not authorization:
            raise Unauthenticated("send an API key: `Authorization: Bearer mnk_…`; the first one is in config.toml")
        kind, _, secret = authorization.decode("latin-1").partition(" ")
        secret = secret.strip()
        if kind.lower() != "bearer":
            raise Unauthenticated(f"the scheme must be Bearer, not {kind[:20]!r}: `Authorization: Bearer mnk_…`")
        if not looks_valid(secret):
            raise Unauthenticated("this is not an API key: a part is missing or misspelt (its checksum does not fit)")
        return hash_key(secret)


def require(entry: KeyEntry, scope: str) -> None:
    """Raise Forbidden, naming the scope, unless the key has it or is an admin's."""
    scopes = entry.scopes
    if scope not in scopes and "admin" not in scopes:
        raise Forbidden(
            f"the key {entry.name!r} lacks the scope {scope!r} (it has {', '.join(scopes) or 'none'}); "
            f"an admin makes one with `mn key create --scope {scope}`",
            scope=scope,
            key=entry.id,
        )


def principal_of(entry: KeyEntry) -> Principal:
    return Principal(entry.id, entry.owner, entry.namespace, "admin" in entry.scopes)


class Sources:
    """Hosts and origins: any web page can reach loopback, but its browser says so in Host (DNS rebinding) or Origin."""

    def __init__(self, settings: Settings) -> None:
        listed = {name.strip().lower().strip("[]") for name in settings.trusted_hosts.split(",")} - {""}
        self._names = LOOPBACK_NAMES | {settings.api_host.lower().strip("[]")} | listed
        self._any_address = settings.api_host in WILDCARDS
        self.known_hosts: set[bytes] = set()
        """Host headers that were found to be fine."""
        self.origins = frozenset(o.strip().rstrip("/") for o in settings.cors_origins.split(",") if o.strip())

    def check_host(self, host: bytes | None) -> None:
        """Raise Forbidden for a Host that is not this API's."""
        if host in self.known_hosts:
            return
        name = _host_name(host or b"")
        if name not in self._names and not (self._any_address and _is_address(name)):
            raise Forbidden(
                f"the Host {name[:100]!r} is not one that this API answers to; add it to trusted_hosts "
                "(MN_TRUSTED_HOSTS) if it should be",
                host=name[:100],
            )
        if host is not None and len(self.known_hosts) < CACHED_HOSTS_MAX:
            self.known_hosts.add(host)

    def check_origin(self, origin: bytes) -> None:
        """Raise Forbidden for an Origin that is not configured."""
        if origin.decode("latin-1") not in self.origins:
            raise Forbidden(
                f"pages of {origin.decode('latin-1')[:100]!r} may not call this API; add the origin to cors_origins "
                "(MN_CORS_ORIGINS) if they should",
                origin=origin.decode("latin-1")[:100],
            )

    def cors_headers(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What tells a browser that the (checked) origin may read the answer."""
        return [
            (b"access-control-allow-origin", headers[b"origin"]),
            (b"access-control-expose-headers", b"mn-invocation-id, server-timing, retry-after"),
            (b"vary", b"Origin"),
        ]

    def preflight_headers(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        return [
            *self.cors_headers(headers),
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type, mn-timeout, mn-item-codec, prefer"),
            (b"access-control-max-age", b"600"),
        ]


def _host_name(host: bytes) -> str:
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
