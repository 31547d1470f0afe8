"""The gallery as the rest of the server sees it: asynchronous, store and index in step.

The store works in a thread of its own, one call after another, behind a bounded queue; the event
loop never waits for a disk. What any process has committed reaches the index through the store's
numbered changes, in that same thread: right after a commit of its own, and whenever the store is
said to have changed. A caller that goes away in between leaves nothing half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery.index import GalleryIndex, Publish, model_changing
from facelane_server.gallery.losses import Losses
from facelane_server.gallery.snapshot import F32, Change, SubjectKey, added, changes_of, removal_of
from facelane_server.naming import check_identifier, gallery_name
from facelane_server.store.audit import Deed
from facelane_server.store.chain import Head
from facelane_server.store.chips import KeptChip
from facelane_server.store.database import Database, opening, patiently, perhaps_done
from facelane_server.store.following import ChangeKind, HistoryLostError
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.readers import Reader
from facelane_server.store.records import (
    Correction,
    Deleted,
    Enrolled,
    NewTemplate,
    RequestKey,
    Subject,
    Template,
)
from facelane_server.store.vault import Vault, open_vault
from facelane_server.store.watching import StoreWatch

CALL_TIMEOUT_S: Final = 10.0
PUBLISHED_TIMEOUT_S: Final = 5.0
"""How long a change, which is committed by then, waits for the recognisers to have it."""
LOADED_TIMEOUT_S: Final = 60.0
"""The same of all there is, at the start: until then everybody would be a stranger."""
CONFIRMED_TIMEOUT_S: Final = 5.0
"""How long a deletion waits for other processes of the store."""
FOLLOWED_TIMEOUT_S: Final = 1.0
"""What recognisers have of that: meanwhile this process itself names the subject no more."""
LEASE_S: Final = 300.0
FOLLOW_S: Final = 1.0
RETRY_S: Final = 0.5

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Gallery:
    """All galleries of the server. Made by ``open``; ``close`` ends its threads and files.

    Calls raise what the store raises (see ``Store``), and GALLERY_UNAVAILABLE (retryable)
    when too many wait or the store takes longer than ``CALL_TIMEOUT_S``.
    """

    def __init__(
        self, store: Store, executor: ThreadPoolExecutor, *, lease_s: float = LEASE_S
    ) -> None:
        self._store = store
        self._executor = executor
        self._room = threading.BoundedSemaphore(limits.MAX_GALLERY_CALLS)
        self._index: GalleryIndex | None = None
        self._model_id = ""
        self._dim = 0
        self._seen = 0
        """The revision of the store up to which the index has been told."""
        self._is_behind = False  # the index is of another model
        self._removed = 0
        """The revision of the newest removal among them; others wait for it."""
        self._told = 0  # the revision up to which all recognisers were, as far as others know
        self._reader = Reader(store.database, lease_s=lease_s)
        self.database, self.vault = store.database, store.vault
        """The store, which is this gallery's to close, and its keys."""
        self.watch = StoreWatch(store.database)
        """Tells others too when the store may have changed."""
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._lost = ""
        self.on_forgotten: list[Callable[[int], None]] = []
        """Called on the event loop with the number of a subject that was deleted, or one of whose
        templates was, by whomever; 0 = of nobody knows how many."""
        self.losses = Losses()

    @classmethod
    async def open(
        cls,
        place: Path | str,
        *,
        max_templates: int = limits.MAX_TEMPLATES,
        clock_ns: Callable[[], int] = time.time_ns,
        lease_s: float = LEASE_S,
        unlock: Callable[[Database], Vault] = open_vault,
    ) -> Self:
        """Opens or makes the store (see ``opening``), and its keys with ``unlock``. Raises
        GALLERY_UNAVAILABLE with what to do about it, and what ``unlock`` raises."""

        def opened() -> Store:
            database = open_store(place)
            with opening(database):
                vault = unlock(database)
            return Store(database, vault=vault, max_templates=max_templates, clock_ns=clock_ns)

        executor = ThreadPoolExecutor(1, thread_name_prefix="gallery-store")
        try:
            store = await asyncio.get_running_loop().run_in_executor(executor, patiently, opened)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        gallery = cls(store, executor, lease_s=lease_s)
        try:
            await gallery._begin()
        except BaseException:
            await gallery.close()
            raise
        return gallery

    async def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen = await self._call(self._store.revision)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._changed.set)

        self.watch.subscribe(wake)
        self.watch.start()
        self._follower = self._loop.create_task(self._run(), name="gallery-follower")

    async def serve(self, model_id: str, dim: int, publish: Publish) -> bool:
        """Searches with this model from now on: its templates, and no others, are published.

        Called again when the recogniser's model changes (``publish`` stays the first). Whether all
        recognisers had it within ``LOADED_TIMEOUT_S``."""
        index = self._index or GalleryIndex(dim, publish, self.losses)

        def load() -> tuple[int, int]:
            if not self._model_id:
                # Before the first row is read: from here on, deletions wait for this process.
                self._reader.join(0)
            self._model_id, self._dim = model_id, dim
            self._is_behind = True  # should the store be away now, the follower makes up for it
            revision = self._take_all(index)
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
        published = await index.published(revision, LOADED_TIMEOUT_S)
        await self._acknowledge()
        return published

    async def close(self) -> None:
        """Ends the index, then the store; idempotent."""
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
            self._follower = None
        if self._index is not None:
            await self._index.close()
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.watch.close)

        def end() -> None:
            if self._model_id:
                self._reader.leave()
            self._store.close()

        try:
            await loop.run_in_executor(self._executor, end)
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
        return self._index is not None and not self._index.searched(gallery_id)

    def searched(self, gallery_id: str) -> int:
        """Templates that a face is compared with in this gallery."""
        return 0 if self._index is None else self._index.searched(gallery_id)

    def knows(self, gallery_id: str, subject_id: str) -> bool:
        """Whether the subject can be found at this moment: not from its deletion on."""
        return (
            self._index is not None
            and not self._reader.is_fenced
            and self._index.knows((gallery_id, subject_id))
        )

    @property
    def revision(self) -> int:
        """Of the store, as far as it was followed: whoever can be found has no higher number."""
        return self._seen

    @property
    def version(self) -> int:
        """Of what recognisers search."""
        return 0 if self._index is None else self._index.version

    def resolve(self, version: int, index: int) -> SubjectKey | None:
        """See ``GalleryIndex.resolve``; nobody while the store was away for too long."""
        if self._index is None or self._reader.is_fenced:
            return None
        return self._index.resolve(version, index)

    def similarity(
        self, gallery_id: str, subject_id: str, vector: bytes | bytearray, *, model_id: str = ""
    ) -> float:
        """Cosine, [-1, 1], of a probe (float32 bytes, unit norm) to the subject's nearest
        template. Raises NO_TEMPLATES, ARGUMENT_INVALID, and POOL_UNAVAILABLE (retryable) when
        ``model_id``, of the model that made the probe, is given and not the one that is
        searched with. It does not know whether the subject exists: ask ``get_subject`` first."""
        key = (gallery_name(gallery_id), check_identifier(subject_id, "subject_id"))
        if model_id and self._index is not None and self._index.model_id != model_id:
            raise model_changing()
        probe = np.frombuffer(vector, np.float32)
        found = None if self._index is None else self._index.likeness(key, probe)
        if found is None:
            raise FacelaneError(
                Reason.NO_TEMPLATES,
                "the subject has no template of the serving model; enrol a picture first",
            )
        return found

    @property
    def trouble(self) -> str:
        """Why changes are refused, while what is searched stays: FILE_GONE (removed or replaced),
        DISK_FULL, READ_ONLY, REFUSED, UNREACHABLE (the store is away), FENCED (it is away for so
        long that nobody is named any more); empty = they are kept."""
        return "FENCED" if self._reader.is_fenced else self._store.trouble() or self._lost

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

    async def delete_subject(
        self, gallery_id: str, subject_id: str, *, etag: str = "", why: str = ""
    ) -> Deleted:
        """Gone from the answers of this process at once; when this returns, from the store and from
        the answers of every process, and from the recognisers' memory as soon as they have the
        change, for which this waits.

        Raises GALLERY_UNAVAILABLE (retryable, cause NOT_CONFIRMED, with the receipt) when another
        process has not confirmed it within ``CONFIRMED_TIMEOUT_S``: the subject is deleted, and a
        repeated call waits for that process again."""

        def delete() -> tuple[Deleted, int]:
            gone = self._store.delete_subject(gallery_id, subject_id, etag=etag, why=why)
            # At once, whatever becomes of the store: the deletion stands.
            self._apply(list(removal_of(gone.number)))
            return gone, self._follow()

        gone, revision = await self._deleted(delete)
        await self._published(revision)
        await self._confirmed(gone.revision, gone.receipt)
        return gone

    async def _deleted(self, delete: Callable[[], T]) -> T:
        """What was deleted before is gone everywhere when this raises that it is not there."""
        try:
            return await self._call(delete)
        except FacelaneError as error:
            if error.reason in (Reason.SUBJECT_NOT_FOUND, Reason.TEMPLATE_NOT_FOUND):
                # Perhaps by a call that could not wait for all: this one does.
                await self._confirmed(await self._call(self._store.last_removal))
            raise

    # templates

    async def list_templates(
        self, gallery_id: str, subject_id: str, *, corrections: bool = False
    ) -> tuple[Template, ...]:
        listed = self._store.list_templates
        return await self._call(lambda: listed(gallery_id, subject_id, corrections=corrections))

    async def delete_template(
        self, gallery_id: str, template_id: str, *, undo: bool = False
    ) -> Template:
        def delete() -> tuple[Template, int]:
            gone = self._store.delete_template(gallery_id, template_id, undo=undo)
            return gone, self._follow()

        gone, revision = await self._deleted(delete)
        await self._published(revision)
        await self._confirmed(await self._call(self._store.last_removal))
        return gone

    async def enroll(
        self,
        gallery_id: str,
        subject_id: str,
        *,
        vector: F32,
        ood_score: float,
        quality: float = 0.0,
        chip: bytes = b"",
        model_id: str = "",
        create_subject: bool = False,
        display_name: str = "",
        request: RequestKey | None = None,
        answer: Mapping[str, Any] | None = None,
        correction: Correction = Correction.NONE,
    ) -> Enrolled:
        """Adds a template of the serving model; see ``Store.enroll``. ``vector`` [dim].

        Raises POOL_UNAVAILABLE (retryable) when ``model_id``, of the model that made the
        vector, is given and not the serving one: the template would be found by no model.
        """

        def enroll() -> tuple[Enrolled, int]:
            if model_id and model_id != self._model_id:
                raise model_changing()
            new = NewTemplate(self._model_id, vector, ood_score, quality, chip, correction)
            enrolled = self._store.enroll(
                gallery_id,
                subject_id,
                new,
                create_subject=create_subject,
                display_name=display_name,
                request=request,
                answer=answer,
            )
            return enrolled, self._follow() if enrolled.created else 0

        enrolled, revision = await self._call(enroll)
        await self._published(revision)
        return enrolled

    async def recall(self, gallery_id: str, request: RequestKey) -> Enrolled | None:
        """What an earlier enrolment with this request id gave; see ``Store.recall``."""
        return await self._call(lambda: self._store.recall(gallery_id, request))

    # the audit log

    async def write_down(self, deeds: Sequence[Deed]) -> Head:
        """Adds entries to the audit log; its head then."""
        return await self.ask(lambda store: store.audit.write(deeds))

    async def ask(self, call: Callable[[Store], T], *, bounded: bool = True) -> T:
        """For what the server itself does in the store, in the store's thread."""
        return await self._call(lambda: call(self._store), bounded=bounded, counted=False)

    # chips that were kept; see ``Chips``

    async def without_chip(self) -> int:
        return await self._call(lambda: self._store.chips.without(self._model_id))

    async def behind(self, after: str, count: int) -> list[KeptChip]:
        return await self._call(lambda: self._store.chips.behind(self._model_id, after, count))

    async def renew(self, template_id: str, new: NewTemplate) -> bool:
        def renew() -> bool:
            done = self._store.chips.renew(template_id, new)
            self._follow()
            return done

        return await self._call(renew)

    async def renew_keys(self) -> int:
        """See ``Store.renew_keys``."""
        offered = await asyncio.to_thread(self.vault.offered)
        return await self._call(lambda: self._store.renew_keys(offered))

    async def counts(self) -> tuple[int, int]:
        """See ``Store.counts``."""
        return await self._call(self._store.counts)

    # the store's thread

    def _apply(self, changes: list[Change]) -> int:
        return 0 if self._index is None or not changes else self._index.apply(changes)

    def _follow(self) -> int:
        """Tells the index what the store has and it has not; the index's revision to wait for, 0 =
        none."""
        if self._is_behind and self._index is not None:
            return self._start_over()
        revision = 0
        while True:
            try:
                found = self._store.changes(self._seen, self._model_id, self._dim)
            except HistoryLostError:
                log.warning("the gallery is read anew: the store has forgotten what came between")
                return self._start_over()
            if not found:
                return revision
            revision = self._apply([c for one in found for c in changes_of(one)]) or revision
            self._seen = found[-1].revision
            for change in found:
                if change.kind in (ChangeKind.SUBJECT_REMOVED, ChangeKind.TEMPLATE_REMOVED):
                    self._removed = change.revision
                    if change.kind is ChangeKind.SUBJECT_REMOVED:
                        self._store.listed.forget(change.subject)
                    self._tell_forgotten(change.subject)

    def _tell_forgotten(self, number: int) -> None:
        for callback in self.on_forgotten:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(callback, number)

    def _start_over(self) -> int:
        """Anybody may have been taken away meanwhile: others wait to hear that this process has
        seen it, and whoever keeps names here is told."""
        revision = 0
        if self._index is not None:
            revision = self._take_all(self._index)
        else:
            self._seen = self._store.revision()
        self._removed = self._seen
        self._store.listed.clear()
        self._tell_forgotten(0)
        return revision

    def _take_all(self, index: GalleryIndex) -> int:
        with self._store.loading(self._model_id, self._dim) as (seen, rows):
            revision = index.rebase(self._model_id, self._dim, map(added, rows))
            self._seen, self._is_behind = seen, False
        return revision

    # what others do

    async def _run(self) -> None:
        """Follows what other processes commit, and says how far this one has come."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                revision = await self._call(self._follow, counted=False)
                self._lost = ""
                await self._published(revision, FOLLOWED_TIMEOUT_S)
                if self._reader.is_due or self._told < self._removed:
                    await self._acknowledge()
            except FacelaneError as error:
                # Recognition goes on from memory. ``trouble`` says why changes are refused.
                if error.reason is Reason.GALLERY_UNAVAILABLE and not error.retryable:
                    self._lost = error.metadata.get("cause", "UNUSABLE")
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("the gallery's store was not followed; trying again")
                await asyncio.sleep(RETRY_S)

    async def _acknowledge(self) -> None:
        """All that this process was told, its recognisers were told too."""

        def renew() -> int:
            while not self._reader.renew(told := self._seen):
                self._follow()
            return told

        if self._model_id:
            self._told = await self._call(renew, counted=False)

    async def _confirmed(self, revision: int, receipt: str = "") -> None:
        """Until every other process has come so far; see ``delete_subject``."""
        deadline = time.monotonic() + CONFIRMED_TIMEOUT_S
        pause = 0.002
        while lacking := await self._call(lambda: self._reader.lacking(revision)):
            if time.monotonic() > deadline:
                raise FacelaneError(
                    Reason.GALLERY_UNAVAILABLE,
                    f"deleted, but {lacking} other servers of this store have not confirmed that "
                    "they name the subject no more; call again to wait for them",
                    metadata={"cause": "NOT_CONFIRMED", "servers": str(lacking)}
                    | ({"receipt": receipt} if receipt else {}),
                    retryable=True,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)

    async def _published(self, revision: int, timeout_s: float = PUBLISHED_TIMEOUT_S) -> None:
        if self._index is None or not revision:
            return
        if not await self._index.published(revision, timeout_s):
            log.warning("gallery change committed, but not yet with every recogniser")

    async def _call(
        self, call: Callable[[], T], *, bounded: bool = True, counted: bool = True
    ) -> T:
        """``bounded`` in time; ``counted`` among those of clients, whose number is bounded."""
        if counted and not self._room.acquire(blocking=False):
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
            except (OSError, MemoryError) as error:
                # Of what recognisers share, perhaps behind the commit, which is followed again.
                log.error("a gallery call failed", error=type(error).__name__)
                raise perhaps_done() from error
            finally:
                if counted:
                    self._room.release()

        try:
            # Who acts goes along (``store.audit``).
            context = contextvars.copy_context()
            work = asyncio.get_running_loop().run_in_executor(self._executor, context.run, run)
        except RuntimeError:
            if counted:
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
            raise perhaps_done() from None
        finally:
            abandoned.set()
