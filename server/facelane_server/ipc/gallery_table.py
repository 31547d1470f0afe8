"""A snapshot's table of galleries on its way to a worker: in a descriptor of its own,
because thousands of galleries do not fit into a packet.

``GallerySnapshot.galleries`` is what both sides work with; in transit it is empty, and a
memfd holds its ``table_bytes`` of msgpack.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from facelane_server import limits
from facelane_server.ipc.messages import GallerySnapshot

_MAX_BYTES: Final = limits.MAX_TEMPLATES * (limits.MAX_ID_CHARS + 16)
"""Every gallery has a template or more."""

_Table = tuple[tuple[str, int, int], ...]
_decoder: msgspec.msgpack.Decoder[_Table] = msgspec.msgpack.Decoder(_Table)


def detach(snapshot: GallerySnapshot) -> tuple[GallerySnapshot, int]:
    """The snapshot as it travels, and the descriptor of its table, now the caller's."""
    table = msgspec.msgpack.encode(snapshot.galleries)
    fd = os.memfd_create("facelane-galleries", os.MFD_CLOEXEC)
    try:
        written = 0
        while written < len(table):
            written += os.pwrite(fd, memoryview(table)[written:], written)
    except BaseException:
        os.close(fd)
        raise
    return msgspec.structs.replace(snapshot, galleries=(), table_bytes=len(table)), fd


def attach(snapshot: GallerySnapshot, fd: int) -> GallerySnapshot:
    """The snapshot with its table from ``fd``, which is closed in any case.

    Raises ValueError when the descriptor does not hold what the message says.
    """
    try:
        size = snapshot.table_bytes
        if not 0 < size <= _MAX_BYTES:
            raise ValueError("the table of galleries is empty or too large")
        table = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    if len(table) != size:
        raise ValueError("the table of galleries is shorter than its message says")
    try:
        galleries = _decoder.decode(table)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ValueError("the table of galleries cannot be read") from None
    return msgspec.structs.replace(snapshot, galleries=galleries, table_bytes=0)
