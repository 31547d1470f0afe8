"""Pictures of events on their way into the store: the best shot of each track until something is
told of it, then encoded by a worker, sealed and written.

They are no part of the events' own way: an event is told whether or not its picture is there
already, and a picture that finds no room, no worker or no store is not kept, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from facelane_server import limits
from facelane_server.domain import (
    Decision,
    FacelaneError,
    Identity,
    Keeping,
    Portrait,
    Reason,
    TrackReport,
)
from facelane_server.events.feed import EventKind
from facelane_server.gallery_rules import Expiry
from facelane_server.store.pictures import Photo, Pictures, new_id, not_found

log = structlog.get_logger(__name__)

T = TypeVar("T")

PRUNE_S: Final = 30.0
POLL_S: Final = 0.05

Encode = Callable[[tuple[bytes, ...]], Awaitable[tuple[bytes, ...]]]
"""JPEGs of square pictures; raises ``FacelaneError``."""

SHOWN: Final = (
    EventKind.SUBJECT_SEEN,
    EventKind.UNKNOWN_SEEN,
    EventKind.SPOOF_SUSPECTED,
)
"""The kinds of events that may have a picture."""


class BestShots:
    """The clearest portrait of each track; those of the longest-untouched tracks go first. Pure."""

    def __init__(self, most: int = limits.MAX_PORTRAITS) -> None:
        self._most = most
        self._count = 0
        self._best: OrderedDict[tuple[int, int], tuple[int, Portrait]] = OrderedDict()
        """With its number, which tells it from others when it is gone."""

    def __len__(self) -> int:
        return len(self._best)

    def note(self, lane_id: int, track_id: int, portrait: Portrait) -> None:
        key = (lane_id, track_id)
        known = self._best.get(key)
        if known is None or portrait.promise >= known[1].promise:
            self._count += 1
            self._best[key] = self._count, portrait
        self._best.move_to_end(key)
        while len(self._best) > self._most:
            self._best.popitem(last=False)

    def best(self, lane_id: int, track_id: int) -> Portrait | None:
        return self.numbered(lane_id, track_id)[1]

    def numbered(self, lane_id: int, track_id: int) -> tuple[int, Portrait | None]:
        """With its number; 0 = there is none."""
        return self._best.get((lane_id, track_id), (0, None))

    def forget(self, lane_id: int, track_id: int | None = None) -> None:
        """One track, or all of a lane."""
        if track_id is not None:
            self._best.pop((lane_id, track_id), None)
            return
        for key in [key for key in self._best if key[0] == lane_id]:
            del self._best[key]


def wanted(kind: EventKind, identity: Identity, keeping: Keeping) -> bool:
    """Whether an event has a picture kept. Pure."""
    if kind not in SHOWN or keeping is Keeping.NONE:
        return False
    return keeping is Keeping.ALL or identity.decision is not Decision.MATCH


@dataclass(frozen=True, slots=True)
class _Waiting:
    picture_id: str
    portrait: Portrait
    time_ns: int
    gallery_id: str
    subject_id: str
    as_of: int


class EventPictures:
    """Of one server. ``run`` until it is cancelled, then ``close``. All calls on the event loop."""

    def __init__(self, store: Pictures, encode: Encode, *, keep: int, keep_days: float) -> None:
        self._store = store
        self._encode = encode
        self._keep = keep
        self._expiry = Expiry(int(keep_days * 86_400e9))
        self._shots = BestShots()
        self._taken: dict[tuple[int, int], tuple[int, str, str]] = {}
        """By track: the number of what was taken last, of whom, and by which it is kept."""
        self._waiting: deque[_Waiting] = deque()
        self._under_way: set[str] = set()
        self._changed = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="picture-store")
        self.dropped = 0
        """Pictures that were to be kept, and were not."""

    def note(self, lane_id: int, track_id: int, portrait: Portrait) -> None:
        """A look at a track."""
        self._shots.note(lane_id, track_id, portrait)

    def forget(self, lane_id: int, track_id: int | None = None) -> None:
        """A track, or all of a lane, has ended."""
        self._shots.forget(lane_id, track_id)
        if track_id is not None:
            self._taken.pop((lane_id, track_id), None)
            return
        for key in [key for key in self._taken if key[0] == lane_id]:
            del self._taken[key]

    def forgotten(self, _number: int = 0) -> None:
        """Somebody was deleted: what was kept of a track may have gone too, and is taken anew."""
        self._taken.clear()

    def take(
        self,
        lane_id: int,
        kind: EventKind,
        report: TrackReport,
        *,
        gallery_id: str,
        keeping: Keeping,
        as_of: int = 0,
    ) -> str:
        """What the event's picture is kept by, where it has one; never waits. ``as_of``: see
        ``EventRecord``."""
        if not wanted(kind, report.identity, keeping):
            return ""
        number, portrait = self._shots.numbered(lane_id, report.track_id)
        if portrait is None or not self._store.are_kept:
            return ""
        subject_id = report.identity.subject_id
        taken = self._taken.get((lane_id, report.track_id))
        if taken is not None and taken[0] == number and taken[1] == subject_id:
            return taken[2]  # the same shot says it again
        if len(self._waiting) >= limits.MAX_PICTURES_WAITING:
            self._drop("too many wait")
            return ""
        picture_id = new_id()
        self._taken[lane_id, report.track_id] = (number, subject_id, picture_id)
        self._waiting.append(
            _Waiting(picture_id, portrait, time.time_ns(), gallery_id, subject_id, as_of)
        )
        self._under_way.add(picture_id)
        self._changed.set()
        return picture_id

    def _drop(self, why: str) -> None:
        self.dropped += 1
        log.warning("a picture of an event is not kept", why=why, so_far=self.dropped)

    async def get(self, picture_id: str) -> Photo:
        """Waits for one that is on its way. Raises PICTURE_NOT_FOUND, GALLERY_UNAVAILABLE."""
        deadline = time.monotonic() + limits.PICTURE_S
        while picture_id in self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        found = await self._call(lambda: self._store.get(picture_id))
        if found is None:
            raise not_found()
        return found

    async def give(self, picture_id: str, gallery_id: str, subject_id: str) -> bool:
        """See ``Pictures.give``."""
        return await self._call(lambda: self._store.give(picture_id, gallery_id, subject_id))

    async def run(self) -> None:
        while True:
            # First of all: while no server ran, pictures have come of age.
            with contextlib.suppress(FacelaneError):  # the next time, then
                await self._prune()
            pruned = time.monotonic()
            while (left := pruned + PRUNE_S - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                self._changed.clear()
                while self._waiting:
                    await self._keep_next()

    async def _keep_next(self) -> None:
        # Held by this call alone: nobody's face stays behind while nothing else happens.
        one = self._waiting.popleft()
        try:
            await self._write(one)
        except FacelaneError as error:
            self._drop(error.reason.value)
        except Exception:
            log.exception("a picture of an event was not kept")
            self.dropped += 1
        finally:
            self._under_way.discard(one.picture_id)

    async def _write(self, one: _Waiting) -> None:
        portrait = one.portrait
        sources = (portrait.around, portrait.chip) if portrait.chip else (portrait.around,)
        jpegs = await self._encode(sources)
        photo = Photo(*jpegs)
        await self._call(
            lambda: self._store.add(
                one.picture_id,
                photo,
                one.time_ns,
                gallery_id=one.gallery_id,
                subject_id=one.subject_id,
                as_of=one.as_of,
            )
        )

    async def _prune(self) -> None:
        before_ns = self._expiry.before_ns()

        def prune() -> int:
            return self._store.prune(keep=self._keep, before_ns=before_ns)

        while await self._call(prune) >= limits.MAX_PICTURES_PRUNED:
            pass

    async def _call(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except RuntimeError:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down", retryable=True
            ) from None

    def close(self) -> None:
        """What waits is not kept."""
        self._executor.shutdown(wait=True)
