"""The gallery in memory: who can be found, and what the recognisers search.

Changes may come from any thread, in the order of the store's commits. Each holds for the answers
of this module at once: ``resolve`` stops naming who was deleted before any worker has heard of it,
also for results in flight. One task on the event loop publishes; changes that come meanwhile are
published together. A new base (see ``snapshot``) is made in a thread, beside all that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.gallery import decide
from facelane_server.gallery.losses import Losses, SubjectKey
from facelane_server.gallery.snapshot import (
    F32,
    AddTemplate,
    Change,
    Generation,
    RemoveSubject,
    RemoveTemplate,
    compact,
    load,
)
from facelane_server.ipc.gallery_log import GalleryLog
from facelane_server.ipc.messages import GalleryDelta, GallerySnapshot
from facelane_server.wiping import wipe

Publish = Callable[[GallerySnapshot, int, GalleryDelta | None, int], Awaitable[None]]
"""Gives a base and what came after it to all recognisers; returns when those that are ready have
it. The descriptors (of base and log, -1 = none) are read-only and stay the index's own. They are
open until a later call has returned; who needs them for longer duplicates them."""

PUBLISH_TIMEOUT_S: Final = 40.0
"""Longer than a pool waits for its workers: it reports its own failure first."""
RETRY_S: Final = 1.0

log = structlog.get_logger(__name__)


def model_changing() -> FacelaneError:
    """Embeddings of two models cannot be compared, nor kept as each other's."""
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        "the recogniser's model is being changed; try again in a moment",
        metadata={"stage": Stage.RECOGNIZER.value},
        retryable=True,
    )


@dataclass(slots=True)
class _Served:
    """A generation, its log, and the versions that were published of it."""

    rows: Generation
    log: GalleryLog
    version: int = 0

    def close(self) -> None:
        self.rows.close()
        self.log.close()


