"""A lane: the server's object for one stream.

A frame's way through its lane::

    offer -> [queued in the detector pool] -> detected -> turn -> appraised -> emitted
                 | superseded, too old          (in order)          (in order)
                 v
               dropped --------------------------------------------> emitted

Three things happen strictly in the order of receipt: the tracker's update (``turn``),
the fusion of new evidence into the tracks, and the emission of outcomes. Detection and
appraisal of different frames overlap freely between them. Of video, a frame names its picture of
a group of pictures (``Footage``); one that is dropped is decoded all the same where a later one
needs it, and one that a decoder holds back waits for those that bring it out (``_ahead``).

Invariants: every frame offered gets exactly one outcome; outcomes leave in increasing
``frame_id``; at most ``window`` frames are without a written outcome, and at most
``window_bytes`` of pictures are held (one frame is always let in); an aborted lane
withdraws what no worker has begun and forgets the rest.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from facelane_server import limits, tracking
from facelane_server.domain import (
    STAGES,
    DropReason,
    FacelaneError,
    Frame,
    FrameDrop,
    FrameError,
    FrameResult,
    Outcome,
    Overload,
    Picture,
    Reason,
    Stage,
)
from facelane_server.lanes.allowance import Allowance
from facelane_server.lanes.entry import Entry
from facelane_server.lanes.faces import Faces, Look
from facelane_server.lanes.pace import Pace, Parts, Rhythm, ToldRate
from facelane_server.lanes.types import (
    KeyFrameWanted,
    LaneDraining,
    LaneObserver,
    LaneOptions,
    LaneTotals,
    RateChanged,
    SilentObserver,
    StageChanged,
    Tally,
    Told,
    TrackEnded,
    Update,
)
from facelane_server.lanes.video import Footage
from facelane_server.lanes.wake import Wake
from facelane_server.pipeline import Evidence, Origin, Pipeline, error_of
from facelane_server.pools.groups import Wanted
from facelane_server.pools.tasks import ANYBODY, DetectAnswer, Sender, Undecoded

_AGES: Final = 64
"""Of results, kept until somebody asks: those of a quarter of a second."""


class Lane:
    """See the module. All methods run on the event loop; none blocks."""

    def __init__(
        self,
        lane_id: int,
        stream_id: str,
        options: LaneOptions,
        pipeline: Pipeline,
        *,
        window: int,
        window_bytes: int,
        tracking_params: tracking.Params,
        video_cache_bytes: int = 8 * limits.MIB,
        sender: Sender = ANYBODY,
        allowance: Allowance | None = None,
        observer: LaneObserver | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.lane_id = lane_id
        self.stream_id = stream_id
        self.options = options
        self.sender = sender
        self._pipeline = pipeline
        self._window = window
        self._window_bytes = window_bytes
        self._allowance = allowance
        self._observer: LaneObserver = observer or SilentObserver()
        self._clock = clock
        self._plan = options.plan
        self._faces = Faces(pipeline, options, tracking_params, Told(self, self._observer))

        self._entries: deque[Entry] = deque()
        self._turn = 0  # entries at the left of the deque that have had their turn
        self._waiting: Entry | None = None  # LATEST_WINS: the newest, perhaps not begun
        self._outbox: deque[Outcome | Update] = deque()
        self._unwritten = 0
        self._held = 0
        self._last_frame_id = -1
        self._last_offset_ns = 0
        self._input_closed = False
        self._aborted = False
        self._draining = False
        self._wake_reader = Wake()
        self._wake_writer = Wake()

        self._unavailable = set(pipeline.unavailable(options.plan))

        self._rhythm = Rhythm(options.analysis_fps) if options.analysis_fps else None
        self._passed_over = 0
        self._parts = Parts(lane_id)
        self.footage = Footage(pipeline.max_pixels, video_cache_bytes, allowance, self._parts)
        self._ahead: deque[Entry] = deque()  # of video: held back until others bring them out
        self._asked = False
        self.keeps_age = True  # rather loses pictures of video than lets them grow old
        self._pace = Pace(lane_id)
        self._told = ToldRate()
        self._tallied = (0, 0)
        self._ages_ns: deque[int] = deque(maxlen=_AGES)
        self._received = 0
        self._results = 0
        self._errors = 0
        self._shown = 0
        self._drops: Counter[DropReason] = Counter()

    # -- the reader's side -------------------------------------------------------------

    @property
    def can_accept(self) -> bool:
        """Whether another frame may be read now; otherwise flow control holds the client."""
        backlog = len(self._entries) + self._unwritten
        if backlog == 0:
            return True
        if backlog >= self._window or self._held >= self._window_bytes:
            return False
        return self._allowance is None or self._held == 0 or not self._allowance.full

    async def wait_can_accept(self) -> None:
        """Returns when a frame may be read. The writer's progress, bounded by its own
        deadline, is what it waits for."""
        while not self.can_accept and not self._aborted:
            self._show()  # what waits for more may be all that others wait for
            if self._allowance is not None:
                self._allowance.wake(self._wake_reader)
            await self._wake_reader.wait()

    def offer(self, frame: Frame, fault: FacelaneError | None = None) -> None:
        """Takes a frame. ``fault``: what is wrong with its picture, told in its turn.

        Raises ``FacelaneError(FRAME_ID_NOT_INCREASING)``, which ends the stream: an
        outcome for such a frame could not keep the order.
        """
        if frame.frame_id <= self._last_frame_id:
            raise FacelaneError(
                Reason.FRAME_ID_NOT_INCREASING,
                f"frame_id {frame.frame_id} follows {self._last_frame_id}; "
                "frame ids of a stream must increase",
            )
        self._last_frame_id = frame.frame_id
        self._received += 1
        entry = Entry(frame, self._clock())
        self._entries.append(entry)
        if fault is not None or not self.footage.knows(frame.picture.encoding):
            fault = self._admit(entry, fault)
        if fault is None and frame.stream_offset_ns < self._last_offset_ns:
            fault = FacelaneError(
                Reason.ARGUMENT_INVALID,
                "stream_offset went back; it is media time and must not decrease",
            )
        else:
            self._last_offset_ns = max(self._last_offset_ns, frame.stream_offset_ns)
        if fault is not None:
            self._settle(
                entry, FrameError(fault.reason, fault.message, fault.retryable, fault.metadata)
            )
        elif self._draining:
            self._settle(entry, FrameDrop(DropReason.DRAINING))
        elif frame.picture.encoding.is_video:
            if entry.place is None:
                thinned = self.footage.thinned
                why = DropReason.THINNED if thinned else DropReason.WAITING_FOR_KEY_FRAME
                self._settle(entry, FrameDrop(why))
            else:
                self._hold(entry)
                self._ahead.append(entry)
        elif self._is_wanted(entry):
            self._submit(entry, frame.picture)
        self._show()

    def _admit(self, entry: Entry, fault: FacelaneError | None) -> FacelaneError | None:
        """Of video: its place in a group of pictures; what is wrong with the frame, if anything."""
        footage, picture = self.footage, entry.frame.picture
        try:
            if fault is not None:
                footage.lose()
                return fault
            footage.check(picture.encoding)
            if picture.encoding.is_video:
                if self._is_behind():
                    footage.lose()
                entry.place = footage.take(bytes(picture.data), picture.encoding)
        except FacelaneError as error:
            return error
        finally:
            self._after_footage()
        return None

    def _is_behind(self) -> bool:
        """The decoder is, and more of the group would only come later and later."""
        hurries = self.keeps_age and self.options.overload is Overload.LATEST_WINS
        first = self._entries[self._turn] if hurries else None
        since = first.task.behind_ns if first is not None and first.task is not None else 0
        return 0 < since < self._clock() - limits.BEHIND_NS

    def _after_footage(self) -> None:
        """Asks for a key frame, once."""
        footage = self.footage
        if footage.dry is not self._asked:
            self._asked = footage.dry
            if footage.dry:
                self._push(KeyFrameWanted())

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether the stream's own rhythm takes the frame; else it has its outcome."""
        if self._rhythm is None or self._rhythm.takes(entry.frame.stream_offset_ns):
            return True
        self._passed_over += 1
        self._settle(entry, FrameDrop(DropReason.SUPERSEDED))
        return False

    def _show(self) -> None:
        """Of video: hands over what a decoder shows by now; all, where no more may come."""
        stuck = bool(self._ahead) and not self.can_accept
        drains = stuck and len(self._ahead) == sum(e.under_way for e in self._entries)
        while self._ahead:
            entry = self._ahead[0]
            assert entry.place is not None
            group, number = entry.place
            newest = len(group) - 1
            if number + group.delay > newest and not group.closed and not drains:
                return
            self._ahead.popleft()
            last, beyond = min(number + group.delay, newest), number + group.delay > newest
            wanted = Wanted(self.lane_id, group, number, last, beyond)
            if self._is_wanted(entry):
                self._submit(entry, wanted)
            else:
                self._pipeline.pass_by(wanted, self._origin(entry))

    def _submit(self, entry: Entry, picture: Picture | Wanted) -> None:
        self._hold(entry)
        before = None
        if self.options.overload is Overload.LATEST_WINS:
            before = self._supersede(entry, picture)
            if before is None and not self._pace.takes(entry.received_ns):
                self._pipeline.pass_by(picture, self._origin(entry))
                self._settle(entry, FrameDrop(DropReason.THINNED))
                return
        self._waiting = entry
        if entry.task is None:
            entry.task = self._pipeline.detect(picture, self._plan, self._origin(entry))
        entry.task.future.add_done_callback(functools.partial(self._detected, entry))
        if before is not None:
            self._settle(before, FrameDrop(DropReason.SUPERSEDED))

    def _hold(self, entry: Entry) -> None:
        if not entry.held:
            entry.held = True
            self._held += entry.size
            if self._allowance is not None:
                self._allowance.take(entry.size)

    def _settle(self, entry: Entry, body: FrameDrop | FrameError) -> None:
        entry.body = body
        self._release(entry)
        self._advance()

    def _supersede(self, entry: Entry, picture: Picture | Wanted) -> Entry | None:
        """Gives the turn of the frame of this lane that still waits for a worker, if any, to this
        one; the other one then."""
        before = self._waiting
        if before is None or before.task is None or before.task.dispatched_ns:
            return None
        entry.task = self._pipeline.detect_instead(
            before.task, picture, self._plan, self._origin(entry)
        )
        return None if entry.task is None else before

    @property
    def taken_at(self) -> float | None:
        """Pictures a second that are taken; ``None`` = all."""
        rate = self._pace.rate
        return None if rate is None else rate * self._parts.part

    def take_at(self, fps: float | None, groups: float = 1.0) -> None:
        """From now on so many pictures a second are taken, all with ``None``: of video in this part
        of its groups of pictures, and none in the others. The client is told of what makes a
        difference to it."""
        now_ns = self._clock()
        self._pace.change(None if fps is None else fps / groups, now_ns)
        self._parts.part = groups
        told = self._told.change(fps, now_ns)
        if told is not None:
            self._push(RateChanged(told))

    def tally(self) -> Tally:
        """What happened since this was asked before."""
        asked = self._received - self._passed_over
        received, results = asked - self._tallied[0], self._results - self._tallied[1]
        opening = not self._tallied[1]
        self._tallied = (asked, self._results)
        ages_ns, video = tuple(self._ages_ns), self.footage.is_video
        self._ages_ns.clear()
        return Tally(received, results, ages_ns, video, opening, self.footage.length)

    def close_input(self) -> None:
        """No more frames will come."""
        self._input_closed = True
        self.footage.end()
        self._show()
        self._wake_writer.set()

    def drain(self, grace_ns: int) -> None:
        """Tells the client that the server ends; frames that come from now on are dropped."""
        if self._draining:
            return
        self._draining = True
        self.footage.end()
        self._show()
        self._push(LaneDraining(grace_ns))

    def stages_changed(self) -> None:
        """Some pool's availability changed: tells the client about stages it asked for."""
        now = set(self._pipeline.unavailable(self._plan))
        for stage in Stage:
            if (stage in now) != (stage in self._unavailable):
                self._push(StageChanged(stage, available=stage not in now))
        self._unavailable = now

    def abort(self) -> None:
        """The stream is gone: gives back what no worker has begun, forgets the rest.

        Every frame without an outcome is counted as dropped with STREAM_CLOSED.
        """
        if self._aborted:
            return
        self._aborted = True
        for entry in self._entries:
            if entry.task is not None and entry.answer is None and entry.body is None:
                self._pipeline.give_up(entry.task)
            for look in entry.looks:
                if look.take_back is not None:
                    look.take_back()
            entry.body = FrameDrop(DropReason.STREAM_CLOSED)
            self._release(entry)
            self._count(self._outcome(entry, entry.body))
        self._entries.clear()
        self._ahead.clear()
        self._waiting = None
        self._outbox.clear()
        self._wake_reader.set()
        self._wake_writer.set()

    def finish(self) -> None:
        """The stream is over: its remaining tracks end. Safe to call twice."""
        self._faces.finish()
        self.footage.close()
        if self.footage.is_video:
            self._pipeline.release(self.lane_id)

    @property
    def newest(self) -> Entry | None:
        """The last frame that was offered and has no outcome."""
        return self._entries[-1] if self._entries else None

    # -- the writer's side -------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """The input is closed and every outcome has been taken."""
        return self._input_closed and not self._entries and not self._outbox

    async def take(self) -> list[Outcome | Update]:
        """What is to be written, in order; empty only when the lane has settled or was
        aborted. Call ``written`` for each."""
        while not self._outbox and not self.settled and not self._aborted:
            await self._wake_writer.wait()
        taken = list(self._outbox)
        self._outbox.clear()
        return taken

    def written(self) -> None:
        """One outcome (not an update) was written: its place in the window is free."""
        self._unwritten -= 1
        self._wake_reader.set()

    @property
    def totals(self) -> LaneTotals:
        return LaneTotals(
            received=self._received,
            results=self._results,
            drops=self._drops.total(),
            errors=self._errors,
            faces=self._shown,
            tracks=self._faces.created,
            drops_by_reason=dict(self._drops),
        )

    # -- on the way --------------------------------------------------------------------

    def _release(self, entry: Entry) -> None:
        """Lets go of the picture's bytes as soon as nobody needs them."""
        if entry.held and entry.size:
            self._held -= entry.size
            if self._allowance is not None:
                self._allowance.give(entry.size)
            entry.size = 0
        if entry.let_go():
            self._wake_reader.set()

    def _detected(self, entry: Entry, future: asyncio.Future[DetectAnswer | Undecoded]) -> None:
        if self._aborted or entry.body is not None:
            if not future.cancelled():
                future.exception()  # retrieved: nobody else will
            return
        if not future.cancelled() and future.exception() is None:
            answer = future.result()
            if isinstance(answer, Undecoded):
                self._undecoded(entry, answer)
                return
            entry.answer = answer
            assert entry.task is not None
            entry.timings.note(Stage.DETECTOR, entry.task)
        else:
            error = error_of(future)
            never_begun = (task := entry.task) is None or not task.dispatched_ns or task.opening
            if error.reason is Reason.DEADLINE_EXCEEDED and never_begun:
                entry.body = FrameDrop(DropReason.TOO_OLD)
            else:
                entry.body = FrameError(
                    error.reason, error.message, error.retryable, error.metadata
                )
            self._give_up_broken(entry)
        self._release(entry)
        self._advance()

    def _undecoded(self, entry: Entry, answer: Undecoded) -> None:
        """There is no picture yet, or none before the next key frame."""
        assert entry.place is not None
        group = entry.place[0]
        if answer.held:
            group.delay = max(group.delay, answer.held)
            self._waiting = None if self._waiting is entry else self._waiting
            entry.task = None
            self._ahead = deque(sorted([entry, *self._ahead], key=lambda e: e.frame.frame_id))
            self._show()
            return
        group.broken = True
        self._give_up_broken(entry)
        self._settle(entry, FrameDrop(DropReason.WAITING_FOR_KEY_FRAME))

    def _give_up_broken(self, entry: Entry) -> None:
        """The stream goes on with its next key frame, where the frame's group is of no more use."""
        group = self.footage.group
        if group is not None and group.broken and entry.place and entry.place[0] is group:
            self.footage.lose()
            self._after_footage()
            self._show()

    def _advance(self) -> None:
        """Gives every frame whose turn has come its turn, then emits what is complete."""
        entries = self._entries
        while self._turn < len(entries):
            entry = entries[self._turn]
            if entry.body is None and entry.answer is None:
                break
            self._turn += 1
            if entry.answer is not None and not entry.turned:
                entry.turned = True
                self._take_turn(entry, entry.answer)
        self._emit()

    def _take_turn(self, entry: Entry, answer: DetectAnswer) -> None:
        """Tracks the faces of a frame and asks the second stages for what is wanted."""
        entry.missing = self._pipeline.unavailable(self._plan)
        entry.looks = self._faces.turn(
            answer.faces,
            entry.frame.stream_offset_ns,
            entry.missing,
            (answer.width, answer.height),
        )
        entry.answer = DetectAnswer(answer.width, answer.height, ())  # lets go of the crops
        asked = [look for look in entry.looks if look.recognize or look.live]
        if not asked:
            return
        entry.outstanding = len(asked)
        origin = self._origin(entry)
        for look in asked:
            take_back = self._pipeline.appraise(
                look.face,
                self._plan,
                origin,
                entry.timings,
                functools.partial(self._appraised, entry, look),
                recognize=look.recognize,
                liveness=look.live,
            )
            if look.evidence is None:
                look.take_back = take_back

    def _origin(self, entry: Entry) -> Origin:
        deadline_ns = entry.received_ns + self.options.max_frame_age_ns
        return Origin(self.lane_id, self.options.weight, deadline_ns, self.sender)

    def _appraised(self, entry: Entry, look: Look, evidence: Evidence) -> None:
        self._faces.answered(look, evidence)
        entry.outstanding -= 1
        if entry.outstanding == 0 and not self._aborted:
            self._emit()

    def _emit(self) -> None:
        """Moves complete frames from the head of the lane to the outbox, in order."""
        entries = self._entries
        while entries and self._turn:
            entry = entries[0]
            body: FrameResult | FrameDrop | FrameError
            if entry.body is not None:
                body = entry.body
            elif entry.turned and entry.outstanding == 0:
                body = self._compose(entry)
            else:
                break
            entries.popleft()
            self._turn -= 1
            outcome = self._outcome(entry, body)
            self._unwritten += 1
            self._count(outcome)
            self._push(outcome)
            for track_id in self._faces.settle(self._looks):
                self._push(TrackEnded(track_id))

    def _looks(self) -> Iterator[Look]:
        """Those of frames on their way."""
        return (look for entry in self._entries for look in entry.looks)

    def _outcome(self, entry: Entry, body: FrameResult | FrameDrop | FrameError) -> Outcome:
        frame = entry.frame
        age_ns = self._clock() - entry.received_ns
        return Outcome(frame.frame_id, frame.stream_offset_ns, frame.capture_time_ns, body, age_ns)

    def _compose(self, entry: Entry) -> FrameResult:
        """The result of a frame: new evidence fused into its tracks, then their state read."""
        assert entry.answer is not None
        missing = entry.missing
        faces = []
        for look in entry.looks:
            unanswered, evidence = entry.missing, look.evidence
            if evidence is not None and self._pipeline.sift(evidence).missing:
                unanswered = (*entry.missing, *evidence.missing)
                missing = (*missing, *unanswered)
            faces.append(self._faces.face(look, entry.frame, unanswered))
        return FrameResult(
            width=entry.answer.width,
            height=entry.answer.height,
            faces=tuple(faces),
            timings=entry.timings.freeze(),
            missing_stages=tuple([s for s in STAGES if s in missing]) if missing else (),
        )

    def _count(self, outcome: Outcome) -> None:
        body = outcome.body
        if isinstance(body, FrameResult):
            self._results += 1
            self._ages_ns.append(outcome.age_ns)
            self._shown += len(body.faces)
        elif isinstance(body, FrameDrop):
            self._drops[body.reason] += 1
        else:
            self._errors += 1
        self._observer.outcome(self, outcome)

    def _push(self, item: Outcome | Update) -> None:
        # Updates are few, each caused by a frame or a pool; who does not read is cut off.
        if self._aborted:
            return
        self._outbox.append(item)
        self._wake_writer.set()
