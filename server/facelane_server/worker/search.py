"""Exact cosine search of a gallery, inside the recogniser's worker.

Rows are unit vectors sorted by gallery, then by subject; a subject's similarity is that of its
best template. On a CPU the snapshot is held as float32 and searched by BLAS, a large one in 8
bits (``coarse``); on a CUDA device as float16 (``card_search``). What came after the snapshot
is in ``late``: few rows, compared one by one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from facelane_server import limits
from facelane_server.ipc import gallery_table
from facelane_server.ipc.channel import ChannelClosed, WorkerChannel, close_all
from facelane_server.ipc.gallery_log import Added, LogReader
from facelane_server.ipc.messages import Fatal, GalleryDelta, GalleryLoaded, GallerySnapshot
from facelane_server.wiping import fleeting, scrub, wipe
from facelane_server.worker import coarse, exit_codes
from facelane_server.worker.faults import Quit, ending

if TYPE_CHECKING:
    from facelane_server.models.api import F32
    from facelane_server.worker.card_search import CardRows

_CHUNK_ROWS: Final = 65_536
"""Rows scored at a time: bounds the score matrix to 32 x 65,536 floats (8 MiB)."""
_NOT_LOADED: Final = "the gallery snapshot could not be loaded"

Hits = tuple[tuple[int, float], ...]
"""(subject index, cosine), best first, one a subject."""


class SnapshotError(Exception):
    """The snapshot's descriptor does not hold what its message says."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """One gallery: rows [first, last) and where its subjects begin, relative to first."""

    first: int
    last: int
    starts: npt.NDArray[np.intp]
    subjects: npt.NDArray[np.int32]


_NEVER: Final = -2.0
"""Below every cosine: of rows that were removed."""
_GONE_BELOW: Final = -1.5


class _Rows(Protocol):
    """Where the matrix lives."""

    def best_of_subjects(self, probes: F32, segment: _Segment, keep: int) -> list[Hits]:
        """Subjects of whom no row is left are not among them."""

    def remove(self, rows: Sequence[int]) -> None:
        """Overwrites rows: they are never found again."""


class _Late:
    """Rows that came after the snapshot, in the order in which they came."""

    def __init__(self, dim: int) -> None:
        self._matrix: F32 = fleeting((64, dim), np.float32)
        self._subjects = np.zeros(64, np.int32)
        self._galleries = np.zeros(64, np.int32)
        self._names: dict[str, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, gallery: str, subject: int, vector: npt.NDArray[np.float16]) -> None:
        at = self._count
        if at == len(self._matrix):
            # Whoever searches meanwhile has the old arrays, which stay as they are until then.
            matrix = fleeting((2 * at, self._matrix.shape[1]), np.float32)
            matrix[:at] = self._matrix
            self._matrix = matrix
            self._subjects = np.concatenate([self._subjects, np.zeros_like(self._subjects)])
            self._galleries = np.concatenate([self._galleries, np.zeros_like(self._galleries)])
        self._matrix[at] = vector
        self._subjects[at] = subject
        self._galleries[at] = self._names.setdefault(gallery, len(self._names) + 1)
        self._count = at + 1

    def remove(self, at: int) -> None:
        self._galleries[at] = 0
        self._matrix[at] = 0

    def best(self, probes: F32, gallery: str, keep: int) -> list[Hits]:
        number = self._names.get(gallery, -1)
        count = self._count
        rows = np.flatnonzero(self._galleries[:count] == number)
        if not len(rows):
            return [() for _ in range(len(probes))]
        held = self._matrix[rows]
        scores = probes @ held.T
        wipe(held)
        subjects = self._subjects[rows]
        order = np.argsort(subjects, kind="stable")
        own = subjects[order]
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        best = np.maximum.reduceat(scores[:, order], starts, axis=1)
        return _top(best, own[starts], keep)


