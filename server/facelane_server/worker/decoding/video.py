"""Video in a worker: a decoder for each lane that sends it, and the seam for those who decode.

An engine opens decoders; a decoder takes access units in decoding order and gives pictures in
the order of showing (``Shown``), which are converted only when somebody wants to look at them.
A ``Session`` is one lane's: it knows which access units its decoder has had and which picture
belongs to which. Where pictures are shown in another order than they are decoded in, the n-th
access unit of a group stands for the n-th picture shown.

``Sessions`` holds them all, by the lane's number. Its calls are made one after the other for each
lane (``patience.Lanes``), by any thread; one that was given up takes its session with it.

A card's decoder takes long to open, which its first key frame does. That is done beside, and the
others' pictures do not wait for it: what comes for the lane meanwhile is kept, and decoded once it
is open.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol

from facelane_server import annexb, limits
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import PictureHeld, VideoItem
from facelane_server.models import api
from facelane_server.models.api import U8

SLICE_S: Final = 0.05
"""What one lane may decode at a stretch before others have their turn: a group of pictures that
is replayed takes longer, and goes on in the next job."""
OPENERS: Final = 1
"""Threads that open decoders where that takes long: a card's driver opens one after the other, and
two that wait for it would be two that others wait for."""
OPENING_S: Final = 0.005
"""What a job waits for decoders that are being opened, all together."""
OPENING_FIRST_S: Final = 0.5
"""The same where nobody else has one, so nobody is kept waiting."""

Pixels = U8 | api.DevicePicture


class Shown(Protocol):
    """A picture that a decoder gives out."""

    @property
    def tag(self) -> int:
        """That its access unit came with."""

    def keep(self) -> None:
        """It is to outlast what its decoder is given next."""

    def read(self) -> Pixels:
        """uint8 [height, width, 3], BGR, C-contiguous, or the same on the model's device."""


class VideoDecoder(Protocol):
    """Of one lane. Not used again after it has raised anything but PICTURE_CORRUPT."""

    @property
    def resets_at_keys(self) -> bool:
        """A key frame makes it forget what was before, and ``reset`` costs far more: it is for
        what was broken. Pictures from before the key frame may still be shown behind it."""

    @property
    def reorders(self) -> bool:
        """It may hold pictures back to show them in order."""

    def decode(self, unit: bytes, tag: int) -> Sequence[Shown]:
        """One access unit; what is shown by it, in order. Raises FacelaneError:
        PICTURE_CORRUPT for one that is broken, VIDEO_UNSUPPORTED."""

    def drain(self) -> Sequence[Shown]:
        """The pictures that are held back; the next unit is a key frame."""

    def reset(self) -> None:
        """Forget everything, what was broken too; the next unit is a key frame."""

    def close(self) -> None: ...


class VideoEngine(Protocol):
    @property
    def opens_slowly(self) -> bool:
        """Its ``open`` is called by a thread that has nothing else to do."""

    @property
    def waits(self) -> bool:
        """To decode is to wait for a device: it is begun before the job has its turn."""

    def settle_in(self) -> None:
        """Called by each thread that decodes, first of all."""

    def open(self, codec: Encoding, found: annexb.Format, key_frame: bytes = b"") -> VideoDecoder:
        """``key_frame``: that the decoder will begin with, and will be given after this; where it
        is known, what opens slowly opens here. Raises FacelaneError(VIDEO_UNSUPPORTED) for a format
        that this engine does not take; OUT_OF_MEMORY (retryable)."""


@dataclass(frozen=True, slots=True)
class _Blank:
    """For models that look at no pixels."""

    tag: int
    pixels: U8

    def keep(self) -> None:
        """It does."""

    def read(self) -> U8:
        return self.pixels


