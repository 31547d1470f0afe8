"""The gallery in memory: every change becomes a new immutable snapshot for the recognisers.

Changes may come from any thread, in the order of the store's commits. One task on the
event loop builds (in a thread) and publishes; changes that arrive meanwhile are taken
together into the next snapshot, so at most one rebuild is under way and the last write wins.

A deleted subject is gone at once: ``resolve`` stops naming it before any worker has the
new snapshot, also for results in flight that were computed from an older one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import structlog

from facelane_server import limits
from facelane_server.gallery.snapshot import (
    F32,
    AddTemplate,
    Change,
    Pending,
    RemoveSubject,
    RemoveTemplate,
    Snapshot,
    SubjectKey,
    after,
    build,
    empty,
)
from facelane_server.ipc.messages import GallerySnapshot

Publish = Callable[[GallerySnapshot, int], Awaitable[None]]
"""Gives a snapshot to all recognisers; returns when those that are ready have it. The
descriptor is read-only and stays the index's own. It is open until a later call has
returned; who needs it for longer duplicates it."""

PUBLISH_TIMEOUT_S: Final = 40.0
"""Longer than a pool waits for its workers: it reports its own failure first."""
RETRY_S: Final = 1.0

log = structlog.get_logger(__name__)


class GalleryIndex:
    """Owns the current snapshot, the changes since, and the task that publishes.

    ``apply`` and ``rebase`` may be called from any thread; all else from the event loop.
    """

    def __init__(self, dim: int, publish: Publish) -> None:
        """``dim``: length of the serving model's embeddings."""
        self._publish = publish
        self._lock = threading.Lock()
        self._changes: dict[SubjectKey, Pending] = {}
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
            pending = self._changes[key] = Pending(False, set(), {})
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
                    self._changes = after(changes, self._changes)
            raise
        self._tables[built.version] = built.keys
        while len(self._tables) > limits.MAX_SNAPSHOTS_KEPT:
            self._tables.popitem(last=False)
        replaced, self._snapshot = self._snapshot, built
        if replaced is not self._published:
            replaced.close()
        return revision