class Searcher:
    """A snapshot and what came after it. One thread extends it; any may search meanwhile, and then
    finds more or less of what is being taken in."""

    def __init__(self, snapshot: GallerySnapshot, fd: int, device: str) -> None:
        """Read the snapshot from ``fd`` (closed in any case) onto ``device``.

        Raises SnapshotError when sizes or ranges do not hold together.
        """
        try:
            matrix, subjects = _read(snapshot, fd)
        finally:
            os.close(fd)
        self.version = snapshot.version
        self.dim = snapshot.dim
        self._segments = {
            gallery: _segment(first, last, subjects) for gallery, first, last in snapshot.galleries
        }
        self._rows: _Rows = _rows(matrix, device)
        self._size = len(matrix)
        self._late = _Late(self.dim)
        self._log = LogReader()

    def extend(self, version: int, fd: int, log_bytes: int) -> bool:
        """Takes in what came after the snapshot; whether rows were removed. ``fd`` stays the
        caller's. Raises SnapshotError."""
        try:
            operations = self._log.read(fd, log_bytes)
        except ValueError as error:
            raise SnapshotError(str(error)) from None
        removed: list[int] = []
        fewer = False
        for operation in operations:
            fewer |= not isinstance(operation, Added)
            if isinstance(operation, Added):
                if len(operation.vector) != 2 * self.dim:
                    raise SnapshotError("a vector of another length")
                vector = np.frombuffer(operation.vector, np.float16)
                self._late.add(operation.gallery, operation.subject, vector)
                del vector
                wipe(operation.vector)
            elif 0 <= operation.row < self._size:
                removed.append(operation.row)
            elif 0 <= -1 - operation.row < len(self._late):
                self._late.remove(-1 - operation.row)
            else:
                raise SnapshotError("a row that is not there was removed")
        if removed:
            self._rows.remove(removed)
        self.version = version
        return fewer

    def search(self, probes: F32, gallery: str, top_k: int) -> list[Hits]:
        """``probes`` [N, dim] unit vectors → for each the best ``top_k`` subjects of
        ``gallery``; empty for a gallery that has no templates."""
        if top_k < 1:
            return [() for _ in range(len(probes))]
        keep = min(top_k, limits.MAX_CANDIDATES)
        segment = self._segments.get(gallery)
        if segment is None or segment.last == segment.first:
            return self._late.best(probes, gallery, keep)
        found = self._rows.best_of_subjects(probes, segment, keep)
        if not len(self._late):
            return found
        late = self._late.best(probes, gallery, keep)
        return [_merged(a, b, keep) for a, b in zip(found, late, strict=True)]


def _merged(first: Hits, second: Hits, keep: int) -> Hits:
    """A subject may have rows of both kinds."""
    if not second:
        return first
    best: dict[int, float] = {}
    for subject, cosine in (*first, *second):
        best[subject] = max(cosine, best.get(subject, _NEVER))
    return tuple(sorted(best.items(), key=lambda hit: -hit[1])[:keep])


class _NumpyRows:
    def __init__(self, matrix: npt.NDArray[np.float16]) -> None:
        self._matrix: F32 = fleeting(matrix.shape, np.float32)
        self._matrix[...] = matrix
        self._gone: npt.NDArray[np.intp] = np.empty(0, np.intp)
        """Rows that were removed, ascending."""

    def remove(self, rows: Sequence[int]) -> None:
        self._gone = np.union1d(self._gone, np.asarray(rows, np.intp))
        self._matrix[np.asarray(rows, np.intp)] = 0

    def best_of_subjects(self, probes: F32, segment: _Segment, keep: int) -> list[Hits]:
        best = np.empty((len(probes), len(segment.starts)), np.float32)
        gone = self._gone
        for lo, hi, first, last in _chunks(segment):
            scores = probes @ self._matrix[segment.first + first : segment.first + last].T
            if len(gone):
                begin, end = np.searchsorted(gone, (segment.first + first, segment.first + last))
                scores[:, gone[begin:end] - segment.first - first] = _NEVER
            np.maximum.reduceat(scores, segment.starts[lo:hi] - first, axis=1, out=best[:, lo:hi])
        return _top(best, segment.subjects, keep)


class _CoarseRows:
    """See ``coarse``."""

    def __init__(self, matrix: npt.NDArray[np.float16]) -> None:
        self._rows = coarse.CoarseRows(matrix)
        self._cut: dict[int, list[tuple[int, int, int, int]]] = {}

    def remove(self, rows: Sequence[int]) -> None:
        self._rows.remove(rows)

    def best_of_subjects(self, probes: F32, segment: _Segment, keep: int) -> list[Hits]:
        chunks = self._cut.get(segment.first)
        if chunks is None:
            chunks = self._cut[segment.first] = _chunks(segment)
        found = self._rows.best_of_subjects(
            probes, segment.first, segment.starts, segment.last, keep, chunks
        )
        return [
            tuple((int(segment.subjects[place]), cosine) for place, cosine in hits)
            for hits in found
        ]


