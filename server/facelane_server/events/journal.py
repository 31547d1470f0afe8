"""Events on their way into the store, and what others have written on its way to the watchers.

A server tells an event when the store has it, and not before: whoever has heard of it finds it
again behind its token, at every server of the store, however many died since. While the store is
away events wait here, in their order and within a bound, and are written when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.events.feed import Event, EventFeed, EventKind, lost
from facelane_server.gallery_rules import Expiry
from facelane_server.store import events as stored
from facelane_server.store.database import Database
from facelane_server.store.events import EventRecord
from facelane_server.store.following import HistoryLostError
from facelane_server.store.vault import Vault
from facelane_server.store.watching import StoreWatch

RETRY_S: Final = 0.5
PRUNE_S: Final = 30.0
_SET_BACK_NS: Final = 1_000_000_000
TRIES: Final = 3
"""Of an event by itself that fails for a reason that nobody foresaw."""
FLUSH_S: Final = 3.0
"""How long the end of the server waits for what is not written yet."""

log = structlog.get_logger(__name__)


class EventJournal:
    """Between one feed and one store. Made by ``start``; ``close`` ends it."""

    def __init__(
        self, database: Database, vault: Vault, feed: EventFeed, *, keep: int, keep_days: float
    ) -> None:
        self._database = database
        self._vault = vault
        self._feed = feed
        self._keep = keep
        self._expiry = Expiry(int(keep_days * 86_400e9))
        self._waiting: deque[EventRecord] = deque()
        self._overflow = 0
        self._last_ns = 0
        self._seen = 0
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="event-store")
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="event-history")
        self._task: asyncio.Task[None] | None = None
        self._away = ""

    @property
    def trouble(self) -> str:
        """Why events wait, in capitals; empty = they do not."""
        return self._away

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def dropped(self) -> int:
        """Events that were never written: more waited than are kept, or they could not be."""
        return self._overflow

    async def start(self, watch: StoreWatch) -> None:
        """Raises GALLERY_UNAVAILABLE."""
        loop = asyncio.get_running_loop()
        epoch = await loop.run_in_executor(self._executor, stored.history_id, self._database)
        gone, self._seen = await loop.run_in_executor(self._executor, stored.span, self._database)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._changed.set)

        self._feed.attach(self, epoch, gone, self._seen)
        watch.subscribe(wake)
        self._task = loop.create_task(self._run(), name="event-journal")

    async def flush(self) -> None:
        """Until what happened so far was told, or ``FLUSH_S`` are over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._waiting:
                    self._written.clear()
                    await self._written.wait()

    async def close(self) -> None:
        """Writes what it can; idempotent."""
        await self.flush()
        if self._waiting:
            log.error("events were not written before the end", events=len(self._waiting))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._executor.shutdown(wait=True)
        self._readers.shutdown(wait=True)

    def take(self, event: Event) -> None:
        """From the feed, on the event loop; never waits."""
        # Never the same twice: what was written can be told from what was not. Nor the time of a
        # clock that was set back since.
        at_ns = event.time_ns
        self._last_ns = self._last_ns + 1 if 0 <= self._last_ns - at_ns < _SET_BACK_NS else at_ns
        if len(self._waiting) >= limits.MAX_EVENTS_WAITING:
            if not self._overflow:
                log.error("events are lost: the store is away, and no more of them are kept")
            self._overflow += 1
            return
        self._waiting.append(
            EventRecord(
                0,
                event.kind.value,
                self._last_ns,
                event.source_id,
                event.stream_id,
                event.gallery_id,
                event.track,
                event.pool,
                event.message,
                event.sender,
                event.rule,
                as_of=event.as_of,
            )
        )
        self._changed.set()

    async def older(self, seen: int) -> list[Event]:
        """Events behind ``seen`` from the store, which the feed does not have. Raises HISTORY_LOST,
        and GALLERY_UNAVAILABLE (retryable) while the store is away."""
        loop = asyncio.get_running_loop()
        try:
            records = await loop.run_in_executor(
                self._readers, stored.after, self._database, self._vault, seen
            )
        except HistoryLostError:
            raise lost("more has happened since that token than is kept") from None
        except RuntimeError:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down; watch again", retryable=True
            ) from None
        return [_event(record) for record in records]

    async def find(self, sequence: int) -> Event | None:
        """The event of a number. Raises GALLERY_UNAVAILABLE (retryable) while the store is away."""
        loop = asyncio.get_running_loop()
        try:
            record = await loop.run_in_executor(
                self._readers, stored.one, self._database, self._vault, sequence
            )
        except RuntimeError:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down; ask again", retryable=True
            ) from None
        return None if record is None else _event(record)

    async def before(
        self,
        sequence: int,
        count: int,
        *,
        kinds: Sequence[str],
        source_ids: Sequence[str],
        gallery_ids: Sequence[str],
    ) -> list[Event]:
        """See ``store.events.before``. Raises GALLERY_UNAVAILABLE (retryable)."""
        loop = asyncio.get_running_loop()
        asked = functools.partial(
            stored.before,
            self._database,
            self._vault,
            sequence,
            count,
            kinds=kinds,
            source_ids=source_ids,
            gallery_ids=gallery_ids,
        )
        try:
            records = await loop.run_in_executor(self._readers, asked)
        except RuntimeError:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down; ask again", retryable=True
            ) from None
        return [_event(record) for record in records]

    # -- the task ----------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[EventRecord] = []
        again, pruned = False, 0.0
        # Of a batch that failed for a reason that nobody foresaw, each is tried by itself: one that
        # cannot be written keeps nobody else's.
        suspects = tries = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PRUNE_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                while self._waiting:
                    if not again:  # what was tried is tried as it was: it may be there, whole
                        most = 1 if suspects else limits.MAX_EVENT_BATCH
                        count = min(len(self._waiting), most)
                        batch = [self._waiting[n] for n in range(count)]
                    attempt, again = again or suspects > 0, True
                    await loop.run_in_executor(self._executor, self._append, batch, attempt)
                    again, tries = False, 0
                    suspects = max(0, suspects - len(batch))
                    for _ in batch:
                        self._waiting.popleft()
                    batch = []  # they name people
                    await self._read()
                await self._read()
                if self._away:
                    log.info("the store takes events again", was=self._away)
                    self._away = ""
                if time.monotonic() - pruned >= PRUNE_S:
                    pruned = time.monotonic()
                    await self._prune()
            except FacelaneError as error:
                if not self._away:
                    log.warning("events wait for the store", reason=error.metadata.get("cause"))
                self._away = error.metadata.get("trouble") or error.metadata.get("cause", "AWAY")
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            except Exception:
                # Nothing may end this task: those who watch would hear of nothing any more.
                log.exception("events were not written or read; trying again")
                tries += again
                if again and len(batch) > 1:
                    suspects, again, tries = len(batch), False, 0
                elif again and tries >= TRIES:
                    log.error("an event cannot be written, and is left out", kind=batch[0].kind)
                    self._waiting.popleft()
                    self._overflow += 1
                    suspects, again, tries = max(0, suspects - 1), False, 0
                    batch = []
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            self._written.set()

    def _append(self, batch: list[EventRecord], again: bool) -> None:
        stored.append(self._database, self._vault, batch, again=again)

    async def _read(self) -> None:
        """All that is in the store goes to those who watch, whoever wrote it."""
        loop = asyncio.get_running_loop()
        while True:
            cleared = self._feed.cleared
            try:
                records = await loop.run_in_executor(
                    self._executor, stored.after, self._database, self._vault, self._seen
                )
            except HistoryLostError:
                gone, self._seen = await loop.run_in_executor(
                    self._executor, stored.span, self._database
                )
                self._feed.skip(gone, self._seen)
                log.warning("events were missed: the store forgot them, or is an earlier one")
                return
            if self._feed.cleared != cleared:
                continue  # read before somebody was deleted
            if not records:
                return
            self._seen = records[-1].sequence
            self._feed.receive([_event(record) for record in records])

    async def _prune(self) -> None:
        loop = asyncio.get_running_loop()
        before_ns = self._expiry.before_ns()

        def prune() -> int:
            return stored.prune(self._database, keep=self._keep, before_ns=before_ns)

        while await loop.run_in_executor(self._executor, prune) >= limits.MAX_EVENTS_PRUNED:
            pass
        gone, _ = await loop.run_in_executor(self._executor, stored.span, self._database)
        self._feed.forgotten(gone)


def _event(record: EventRecord) -> Event:
    return Event(
        record.sequence,
        EventKind(record.kind),
        record.time_ns,
        record.source_id,
        record.stream_id,
        record.gallery_id,
        record.track,
        record.pool,
        record.message,
        record.sender,
        record.rule,
        record.candidate,
    )
