"""Identifiers. Each kind is a type of its own, so that swapping two of them is a type error.

Generated ids are a prefix, an underscore and 26 Crockford base-32 digits: 48 bits of milliseconds since the epoch, then 80 random
bits (the layout of ULID, https://github.com/ulid/spec), so ids of one kind sort by the time at which they were made.
"""

from __future__ import annotations

import os
import re
import time
from typing import NewType

NodeId = NewType("NodeId", str)
"""`mirror_neuron@<alias>`; survives restarts and address changes."""
PeerId = NewType("PeerId", str)
"""One mesh participant: a node's id, or `<node id>/gateway-<k>`."""
InvocationId = NewType("InvocationId", str)
"""`inv_…`: one call, whatever number of attempts it takes."""
AllocationId = NewType("AllocationId", str)
"""`alc_…`: one committed decision that a node runs a sandbox for a version."""
SandboxId = NewType("SandboxId", str)
"""`sbx_…`: one live isolation."""
VersionId = NewType("VersionId", str)
"""`<function name>#<number>`: one immutable version of a function."""
Digest = NewType("Digest", str)
"""`sha256:<64 hex digits>` of a bundle's canonical file list."""
KeyId = NewType("KeyId", str)
"""`key_…`: names an API key without revealing it."""

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = tuple(a + b for a in _ALPHABET for b in _ALPHABET)

FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}(~[A-Za-z0-9]{1,32})?\Z")
"""A function's name: a letter or underscore, then letters, digits and `_.-`, at most 100 in all. `~scope` marks an ephemeral one."""


def encode_ulid(timestamp_ms: int, entropy: int) -> str:
    """26 base-32 digits for 48 bits of milliseconds and 80 bits of entropy."""
    value = ((timestamp_ms & 0xFFFFFFFFFFFF) << 80) | entropy
    pairs = _PAIRS
    return "".join([pairs[(value >> shift) & 1023] for shift in range(120, -1, -10)])


def new_ulid() -> str:
    """A fresh ULID from this machine's clock and the kernel's random source."""
    return encode_ulid(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10), "big"))


def new_invocation_id() -> InvocationId:
    return InvocationId("inv_" + new_ulid())


def new_allocation_id() -> AllocationId:
    return AllocationId("alc_" + new_ulid())


def new_sandbox_id() -> SandboxId:
    return SandboxId("sbx_" + new_ulid())


def new_key_id() -> KeyId:
    return KeyId("key_" + new_ulid())


def version_id(function: str, number: int) -> VersionId:
    return VersionId(f"{function}#{number}")


def display_name(function: str) -> str:
    """A function's name as its author knows it, without an ephemeral scope."""
    return function.partition("~")[0]
