"""What happened, for those who watch: one bounded history, many readers.

An event is written once, into a ring of ``limits.EVENT_HISTORY``. A watcher is no queue but
a position in that ring, so a slow one costs nothing and delays nobody; when the ring has
overtaken it, it is told HISTORY_LOST and ends. Nothing is ever skipped silently.

A resume token names a position: ``epoch`` (this server's life, random) and the sequence
number of the last event seen. A token of another life, or of a position that the ring has
overtaken, is HISTORY_LOST as well: the watcher knows then that it missed something, and
starts again without a token.
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
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, replace
from typing import Final, Self

import msgspec

from facelane_server import limits
from facelane_server.domain import Decision, FacelaneError, Identity, Reason, TrackReport

_TOKEN: Final = struct.Struct(">8sQ")


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


@dataclass(frozen=True, slots=True)
class Event:
    """``sequence`` counts from 1 in one life of the server. ``time_ns``: wall clock, since
    the epoch. Fields that do not belong to the kind are empty."""

    sequence: int
    kind: EventKind
    time_ns: int
    source_id: str = ""
    stream_id: str = ""
    gallery_id: str = ""
    track: TrackReport | None = None
    pool: str = ""
    message: str = ""


class EventFeed:
    """The history and its watchers. All calls from the event loop's thread."""

    def __init__(
        self,
        *,
        history: int = limits.EVENT_HISTORY,
        max_watchers: int = limits.MAX_EVENT_WATCHERS,
        clock_ns: Callable[[], int] = time.time_ns,
        epoch: bytes | None = None,
    ) -> None:
        """``epoch``: 8 bytes that differ between lives of the server; random by default."""
        self._ring: deque[Event] = deque(maxlen=history)
        self._max_watchers = max_watchers
        self._clock_ns = clock_ns
        self._epoch = secrets.token_bytes(8) if epoch is None else epoch
        self._watchers: set[Watcher] = set()
        self._sequence = 0
        self._closed = False

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
    ) -> Event:
        """Writes an event and wakes the watchers; never waits for one."""
        self._sequence += 1
        event = Event(
            self._sequence,
            kind,
            self._clock_ns(),
            source_id,
            stream_id,
            gallery_id,
            track,
            pool,
            message,
        )
        self._ring.append(event)
        for watcher in self._watchers:
            watcher.wake.set()
        return event

    def token(self, event: Event) -> str:
        """Resumes after this event."""
        return self.token_after(event.sequence)

    def token_after(self, sequence: int) -> str:
        """Resumes after the event of this number; 0 = before the first one."""
        packed = _TOKEN.pack(self._epoch, sequence)
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    def watch(self, resume_token: str = "", kinds: Collection[EventKind] = ()) -> Watcher:
        """A watcher from now on, or from a token. No ``kinds`` = all of them.

        Use it as a context manager: it counts against the bound until it is closed. Raises
        RESUME_TOKEN_INVALID, HISTORY_LOST, STREAM_LIMIT (retryable), DRAINING (retryable).
        """
        if self._closed:
            raise _draining()
        seen = self._read(resume_token) if resume_token else self._sequence
        if len(self._watchers) >= self._max_watchers:
            raise FacelaneError(
                Reason.STREAM_LIMIT,
                f"{self._max_watchers} calls watch events already; end one, or share its events",
                metadata={"limit": str(self._max_watchers)},
                retryable=True,
            )
        watcher = Watcher(self, seen, frozenset(kinds))
        self._watchers.add(watcher)
        return watcher

    def forget_subject(self, gallery_id: str, subject_id: str) -> None:
        """Takes the subject out of what is kept: its events stay, and name nobody."""
        for index, event in enumerate(self._ring):
            track = event.track
            if track is None or event.gallery_id != gallery_id:
                continue
            identity = track.identity
            near = tuple(c for c in identity.candidates if c.subject_id != subject_id)
            if identity.subject_id == subject_id:
                identity = Identity(Decision.NOT_EVALUATED)
            elif len(near) < len(identity.candidates):
                identity = msgspec.structs.replace(identity, candidates=near)
            else:
                continue
            self._ring[index] = replace(
                event, track=msgspec.structs.replace(track, identity=identity)
            )

    def close(self) -> None:
        """Ends every watcher with DRAINING, once it has read what is there; idempotent."""
        self._closed = True
        for watcher in self._watchers:
            watcher.wake.set()

    def _read(self, token: str) -> int:
        try:
            packed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            epoch, sequence = _TOKEN.unpack(packed)
        except (binascii.Error, ValueError, struct.error):
            raise _invalid_token() from None
        if epoch != self._epoch:
            raise _lost("the server has restarted since that token")
        if sequence > self._sequence:
            raise _invalid_token()
        if sequence < self._sequence - len(self._ring):
            raise _lost("more has happened since that token than is kept")
        return int(sequence)

    # for the watchers

    def after(self, sequence: int) -> list[Event]:
        """At most ``limits.MAX_EVENT_BATCH`` events behind ``sequence``. Raises HISTORY_LOST."""
        behind = self._sequence - sequence
        start = len(self._ring) - behind
        if start < 0:
            raise _lost("this call read more slowly than events came")
        end = start + min(behind, limits.MAX_EVENT_BATCH)
        return list(itertools.islice(self._ring, start, end))

    @property
    def closed(self) -> bool:
        return self._closed

    def forget(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)


class Watcher:
    """One reader of the feed; made by ``EventFeed.watch``."""

    def __init__(self, feed: EventFeed, seen: int, kinds: frozenset[EventKind]) -> None:
        self._feed = feed
        self._seen = seen
        self._kinds = kinds
        self.wake = asyncio.Event()

    @property
    def resume_token(self) -> str:
        """Resumes after what this watcher has read."""
        return self._feed.token_after(self._seen)

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
            self.wake.clear()
            events = self._feed.after(self._seen)
            if not events:
                if self._feed.closed:
                    raise _draining()
                await self.wake.wait()
                continue
            self._seen = events[-1].sequence
            wanted = [e for e in events if e.kind in self._kinds] if self._kinds else events
            if wanted:
                return wanted

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            for event in await self.batch():
                yield event


def _invalid_token() -> FacelaneError:
    return FacelaneError(
        Reason.RESUME_TOKEN_INVALID,
        "resume_token is not one that this service gave; watch without one",
    )


def _lost(why: str) -> FacelaneError:
    return FacelaneError(
        Reason.HISTORY_LOST,
        f"events were missed: {why}; watch again without a resume_token",
    )


def _draining() -> FacelaneError:
    return FacelaneError(
        Reason.DRAINING,
        "the server is shutting down; watch again with the last resume_token",
        retryable=True,
    )
