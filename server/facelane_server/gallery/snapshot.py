"""Immutable states of the gallery, and how the next one is made from the last.

A snapshot is one sealed memory file (see ``ipc.messages.GallerySnapshot``)::

    0            rows x dim float16       unit vectors, by gallery, subject, age
    rows*dim*2   rows x int32             row -> index in the version's subject table

and it is also this module's own copy: the next snapshot is made from the last one and the
changes since. Nothing is held twice, except while one is being built.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from facelane_server.ipc.messages import GallerySnapshot

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SubjectKey = tuple[str, str]
"""(gallery id, subject id)."""

CHUNK_ROWS: Final = 8_192
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class AddTemplate:
    """``vector`` [dim] float16 of unit norm."""

    gallery_id: str
    subject_id: str
    template_id: str
    vector: F16


@dataclass(frozen=True, slots=True)
class RemoveTemplate:
    gallery_id: str
    subject_id: str
    template_id: str


@dataclass(frozen=True, slots=True)
class RemoveSubject:
    gallery_id: str
    subject_id: str


Change = AddTemplate | RemoveTemplate | RemoveSubject


@dataclass(slots=True)
class Pending:
    """The changes to one subject since the last snapshot, in their net effect."""

    cleared: bool
    """All templates of the last snapshot are gone."""
    removed: set[str]
    added: dict[str, F16]


class Snapshot:
    """One immutable state of the gallery. Owns its memory file; see ``close``."""

    def __init__(
        self,
        version: int,
        dim: int,
        matrix: F16,
        template_ids: npt.NDArray[np.bytes_],
        keys: tuple[SubjectKey, ...],
        counts: I64,
        fd: int,
        model_id: str = "",
    ) -> None:
        self.version = version
        self.model_id = model_id
        self.dim = dim
        self.matrix = matrix
        """[rows, dim] float16, read-only."""
        self.template_ids = template_ids
        """[rows] ASCII."""
        self.keys = keys
        """The subject table, sorted: a row's subject index points into it."""
        self.counts = counts
        """[len(keys)] rows of each subject."""
        self.starts: I64 = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """[len(keys) + 1] first row of each subject."""
        self.fd = fd
        self._closer = weakref.finalize(self, os.close, fd) if fd >= 0 else None

    @property
    def rows(self) -> int:
        return len(self.matrix)

    def position(self, key: SubjectKey) -> int | None:
        """The subject's index in ``keys``."""
        at = bisect.bisect_left(self.keys, key)
        return at if at < len(self.keys) and self.keys[at] == key else None

    def searched(self, gallery_id: str) -> int:
        """Templates of the gallery."""
        first = bisect.bisect_left(self.keys, gallery_id, key=lambda key: key[0])
        end = bisect.bisect_right(self.keys, gallery_id, lo=first, key=lambda key: key[0])
        return int(self.starts[end] - self.starts[first])

    def vectors(self, key: SubjectKey) -> F16:
        """[n, dim] the subject's templates; n may be 0."""
        at = self.position(key)
        if at is None:
            return self.matrix[:0]
        return self.matrix[self.starts[at] : self.starts[at + 1]]

    def message(self) -> GallerySnapshot:
        galleries: list[tuple[str, int, int]] = []
        first = 0
        while first < len(self.keys):
            gallery = self.keys[first][0]
            end = bisect.bisect_right(self.keys, gallery, lo=first, key=lambda key: key[0])
            galleries.append((gallery, int(self.starts[first]), int(self.starts[end])))
            first = end
        return GallerySnapshot(self.version, self.rows, self.dim, tuple(galleries), self.model_id)

    def close(self) -> None:
        """Gives the descriptor back. The matrix stays mapped for as long as it is referred to."""
        if self._closer is not None:
            self._closer()


def empty(dim: int, model_id: str = "") -> Snapshot:
    """A gallery without templates and without a memory file: what the first is built from."""
    return Snapshot(
        0,
        dim,
        np.empty((0, dim), np.float16),
        np.empty(0, "S32"),
        (),
        np.empty(0, np.int64),
        fd=-1,
        model_id=model_id,
    )


