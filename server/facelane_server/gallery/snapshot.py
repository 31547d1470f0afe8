"""What recognisers search: a base of many rows that stays, and a log of what came after it.

A base is one memory file (see ``ipc.messages.GallerySnapshot``)::

    0            rows x dim float16       unit vectors, by gallery, subject, age
    rows*dim*2   rows x int32             row -> index in the table of subjects

It is also this module's own copy. Nobody else can write to it or change its size; its owner
overwrites the rows of who was deleted. A change costs what it adds: it is an entry of the log (see
``ipc.gallery_log``), which each worker reads on from where it was. When the log has grown, a new
base is made from both beside what goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from facelane_server import limits
from facelane_server.gallery import decide
from facelane_server.ipc.gallery_log import Added, Operation, Removed
from facelane_server.ipc.messages import GallerySnapshot
from facelane_server.store.following import ChangeKind, StoredChange
from facelane_server.store.records import StoredVector
from facelane_server.wiping import wipe

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SubjectKey = tuple[str, str]
"""(gallery id, subject id)."""

CHUNK_ROWS: Final = 8_192
_SEAL_FUTURE_WRITE: Final = 0x10
"""Linux 5.1; ``fcntl`` does not name it. Existing mappings go on writing, nobody else can begin."""
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True, slots=True)
class AddTemplate:
    """``number``: of the subject, never another's. ``vector`` [dim] float16 of unit norm."""

    number: int
    gallery_id: str
    subject_id: str
    template_id: str
    vector: F16


@dataclass(frozen=True, slots=True)
class RemoveTemplate:
    number: int
    template_id: str


@dataclass(frozen=True, slots=True)
class RemoveSubject:
    number: int


Change = AddTemplate | RemoveTemplate | RemoveSubject


def added(row: StoredVector) -> AddTemplate:
    """What a subject is not is searched like somebody else: with the number and the name of nobody
    (``decide.SHADOW``), beside the subject."""
    number, name = row.subject, row.subject_id
    if row.negative:
        number, name = -number, decide.SHADOW + name
    return AddTemplate(number, row.gallery_id, name, row.template_id, row.vector)


def changes_of(change: StoredChange) -> tuple[Change, ...]:
    """What the index is told of a change of the store; what it does not know it passes over."""
    number, template_id = change.subject, change.template_id
    match change.kind:
        case ChangeKind.TEMPLATE_ADDED:
            return () if change.added is None else (added(change.added),)
        case ChangeKind.TEMPLATE_REMOVED:
            return (RemoveTemplate(number, template_id), RemoveTemplate(-number, template_id))
        case ChangeKind.SUBJECT_REMOVED:
            return removal_of(number)
        case ChangeKind.SUBJECT:
            return ()


def removal_of(number: int) -> tuple[Change, ...]:
    """Of a subject, and of what it is not."""
    return (RemoveSubject(number), RemoveSubject(-number))


