"""How a detector's jobs come to their pictures: by threads, beside what its loop does.

Of a job the stills are one call each, and the lanes of video. Where decoding is waiting for a
device (``VideoEngine.waits``) a job of video is read before it has its turn, beside those before
it: however few pictures it is of, a card takes milliseconds.

Lanes of which a job brings only what nobody looks at are decoded on threads of their own, and no
job waits for them but one that has the lane's next picture.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from facelane_server import limits
from facelane_server.domain import FacelaneError
from facelane_server.ipc.messages import PictureHeld, VideoItem
from facelane_server.models import api
from facelane_server.models.api import U8
from facelane_server.worker.decoding.patience import Decoders, Lanes, Run
from facelane_server.worker.decoding.video import Sessions, VideoEngine

_AHEAD: Final = 0.25
"""Of a job's time, what may be spent on what nobody looks at."""
_MOST_AHEAD: Final = 4
"""Jobs of which that is under way; who brings more waits for the first."""
_LOOK_S: Final = 0.05
"""How often it is looked after while a job is read."""

Read = tuple[U8, tuple[int, int]] | U8 | api.DevicePicture | FacelaneError | PictureHeld
"""What became of one picture before the model sees it; with its size as stored, if shrunk."""
Meanwhile = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one job: under way, until ``Reader.end``."""

    run: Run[Sequence[Read]]
    numbers: Sequence[Sequence[int]]
    """Of the items of each call."""
    ahead: Mapping[int, PictureHeld]
    """Of the items that nobody looks at: how far their decoders will be. Where one will not, it
    says so when it is given the lane's next picture."""


class Reader:
    """Used by one thread. ``engine``: who decodes video, None = nobody looks at pixels;
    ``timeout_s``: what a job may take."""

    def __init__(
        self, engine: VideoEngine | None, threads: int, *, max_pixels: int, timeout_s: float
    ) -> None:
        self._video = Sessions(engine, max_pixels=max_pixels)
        lanes, given_up = Lanes(), self._video.given_up
        first = None if engine is None else engine.settle_in
        picture_s = min(limits.DECODE_SECONDS, 0.4 * timeout_s)
        self._decoders = Decoders(threads, picture_s, 0.6 * timeout_s, lanes, given_up, first)
        ahead_s = _AHEAD * timeout_s  # beside the next job: together they have less than a job
        self._beside = Decoders(threads, ahead_s, ahead_s, lanes, given_up, first)
        self._ahead: deque[tuple[Run[Any], frozenset[int]]] = deque()
        """Of each job, and its lanes."""
        self._looked = 0.0
        self.reads_early = engine is not None and engine.waits
        self.waited_s = 0.0
        """How long the calls of the newest job that was read waited for a thread, on average."""

    @property
    def worn_out(self) -> bool:
        """The process should end once its jobs are answered."""
        return self._decoders.worn_out or self._beside.worn_out

    def begin(
        self,
        stills: Mapping[int, Callable[[], Read]],
        footage: Mapping[int, tuple[VideoItem, Sequence[bytes]]],
    ) -> Reading:
        """Items by their numbers. ``end`` is to be called for it, in the order in which they were
        begun. Raises ProtocolError for a lane too many."""
        calls: list[Callable[[], Sequence[Read]]] = [_alone(read) for read in stills.values()]
        lanes: list[int | None] = [None] * len(calls)
        numbers: list[Sequence[int]] = [[i] for i in stills]
        ahead: dict[int, Callable[[], object]] = {}
        held: dict[int, PictureHeld] = {}
        for lane, call in self._video.calls(list(footage.values())).items():
            of_lane = [i for i, (item, _) in footage.items() if item.lane == lane]
            items = [footage[i][0] for i in of_lane]
            if all(item.ahead for item in items):
                ahead[lane] = call
                held |= {i: PictureHeld(item.last) for i, item in zip(of_lane, items, strict=True)}
            else:
                calls.append(call)
                lanes.append(lane)
                numbers.append(of_lane)
        run = self._decoders.begin(calls, lanes)
        if ahead:
            begun = self._beside.begin(list(ahead.values()), list(ahead), unasked=True)
            self._ahead.append((begun, frozenset(ahead)))
        return Reading(run, numbers, held)

    def end(self, reading: Reading, meanwhile: Meanwhile | None = None) -> dict[int, Read]:
        """By the number of the item. ``meanwhile``: called again and again while threads are
        waited for."""

        def wait() -> None:
            self._look_after()
            if meanwhile is not None:
                meanwhile()

        read: dict[int, Read] = dict(reading.ahead)
        results = self._decoders.settle(reading.run, wait if meanwhile or self._ahead else None)
        self.waited_s = reading.run.waited_s
        for of_call, found in zip(reading.numbers, results, strict=True):
            if isinstance(found, FacelaneError):
                read.update(dict.fromkeys(of_call, found))
            else:
                read.update(zip(of_call, found, strict=True))
        return read

    def _look_after(self) -> None:
        """What hangs of a lane that nobody looks at keeps its next picture waiting."""
        if (now := time.monotonic()) >= self._looked + _LOOK_S:
            self._looked = now
            for run, _ in self._ahead:
                self._beside.look_after(run)

    def settle(self, lane: int | None = None) -> None:
        """Raises what went wrong with what nobody looks at, once: of what is over; of the lane, or
        of too many jobs, it is waited for."""
        while self._ahead:
            needed = lane is not None and any(lane in lanes for _, lanes in self._ahead)
            run, _ = self._ahead[0]
            if not (needed or run.is_over or len(self._ahead) > _MOST_AHEAD):
                return
            self._ahead.popleft()
            self._beside.settle(run)

    def close(self, lane: int) -> None:
        """Its decoder is not needed any more; nothing of it is under way."""
        self._video.close(lane)


def _alone(read: Callable[[], Read]) -> Callable[[], Sequence[Read]]:
    return lambda: [read()]
