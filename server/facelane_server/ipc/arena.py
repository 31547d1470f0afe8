"""Shared memory for the pixels: a sealed memfd, cut into equal slots.

::

    memfd (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), sparse
    0                slot_bytes         2 * slot_bytes              slots * slot_bytes
    +----------------+------------------+-----------  -  -  --------+
    | slot 0         | slot 1           |                           |
    +----------------+------------------+-----------  -  -  --------+
      job's items, each at an offset from the slot's start, ``ALIGN``ed

A worker has two arenas. The **request** arena is written by the server before Infer and
only read by the worker; the **response** arena is written by the worker before
InferDone and only read by the server. One job in flight owns the same slot of both:

::

    FREE --server fills request, Infer--> OWNED BY THE WORKER --InferDone read--> FREE

The server is the owner: it creates both, hands descriptors over with Load, and closes
them when the worker's process is gone. A new process gets new arenas, so nothing that a
dying one still writes can reach a later job. The seals keep a worker from truncating
what the server has mapped (which would kill the server by SIGBUS). Nothing has a name:
the kernel frees all when the last process that maps it ends.

Only pages that were touched take memory. ``clear`` overwrites what a job has left, and gives back
what a large one touched beyond ``limits.SLOT_KEEP_BYTES``, so that no picture stays resident.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

import numpy as np

from facelane_server import limits
from facelane_server.wiping import wipe

ALIGN: Final = 64
"""Offsets of items in a slot: a cache line."""
_PAGE: Final = mmap.PAGESIZE
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def aligned(offset: int) -> int:
    """``offset`` rounded up to ``ALIGN``."""
    return (offset + ALIGN - 1) & ~(ALIGN - 1)


class Arena:
    """``slots`` slots of ``slot_bytes`` (a multiple of the page size)."""

    def __init__(self, fd: int, slots: int, slot_bytes: int, *, writable: bool) -> None:
        """Map the memfd ``fd``, which is closed in any case: a mapping does without. Raises
        ValueError when its size or seals are not what they must be, OSError when it cannot
        be mapped."""
        try:
            if slots < 1 or slot_bytes < _PAGE or slot_bytes % _PAGE:
                raise ValueError("an arena needs slots of whole pages")
            if os.fstat(fd).st_size != slots * slot_bytes:
                raise ValueError("the arena's size is not slots x slot bytes")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ValueError("the arena is not sealed")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(fd, slots * slot_bytes, mmap.MAP_SHARED, protection)
        finally:
            os.close(fd)
        self._fd = -1
        self._view = memoryview(self._map)
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._views = [
            self._view[slot * slot_bytes : (slot + 1) * slot_bytes] for slot in range(slots)
        ]
        self._places = [np.frombuffer(v[: limits.SLOT_KEEP_BYTES], np.uint8) for v in self._views]
        """Of each slot what is kept."""

    @classmethod
    def create(cls, name: str, slots: int, slot_bytes: int) -> Arena:
        """A fresh arena, mapped for reading and writing. ``name`` shows in /proc only."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            arena = cls(os.dup(fd), slots, slot_bytes, writable=True)
        except BaseException:
            os.close(fd)
            raise
        arena._fd = fd
        return arena

    def fileno(self) -> int:
        """To be handed to another process; of an arena that was made by ``create``."""
        return self._fd

    def slot(self, index: int) -> memoryview:
        """The bytes of one slot; valid until ``close``."""
        return self._views[index]

    def clear(self, slot: int, used: int) -> None:
        """Overwrites what a job wrote, ``used`` bytes: pictures and embeddings stay in no slot that
        is free. Pages beyond what is kept are given back; a kernel that knows no MADV_REMOVE
        (gVisor) keeps them for the next job."""
        if self._view.readonly:
            raise ValueError("who maps an arena to read it has nothing to overwrite")
        if used <= limits.SLOT_KEEP_BYTES:
            self._places[slot][:used] = 0
        else:
            used = min(used, self.slot_bytes)
            self._places[slot][:] = 0
            start = slot * self.slot_bytes + limits.SLOT_KEEP_BYTES
            end = min((used + _PAGE - 1) // _PAGE * _PAGE, self.slot_bytes)
            try:
                self._map.madvise(mmap.MADV_REMOVE, start, end - limits.SLOT_KEEP_BYTES)
            except OSError:
                wipe(self._views[slot][limits.SLOT_KEEP_BYTES : used])

    def close(self) -> None:
        """Unmap and close. Safe to call twice. Raises BufferError while slices live."""
        if self._map.closed:
            return
        self._places.clear()
        for view in self._views:
            view.release()
        self._view.release()
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