class Base:
    """Rows of one moment. Owns its memory file; see ``close``."""

    def __init__(
        self,
        dim: int,
        matrix: F16,
        template_ids: npt.NDArray[np.bytes_],
        numbers: I64,
        galleries: Sequence[str],
        counts: I64,
        fd: int,
    ) -> None:
        self.dim = dim
        self.matrix = matrix
        """[rows, dim] float16."""
        self.template_ids = template_ids
        """[rows] ASCII."""
        self.numbers = numbers
        """[subjects] the subject at each index."""
        self.galleries = galleries
        """[subjects] its gallery; in ascending order."""
        self.counts = counts
        """[subjects] rows of each."""
        self.starts: I64 = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.alive = np.ones(len(matrix), bool)
        self.fd = fd
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        self._closer = weakref.finalize(self, os.close, fd) if fd >= 0 else None

    @property
    def rows(self) -> int:
        return len(self.matrix)

    def index(self, number: int) -> int | None:
        """Of a subject in the table."""
        at = int(np.searchsorted(self._sorted, number))
        if at == len(self._sorted) or self._sorted[at] != number:
            return None
        return int(self._order[at])

    def rows_of(self, index: int) -> I64:
        """Rows of the subject that are left."""
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        return first + np.flatnonzero(self.alive[first:last])

    def wipe(self, row: int) -> None:
        """Its vector is nowhere in the file from here on."""
        self.alive[row] = False
        self.matrix[row] = 0

    def message(self, version: int, model_id: str) -> GallerySnapshot:
        table: list[tuple[str, int, int]] = []
        first = 0
        while first < len(self.galleries):
            end = first + 1
            while end < len(self.galleries) and self.galleries[end] == self.galleries[first]:
                end += 1
            table.append((self.galleries[first], int(self.starts[first]), int(self.starts[end])))
            first = end
        return GallerySnapshot(version, self.rows, self.dim, tuple(table), model_id)

    def close(self) -> None:
        """Gives descriptor and rows back: of those who are deleted later nothing is left in it. Its
        subjects are still known, for results in flight."""
        self.matrix = np.empty((0, self.dim), np.float16)
        if self._closer is not None:
            self._closer()