class _OnCard:
    """See ``card_search``."""

    def __init__(self, rows: CardRows) -> None:
        self._rows = rows

    def remove(self, rows: Sequence[int]) -> None:
        self._rows.remove(rows)

    def best_of_subjects(self, probes: F32, segment: _Segment, keep: int) -> list[Hits]:
        found = self._rows.best_of_subjects(
            probes, segment.first, segment.starts, segment.last, keep
        )
        return [
            tuple((int(segment.subjects[place]), cosine) for place, cosine in hits)
            for hits in found
        ]


def _rows(matrix: npt.NDArray[np.float16], device: str) -> _Rows:
    if device.startswith("cuda"):
        from facelane_server.worker.card_search import CardRows

        return _OnCard(CardRows(matrix, device))
    if len(matrix) >= coarse.LEAST_ROWS and coarse.CoarseRows.can():
        return _CoarseRows(matrix)
    return _NumpyRows(matrix)


def _read(
    snapshot: GallerySnapshot, fd: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]]:
    rows, dim = snapshot.rows, snapshot.dim
    if not (0 <= rows <= limits.MAX_TEMPLATES and 1 <= dim <= limits.MAX_EMBEDDING_DIM):
        raise SnapshotError("rows or dim out of range")
    for _, first, last in snapshot.galleries:
        if not 0 <= first <= last <= rows:
            raise SnapshotError("a gallery's rows are out of range")
    size = rows * dim * 2 + rows * 4
    if os.fstat(fd).st_size < size:
        raise SnapshotError("the descriptor is shorter than its message says")
    if rows == 0:
        return np.empty((0, dim), np.float16), np.empty(0, np.int32)
    mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    matrix = np.frombuffer(mapped, np.float16, rows * dim).reshape(rows, dim)
    subjects = np.frombuffer(mapped, np.int32, rows, offset=rows * dim * 2).copy()
    return matrix, subjects


def _segment(first: int, last: int, subjects: npt.NDArray[np.int32]) -> _Segment:
    own = subjects[first:last]
    if not len(own):
        return _Segment(first, last, np.empty(0, np.intp), own)
    starts = np.concatenate(([0], np.flatnonzero(own[1:] != own[:-1]) + 1)).astype(np.intp)
    return _Segment(first, last, starts, own[starts])


def _chunks(segment: _Segment) -> list[tuple[int, int, int, int]]:
    """(first subject, last subject, first row, last row), cut between subjects."""
    rows = segment.last - segment.first
    bounds = np.append(segment.starts, rows)
    chunks: list[tuple[int, int, int, int]] = []
    lo = 0
    while lo < len(segment.starts):
        hi = int(np.searchsorted(bounds, bounds[lo] + _CHUNK_ROWS, side="right")) - 1
        hi = max(hi, lo + 1)
        chunks.append((lo, hi, int(bounds[lo]), int(bounds[hi])))
        lo = hi
    return chunks


def _top(best: F32, subjects: Sequence[int] | npt.NDArray[np.int32], keep: int) -> list[Hits]:
    keep = min(keep, best.shape[1])
    if keep < best.shape[1]:
        columns = np.argpartition(-best, keep - 1, axis=1)[:, :keep]
    else:
        columns = np.broadcast_to(np.arange(keep), (len(best), keep))
    hits: list[Hits] = []
    for row, chosen in zip(best, columns, strict=True):
        ordered = chosen[np.argsort(-row[chosen], kind="stable")]
        hits.append(
            tuple((int(subjects[c]), float(row[c])) for c in ordered if row[c] > _GONE_BELOW)
        )
    return hits


