"""Memory of what nobody is to find again: embeddings, pictures, names of who was deleted.

What is freed is not overwritten, by Python nor by the C library, until the place is used again,
and where whoever uses it next needs less, what it does not need stays for as long. So what holds
an embedding is overwritten when it is let go of (``Fleeting``, ``wipe``). Copies that are not ours,
of names above all (messages, strings, buffers of libraries), are overwritten when they are freed
where ``allocator.one_heap`` has seen to it, and where not, or by Python itself, once ``scrub`` has
filled the free memory of the process.

glibc and CPython on Linux; with other allocators ``scrub`` does what can be done.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

D = TypeVar("D", bound=np.generic)
Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]

_OVERHEAD: Final = 33
"""Bytes of a ``bytes`` object besides its own."""
_CONTENT: Final = bytes.__basicsize__ - 1
"""Where in a ``bytes`` object its own begin."""
_CLASSES: Final = range(512, 32, -16)
"""Sizes of the blocks that CPython hands out itself; smaller ones hold no text."""
_MOST_BYTES: Final = 256 << 20
"""Free memory that is filled at a time, of each kind."""
_lock = threading.Lock()


def wipe(*buffers: Buffer) -> None:
    """Overwrites them with zeros, also where Python says that they cannot change: each must be the
    caller's alone. Contiguous."""
    for buffer in buffers:
        if type(buffer) is bytes:  # keys, one for each subject: five times as fast as below
            if len(buffer) > 1:  # those of one byte are everybody's
                ctypes.memset(id(buffer) + _CONTENT, 0, len(buffer))
            continue
        with buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer) as view:
            size = view.nbytes
            if size < 2:
                continue
            place = np.frombuffer(view, np.uint8)
            if view.readonly:
                ctypes.memset(place.ctypes.data, 0, size)
            else:
                place.fill(0)
            del place


class Fleeting(bytearray):
    """Bytes that are overwritten when nobody refers to them any more."""

    def __del__(self) -> None:
        if self:
            np.frombuffer(self, np.uint8).fill(0)


def fleeting(shape: tuple[int, ...], dtype: type[D]) -> npt.NDArray[D]:
    """Zeros, that are overwritten when neither the array nor a view of it is referred to."""
    count = int(np.prod(shape))
    if not count:
        return np.zeros(shape, dtype)
    kept = Fleeting(count * np.dtype(dtype).itemsize)
    return np.frombuffer(kept, dtype).reshape(shape)


def scrub() -> None:
    """Fills what is free of this process's memory with zeros, or gives it back. Takes some tens of
    milliseconds, in which other Python threads go on."""
    with _lock:
        gc.collect()
        libc = _libc()
        if libc is not None:
            libc.malloc_trim(0)
        kept: list[list[bytes]] = []
        # A confined worker does not see its own maps, and memory that runs out has been filled
        # until then.
        with contextlib.suppress(OSError, MemoryError):
            kept = _fill_blocks()
        if libc is not None:
            with contextlib.suppress(MemoryError):
                _fill_heap(libc)
        del kept


class Scrubbing:
    """Scrubs in a thread of its own, which is begun while there is memory for it: a thread whose
    first steps fail for want of memory never says that it began, and who starts it waits for ever.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._due = threading.Lock()
        """Free while something is to be scrubbed."""
        self._due.acquire()
        self._begun = False

    def begin(self) -> None:
        """The thread, for as long as the process lives; once is enough."""
        with self._guard, contextlib.suppress(RuntimeError):  # there may be no room for one
            if not self._begun:
                threading.Thread(target=self._run, name="scrubbing", daemon=True).start()
                self._begun = True

    def note(self) -> None:
        """Something was deleted. Many of them together cost hardly more than one. Without a thread
        it is scrubbed before this returns."""
        with self._guard:
            if self._begun:
                if self._due.locked():
                    self._due.release()
                return
        scrub()

    def _run(self) -> None:
        while True:
            self._due.acquire()
            scrub()


def _libc() -> Any:
    """Holds the GIL while it is called: to be given it back after each of many calls takes long."""
    libc = ctypes.PyDLL(None)
    if not hasattr(libc, "mallinfo2"):  # musl, glibc before 2.33
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.calloc.restype = ctypes.c_void_p
    libc.sbrk.restype = ctypes.c_void_p
    libc.mallinfo2.restype = _MallInfo
    libc.free.argtypes = [ctypes.c_void_p]
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    return libc


class _MallInfo(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = [
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def _fill_blocks() -> list[list[bytes]]:
    """Takes all free blocks of CPython's own allocator, until it has to ask for new memory."""
    spans = _mapped()
    starts = np.asarray([first for first, _ in spans], np.uint64)
    ends = np.asarray([last for _, last in spans], np.uint64)
    kept: list[list[bytes]] = []
    for size in _CLASSES:
        taken = 0
        while taken < _MOST_BYTES:
            made = [bytes(size - _OVERHEAD) for _ in range(256)]
            kept.append(made)
            taken += 256 * size
            at = np.asarray([id(one) for one in made], np.uint64)
            span = np.searchsorted(starts, at, side="right") - 1
            fresh = (span < 0) | (at >= ends[np.maximum(span, 0)])
            if bool(fresh.any()):
                # Given back at once: what others need meanwhile would keep it there.
                made[:] = [
                    one for one, is_new in zip(made, fresh.tolist(), strict=True) if not is_new
                ]
                break
    return kept


def _mapped() -> list[tuple[int, int]]:
    """What this process can write to now, ascending."""
    found = []
    with Path("/proc/self/maps").open("rb") as lines:
        for line in lines:
            where, rights = line.split(None, 2)[:2]
            if rights.startswith(b"rw"):
                first, last = where.split(b"-")
                found.append((int(first, 16), int(last, 16)))
    return found


def _fill_heap(libc: Any) -> None:
    """Takes all free chunks of the C library's heap below its end."""
    end = (libc.sbrk(0) or 0) - libc.mallinfo2().keepcost
    taken: list[int] = []
    total = 0
    try:
        for size in (*_halves(128 << 10, 2048), *range(2032, 8, -16)):
            while total < _MOST_BYTES:
                place = libc.calloc(1, size)
                if not place:
                    break
                if place >= end:
                    # Kept, it would be a hole once it is freed: what others need meanwhile comes
                    # behind it, and the next time all of it is filled again.
                    libc.free(place)
                    break
                taken.append(place)
                total += size
    finally:
        for place in taken:
            libc.free(place)


def _halves(first: int, last: int) -> list[int]:
    sizes = []
    while first >= last:
        sizes.append(first)
        first //= 2
    return sizes
