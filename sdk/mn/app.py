"""Deploying: what `f.remote()` does at its first call, and what `mn deploy` does.

A process that calls a function which it never deployed gets a version of its own: an **ephemeral scope**, twelve
random letters, is put behind each name (`square~k3…`). The scope is kept alive by a contact a minute, removed at exit,
and otherwise by the pool ten minutes after its last contact. A forked child makes its own scope.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import string
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from mn.client import Client
from mn.formats.bundle import pack
from mn.formats.errors import InvalidRequest, MnError, NotFound, Unavailable
from mn.formats.pickles import SANDBOX_MAIN
from mn.functions import Function
from mn.packing import Packed, has_source, pack_module
from mn.scripts import redefined
from mn.targets import Target as Target
from mn.targets import load_target as load_target

CONTACT_EVERY_S = 60.0
EXIT_S = 2.0
"""What removing a scope may take at exit; the pool removes it later anyway."""
SCOPE_LETTERS = 12
_ALPHABET = string.ascii_lowercase + string.digits
_log = logging.getLogger("mn")


def deploy(
    target: str | ModuleType, names: tuple[str, ...] = (), *, replace: bool = False, client: Client | None = None
) -> dict[str, Any]:
    """Deploy functions under their own names: those of a file (`hello.py`), one of them (`hello.py::square`), or a
    module's.

    Returns `{"digest", "functions": [{"name", "version", "url", "changed"}]}`.
    Raises InvalidRequest when there is nothing to deploy or a function can't be packed, Conflict when a name is
    somebody else's.
    """
    found = load_target(target) if isinstance(target, str) else Target(target, ())
    packed = pack_target(found, names)
    return _client(client).push_bundle(pack(packed.files, packed.manifest), deploy=True, replace=replace)


def pack_target(found: Target, names: tuple[str, ...] = ()) -> Packed:
    """The bundle of a target's functions.

    Raises NotFound for a name that it does not have, InvalidRequest for a file that defines one twice.
    """
    _check_unique(found.module)
    functions = list(found)
    if names:
        known = {function.name: function for function in functions}
        if unknown := [name for name in names if name not in known]:
            raise NotFound(f"{found.module.__name__} has no function {', '.join(unknown)}", near=sorted(known))
        functions = [known[name] for name in names]
    return pack_module(found.module, functions, only=True)


def _check_unique(module: ModuleType) -> None:
    twice = redefined(Path(str(module.__file__)).read_bytes()) if has_source(module) else None
    if twice is not None:
        name, first, second = twice
        raise InvalidRequest(
            f"two functions are called {name!r}, at lines {first} and {second} of {Path(str(module.__file__)).name}: "
            "the second replaces the first, so give one of them a name of its own"
        )


def _client(given: Client | None) -> Client:
    if given is not None:
        return given
    from mn.transport import default_transport

    return default_transport().client


class Scope:
    """One ephemeral deployment, of this process alone."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.name = "".join(secrets.choice(_ALPHABET) for _ in range(SCOPE_LETTERS))

    def deploy(self, packed: Packed) -> dict[int, str]:
        """Deploy; the pool's name of each function, by the identity of its code."""
        self.client.push_bundle(pack(packed.files, packed.manifest), deploy=True, scope=self.name)
        return {id(each.raw_function): f"{name}~{self.name}" for name, each in packed.functions.items()}

    def contact(self) -> bool:
        """Say that it is still in use; False when the pool has given it up. Another failure is not the caller's problem: the next
        contact, or the next call, tells.
        """
        try:
            self.client.contact_scope(self.name)
        except NotFound:
            return False
        except MnError as error:
            _log.debug("contact of scope %s failed: %s", self.name, error)
        return True

    def remove(self) -> None:
        try:
            self.client.delete_scope(self.name, timeout_s=EXIT_S)
        except MnError as error:
            _log.debug("scope %s is left to expire: %s", self.name, error)


class Deployments:
    """What this process has deployed for itself."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self.pid = os.getpid()
        self.scopes: list[Scope] = []
        self.keeping = False
        # The functions themselves are held, so that an identity is not given to another one.
        self.names: dict[int, tuple[Function[Any, Any], str]] = {}
        self.ended = threading.Event()
        self.contact_at = time.time()
        """By the wall clock, which goes on while a laptop sleeps."""

    def name_of(self, function: Function[Any, Any]) -> str:
        """The pool's name of a function; deploys it, and what belongs to it, when it is not there yet."""
        known = self.names.get(id(function.raw_function)) if self.pid == os.getpid() else None
        if known is not None and time.time() - self.contact_at < 2 * CONTACT_EVERY_S:
            return known[1]
        with self.lock:
            if self.pid != os.getpid():
                self._forget()
            elif known is not None:
                self.contact()
            known = self.names.get(id(function.raw_function))
            if known is None:
                self._deploy(function)
                known = self.names[id(function.raw_function)]
            return known[1]

    def _deploy(self, function: Function[Any, Any]) -> None:
        assert function.raw_function is not None
        module = sys.modules.get(function.raw_function.__module__) or ModuleType(function.raw_function.__module__)
        if module.__name__ == "__main__":
            # Results name a script's classes as its sandbox does.
            sys.modules[SANDBOX_MAIN] = module
        packed = pack_module(module, [function])
        scope = Scope(_client(None))
        if not self.keeping:
            self.keeping = True
            self.contact_at = time.time()
            threading.Thread(target=self._keep, args=(self.ended,), name="mn-contact", daemon=True).start()
        # Before the upload: a scope whose upload was cut off is removed at exit as well.
        self.scopes.append(scope)
        names = scope.deploy(packed)
        for each in packed.functions.values():
            self.names[id(each.raw_function)] = (each, names[id(each.raw_function)])

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(CONTACT_EVERY_S):
            with self.lock:
                self.contact()

    def contact(self) -> None:
        """Keep what is deployed; what the pool gave up meanwhile is deployed again by the next call."""
        self.contact_at = time.time()
        gone = [scope for scope in self.scopes if not scope.contact()]
        for scope in gone:
            self.scopes.remove(scope)
            suffix = "~" + scope.name
            self.names = {code: known for code, known in self.names.items() if not known[1].endswith(suffix)}

    def remove(self) -> None:
        """Remove all that this process deployed. A forked child leaves its parent's alone."""
        if self.pid != os.getpid():
            return
        with self.lock:
            self.ended.set()
            scopes, self.scopes, self.names = self.scopes, [], {}
            self.ended = threading.Event()
            self.keeping = False
        for scope in scopes:
            scope.remove()

    def after_fork(self) -> None:
        self.lock = threading.RLock()


_deployments = Deployments()
atexit.register(_deployments.remove)
os.register_at_fork(after_in_child=_deployments.after_fork)


def deployed_name(function: Function[Any, Any]) -> str:
    """The name by which the pool knows a function of this process, deployed now if need be."""
    try:
        return _deployments.name_of(function)
    except Unavailable as error:
        error.add_note(f"  {function.name} was to be deployed for this process; {function.name}.local(…) runs it here")
        raise


def remove_all() -> None:
    """Remove this process's ephemeral functions now, rather than at exit. A later call deploys them again."""
    _deployments.remove()
