"""Keys that lock keys, and what they lock: AES-256-GCM. Pure.

::

    master key   outside of the store (``masterkey``)
      epoch key  in the store, wrapped by the master key; destroyed when subjects were erased
        subject's key   in the store, wrapped by the newest epoch key; deleted with its subject
          vectors, names, labels, chips, pictures of the subject
      index key  in the store, wrapped by the master key: makes the blinded ids

Whatever is sealed is bound to its place (``where``): a value that somebody moves to another row
does not open. A sealed value has ``OVERHEAD`` bytes more than the plain one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from facelane_server.wiping import wipe

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
OVERHEAD: Final = _NONCE_BYTES + _TAG_BYTES


class SealBrokenError(Exception):
    """What was to be opened is damaged, of another place, or locked by another key."""


class Lock:
    """One key. ``name``: what a row that it locks says of it; of a master key, a digest of
    the key, so that the wrong one is told at once."""

    __slots__ = ("_cipher", "name")

    def __init__(self, key: bytes, name: str) -> None:
        """Raises ``ValueError`` unless the key has 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self.name = name
        self._cipher = AESGCM(key)

    @classmethod
    def of(cls, key: bytes, name: str = "") -> Self:
        """The name is the key's fingerprint where none is given."""
        return cls(key, name or fingerprint(key))

    @classmethod
    def taking(cls, key: bytes, name: str = "") -> Self:
        """The same, and the key's bytes, the caller's alone, are overwritten: the lock has them,
        and OpenSSL overwrites its own as the lock goes."""
        try:
            return cls.of(key, name)
        finally:
            wipe(key)

    def seal(self, plain: bytes, where: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, where.encode())

    def open(self, sealed: bytes, where: str) -> bytes:
        """Raises ``SealBrokenError``."""
        try:
            return self._cipher.decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], where.encode()
            )
        except (InvalidTag, ValueError):
            raise SealBrokenError from None


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def fingerprint(key: bytes) -> str:
    """16 hexadecimal digits that tell keys apart, and nothing of the key."""
    return hashlib.sha256(b"facelane key\0" + key).hexdigest()[:16]


def blinded(index_key: bytes, *parts: str) -> str:
    """What stands for a name in the store: equal for equal ones, 64 hexadecimal digits."""
    encoded = (part.encode() for part in parts)
    text = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return hmac.new(index_key, text, hashlib.sha256).hexdigest()