def build(last: Snapshot, changes: dict[SubjectKey, Pending], version: int) -> Snapshot:
    """The snapshot after ``last``: one copy of the rows, Python's work only for the changes.

    Raises ``OSError`` when the memory file cannot be had.
    """
    # 1. Which rows stay, and which come in where (in positions of the old rows).
    keep = np.ones(last.rows, bool)
    insert_at: list[int] = []
    insert_ids: list[bytes] = []
    vectors: list[F16] = []
    counts = last.counts.copy()
    new_at: list[int] = []
    new_keys: list[SubjectKey] = []
    new_counts: list[int] = []
    for key in sorted(changes):
        change = changes[key]
        at = bisect.bisect_left(last.keys, key)
        known = at < len(last.keys) and last.keys[at] == key
        if known:
            span = slice(int(last.starts[at]), int(last.starts[at + 1]))
            if change.cleared:
                keep[span] = False
            elif change.removed:
                keep[span] = ~np.isin(
                    last.template_ids[span], [name.encode() for name in change.removed]
                )
            counts[at] = int(keep[span].sum()) + len(change.added)
        elif change.added:
            new_at.append(at)
            new_keys.append(key)
            new_counts.append(len(change.added))
        row = int(last.starts[at + 1] if known else last.starts[at])
        for template_id, vector in change.added.items():
            insert_at.append(row)
            insert_ids.append(template_id.encode())
            vectors.append(vector)

    # 2. Where each new row comes from: an old row, or -1 - k for the k-th vector.
    fresh = -1 - np.arange(len(vectors), dtype=np.int64)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    at_kept = kept_before[np.asarray(insert_at, np.int64)]
    order = np.insert(np.flatnonzero(keep).astype(np.int64), at_kept, fresh)
    template_ids = np.insert(last.template_ids[keep], at_kept, np.asarray(insert_ids, "S32"))

    # 3. The subject table.
    keys = last.keys
    if new_keys or not counts.all():
        keys = _merge(last.keys, counts, new_at, new_keys)
    counts = np.insert(counts, new_at, new_counts)
    counts = counts[counts > 0]

    # 4. The file.
    block = np.stack(vectors) if vectors else np.empty((0, last.dim), np.float16)
    fd, matrix = _write(last.matrix, order, block, counts)
    return Snapshot(version, last.dim, matrix, template_ids, keys, counts, fd, last.model_id)


def _merge(
    old: Sequence[SubjectKey], counts: I64, new_at: Sequence[int], new_keys: Sequence[SubjectKey]
) -> tuple[SubjectKey, ...]:
    merged: list[SubjectKey] = []
    cuts = sorted(
        [(at, 1, key) for at, key in zip(new_at, new_keys, strict=True)]
        + [(int(at), 2, old[int(at)]) for at in np.flatnonzero(counts == 0)]
    )
    begin = 0
    for at, kind, key in cuts:
        merged.extend(old[begin:at])
        if kind == 1:
            merged.append(key)
            begin = at
        else:
            begin = at + 1
    merged.extend(old[begin:])
    return tuple(merged)


def _write(old: F16, order: I64, block: F16, counts: I64) -> tuple[int, F16]:
    """A sealed, read-only memory file and its matrix."""
    dim = block.shape[1]
    writable = os.memfd_create("facelane-gallery", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for first in range(0, len(order), CHUNK_ROWS):
            source = order[first : first + CHUNK_ROWS]
            if source[0] >= 0 and (np.diff(source) == 1).all():
                _write_all(writable, old[source[0] : source[-1] + 1])
                continue
            chunk = np.empty((len(source), dim), np.float16)
            from_old = source >= 0
            chunk[from_old] = old[source[from_old]]
            chunk[~from_old] = block[-1 - source[~from_old]]
            _write_all(writable, chunk)
        _write_all(writable, np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
        # A descriptor without write permission: shared read-only mappings of a sealed file
        # are refused through a writable one by kernels before 6.7.
        fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
    rows = len(order)
    if rows == 0:
        return fd, np.empty((0, dim), np.float16)
    try:
        # The mapping lives for as long as the matrix, or a view of it, is referred to.
        mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    except BaseException:
        os.close(fd)
        raise
    return fd, np.frombuffer(mapped, np.float16, rows * dim).reshape(rows, dim)


def _write_all(fd: int, values: npt.NDArray[np.generic]) -> None:
    view = memoryview(b"") if values.size == 0 else values.data.cast("B")
    while view:
        view = view[os.write(fd, view) :]


def after(
    earlier: dict[SubjectKey, Pending], later: dict[SubjectKey, Pending]
) -> dict[SubjectKey, Pending]:
    """Both sets of changes as one, after a build that failed."""
    merged = dict(earlier)
    for key, change in later.items():
        first = merged.get(key)
        if first is None or change.cleared:
            merged[key] = change
            continue
        added = {k: v for k, v in first.added.items() if k not in change.removed}
        removed = first.removed | (change.removed - first.added.keys())
        merged[key] = Pending(first.cleared, removed, added | change.added)
    return merged
