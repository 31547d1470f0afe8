"""What happened, for those who watch: one bounded history, many readers.

An event is told once, from a ring of ``limits.EVENT_HISTORY``. A watcher is no queue but
a position, so a slow one costs nothing and delays nobody. What the ring has lost is read from the
store (``journal``), for as long as it is kept there; without a store, or behind that, the watcher
is told HISTORY_LOST and ends. Nothing is ever skipped silently.

A resume token names a position: ``epoch`` (of the store; without one, of this server's life), the
sequence number of the last event seen, and a mark of that event. A token of another epoch, of a
position that is not kept any more, or of an event that is another one by now (a backup of the store
was restored, and has gone on) is HISTORY_LOST as well: the watcher knows then that it missed
something, and starts again without a token.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import itertools
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self, TypeVar

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, RuleReport, TrackReport
from facelane_server.store.events import without

T = TypeVar("T")

_TOKEN: Final = struct.Struct(">8sQI")
_UNMARKED: Final = struct.Struct(">8sQ")
PROGRESS_EVENTS: Final = 256
PROGRESS_S: Final = 30.0
"""A watcher is told how far it has come after so many events that are not for it, and after so long
where there are fewer."""


class EventKind(enum.StrEnum):
    """See ``event_service.proto``, which has the same names."""

    SUBJECT_SEEN = "SUBJECT_SEEN"
    UNKNOWN_SEEN = "UNKNOWN_SEEN"
    SPOOF_SUSPECTED = "SPOOF_SUSPECTED"
    STREAM_OPENED = "STREAM_OPENED"
    STREAM_CLOSED = "STREAM_CLOSED"
    POOL_CHANGED = "POOL_CHANGED"
    DEVICE_MEMORY = "DEVICE_MEMORY"
    TRACK_STARTED = "TRACK_STARTED"
    TRACK_UPDATED = "TRACK_UPDATED"
    TRACK_ENDED = "TRACK_ENDED"
    FACE_HIDDEN = "FACE_HIDDEN"
    ZONE_ENTERED = "ZONE_ENTERED"
    ZONE_LEFT = "ZONE_LEFT"
    ZONE_DWELL = "ZONE_DWELL"
    ZONE_UNKNOWN = "ZONE_UNKNOWN"
    LINE_CROSSED = "LINE_CROSSED"
    SUBJECT_CANDIDATE = "SUBJECT_CANDIDATE"


@dataclass(frozen=True, slots=True)
class Event:
    """``sequence`` counts from 1 in one store, over all its servers and their lives; 0 = not
    written yet. ``time_ns``: wall clock, since the epoch. Fields that do not belong to the kind are
    empty. ``sender``: the name of the key whose stream it is about, for who may hear of it; no
    watcher is told."""

    sequence: int
    kind: EventKind
    time_ns: int
    source_id: str = ""
    stream_id: str = ""
    gallery_id: str = ""
    track: TrackReport | None = None
    pool: str = ""
    message: str = ""
    sender: str = ""
    rule: RuleReport | None = None
    candidate: int = 0
    """The sequence of the SUBJECT_CANDIDATE that was confirmed, 0 = none."""
    as_of: int = 0
    """While it is on its way into the store: see ``EventRecord``."""


class Keeper(Protocol):
    """What keeps events beyond the ring; see ``journal``."""

    def take(self, event: Event) -> None:
        """An event that has just happened: it comes back, numbered, by ``EventFeed.receive``."""

    async def older(self, seen: int) -> list[Event]:
        """Events behind ``seen``, oldest first; none = there is none yet. Raises HISTORY_LOST."""

    async def find(self, sequence: int) -> Event | None:
        """The event of a number, while it is kept."""

    async def before(
        self,
        sequence: int,
        count: int,
        *,
        kinds: Sequence[str],
        source_ids: Sequence[str],
        gallery_ids: Sequence[str],
    ) -> list[Event]:
        """Older events, the newest first; see ``store.events.before``."""


class EventFeed:
    """The history and its watchers. All calls from the event loop's thread."""

    def __init__(
        self,
        *,
        history: int = limits.EVENT_HISTORY,
        max_watchers: int = limits.MAX_EVENT_WATCHERS,
        clock_ns: Callable[[], int] = time.time_ns,
        epoch: bytes | None = None,
        recorded: bool = False,
    ) -> None:
        """``epoch``: 8 bytes that differ between lives of the server; random by default.
        ``recorded``: events are told when a keeper has them; until it is attached they wait."""
        self._ring: deque[Event] = deque(maxlen=history)
        self._max_watchers = max_watchers
        self._clock_ns = clock_ns
        self._epoch = secrets.token_bytes(8) if epoch is None else epoch
        self._watchers: set[Watcher] = set()
        self._sequence = 0
        self._closed = False
        self._recorded = recorded
        self._keeper: Keeper | None = None
        self._gone = 0
        """The newest event that is kept nowhere any more."""
        self._early: list[Event] = []
        self.cleared = 0
        """Counts deletions: what was read before the last one may name who was deleted."""

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    @property
    def newest(self) -> int:
        """The sequence number of the last event; 0 = none yet."""
        return self._sequence

    def publish(
        self,
        kind: EventKind,
        *,
        source_id: str = "",
        stream_id: str = "",
        gallery_id: str = "",
        track: TrackReport | None = None,
        pool: str = "",
        message: str = "",
        sender: str = "",
        rule: RuleReport | None = None,
        as_of: int = 0,
    ) -> Event:
        """Tells an event, now or when it is kept; never waits. In the order of the calls."""
        event = Event(
            0,
            kind,
            self._clock_ns(),
            source_id,
            stream_id,
            gallery_id,
            track,
            pool,
            message,
            sender,
            rule,
            as_of=as_of,
        )
        if self._keeper is not None:
            self._keeper.take(event)
        elif self._recorded:
            if len(self._early) < limits.EVENT_HISTORY:
                self._early.append(event)
        else:
            event = replace(event, sequence=self._sequence + 1)
            self.receive([event])
        return event

    # for the keeper

    def attach(self, keeper: Keeper, epoch: bytes, gone: int, newest: int) -> None:
        """Events are the keeper's from here on. ``gone``: the newest that is not kept any more."""
        self._keeper, self._epoch = keeper, epoch
        self.skip(gone, newest)
        early, self._early = self._early, []
        for event in early:
            keeper.take(event)

    def receive(self, events: Sequence[Event]) -> None:
        """Tells what is kept: the next ones, without a gap."""
        for event in events:
            assert event.sequence == self._sequence + 1
            self._sequence = event.sequence
            self._ring.append(event)
        self._wake()

    def skip(self, gone: int, newest: int) -> None:
        """What is kept is another history, or has a gap before ``newest``."""
        self._ring.clear()
        self._gone, self._sequence = gone, newest
        self._wake()

    def forgotten(self, gone: int) -> None:
        """Events up to this one are not kept any more."""
        self._gone = max(self._gone, gone)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.wake.set()

    def token(self, event: Event) -> str:
        """Resumes after this event."""
        return self.token_after(event.sequence, _mark(event))

    def token_after(self, sequence: int, mark: int = 0) -> str:
        """Resumes after the event of this number; 0 = before the first one. ``mark``: what that
        event is told from others by, 0 = it is not known."""
        named = (self._epoch, sequence)
        packed = _TOKEN.pack(*named, mark) if mark else _UNMARKED.pack(*named)
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    def watch(
        self,
        resume_token: str = "",
        kinds: Collection[EventKind] = (),
        *,
        source_ids: Collection[str] = (),
        gallery_ids: Collection[str] = (),
    ) -> Watcher:
        """A watcher from now on, or from a token. No ``kinds``, ``source_ids``, ``gallery_ids`` =
        all of them; else events of those alone.

        Use it as a context manager: it counts against the bound until it is closed. Raises
        RESUME_TOKEN_INVALID, HISTORY_LOST, STREAM_LIMIT (retryable), DRAINING (retryable).
        """
        if self._closed:
            raise _draining()
        newest = self._ring[-1] if self._ring else None
        seen, mark = self._sequence, 0 if newest is None else _mark(newest)
        if resume_token:
            seen, mark = self._read(resume_token)
        if len(self._watchers) >= self._max_watchers:
            raise FacelaneError(
                Reason.STREAM_LIMIT,
                f"{self._max_watchers} calls watch events already; end one, or share its events",
                metadata={"limit": str(self._max_watchers)},
                retryable=True,
            )
        wanted = Wanted(frozenset(kinds), frozenset(source_ids), frozenset(gallery_ids))
        watcher = Watcher(self, seen, wanted, mark, is_sure=not resume_token)
        self._watchers.add(watcher)
        return watcher

    def forget_subject(self, gallery_id: str, subject_id: str) -> None:
        """Takes the subject out of what is kept: its events stay, and name nobody."""
        self.cleared += 1
        if self._keeper is not None:
            # In the store it was done with the deletion: what the ring has is read again there.
            self._ring.clear()
            return
        for index, event in enumerate(self._ring):
            if event.track is not None and event.gallery_id == gallery_id:
                self._ring[index] = replace(event, track=without(event.track, subject_id))

    def close(self) -> None:
        """Ends every watcher with DRAINING, once it has read what is there; idempotent."""
        self._closed = True
        for watcher in self._watchers:
            watcher.wake.set()

    def _read(self, token: str) -> tuple[int, int]:
        try:
            packed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            is_marked = len(packed) == _TOKEN.size
            epoch, sequence, mark = (
                _TOKEN.unpack(packed) if is_marked else (*_UNMARKED.unpack(packed), 0)
            )
        except (binascii.Error, ValueError, struct.error):
            raise _invalid_token() from None
        if epoch != self._epoch:
            raise lost(
                "the server has restarted since that token"
                if self._keeper is None
                else "that token is of another store"
            )
        # A keeper may have it from another server, a moment ahead.
        ahead = limits.MAX_SEQUENCE if self._keeper is not None else self._sequence
        if sequence > ahead:
            raise _invalid_token()
        gone = self._first if self._keeper is None else self._gone
        if sequence < gone:
            raise lost("more has happened since that token than is kept", self.token_after(gone))
        return int(sequence), int(mark)

    @property
    def _first(self) -> int:
        """The newest event that the ring has not."""
        return self._sequence - len(self._ring)

    def held(self, sequence: int) -> Event | None:
        """The event of a number, while the ring has it."""
        if self._first < sequence <= self._sequence:
            return self._ring[sequence - self._first - 1]
        return None

    async def find(self, sequence: int) -> Event | None:
        """The event of a number, while it is kept. Raises GALLERY_UNAVAILABLE."""
        if sequence > limits.MAX_SEQUENCE:
            return None
        if (keeper := self._keeper) is not None:
            return await self._now(lambda: keeper.find(sequence))
        return next((event for event in self._ring if event.sequence == sequence), None)

    async def before(
        self,
        sequence: int,
        count: int,
        *,
        kinds: Sequence[str] = (),
        source_ids: Sequence[str] = (),
        gallery_ids: Sequence[str] = (),
    ) -> list[Event]:
        """At most ``count`` events before ``sequence`` (0 = from the newest on), the newest first.
        Raises GALLERY_UNAVAILABLE."""
        sequence = min(sequence, limits.MAX_SEQUENCE)
        if (keeper := self._keeper) is not None:
            return await self._now(
                lambda: keeper.before(
                    sequence, count, kinds=kinds, source_ids=source_ids, gallery_ids=gallery_ids
                )
            )
        found = [
            event
            for event in reversed(self._ring)
            if (not sequence or event.sequence < sequence)
            and (not kinds or event.kind.value in kinds)
            and (not source_ids or event.source_id in source_ids)
            and (not gallery_ids or event.gallery_id in gallery_ids)
        ]
        return found[:count]

    # for the watchers

    async def after(self, sequence: int) -> list[Event]:
        """At most ``limits.MAX_EVENT_BATCH`` events behind ``sequence``. Raises HISTORY_LOST."""
        if self._first <= sequence <= self._sequence:
            start = sequence - self._first
            return list(itertools.islice(self._ring, start, start + limits.MAX_EVENT_BATCH))
        if (keeper := self._keeper) is not None:
            return await self._now(lambda: keeper.older(sequence))
        raise lost("this call read more slowly than events came", self.token_after(self._first))

    async def _now(self, read: Callable[[], Awaitable[T]]) -> T:
        """What the keeper has; what it read before somebody was deleted is read again."""
        while True:
            cleared = self.cleared
            found = await read()
            if self.cleared == cleared:
                return found

    @property
    def closed(self) -> bool:
        return self._closed

    def forget(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a watcher is told; an empty set is everything."""

    kinds: frozenset[EventKind]
    source_ids: frozenset[str]
    gallery_ids: frozenset[str]

    def __contains__(self, event: Event) -> bool:
        return (
            (not self.kinds or event.kind in self.kinds)
            and (not self.source_ids or event.source_id in self.source_ids)
            and (not self.gallery_ids or event.gallery_id in self.gallery_ids)
        )


class Watcher:
    """One reader of the feed; made by ``EventFeed.watch``."""

    def __init__(
        self, feed: EventFeed, seen: int, wanted: Wanted, mark: int = 0, *, is_sure: bool = True
    ) -> None:
        """``mark``: of the event ``seen``, see ``EventFeed.token_after``; ``is_sure``: it is that
        one."""
        self._feed = feed
        self._seen = seen
        self._wanted = wanted
        self._mark = mark
        self._is_sure = is_sure or not mark
        self.wake = asyncio.Event()

    @property
    def seen(self) -> int:
        """The newest event that was read."""
        return self._seen

    @property
    def resume_token(self) -> str:
        """Resumes after what this watcher has read."""
        return self._feed.token_after(self._seen, self._mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._feed.forget(self)

    async def batch(self) -> list[Event]:
        """The next events, at least one, oldest first; waits for them without a deadline of
        its own, because nothing may happen for long: the caller's cancellation ends it.

        Raises HISTORY_LOST when the feed has overtaken this watcher, and DRAINING when the
        feed was closed and all was read.
        """
        while True:
            if wanted := await self._next():
                return wanted

    async def _next(self) -> list[Event]:
        """What is wanted of the next events; perhaps none of them."""
        if not self._is_sure:
            there = self._feed.held(self._seen) or await self._feed.find(self._seen)
            if there is not None and _mark(there) != self._mark:
                raise lost("the store is an earlier one, which has gone on since")
            self._is_sure = True
        while True:
            self.wake.clear()
            events = await self._feed.after(self._seen)
            if events:
                self._seen, self._mark = events[-1].sequence, _mark(events[-1])
                return [event for event in events if event in self._wanted]
            if self._feed.closed:
                raise _draining()
            await self.wake.wait()

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in self.steps():
            if event is not None:
                yield event
            del event

    async def steps(self) -> AsyncIterator[Event | None]:
        """The events, and ``None`` wherever all up to ``seen`` were given or are not wanted, which
        does not depend on what is; raises as ``batch`` does."""
        event: Event | None
        while True:
            begun, mark = self._seen, self._mark
            events = await self._next()
            cleared = self._feed.cleared
            for event in events:
                if self._feed.cleared != cleared:
                    # It is read again, without who was deleted meanwhile.
                    self._seen, self._mark = begun, mark
                    break
                begun, mark = event.sequence, _mark(event)
                yield event
            else:
                event = None
                yield None
            del events, event  # until the next ones come, nobody is kept here


class Progress:
    """When somebody who hears little is to be told how far he has come: the token of his last event
    would be of a time that is not kept any more, though he has missed nothing."""

    def __init__(self, at: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.told(at)

    def told(self, at: int) -> None:
        """The token of this event was given."""
        self._at, self._told_s = at, self._clock()

    def is_due(self, at: int) -> bool:
        """Whether it is, with this event; it is counted as told then."""
        due = at - self._at >= PROGRESS_EVENTS or self._clock() - self._told_s >= PROGRESS_S
        if due:
            self.told(at)
        return due


def _mark(event: Event) -> int:
    """32 bits by which an event is told from another one of its number; never 0. Of its time alone:
    a watcher is given it of events, too, that are not for it."""
    return zlib.crc32(event.time_ns.to_bytes(8, "big", signed=True)) or 1


def _invalid_token() -> FacelaneError:
    return FacelaneError(
        Reason.RESUME_TOKEN_INVALID,
        "resume_token is not one that this service gave; watch without one",
    )


def event_not_found() -> FacelaneError:
    return FacelaneError(
        Reason.EVENT_NOT_FOUND, "there is no such event, or it is not kept any more"
    )


def lost(why: str, kept: str = "") -> FacelaneError:
    """``kept``: the token before the oldest event that there still is."""
    return FacelaneError(
        Reason.HISTORY_LOST,
        f"events were missed: {why}; watch again without a resume_token"
        + (", or from the one in the metadata on" if kept else ""),
        metadata={"resume_token": kept} if kept else {},
    )


def _draining() -> FacelaneError:
    return FacelaneError(
        Reason.DRAINING,
        "the server is shutting down; watch again with the last resume_token",
        retryable=True,
    )