class GalleryIndex:
    """Owns the rows that are searched and the task that publishes them.

    ``apply`` and ``rebase`` may be called from any thread; all else from the event loop.
    """

    def __init__(self, dim: int, publish: Publish, losses: Losses | None = None) -> None:
        """``dim``: length of the serving model's embeddings. ``losses``: told of what goes."""
        self._losses = losses or Losses()
        self._publish = publish
        self._lock = threading.Lock()
        self._keys: dict[int, SubjectKey] = {}
        """Who can be found: number -> name."""
        self._numbers: dict[SubjectKey, int] = {}
        self._per_gallery: dict[str, int] = {}
        """Templates of each gallery."""
        self._templates = 0
        self._revision = 0
        self._version = 0
        self._served = _Served(Generation(load(dim, ())), GalleryLog())
        self._tables: list[tuple[int, Generation]] = []
        """(first version, generation), the oldest first: what an index of a result means."""
        self._since: list[Change] | None = None
        """Changes since the rows were cut for the base that is being made; ``None`` = none is."""
        self._old: list[_Served] = []
        """Replaced, and perhaps being published: closed when another one was."""
        self._published_revision = -1
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gallery-index")
        self._dirty = asyncio.Event()
        self._dirty.set()
        self._progress = asyncio.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._compaction: asyncio.Task[None] | None = None

    # life

    def start(self) -> None:
        """Begins to publish, with what was applied before."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="gallery-index")

    async def close(self) -> None:
        """Stops publishing and frees the rows; idempotent."""
        for task in (self._task, self._compaction):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._task = self._compaction = None
        self._loop = None
        self._executor.shutdown(wait=True)
        for served in (self._served, *self._old):
            served.close()
        self._old = []

    # changes

    def apply(self, changes: Iterable[Change]) -> int:
        """Takes changes in; the revision to wait for in ``published``. From any thread. What is
        known already changes nothing: a template that is there, one that is not."""
        with self._lock:
            for change in changes:
                if self._take(self._served, change) and self._since is not None:
                    self._since.append(change)
            self._revision += 1
            revision = self._revision
        self._wake()
        return revision

    def rebase(self, model_id: str, dim: int, templates: Iterable[AddTemplate]) -> int:
        """Forgets all and takes ``templates`` of another model, or of the store as it is now, in;
        they come in the order of galleries and subjects. Like ``apply``."""
        keys: dict[int, SubjectKey] = {}
        per_gallery: dict[str, int] = {}

        def noted() -> Iterable[AddTemplate]:
            for row in templates:
                if row.number not in keys:
                    keys[row.number] = (row.gallery_id, row.subject_id)
                if row.number > 0:
                    per_gallery[row.gallery_id] = per_gallery.get(row.gallery_id, 0) + 1
                yield row

        base = load(dim, noted())  # before the lock: the event loop takes it too
        fresh = _Served(Generation(base, model_id), GalleryLog())
        numbers = {key: number for number, key in keys.items()}
        with self._lock:
            self._old.append(self._served)
            self._served = fresh
            self._keys, self._numbers, self._per_gallery = keys, numbers, per_gallery
            self._templates = sum(per_gallery.values())
            self._since = None  # a base that is being made is of what was forgotten
            self._losses.note_all()
            self._revision += 1
            revision = self._revision
        self._wake()
        return revision

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._dirty.set)

    def _take(self, served: _Served, change: Change) -> bool:
        """Whether it changed anything."""
        rows = served.rows
        number = change.number
        places: list[int] = []
        counted = int(number > 0)  # what somebody is not is nobody to be found
        if isinstance(change, AddTemplate):
            if rows.has(number, change.template_id):
                return False
            rows.add(change)
            key = (change.gallery_id, change.subject_id)
            self._keys[number] = key
            self._numbers[key] = number
            self._count(change.gallery_id, counted)
            if not counted:  # whoever bears the name may be the one who is not meant by it
                whose = change.subject_id.removeprefix(decide.SHADOW)
                self._losses.note((change.gallery_id, whose))
            return True
        known = self._keys.get(number)
        if known is None:
            return False
        if isinstance(change, RemoveSubject):
            self._count(known[0], -rows.count(number) * counted)
            places = rows.remove_subject(number)
            self._forget(number, known)
        else:
            if not rows.has(number, change.template_id):
                return False
            places = rows.remove(number, change.template_id)
            self._count(known[0], -counted)
            if not rows.count(number):
                self._forget(number, known)
        self._losses.note(known)
        for place in places:
            served.log.wipe(place, 2 * rows.base.dim)
        return True

    def _count(self, gallery_id: str, more: int) -> None:
        self._templates += more
        left = self._per_gallery.get(gallery_id, 0) + more
        if left:
            self._per_gallery[gallery_id] = left
        else:
            self._per_gallery.pop(gallery_id, None)

    def _forget(self, number: int, key: SubjectKey) -> None:
        del self._keys[number]
        if self._numbers.get(key) == number:
            del self._numbers[key]

    # answers

    @property
    def model_id(self) -> str:
        """Of the templates that are searched."""
        return self._served.rows.model_id

    @property
    def templates(self) -> int:
        """Templates of the serving model, changes that are not yet published included."""
        return self._templates

    @property
    def version(self) -> int:
        """The newest that was published."""
        return self._version

    def searched(self, gallery_id: str) -> int:
        """Templates of the gallery."""
        return self._per_gallery.get(gallery_id, 0)

    def resolve(self, version: int, index: int) -> SubjectKey | None:
        """The subject at ``index`` of the table that a version was searched with; ``None`` when it
        was deleted since, or when that is older than ``limits.MAX_BASES_KEPT`` bases."""
        for first, rows in reversed(self._tables):
            if first <= version:
                number = rows.number_at(index)
                return None if number is None else self._keys.get(number)
        return None

    def key(self, number: int) -> SubjectKey | None:
        """The subject of a number, while it has a template."""
        return self._keys.get(number)

    def knows(self, key: SubjectKey) -> bool:
        """Whether the subject has any template, changes that are not yet published included."""
        return key in self._numbers

    def similarity(self, key: SubjectKey, vector: F32) -> float | None:
        """Cosine, [-1, 1], of ``vector`` [dim] (unit norm) to the subject's nearest template;
        ``None`` when the subject has none."""
        with self._lock:
            number = self._numbers.get(key)
            rows = self._served.rows
            if number is None or len(vector) != rows.base.dim:
                return None
            held = rows.vectors(number)
        if not len(held):
            return None
        wide = held.astype(np.float32)
        best = float(np.clip(np.max(wide @ vector), -1.0, 1.0))
        wipe(held, wide)
        return best

    def likeness(self, key: SubjectKey, vector: F32) -> float | None:
        """The same; -1 for a probe that is nearer to what the subject is not."""
        found = self.similarity(key, vector)
        other = self.similarity((key[0], decide.SHADOW + key[1]), vector)
        return -1.0 if found is not None and other is not None and other > found else found

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
                await self._publish_newest()
            except Exception as error:
                # Nothing may end this task: a gallery that no longer follows its store
                # would go on naming people who were deleted.
                log.warning(
                    "gallery not published; trying again",
                    version=self._version,
                    error=str(getattr(error, "reason", type(error).__name__)),
                    retry_s=RETRY_S,
                )
                await asyncio.sleep(RETRY_S)
                self._dirty.set()
                continue
            async with self._progress:
                self._progress.notify_all()
            if self._served.rows.is_heavy and self._compaction is None:
                self._compaction = asyncio.create_task(self._compact(), name="gallery-base")

    async def _publish_newest(self) -> None:
        with self._lock:
            served, revision = self._served, self._revision
            self._write(served)
            version = self._version
            snapshot = served.rows.base.message(served.rows.version, served.rows.model_id)
            delta = None
            if served.log.size:
                delta = GalleryDelta(version, served.rows.version, served.log.size)
        async with asyncio.timeout(PUBLISH_TIMEOUT_S):
            await self._publish(snapshot, served.rows.base.fd, delta, served.log.reader)
        with self._lock:
            done = [old for old in self._old if old is not served]
            self._old = [old for old in self._old if old is served]
        for old in done:
            old.close()
        self._published_revision = max(self._published_revision, revision)

    def _write(self, served: _Served) -> None:
        """Counts the version up when there is something that no version has."""
        rows = served.rows
        if not rows.version:
            self._version += 1
            rows.version = served.version = self._version
            self._tables.append((self._version, rows))
            del self._tables[: -limits.MAX_BASES_KEPT]
        if not rows.unwritten:
            return
        places = iter(served.log.append(rows.unwritten))
        rows.placed(places)
        self._version += 1
        served.version = self._version

    # the next base

    async def _compact(self) -> None:
        try:
            with self._lock:
                served, cut = self._served, self._served.rows.cut()
                self._since = []
            loop = asyncio.get_running_loop()
            base = await loop.run_in_executor(self._executor, compact, cut)
            with self._lock:
                since, self._since = self._since, None
                if since is None or self._served is not served:
                    base.close()  # of what was forgotten meanwhile
                    return
                fresh = _Served(Generation(base, served.rows.model_id), GalleryLog())
                for change in since:
                    _replay(fresh, change)
                self._served = fresh
                self._old.append(served)
            log.info("gallery has a new base", templates=base.rows, since=len(since))
            self._dirty.set()
        except Exception as error:
            # The one there is goes on; the next try is a later one.
            log.warning("no new base of the gallery", error=type(error).__name__)
            await asyncio.sleep(10 * RETRY_S)
        finally:
            with self._lock:
                self._since = None
            self._compaction = None
            self._dirty.set()


def _replay(fresh: _Served, change: Change) -> None:
    """A change that was counted when it came."""
    match change:
        case AddTemplate():
            fresh.rows.add(change)
        case RemoveTemplate():
            fresh.rows.remove(change.number, change.template_id)
        case RemoveSubject():
            fresh.rows.remove_subject(change.number)
