"""The last copy of what the leader publishes; kept and used while there is no leader."""

from __future__ import annotations

from collections.abc import Callable

from mn_nodepool.wire.messages import Directory, DirectoryChange, KeyEntry, Message, Route


class DirectoryView:
    """Names and keys as of (epoch, seq). `apply` says whether a change was missed and a whole copy is needed."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.routes: dict[str, Route] = {}
        self.keys: dict[str, KeyEntry] = {}
        """By the SHA-256 of the secret."""
        self.leader = ""
        self.epoch = 0
        self.seq = 0
        self.synced = False
        self.on_change: list[Callable[[DirectoryView], None]] = []
        self.on_retired: list[Callable[[str, str], None]] = []
        """Called with (version, name) when a route stands for a version no longer; the name is empty when it is gone."""
        self._monotonic = monotonic
        self._heard = 0.0
        self._connected = False

    def stale_s(self) -> float:
        """Seconds since the leader was last heard of; 0 while it is there."""
        if self._connected:
            return 0.0
        return self._monotonic() - self._heard if self.synced else float("inf")

    def lost(self) -> None:
        """The leader is out of reach from now on."""
        if self._connected:
            self._heard, self._connected, self.leader = self._monotonic(), False, ""

    def apply(self, message: Message) -> bool:
        """Take in a Directory or a DirectoryChange; False when a change does not follow what is here."""
        if isinstance(message, Directory):
            if (message.epoch, message.seq) < (self.epoch, self.seq):
                return True
            self._replace(message)
        elif isinstance(message, DirectoryChange):
            if message.epoch != self.epoch or message.seq != self.seq + 1:
                return False
            self._change(message)
        self._heard, self._connected = self._monotonic(), True
        for callback in self.on_change:
            callback(self)
        return True

    def _replace(self, message: Directory) -> None:
        before = self.routes
        self.routes = {route.name: route for route in message.routes}
        self.keys = {key.sha256: key for key in message.keys}
        self.epoch, self.seq, self.leader, self.synced = message.epoch, message.seq, message.leader, True
        for name, route in before.items():
            now = self.routes.get(name)
            if now is None or now.version != route.version:
                self._retired(route.version, name if now else "")

    def _change(self, message: DirectoryChange) -> None:
        for route in message.routes:
            before = self.routes.get(route.name)
            self.routes[route.name] = route
            if before is not None and before.version != route.version:
                self._retired(before.version, route.name)
        for name in message.routes_gone:
            gone = self.routes.pop(name, None)
            if gone is not None:
                self._retired(gone.version, "")
        for key in message.keys:
            self.keys[key.sha256] = key
        if message.keys_gone:
            leaving = set(message.keys_gone)
            self.keys = {sha: key for sha, key in self.keys.items() if key.id not in leaving}
        self.seq = message.seq

    def _retired(self, version: str, name: str) -> None:
        for callback in self.on_retired:
            callback(version, name)
