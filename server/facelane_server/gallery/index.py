"""The gallery in memory: every change becomes a new immutable snapshot for the recognisers.

A snapshot is one sealed memory file (see ``ipc.messages.GallerySnapshot``)::

    0            rows x dim float16       unit vectors, by gallery, subject, age
    rows*dim*2   rows x int32             row -> index in the version's subject table

and it is also this module's own copy: the next snapshot is made from the last one and the
changes since. Nothing is held twice, except while one is being built.

Changes may come from any thread, in the order of the store's commits. One task on the
event loop builds (in a thread) and publishes; changes that arrive meanwhile are taken
together into the next snapshot, so at most one rebuild is under way and the last write wins.

A deleted subject is gone at once: ``resolve`` stops naming it before any worker has the
new snapshot, also for results in flight that were computed from an older one.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from facelane_server import limits
from facelane_server.ipc.messages import GallerySnapshot

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SubjectKey = tuple[str, str]
"""(gallery id, subject id)."""

Publish = Callable[[GallerySnapshot, int], Awaitable[None]]
"""Gives a snapshot to all recognisers; returns when those that are ready have it. The
descriptor is read-only and stays the index's own. It is open until a later call has
returned; who needs it for longer duplicates it."""

PUBLISH_TIMEOUT_S: Final = 40.0
"""Longer than a pool waits for its workers: it reports its own failure first."""
RETRY_S: Final = 1.0
CHUNK_ROWS: Final = 8_192
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

log = structlog.get_logger(__name__)


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
class _Pending:
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

    def holds(self, gallery_id: str) -> bool:
        """Whether any template is in the gallery."""
        at = bisect.bisect_left(self.keys, gallery_id, key=lambda key: key[0])
        return at < len(self.keys) and self.keys[at][0] == gallery_id

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


def build(last: Snapshot, changes: dict[SubjectKey, _Pending], version: int) -> Snapshot:
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


class GalleryIndex:
    """Owns the current snapshot, the changes since, and the task that publishes.

    ``apply`` and ``rebase`` may be called from any thread; all else from the event loop.
    """

    def __init__(self, dim: int, publish: Publish) -> None:
        """``dim``: length of the serving model's embeddings."""
        self._publish = publish
        self._lock = threading.Lock()
        self._changes: dict[SubjectKey, _Pending] = {}
        self._counts: dict[SubjectKey, int] = {}
        """Templates of each subject that has any, changes to come included."""
        self._live: dict[SubjectKey, int] = {}
        """The same subjects -> the first version that may name them."""
        self._templates = 0
        self._revision = 0
        self._next_version = 1
        self._rebased: Snapshot | None = None
        self._snapshot = empty(dim)
        self._published: Snapshot | None = None
        self._published_revision = -1
        self._tables: OrderedDict[int, tuple[SubjectKey, ...]] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gallery-index")
        self._dirty = asyncio.Event()
        self._dirty.set()
        self._progress = asyncio.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    # life

    def start(self) -> None:
        """Begins to publish, with what was applied before."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="gallery-index")

    async def close(self) -> None:
        """Stops publishing and frees the snapshots; idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._loop = None
        self._executor.shutdown(wait=True)
        self._snapshot.close()
        if self._published is not None:
            self._published.close()
        self._snapshot, self._published = empty(self._snapshot.dim), None

    # changes

    def apply(self, changes: Iterable[Change]) -> int:
        """Takes changes in; the revision to wait for in ``published``. From any thread.

        The caller knows what the gallery holds: templates are added once, and only those
        that were added are removed.
        """
        with self._lock:
            for change in changes:
                self._take(change)
            self._revision += 1
            revision = self._revision
        self._wake()
        return revision

    def rebase(self, model_id: str, dim: int, templates: Iterable[AddTemplate]) -> int:
        """Forgets all and takes ``templates`` of another model in; like ``apply``."""
        templates = list(templates)  # read before the lock: the event loop takes it too
        with self._lock:
            self._rebased = empty(dim, model_id)
            self._changes, self._counts, self._live, self._templates = {}, {}, {}, 0
            for template in templates:
                self._take(template)
            self._revision += 1
            revision = self._revision
        self._wake()
        return revision

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._dirty.set)

    def _take(self, change: Change) -> None:
        key = (change.gallery_id, change.subject_id)
        pending = self._changes.get(key)
        if pending is None:
            pending = self._changes[key] = _Pending(False, set(), {})
        before = self._counts.get(key, 0)
        match change:
            case AddTemplate():
                pending.added[change.template_id] = change.vector
                count = before + 1
            case RemoveTemplate():
                if pending.added.pop(change.template_id, None) is None:
                    pending.removed.add(change.template_id)
                count = max(0, before - 1)
            case RemoveSubject():
                pending.cleared = True
                pending.added.clear()
                pending.removed.clear()
                count = 0
        self._templates += count - before
        if count:
            self._live.setdefault(key, self._next_version)
            self._counts[key] = count
        else:
            self._live.pop(key, None)
            self._counts.pop(key, None)

    # answers

    @property
    def snapshot(self) -> Snapshot:
        """The newest that was built; valid for as long as the caller refers to it."""
        return self._snapshot

    @property
    def templates(self) -> int:
        """Templates of the serving model, changes that are not yet published included."""
        return self._templates

    def resolve(self, version: int, index: int) -> SubjectKey | None:
        """The subject at ``index`` of a snapshot's table; ``None`` when it was deleted since,
        or when the version is older than the ``limits.MAX_SNAPSHOTS_KEPT`` last ones."""
        table = self._tables.get(version)
        if table is None or not 0 <= index < len(table):
            return None
        key = table[index]
        first = self._live.get(key)
        return key if first is not None and first <= version else None

    def knows(self, key: SubjectKey) -> bool:
        """Whether the subject has any template, changes that are not yet published included."""
        return key in self._live

    def similarity(self, key: SubjectKey, vector: F32) -> float | None:
        """Cosine, [-1, 1], of ``vector`` [dim] (unit norm) to the subject's nearest template;
        ``None`` when the subject has none."""
        first, snapshot = self._live.get(key), self._snapshot
        if first is None or first > snapshot.version or len(vector) != snapshot.dim:
            return None
        held = snapshot.vectors(key)
        if not len(held):
            return None
        return float(np.clip(np.max(held.astype(np.float32) @ vector), -1.0, 1.0))

    async def published(self, revision: int, timeout: float) -> bool:
        """Whether all recognisers had the revision within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout), self._progress:
                await self._progress.wait_for(lambda: self._published_revision >= revision)
        except TimeoutError:
            return False
        return True

    # the task

    async def _run(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                revision = await self._rebuild()
                async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                    await self._publish(self._snapshot.message(), self._snapshot.fd)
            except Exception as error:
                # Nothing may end this task: a gallery that no longer follows its store
                # would go on naming people who were deleted.
                log.warning(
                    "gallery snapshot not published; trying again",
                    version=self._snapshot.version,
                    error=str(getattr(error, "reason", type(error).__name__)),
                    retry_s=RETRY_S,
                )
                await asyncio.sleep(RETRY_S)
                self._dirty.set()
                continue
            if self._published is not None and self._published is not self._snapshot:
                self._published.close()
            self._published = self._snapshot
            self._published_revision = max(self._published_revision, revision)
            async with self._progress:
                self._progress.notify_all()

    async def _rebuild(self) -> int:
        """Takes the changes into a new snapshot; the revision that the newest one holds."""
        with self._lock:
            revision = self._revision
            if not self._changes and self._rebased is None and self._snapshot.version:
                return revision
            changes, self._changes = self._changes, {}
            rebased, self._rebased = self._rebased, None
            version = self._next_version
            # Counted up at the start: what changes during the build is in a later version.
            self._next_version += 1
        loop = asyncio.get_running_loop()
        base = rebased or self._snapshot
        try:
            built = await loop.run_in_executor(self._executor, build, base, changes, version)
        except BaseException:
            with self._lock:
                if self._rebased is None:
                    self._rebased = rebased
                    self._changes = _after(changes, self._changes)
            raise
        self._tables[built.version] = built.keys
        while len(self._tables) > limits.MAX_SNAPSHOTS_KEPT:
            self._tables.popitem(last=False)
        replaced, self._snapshot = self._snapshot, built
        if replaced is not self._published:
            replaced.close()
        return revision


def _after(
    earlier: dict[SubjectKey, _Pending], later: dict[SubjectKey, _Pending]
) -> dict[SubjectKey, _Pending]:
    """Both sets of changes as one, after a build that failed."""
    merged = dict(earlier)
    for key, change in later.items():
        first = merged.get(key)
        if first is None or change.cleared:
            merged[key] = change
            continue
        added = {k: v for k, v in first.added.items() if k not in change.removed}
        removed = first.removed | (change.removed - first.added.keys())
        merged[key] = _Pending(first.cleared, removed, added | change.added)
    return merged