class BlindDecoder:
    """Decodes nothing: ``blank`` for every access unit."""

    reorders = False
    resets_at_keys = True

    def __init__(self, blank: U8) -> None:
        self._blank = blank

    def decode(self, unit: bytes, tag: int) -> Sequence[Shown]:
        del unit
        return [_Blank(tag, self._blank)]

    def drain(self) -> Sequence[Shown]:
        return []

    def reset(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class Session:
    """One lane's decoder, and where it is in the group of pictures that it decodes."""

    def __init__(
        self, codec: Encoding, decoder: VideoDecoder | Future[VideoDecoder], found: annexb.Format
    ) -> None:
        """``decoder``: or one that is being opened."""
        self.codec = codec
        self.format = found
        self._decoder = decoder
        self.position = -1
        """The newest access unit of the group that it has had."""
        self.owed: tuple[int, int] | None = None
        """A picture that was asked for and is not there yet, and the job that asked last."""
        self._base = 0
        """Access units of the groups before: with them tags are never used twice."""
        self._broken = False
        self._drained = False
        self._undecoded: deque[bytes] = deque()
        """The newest of those that it has had."""
        self._unshown: deque[int] = deque()
        self._shown: dict[int, Shown] = {}

    def begin(self, found: annexb.Format) -> None:
        """The next access unit is the first of a group."""
        decoder = self._decoder
        if not isinstance(decoder, Future) and (self._broken or not decoder.resets_at_keys):
            decoder.reset()
        self.format = found
        self._base += self.position + 1
        self.position = -1
        self.owed = None
        self._broken = False
        self._drained = False
        self._undecoded.clear()
        self._unshown.clear()
        self._shown.clear()

    def goes_on_at(self, first: int, count: int) -> bool:
        """Whether ``count`` access units from ``first`` on are what comes next."""
        if self._broken or (self._drained and count):
            return False
        return first == self.position + 1

    def feed(self, units: Sequence[bytes]) -> None:
        """They are decoded by ``decode``."""
        self.position += len(units)
        self._undecoded += units

    @property
    def is_open(self) -> bool:
        """False too where its decoder could not be opened: it is of no more use then."""
        return not isinstance(self._decoder, Future)

    def opened(self, wait_s: float) -> bool:
        """Whether there is a decoder by now. Raises what opening it has raised."""
        if isinstance(self._decoder, Future):
            wait([self._decoder], wait_s)
            if not self._decoder.done():
                return False
            self._decoder = self._decoder.result()
        return True

    def decode(self, clock: Callable[[], float], until: float, wanted: int = 0) -> bool:
        """What it has been fed with, one access unit at least; whether that was all. Of its
        pictures those before the ``wanted`` one are let go of."""
        decoder = self._decoder
        assert not isinstance(decoder, Future), "not opened"
        while self._undecoded:
            unit = self._undecoded.popleft()
            number = self.position - len(self._undecoded)
            self._unshown.append(number)
            try:
                shown = decoder.decode(unit, self._base + number)
                self._take(shown, wanted, reorders=decoder.reorders)
            except FacelaneError:
                # What follows would be decoded on top of it: wrong, and nobody could see it.
                self._broken = True
                raise
            if clock() >= until:
                break
        return not self._undecoded

    def close(self) -> None:
        if isinstance(self._decoder, Future):
            self._decoder.add_done_callback(_close_late)
        else:
            self._decoder.close()

    def drain(self, wanted: int = 0) -> None:
        decoder = self._decoder
        assert not isinstance(decoder, Future), "not opened"
        if not self._drained:
            self._take(decoder.drain(), wanted, reorders=decoder.reorders)
            self._drained = True
            self._unshown.clear()

    def _take(self, shown: Sequence[Shown], wanted: int, *, reorders: bool) -> None:
        for picture in shown:
            number = picture.tag - self._base
            if number < 0:
                continue  # of a group before
            if not reorders:
                # What lies before it will not be shown any more.
                while self._unshown and self._unshown[0] < number:
                    self._unshown.popleft()
            if not self._unshown:
                continue
            place = self._unshown.popleft()
            if place >= wanted:
                picture.keep()
                self._shown[place] = picture
        while len(self._unshown) > limits.MAX_REORDER:
            self._unshown.popleft()

    def picture(self, number: int) -> Shown | None:
        """The ``number``-th; earlier ones are let go of. None when it is held back."""
        for earlier in [n for n in self._shown if n < number]:
            del self._shown[earlier]
        found = self._shown.pop(number, None)
        if found is None and number not in self._unshown:
            raise _corrupt(self.codec, "its picture was not shown")
        return found

    @property
    def held(self) -> int:
        return len(self._unshown)


Read = Pixels | FacelaneError | PictureHeld


class Sessions:
    """Of a worker. ``engine``: who decodes; ``max_pixels``: of one picture."""

    def __init__(
        self,
        engine: VideoEngine | None,
        *,
        max_pixels: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``engine`` None: nobody looks at pixels."""
        self._engine = engine
        self._max_pixels = max_pixels
        self._clock = clock
        self._sessions: dict[int, Session] = {}
        self._jobs = 0
        slow = engine is not None and engine.opens_slowly
        self._openers = ThreadPoolExecutor(OPENERS, "open-video") if slow else None

    def __len__(self) -> int:
        return len(self._sessions)

    def calls(
        self, items: Sequence[tuple[VideoItem, Sequence[bytes]]]
    ) -> dict[int, Callable[[], Sequence[Read]]]:
        """Of one job: for each lane the call that decodes its items in order, and says what became
        of each. What nobody looks at is decoded where all of a lane is that: with a picture that
        is wanted it is left to that one. Those whose decoder is not open yet come last. Raises
        ProtocolError for a lane too many."""
        lanes: dict[int, list[tuple[VideoItem, Sequence[bytes]]]] = {}
        for item, units in items:
            lanes.setdefault(item.lane, []).append((item, units))
        self._jobs += 1
        if len(self._sessions.keys() | lanes.keys()) > limits.MAX_DECODERS:
            raise ProtocolError("more decoders than a worker has")
        now = self._clock()
        return {
            lane: functools.partial(self._run, self._jobs, now, lanes[lane])
            for lane in sorted(lanes, key=self._is_slow)
        }

    def _is_slow(self, lane: int) -> bool:
        session = self._sessions.get(lane)
        return session is None or not session.is_open

    def given_up(self, lane: int) -> None:
        """A call of it was: its thread may still be at work on the session."""
        self._sessions.pop(lane, None)

    def close(self, lane: int) -> None:
        session = self._sessions.pop(lane, None)
        if session is not None:
            session.close()

    def close_all(self) -> None:
        for lane in list(self._sessions):
            self.close(lane)

    def _leave(self, lane: int, session: Session) -> None:
        """It is of no more use. Whoever was given up may say so when the lane has another."""
        if self._sessions.get(lane) is session:
            del self._sessions[lane]

    def _run(
        self, job: int, began: float, items: Sequence[tuple[VideoItem, Sequence[bytes]]]
    ) -> list[Read]:
        now = self._clock()
        until = now + SLICE_S
        if all(item.ahead for item, _ in items):
            return [self._look_away(item, units, until) for item, units in items]
        alone = not self._sessions.keys() - {item.lane for item, _ in items}
        opening_s = OPENING_FIRST_S if alone else OPENING_S
        wait_s = max(0.0, began + opening_s - now)
        return [self._read(job, item, units, until, wait_s) for item, units in items]

    def _fed(
        self, item: VideoItem, units: Sequence[bytes]
    ) -> Session | FacelaneError | PictureHeld:
        """The item's session, which has its access units; else what is to be answered."""
        try:
            session = self._session(item, units)
        except FacelaneError as error:
            return error
        if session is None:
            return PictureHeld(-1)
        session.feed(units)
        return session

    def _look_away(self, item: VideoItem, units: Sequence[bytes], until: float) -> Read:
        """Decodes what nobody looks at. What is not done within the time is done with the lane's
        next picture, which is told also what is wrong with it."""
        session = self._fed(item, units)
        if not isinstance(session, Session):
            return session
        try:
            owed = item.picture + 1 if session.owed is None else session.owed[0]
            if session.opened(0.0):
                session.decode(self._clock, until, min(owed, item.picture + 1))
        except FacelaneError as error:
            if error.reason is not Reason.PICTURE_CORRUPT or not session.is_open:
                self._leave(item.lane, session)
        except Exception:
            self._leave(item.lane, session)  # an access unit is missing
            raise
        return PictureHeld(session.position)

    def _read(
        self, job: int, item: VideoItem, units: Sequence[bytes], until: float, wait_s: float
    ) -> Read:
        if self._is_early(job, item):
            return PictureHeld(0, waits=True)
        session = self._fed(item, units)
        if not isinstance(session, Session):
            return session
        session.owed = None
        try:
            if item.ahead:
                return PictureHeld(session.position)
            opened = session.opened(wait_s)
            if not opened or not session.decode(self._clock, until, item.picture):
                session.owed = item.picture, job
                return PictureHeld(session.position, opening=not opened)
            if item.drain:
                session.drain(item.picture)
            picture = session.picture(item.picture)
            return (
                PictureHeld(session.position, session.held) if picture is None else picture.read()
            )
        except FacelaneError as error:
            if error.reason is not Reason.PICTURE_CORRUPT or not session.is_open:
                self._leave(item.lane, session)
            return error

    def _is_early(self, job: int, item: VideoItem) -> bool:
        """One before it is not there yet: that would be let go of for this one, and asked for
        again. Who asked for it does so at once, or has gone."""
        session = self._sessions.get(item.lane)
        if item.begins or session is None or session.owed is None:
            return False
        picture, asked_in = session.owed
        return picture < item.picture and job < asked_in + limits.JOBS_PER_DECODER

    def _session(self, item: VideoItem, units: Sequence[bytes]) -> Session | None:
        """That goes on, or begins, with these access units; None when it does not."""
        session = self._sessions.get(item.lane)
        if not item.begins:
            return session if session and session.goes_on_at(item.first, len(units)) else None
        codec = Encoding(item.encoding)
        if not units:
            raise ProtocolError("a group of pictures without a key frame")
        found = annexb.examine(units[0], codec, item.max_pixels or self._max_pixels).format
        if found is None:
            raise _corrupt(codec, "it begins with no key frame")
        if session is not None and session.codec is codec and session.format == found:
            session.begin(found)
            return session
        if session is not None:
            self.close(item.lane)
        decoder = self._open(codec, found, units[0])
        session = self._sessions[item.lane] = Session(codec, decoder, found)
        return session

    def _open(
        self, codec: Encoding, found: annexb.Format, key_frame: bytes
    ) -> VideoDecoder | Future[VideoDecoder]:
        if self._engine is None:
            return BlindDecoder(api.blank(found.width, found.height))
        if self._openers is None:
            return self._engine.open(codec, found)
        return self._openers.submit(self._engine.open, codec, found, key_frame)


def _close_late(opening: Future[VideoDecoder]) -> None:
    """Of a lane that has gone meanwhile."""
    if opening.exception() is None:
        opening.result().close()


def _corrupt(codec: Encoding, why: str) -> FacelaneError:
    return FacelaneError(
        Reason.PICTURE_CORRUPT, f"the {codec.value} access unit cannot be decoded: {why}"
    )
