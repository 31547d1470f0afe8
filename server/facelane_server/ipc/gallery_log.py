"""What came after a gallery's base, as the front writes it and workers read it.

A memory file that grows: one entry after the other, each its length (4 bytes, little-endian) and a
msgpack operation. ``GalleryDelta`` says how far it goes; a worker reads on from where it was. The
vector is the last of an addition's bytes, so that its place is known: it is overwritten with zeros
when it is removed, and the removal follows.
"""

from __future__ import annotations

import os
import struct
from typing import Annotated, Final, Self

import msgspec

from facelane_server import limits
from facelane_server.wiping import Fleeting, wipe

_LENGTH: Final = struct.Struct("<I")


class Added(msgspec.Struct, frozen=True, array_like=True, tag="+", forbid_unknown_fields=True):
    """The next late row: of ``subject``, an index of the table, in ``gallery``. ``vector``: dim x
    float16."""

    gallery: Annotated[str, msgspec.Meta(max_length=limits.MAX_ID_CHARS)]
    subject: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    vector: bytearray


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="-", forbid_unknown_fields=True):
    """Row of the base, or -1 - k: the k-th late row."""

    row: int


Operation = Added | Removed
_decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
_encode = msgspec.msgpack.Encoder().encode


class GalleryLog:
    """The writing side. ``reader`` is a descriptor without write permission."""

    def __init__(self) -> None:
        writer = os.memfd_create("facelane-gallery-log", os.MFD_CLOEXEC)
        try:
            self.reader = os.open(f"/proc/self/fd/{writer}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(writer)
            raise
        self._writer = writer
        self.size = 0

    def append(self, operations: list[Operation]) -> list[int]:
        """Where each addition's vector lies now. Raises ``OSError``; nothing is added then."""
        places: list[int] = []
        end = self.size
        for operation in operations:
            entry = _encode(operation)
            try:
                _write(self._writer, _LENGTH.pack(len(entry)), end)
                _write(self._writer, entry, end + _LENGTH.size)
            finally:
                wipe(entry)
            end += _LENGTH.size + len(entry)
            if isinstance(operation, Added):
                places.append(end - len(operation.vector))
        self.size = end
        return places

    def wipe(self, place: int, length: int) -> None:
        os.pwrite(self._writer, bytes(length), place)

    def close(self) -> None:
        """Idempotent."""
        if self._writer >= 0:
            os.close(self._writer)
            os.close(self.reader)
            self._writer = -1


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


class LogReader:
    """The reading side, in a worker."""

    def __init__(self) -> None:
        self._read = 0

    def read(self, fd: int, size: int) -> list[Operation]:
        """What is new up to ``size``; its vectors are the caller's to overwrite. ``fd`` stays the
        caller's. Raises ValueError when the file does not hold what its message says."""
        if not self._read <= size <= limits.MAX_GALLERY_LOG_BYTES:
            raise ValueError("the gallery's log does not go back, nor on for ever")
        if os.fstat(fd).st_size < size:
            raise ValueError("the gallery's log is shorter than its message says")
        data = Fleeting(size - self._read)
        view, begin = memoryview(data), self._read
        while view:
            got = os.preadv(fd, [view], begin)
            if not got:
                raise ValueError("the gallery's log is shorter than its message says")
            view, begin = view[got:], begin + got
        found: list[Operation] = []
        at = 0
        try:
            while at < len(data):
                (length,) = _LENGTH.unpack_from(data, at)
                at += _LENGTH.size
                found.append(_decoder.decode(memoryview(data)[at : at + length]))
                at += length
        except (msgspec.DecodeError, UnicodeDecodeError, struct.error):
            raise ValueError("the gallery's log cannot be read") from None
        if at != len(data):
            raise ValueError("the gallery's log ends within an entry")
        self._read = size
        return found

    def copy(self) -> Self:
        other = type(self)()
        other._read = self._read
        return other