class GalleryLoader:
    """Builds searchers, and extends them, in a thread of its own, so that inference goes on
    meanwhile.

    At most one snapshot is being built and one waits, with the newest of what came after it; a
    newer one takes the place of the one that waits. ``current`` is replaced whole. After ``close``
    nothing is said any more: in a thread group the channel is the next model's by then.
    """

    def __init__(self, channel: WorkerChannel) -> None:
        self.current: Searcher | None = None
        self.device = "cpu"
        self.model_id = ""
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: tuple[GallerySnapshot, list[int]] | None = None
        self._further: tuple[GalleryDelta, int] | None = None
        self._base = 0
        """The version of the snapshot that ``current`` was built from."""
        self._foreign = False
        """It was of another model: so is what comes after it."""
        self._fewer = False
        """Somebody was removed, and what is left of them in free memory was not overwritten yet."""
        self._begun = False
        self._due = threading.Lock()
        """Free while there is something for the thread to do."""
        self._due.acquire()
        self._closed = False

    def offer(self, snapshot: GallerySnapshot, descriptors: list[int]) -> None:
        """Takes the descriptors (matrix, table) over."""
        with self._lock:
            self._drop()
            self._waiting = (snapshot, descriptors)
            self._begin()

    def extend(self, delta: GalleryDelta, fd: int) -> None:
        """Takes the descriptor of the log over."""
        with self._lock:
            if self._further is not None:
                os.close(self._further[1])
            self._further = (delta, fd)
            self._begin()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()
            self._wake()

    def _drop(self) -> None:
        if self._waiting is not None:
            close_all(self._waiting[1])
            self._waiting = None
        if self._further is not None:
            os.close(self._further[1])
            self._further = None

    def _begin(self) -> None:
        # It stays: a thread that is started where memory has run out may never say that it began,
        # and whoever starts it waits for that.
        if not self._begun:
            threading.Thread(target=self._work, name="gallery", daemon=True).start()
            self._begun = True
        self._wake()

    def _wake(self) -> None:
        if self._due.locked():
            self._due.release()

    def _work(self) -> None:
        while True:
            self._due.acquire()
            while self._next():
                pass
            if self._closed:
                return

    def _next(self) -> bool:
        """Does what waits; whether there was anything."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
            further = None
            if waiting is None:
                further, self._further = self._further, None
            if waiting is None and further is None:
                return False
        try:
            if waiting is not None:
                version = self._build(*waiting)
            else:
                assert further is not None
                version = self._extend(*further)
            with self._lock:
                if not self._closed:
                    self._channel.send(GalleryLoaded(version))
            if self._fewer:
                self._fewer = False
                # Of those who are gone: what other code than ours has left, free, behind.
                scrub()
        except ChannelClosed:
            self._closed = True
        except Exception as error:
            self._give_up(error)
        return True

    def _build(self, snapshot: GallerySnapshot, descriptors: list[int]) -> int:
        fd, table_fd = descriptors
        self._base = snapshot.version
        self._foreign = snapshot.model_id not in ("", self.model_id)
        if self._foreign:
            # Of the model before or after this one: nothing may be compared with it.
            os.close(table_fd)
            snapshot = GallerySnapshot(snapshot.version, 0, snapshot.dim, ())
        else:
            try:
                snapshot = gallery_table.attach(snapshot, table_fd)
            except ValueError as error:
                os.close(fd)
                raise SnapshotError(str(error)) from None
        searcher = Searcher(snapshot, fd, self.device)
        if self.current is None or searcher.version > self.current.version:
            self.current = searcher
        return snapshot.version

    def _extend(self, delta: GalleryDelta, fd: int) -> int:
        try:
            if delta.base != self._base or self.current is None:
                raise SnapshotError("a delta of another snapshot")
            if self._foreign:
                self.current.version = delta.version
            else:
                self._fewer |= self.current.extend(delta.version, fd, delta.log_bytes)
            return delta.version
        finally:
            os.close(fd)

    def _give_up(self, error: Exception) -> NoReturn:
        """A recogniser without the present gallery would name people wrongly."""
        leave = (
            Quit(exit_codes.PROTOCOL, Fatal("PROTOCOL", _NOT_LOADED))
            if isinstance(error, SnapshotError)
            else ending(error, _NOT_LOADED)
        )
        assert leave.fatal is not None
        with contextlib.suppress(ChannelClosed):
            self._channel.send(leave.fatal)
        os._exit(leave.code)