class BaseWriter:
    """Makes a base row by row, or block by block, in the order of galleries and subjects."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._fd = os.memfd_create("facelane-gallery", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def write(self, block: F16) -> None:
        """``block`` [n, dim]. Raises ``OSError`` when there is no memory."""
        view = memoryview(b"") if block.size == 0 else np.ascontiguousarray(block).data.cast("B")
        while view:
            view = view[os.write(self._fd, view) :]

    def write_rows(self, rows: Sequence[F16]) -> None:
        """The same, of rows [dim]; no copy of them is left."""
        block = np.stack(rows)
        try:
            self.write(block)
        finally:
            wipe(block)

    def finish(
        self,
        template_ids: npt.NDArray[np.bytes_],
        numbers: I64,
        galleries: Sequence[str],
        counts: I64,
    ) -> Base:
        """Closes the writer."""
        rows = int(counts.sum())
        try:
            subjects = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            view = memoryview(b"") if rows == 0 else subjects.data.cast("B")
            while view:
                view = view[os.write(self._fd, view) :]
            matrix: F16 = np.empty((0, self._dim), np.float16)
            if rows:
                # Lives for as long as the matrix, or a view of it, is referred to.
                mapped = mmap.mmap(self._fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                matrix = np.frombuffer(mapped, np.float16, rows * self._dim)
                matrix = matrix.reshape(rows, self._dim)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
            # Without write permission, for the workers.
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            self.close()
        return Base(self._dim, matrix, template_ids, numbers, galleries, counts, fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def load(dim: int, rows: Iterable[AddTemplate]) -> Base:
    """A base of rows that come in the order of galleries and subjects."""
    writer = BaseWriter(dim)
    template_ids: list[bytes] = []
    numbers: list[int] = []
    galleries: list[str] = []
    counts: list[int] = []
    block: list[F16] = []
    try:
        for row in rows:
            if not numbers or numbers[-1] != row.number:
                numbers.append(row.number)
                same = bool(galleries) and galleries[-1] == row.gallery_id
                galleries.append(galleries[-1] if same else row.gallery_id)
                counts.append(0)
            counts[-1] += 1
            template_ids.append(row.template_id.encode())
            block.append(row.vector)
            if len(block) == CHUNK_ROWS:
                writer.write_rows(block)
                block.clear()
        if block:
            writer.write_rows(block)
        return writer.finish(
            np.asarray(template_ids, "S32"),
            np.asarray(numbers, np.int64),
            galleries,
            np.asarray(counts, np.int64),
        )
    finally:
        writer.close()


@dataclass(slots=True)
class _Late:
    """A template that came after the base. Its operation has the only copy of its vector, which is
    overwritten once it is ``gone``."""

    number: int
    template_id: str
    operation: Added
    gone: bool = False
    written_at: int = -1
    """Where its vector lies in the log; -1 = not written yet."""

    @property
    def vector(self) -> F16:
        return np.frombuffer(self.operation.vector, np.float16)

    def wipe(self) -> None:
        self.gone = True
        wipe(self.operation.vector)


@dataclass(slots=True)
class Generation:
    """A base and all that came after it. Whoever uses it sees to it that one thread does."""

    base: Base
    model_id: str = ""
    version: int = 0
    """Of the base, once it is published."""
    late: list[_Late] = field(default_factory=list)
    late_subjects: list[tuple[int, str]] = field(default_factory=list)
    """(number, gallery) of the subjects behind the base's table."""
    unwritten: list[Operation] = field(default_factory=list)
    gone: int = 0
    """Rows of the base that were wiped."""
    _placed: int = 0
    """Late rows that are written."""
    _late_of: dict[int, list[int]] = field(default_factory=dict)
    _late_index: dict[int, int] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """How much came after the base."""
        return len(self.late) + self.gone

    @property
    def is_heavy(self) -> bool:
        """It is time for a new base."""
        share = self.base.rows // limits.DELTA_SHARE
        bound = min(max(share, limits.MIN_DELTA_ROWS), limits.MAX_DELTA_ROWS)
        return self.weight > bound

    def number_at(self, index: int) -> int | None:
        """The subject at an index of the table."""
        subjects = len(self.base.numbers)
        if 0 <= index < subjects:
            return int(self.base.numbers[index])
        if subjects <= index < subjects + len(self.late_subjects):
            return self.late_subjects[index - subjects][0]
        return None

    def count(self, number: int) -> int:
        """Templates of a subject."""
        index = self.base.index(number)
        rows = 0 if index is None else len(self.base.rows_of(index))
        late = self._late_of.get(number, ())
        return rows + sum(not self.late[at].gone for at in late)

    def has(self, number: int, template_id: str) -> bool:
        """Whether the template is there."""
        late = self._late_of.get(number, ())
        if any(self.late[at].template_id == template_id and not self.late[at].gone for at in late):
            return True
        return self._base_row(number, template_id) is not None

    def _base_row(self, number: int, template_id: str) -> int | None:
        index = self.base.index(number)
        if index is None:
            return None
        for row in self.base.rows_of(index):
            if self.base.template_ids[row] == template_id.encode():
                return int(row)
        return None

    def vectors(self, number: int) -> F16:
        """[n, dim] of a subject, a copy, the caller's to overwrite; n may be 0."""
        index = self.base.index(number)
        rows = self.base.matrix[:0] if index is None else self.base.matrix[self.base.rows_of(index)]
        late = [one for at in self._late_of.get(number, ()) if not (one := self.late[at]).gone]
        return np.concatenate([rows, *(one.vector[None] for one in late)])

    def add(self, new: AddTemplate) -> None:
        index = self.base.index(new.number)
        if index is None:
            index = self._late_index.get(new.number)
            if index is None:
                index = len(self.base.numbers) + len(self.late_subjects)
                self._late_index[new.number] = index
                self.late_subjects.append((new.number, new.gallery_id))
        held = bytearray(new.vector.data.cast("B"))
        operation = Added(new.gallery_id, index, held)
        self._late_of.setdefault(new.number, []).append(len(self.late))
        self.late.append(_Late(new.number, new.template_id, operation))
        self.unwritten.append(operation)

    def remove(self, number: int, template_id: str) -> list[int]:
        """Takes a template out; where its vector lies in the log, to be overwritten there."""
        for at in self._late_of.get(number, ()):
            if self.late[at].template_id == template_id and not self.late[at].gone:
                return self._remove_late(at)
        row = self._base_row(number, template_id)
        if row is not None:
            self._remove_row(row)
        return []

    def remove_subject(self, number: int) -> list[int]:
        """Takes a subject out; where its vectors lie in the log."""
        index = self.base.index(number)
        if index is not None:
            for row in self.base.rows_of(index):
                self._remove_row(int(row))
        places: list[int] = []
        for at in self._late_of.pop(number, ()):
            if not self.late[at].gone:
                places += self._remove_late(at)
        # Its name's next owner has another number, and so another index.
        self._late_index.pop(number, None)
        return places

    def _remove_row(self, row: int) -> None:
        self.base.wipe(row)
        self.gone += 1
        self.unwritten.append(Removed(row))

    def _remove_late(self, at: int) -> list[int]:
        late = self.late[at]
        late.wipe()
        # One that is not written yet keeps its place, as zeros: workers count what was added.
        self.unwritten.append(Removed(-1 - at))
        return [late.written_at] if late.written_at >= 0 else []

    def placed(self, places: Iterator[int]) -> None:
        """What was unwritten stands in the log: each addition's vector at its place."""
        for operation in self.unwritten:
            if isinstance(operation, Added):
                self.late[self._placed].written_at = next(places)
                self._placed += 1
        self.unwritten.clear()

    def close(self) -> None:
        """Nothing of its rows is left; their subjects are still known, for results in flight."""
        self.base.close()
        for late in self.late:
            late.wipe()

    # -- the next base -------------------------------------------------------------------------

    def cut(self) -> Cut:
        """What the next base is to hold: later changes are not in it."""
        rows = np.flatnonzero(self.base.alive)
        late = [one for one in self.late if not one.gone]
        return Cut(
            self.base,
            self.base.matrix,
            rows,
            [one.vector for one in late],
            [one.template_id.encode() for one in late],
            np.asarray([one.operation.subject for one in late], np.int64),
            list(self.late_subjects),
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of a generation at one moment, for ``compact``."""

    base: Base
    matrix: F16
    rows: I64
    vectors: list[F16]
    template_ids: list[bytes]
    subjects: I64
    late_subjects: list[tuple[int, str]]


def compact(cut: Cut) -> Base:
    """One base of all: a copy of the rows. Raises ``OSError`` when there is no memory."""
    base = cut.base
    numbers = np.concatenate([base.numbers, [n for n, _ in cut.late_subjects]]).astype(np.int64)
    names = [*base.galleries, *(gallery for _, gallery in cut.late_subjects)]
    ranks = {name: rank for rank, name in enumerate(sorted(set(names)))}
    rank = np.asarray([ranks[name] for name in names], np.int64)
    owner = np.repeat(np.arange(len(base.numbers)), base.counts)
    subjects = np.concatenate([owner[cut.rows], cut.subjects]).astype(np.int64)
    # Old rows before new ones of a subject; -1 - k is the k-th of the new.
    source = np.concatenate([cut.rows, -1 - np.arange(len(cut.vectors))]).astype(np.int64)
    order = np.lexsort((np.arange(len(subjects)), subjects, rank[subjects]))
    subjects, source = subjects[order], source[order]
    begins = (
        np.flatnonzero(np.concatenate([[True], np.diff(subjects) != 0])) if len(order) else order
    )
    present = subjects[begins] if len(order) else subjects
    counts = np.diff(np.append(begins, len(subjects))).astype(np.int64)
    ids = np.concatenate([base.template_ids[cut.rows], np.asarray(cut.template_ids, "S32")])[order]
    writer = BaseWriter(base.dim)
    try:
        for first in range(0, len(source), CHUNK_ROWS):
            part = source[first : first + CHUNK_ROWS]
            chunk = np.empty((len(part), base.dim), np.float16)
            if len(cut.matrix):  # without a copy in between
                np.take(cut.matrix, np.maximum(part, 0), axis=0, out=chunk, mode="clip")
            for place in np.flatnonzero(part < 0):
                chunk[place] = cut.vectors[-1 - part[place]]
            try:
                writer.write(chunk)
            finally:
                wipe(chunk)
        galleries = [names[int(subject)] for subject in present]
        return writer.finish(ids.astype("S32"), numbers[present], galleries, counts)
    finally:
        writer.close()
