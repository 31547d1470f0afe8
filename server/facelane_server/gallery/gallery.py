"""The gallery as the rest of the server sees it: asynchronous, store and index in step.

The store works in a thread of its own, one call after another, behind a bounded queue;
the event loop never waits for a disk. Each change reaches the index in that same thread,
right after its commit: a caller that goes away in between leaves nothing half done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.gallery.index import GalleryIndex, Publish
from facelane_server.gallery.snapshot import (
    F32,
    AddTemplate,
    Change,
    RemoveSubject,
    RemoveTemplate,
    SubjectKey,
)
from facelane_server.naming import check_identifier, gallery_name
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.records import (
    Enrolled,
    NewTemplate,
    RequestKey,
    Subject,
    Template,
    unit_float16,
)

CALL_TIMEOUT_S: Final = 10.0
PUBLISHED_TIMEOUT_S: Final = 5.0
"""How long a change waits for the recognisers to have it before its call answers; it is
committed by then, and reaches them later."""

log = structlog.get_logger(__name__)

T = TypeVar("T")


def model_changing() -> FacelaneError:
    """Embeddings of two models cannot be compared, nor kept as each other's."""
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        "the recogniser's model is being changed; try again in a moment",
        metadata={"stage": Stage.RECOGNIZER.value},
        retryable=True,
    )


