"""API keys: `mnk_<id>_<entropy>_<checksum>`. Pure; the entropy is an argument.

The id names the key without revealing it, the entropy makes it a secret (128 bits in base 62), the checksum (CRC-32 of
what comes before, in base 62) tells a key that was cut or misspelt from one that is merely unknown. Only a key's
SHA-256 is ever stored.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass

from mn.formats.ids import KeyId

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_BYTES = 8
SECRET_BYTES = 16
KEY_ENTROPY_BYTES = _ID_BYTES + SECRET_BYTES
"""Random bytes that one key needs; more do no harm."""
_ID_DIGITS, _SECRET_DIGITS, _CHECK_DIGITS = 11, 22, 6


@dataclass(frozen=True, slots=True)
class Key:
    """A key at the only moment at which its secret is known."""

    id: KeyId
    secret: str
    """What its owner sends."""
    sha256: str
    """What is stored."""


def _base62(value: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        value, digit = divmod(value, 62)
        text = _DIGITS[digit] + text
    return text


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECK_DIGITS)


def hash_key(secret: str) -> str:
    """SHA-256 of a key in hex: the form in which it is stored and looked up."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(entropy: bytes) -> Key:
    """The key that random bytes make.

    Raises ValueError for fewer than `KEY_ENTROPY_BYTES`.
    """
    if len(entropy) < KEY_ENTROPY_BYTES:
        raise ValueError(f"a key takes {KEY_ENTROPY_BYTES} random bytes, not {len(entropy)}")
    entropy = entropy[:KEY_ENTROPY_BYTES]
    name = _base62(int.from_bytes(entropy[:_ID_BYTES], "big"), _ID_DIGITS)
    body = f"mnk_{name}_{_base62(int.from_bytes(entropy[_ID_BYTES:], 'big'), _SECRET_DIGITS)}"
    secret = f"{body}_{_checksum(body)}"
    return Key(KeyId("key_" + name), secret, hash_key(secret))


def looks_valid(secret: str) -> bool:
    """Whether a text has a key's form and its checksum fits; says nothing about whether any pool knows it."""
    body, _, check = secret.rpartition("_")
    parts = body.split("_")
    fits = len(parts) == 3 and parts[0] == "mnk" and len(parts[1]) == _ID_DIGITS and len(parts[2]) == _SECRET_DIGITS
    return fits and body.isascii() and check == _checksum(body)
