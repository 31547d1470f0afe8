"""The audit log as a chain: what was written stays as it was, or shows it. Pure.

Every entry's digest covers its number, its time, its body and the digest before it. A head, signed
(Ed25519) with every entry that is added, names the newest; so neither an entry in the middle nor
one at the end can be changed, removed or moved by somebody who has the log but not the key. Who
cuts off the end and puts back the head of that time is found by a checkpoint, a copy of a later
head that was kept elsewhere. What retention ends is replaced by a stub: a signed head of
what was removed, from which the rest goes on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

START: Final = bytes(32)
"""The digest before the first entry."""


@dataclass(frozen=True, slots=True)
class Link:
    """An entry as it stands in the store. ``number`` counts from 1, without a gap."""

    number: int
    time_ns: int
    body: bytes
    digest: bytes


def digest_of(before: bytes, number: int, time_ns: int, body: bytes) -> bytes:
    """32 bytes. ``before``: the digest of the entry before, ``START`` for the first one."""
    head = number.to_bytes(8, "big") + time_ns.to_bytes(8, "big") + len(body).to_bytes(8, "big")
    return hashlib.sha256(b"facelane audit 1\0" + before + head + body).digest()


class Head(msgspec.Struct, frozen=True):
    """The newest entry at some time, signed. ``log``: which log (the store's id). As text (one
    line of JSON) it is what a checkpoint is kept as."""

    log: str
    number: int
    time_ns: int
    digest: str
    key: str
    signature: str
    stub: bool = False
    """It stands for entries that retention has ended."""

    def _signed(self) -> bytes:
        fields = (self.log, str(self.number), str(self.time_ns), self.digest, str(int(self.stub)))
        return b"facelane audit head 1\0" + "\0".join(fields).encode()

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Raises ``ValueError``."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"this is no checkpoint of an audit log: {error}") from None

    def is_of(self, public: str) -> bool:
        """Whether this key has signed it."""
        return self.key == public and _is_signed(public, self.signature, self._signed())


def _is_signed(public: str, signature: str, what: bytes) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), what)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


class Receipt(msgspec.Struct, frozen=True):
    """That a subject was deleted, signed: one line of JSON. It names nobody: ``code`` and
    ``subject`` (a number that is never used again) are the store's. ``entry``: of the
    audit log. The keys that would open copies of its rows are destroyed by ``keys_gone_by_ns``,
    0 = nothing was encrypted."""

    log: str
    entry: int
    time_ns: int
    gallery: str
    subject: int
    code: str
    templates: int
    by: str
    keys_gone_by_ns: int
    key: str
    signature: str

    def _signed(self) -> bytes:
        fields = msgspec.structs.astuple(self)[:-1]
        return b"facelane erasure receipt 1\0" + msgspec.json.encode(fields)

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Raises ``ValueError``."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"this is no receipt of an erasure: {error}") from None

    def is_of(self, public: str) -> bool:
        """Whether this key has signed it."""
        return self.key == public and _is_signed(public, self.signature, self._signed())


class Signer:
    """The key that signs heads. ``public``: what others need to verify them, base64."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def head(
        self, log: str, number: int, time_ns: int, digest: bytes, *, stub: bool = False
    ) -> Head:
        head = Head(log, number, time_ns, digest.hex(), self.public, "", stub)
        signature = base64.b64encode(self._key.sign(head._signed())).decode()
        return msgspec.structs.replace(head, signature=signature)

    def receipt(self, receipt: Receipt) -> Receipt:
        """The same, signed."""
        unsigned = msgspec.structs.replace(receipt, key=self.public)
        signature = base64.b64encode(self._key.sign(unsigned._signed())).decode()
        return msgspec.structs.replace(unsigned, signature=signature)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a log. ``number``: of the first entry that it is seen at."""

    number: int
    what: str


def verify(
    links: Iterable[Link],
    head: Head | None,
    *,
    public: str,
    stub: Head | None = None,
    checkpoints: Sequence[Head] = (),
) -> Finding | None:
    """The first thing that is wrong with a log, None = nothing.

    ``public``: the key that it must be signed by; take it from elsewhere than the log. ``stub``:
    what stands for the entries that retention has ended. ``checkpoints``: heads that
    were kept elsewhere; those of before the stub say nothing any more.
    """
    number, before, log = 0, START, None if head is None else head.log
    awaited: dict[int, str] = {}
    if stub is not None:
        if not stub.stub or stub.log != log or not stub.is_of(public):
            return Finding(stub.number, "the stub of what retention ended is not signed by the key")
        number, before = stub.number, bytes.fromhex(stub.digest)
    for kept in checkpoints:
        if kept.log != log or not kept.is_of(public):
            return Finding(kept.number, "a checkpoint is not one of this log and key")
        if kept.number < number:
            continue
        if awaited.setdefault(kept.number, kept.digest) != kept.digest:
            return Finding(kept.number, "two checkpoints contradict each other")
    if awaited.get(number, before.hex()) != before.hex():
        return Finding(number, "the log is not the one that a checkpoint was taken of")
    for link in links:
        if link.number != number + 1:
            return Finding(number + 1, "an entry was removed or moved")
        try:
            found = digest_of(before, link.number, link.time_ns, link.body)
        except OverflowError:
            found = b""
        if found != link.digest:
            return Finding(link.number, "an entry was changed")
        if awaited.get(link.number, found.hex()) != found.hex():
            return Finding(link.number, "the log is not the one that a checkpoint was taken of")
        number, before = link.number, found
    if head is None:
        return Finding(number, "nothing is signed") if number else None
    if head.stub or not head.is_of(public):
        return Finding(head.number, "the head is not signed by the key")
    if (head.number, head.digest) != (number, before.hex()):
        return Finding(min(head.number, number) + 1, "the end was cut off, or added to")
    newest = max(awaited, default=0)
    if newest > number:
        return Finding(number + 1, "the end was cut off: a checkpoint knows of more")
    return None