class Gallery:
    """All galleries of the server. Made by ``open``; ``close`` ends its threads and files.

    Calls raise what the store raises (see ``Store``), and GALLERY_UNAVAILABLE (retryable)
    when too many wait or the store takes longer than ``CALL_TIMEOUT_S``.
    """

    def __init__(self, store: Store, executor: ThreadPoolExecutor) -> None:
        self._store = store
        self._executor = executor
        self._room = threading.BoundedSemaphore(limits.MAX_GALLERY_CALLS)
        self._index: GalleryIndex | None = None
        self._model_id = ""

    @classmethod
    async def open(
        cls,
        place: Path | str,
        *,
        max_templates: int = limits.MAX_TEMPLATES,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> Self:
        """Opens or makes the store (see ``opening``). Raises GALLERY_UNAVAILABLE with what to do
        about it."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="gallery-store")
        try:
            store = await asyncio.get_running_loop().run_in_executor(
                executor,
                lambda: Store(open_store(place), max_templates=max_templates, clock_ns=clock_ns),
            )
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(store, executor)

    async def serve(self, model_id: str, dim: int, publish: Publish) -> bool:
        """Searches with this model from now on: its templates, and no others, are published.

        Called again when the recogniser's model changes (``publish`` stays the first). Whether
        all recognisers had the first snapshot within ``PUBLISHED_TIMEOUT_S``.
        """
        index = self._index or GalleryIndex(dim, publish)

        def load() -> tuple[int, int]:
            revision = index.rebase(
                model_id,
                dim,
                (
                    AddTemplate(row.gallery_id, row.subject_id, row.template_id, row.vector)
                    for row in self._store.vectors(model_id, dim)
                ),
            )
            self._model_id = model_id
            return revision, self._store.counts()[1] - index.templates

        revision, others = await self._call(load, bounded=False)
        if self._index is None:
            self._index = index
            index.start()
        log.info("gallery loaded", templates=index.templates)
        if others:
            log.warning(
                "templates of other models are not searched: enrol these subjects again",
                not_searched=others,
            )
        return await index.published(revision, PUBLISHED_TIMEOUT_S)

    async def close(self) -> None:
        """Ends the index, then the store; idempotent."""
        if self._index is not None:
            await self._index.close()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._store.close)
        except RuntimeError:
            return  # closed before
        self._executor.shutdown(wait=True)

    # answers from memory

    @property
    def model_id(self) -> str:
        """The model whose templates are searched; empty without a recogniser."""
        return self._model_id

    @property
    def templates(self) -> int:
        """Templates that are searched."""
        return 0 if self._index is None else self._index.templates

    def is_empty(self, gallery_id: str) -> bool:
        """Whether faces are searched in it and nobody can be found: all are UNKNOWN there."""
        return self._index is not None and not self._index.snapshot.searched(gallery_id)

    def searched(self, gallery_id: str) -> int:
        """Templates that a face is compared with in this gallery."""
        return 0 if self._index is None else self._index.snapshot.searched(gallery_id)

    def knows(self, gallery_id: str, subject_id: str) -> bool:
        """Whether the subject can be found at this moment: not from its deletion on."""
        return self._index is not None and self._index.knows((gallery_id, subject_id))

    @property
    def version(self) -> int:
        """Of the newest snapshot."""
        return 0 if self._index is None else self._index.snapshot.version

    def resolve(self, version: int, index: int) -> SubjectKey | None:
        """See ``GalleryIndex.resolve``."""
        return None if self._index is None else self._index.resolve(version, index)

    def similarity(
        self, gallery_id: str, subject_id: str, vector: bytes, *, model_id: str = ""
    ) -> float:
        """Cosine, [-1, 1], of a probe (float32 bytes, unit norm) to the subject's nearest
        template. Raises NO_TEMPLATES, ARGUMENT_INVALID, and POOL_UNAVAILABLE (retryable) when
        ``model_id``, of the model that made the probe, is given and not the one that is
        searched with. It does not know whether the subject exists: ask ``get_subject`` first."""
        key = (gallery_name(gallery_id), check_identifier(subject_id, "subject_id"))
        if model_id and self._index is not None and self._index.snapshot.model_id != model_id:
            raise model_changing()
        found = (
            None
            if self._index is None
            else self._index.similarity(key, np.frombuffer(vector, np.float32))
        )
        if found is None:
            raise FacelaneError(
                Reason.NO_TEMPLATES,
                "the subject has no template of the serving model; enrol a picture first",
            )
        return found

    @property
    def trouble(self) -> str:
        """Why changes are refused, while what is searched stays: FILE_GONE (removed or replaced),
        DISK_FULL; empty = they are kept."""
        return self._store.trouble()

    # subjects

    async def create_subject(
        self, gallery_id: str, subject_id: str, display_name: str, labels: Mapping[str, str]
    ) -> Subject:
        return await self._call(
            lambda: self._store.create_subject(gallery_id, subject_id, display_name, labels)
        )

    async def get_subject(self, gallery_id: str, subject_id: str) -> Subject:
        return await self._call(lambda: self._store.get_subject(gallery_id, subject_id))

    async def list_subjects(
        self, gallery_id: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[tuple[Subject, ...], str]:
        return await self._call(
            lambda: self._store.list_subjects(
                gallery_id, page_size=page_size, page_token=page_token
            )
        )

    async def update_subject(
        self,
        gallery_id: str,
        subject_id: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
    ) -> Subject:
        return await self._call(
            lambda: self._store.update_subject(
                gallery_id, subject_id, display_name=display_name, labels=labels, etag=etag
            )
        )

    async def delete_subject(self, gallery_id: str, subject_id: str) -> int:
        """Gone from the answers at once, from the store when this returns, and from the
        recognisers' memory as soon as they have the next snapshot, for which this waits."""

        def delete() -> tuple[int, int]:
            count = self._store.delete_subject(gallery_id, subject_id)
            return count, self._apply(RemoveSubject(gallery_name(gallery_id), subject_id))

        count, revision = await self._call(delete)
        await self._published(revision)
        return count

    # templates

    async def list_templates(self, gallery_id: str, subject_id: str) -> tuple[Template, ...]:
        return await self._call(lambda: self._store.list_templates(gallery_id, subject_id))

    async def delete_template(self, gallery_id: str, template_id: str) -> Template:
        def delete() -> tuple[Template, int]:
            gone = self._store.delete_template(gallery_id, template_id)
            if gone.model_id != self._model_id:
                return gone, 0
            change = RemoveTemplate(gallery_name(gallery_id), gone.subject_id, template_id)
            return gone, self._apply(change)

        gone, revision = await self._call(delete)
        await self._published(revision)
        return gone

    async def enroll(
        self,
        gallery_id: str,
        subject_id: str,
        *,
        vector: F32,
        ood_score: float,
        quality: float = 0.0,
        model_id: str = "",
        create_subject: bool = False,
        display_name: str = "",
        request: RequestKey | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> Enrolled:
        """Adds a template of the serving model; see ``Store.enroll``. ``vector`` [dim].

        Raises POOL_UNAVAILABLE (retryable) when ``model_id``, of the model that made the
        vector, is given and not the serving one: the template would be found by no model.
        """

        def enroll() -> tuple[Enrolled, int]:
            if model_id and model_id != self._model_id:
                raise model_changing()
            new = NewTemplate(self._model_id, vector, ood_score, quality)
            enrolled = self._store.enroll(
                gallery_id,
                subject_id,
                new,
                create_subject=create_subject,
                display_name=display_name,
                request=request,
                answer=answer,
            )
            if not enrolled.created:
                return enrolled, 0
            change = AddTemplate(
                enrolled.subject.gallery_id,
                subject_id,
                enrolled.template.template_id,
                unit_float16(vector),
            )
            return enrolled, self._apply(change)

        enrolled, revision = await self._call(enroll)
        await self._published(revision)
        return enrolled

    async def recall(self, gallery_id: str, request: RequestKey) -> Enrolled | None:
        """What an earlier enrolment with this request id gave; see ``Store.recall``."""
        return await self._call(lambda: self._store.recall(gallery_id, request))

    async def counts(self) -> tuple[int, int]:
        """(subjects, templates) in the store, of all galleries and models."""
        return await self._call(self._store.counts)

    # the thread

    def _apply(self, change: Change) -> int:
        return 0 if self._index is None else self._index.apply([change])

    async def _published(self, revision: int) -> None:
        if self._index is None or not revision:
            return
        if not await self._index.published(revision, PUBLISHED_TIMEOUT_S):
            log.warning("gallery change committed, but not yet with every recogniser")

    async def _call(self, call: Callable[[], T], *, bounded: bool = True) -> T:
        if not self._room.acquire(blocking=False):
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                "too many gallery calls wait; try again in a moment",
                metadata={"limit": str(limits.MAX_GALLERY_CALLS)},
                retryable=True,
            )
        abandoned = threading.Event()

        def run() -> T:
            try:
                if abandoned.is_set():
                    raise FacelaneError(Reason.CANCELLED, "the caller is gone")
                return call()
            finally:
                self._room.release()

        try:
            work = asyncio.get_running_loop().run_in_executor(self._executor, run)
        except RuntimeError:
            self._room.release()
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE, "the server is shutting down; try another, or later"
            ) from None
        # A caller that gave up does not come for the error.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S if bounded else None):
                # Shielded: a call that waits in the queue keeps its place in the bound until
                # the thread has met it, so that impatient callers cannot outgrow the bound.
                return await asyncio.shield(work)
        except TimeoutError:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                "the gallery's store did not answer in time; a change may have been made: read "
                "again, or repeat an enrolment with the same request_id",
                retryable=True,
            ) from None
        finally:
            abandoned.set()
