"""The faces of one stream: which are worth a look, what the looks taught, what is shown.

Between the tracker's update and the frame's result a face is a ``Look``. The lane calls in
the order of receipt: ``turn`` for each detected frame, later ``face`` for each of its looks;
``answered`` may come in any order between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final, Protocol

from facelane_server import tracking
from facelane_server.domain import (
    Decision,
    DetectedFace,
    Face,
    Identity,
    Liveness,
    LivenessVerdict,
    Sighting,
    Stage,
)
from facelane_server.pipeline import Evidence, Pipeline, Plan

_NOT_EVALUATED: Final = Identity(Decision.NOT_EVALUATED)


class Look:
    """One detected face of one frame, and what was learnt of it on this frame."""

    __slots__ = ("evidence", "face", "live", "recognize", "take_back", "track_id")

    def __init__(self, face: DetectedFace, track_id: int, *, recognize: bool, live: bool) -> None:
        self.face = face
        self.track_id = track_id
        self.recognize = recognize
        self.live = live
        self.evidence: Evidence | None = None
        self.take_back: Callable[[], None] | None = None
        """While the second stages are under way."""

    @property
    def asked(self) -> bool:
        return self.recognize or self.live


class FaceListener(Protocol):
    """What is told of tracks; see ``LaneObserver``."""

    def decided(self, sighting: Sighting) -> None: ...

    def suspected(self, sighting: Sighting) -> None: ...

    def ended(self, sighting: Sighting) -> None: ...


class Faces:
    """See the module. ``params`` None: no tracking, every face is a picture of its own."""

    def __init__(
        self,
        pipeline: Pipeline,
        plan: Plan,
        params: tracking.Params | None,
        listener: FaceListener,
    ) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._params = params
        self._listener = listener
        self._tracks = tracking.Tracks()
        self._recognizing: Counter[int] = Counter()
        self._judging: Counter[int] = Counter()
        self._named: dict[int, str] = {}
        self._suspected: set[int] = set()
        self._ended: dict[int, tracking.Track] = {}

    @property
    def created(self) -> int:
        """Tracks since the stream's start."""
        return self._tracks.created

    def turn(
        self, found: Sequence[DetectedFace], now_ns: int, missing: Collection[Stage]
    ) -> list[Look]:
        """Tracks the faces of a frame and says which of them are to be looked at, and by what.

        ``missing``: stages that cannot answer now.
        """
        plan, params = self._plan, self._params
        faces = [face for face in found if face.box.width >= plan.min_face_size]
        recognizer = plan.recognize and Stage.RECOGNIZER not in missing
        judge = plan.liveness and Stage.LIVENESS not in missing
        if params is None:
            return [Look(face, 0, recognize=recognizer, live=judge) for face in faces]
        update = tracking.update(self._tracks, faces, now_ns, params)
        self._tracks = update.tracks
        for gone in update.ended:
            self._ended[gone.track_id] = gone
        looks = []
        for face, track_id in zip(faces, update.assignments, strict=True):
            recognize, live = recognizer, judge
            # A track beyond the tracker's bound has id 0: it is treated as a picture.
            track = self._tracks.get(track_id)
            if track is not None:
                recognize = (
                    recognizer
                    and not self._recognizing[track_id]
                    and tracking.wants_recognition(track, face, now_ns, params)
                )
                live = (
                    judge
                    and not self._judging[track_id]
                    and tracking.wants_liveness(track, face, now_ns, params)
                )
            if recognize:
                self._recognizing[track_id] += 1
            if live:
                self._judging[track_id] += 1
            looks.append(Look(face, track_id, recognize=recognize, live=live))
        return looks

    def answered(self, look: Look, evidence: Evidence) -> None:
        """The second stages have said what they can of this look."""
        look.evidence = evidence
        look.take_back = None  # lets go of the crops
        look.face = replace(look.face, crops=())
        if look.track_id:
            for pending, was_asked in (
                (self._recognizing, look.recognize),
                (self._judging, look.live),
            ):
                if was_asked:
                    pending[look.track_id] -= 1
                    if pending[look.track_id] <= 0:
                        del pending[look.track_id]

    def face(self, look: Look, now_ns: int, missing: Collection[Stage]) -> Face:
        """The look's evidence fused into its track, then the track's state read.

        ``now_ns``: media time of the look's frame. ``missing``: stages that did not answer.
        """
        track = self._tracks.get(look.track_id) or self._ended.get(look.track_id)
        evidence = look.evidence or Evidence()
        if track is None or self._params is None:
            seen = Sighting(
                look.track_id,
                self._pipeline.identity(evidence, self._plan),
                self._pipeline.liveness(evidence.live_score),
                evidence.ood_score,
            )
        else:
            track = self._fused(track, look, evidence, now_ns)
            self._keep(track)
            seen = self._shown(track, evidence, now_ns, self._params, missing)
            self._tell(seen)
        return Face(
            track_id=look.track_id,
            box=look.face.box,
            score=look.face.score,
            landmarks=look.face.landmarks,
            identity=seen.identity,
            liveness=seen.liveness,
            ood_score=seen.ood_score,
            recognized_now=evidence.recognized,
        )

    def _fused(
        self, track: tracking.Track, look: Look, evidence: Evidence, now_ns: int
    ) -> tracking.Track:
        if evidence.recognized and evidence.ood_score is not None:
            identity = self._pipeline.identity(evidence, self._plan)
            track = tracking.with_recognition(
                track, look.face, evidence.ood_score, identity, now_ns
            )
        if evidence.live_score is not None:
            track = tracking.with_liveness(
                track, evidence.live_score, now_ns, self._pipeline.thresholds
            )
        return self._remembered(track)

    def _remembered(self, track: tracking.Track) -> tracking.Track:
        """Somebody who was deleted is named no more, nor as a candidate for a stranger."""
        known = self._pipeline.remembers(track.identity, self._plan)
        return track if known else tracking.forgotten(track)

    def _shown(
        self,
        track: tracking.Track,
        evidence: Evidence,
        now_ns: int,
        params: tracking.Params,
        missing: Collection[Stage],
    ) -> Sighting:
        identity = tracking.identity_at(track, now_ns, params)
        ood_score = tracking.ood_score_at(track, now_ns, params)
        liveness = track.liveness
        # What the track remembers stands only while the stage could contradict it: while
        # its pool is gone, a photo held before a known face would inherit both verdicts.
        if Stage.RECOGNIZER in missing and not evidence.recognized:
            identity, ood_score = _NOT_EVALUATED, None
        lost = Stage.LIVENESS in missing and evidence.live_score is None
        if lost and liveness.verdict is LivenessVerdict.LIVE:
            liveness = Liveness(LivenessVerdict.UNDECIDED)
        return Sighting(track.track_id, identity, liveness, ood_score)

    def _tell(self, seen: Sighting) -> None:
        subject = seen.identity.subject_id
        if subject and self._named.get(seen.track_id) != subject:
            self._named[seen.track_id] = subject
            self._listener.decided(seen)
        spoof = seen.liveness.verdict is LivenessVerdict.SPOOF
        if spoof and seen.track_id not in self._suspected:
            self._suspected.add(seen.track_id)
            self._listener.suspected(seen)

    def _keep(self, track: tracking.Track) -> None:
        if track.track_id in self._ended:
            self._ended[track.track_id] = track
        else:
            self._tracks = self._tracks.replace(track)

    def settle(self, referred: Callable[[], Collection[int]]) -> list[int]:
        """Tells of ended tracks, and gives their ids: of those that no look on its way can
        still refer to (``referred``)."""
        if not self._ended:
            return []
        held = referred()
        gone = [track_id for track_id in self._ended if track_id not in held]
        for track_id in gone:
            self._over(self._ended.pop(track_id))
        return gone

    def finish(self) -> None:
        """The stream is over: its remaining tracks end. Safe to call twice."""
        for track in (*self._ended.values(), *self._tracks.active):
            self._over(track)
        self._ended.clear()
        self._tracks = tracking.Tracks(created=self._tracks.created)

    def _over(self, track: tracking.Track) -> None:
        self._named.pop(track.track_id, None)
        self._suspected.discard(track.track_id)
        track = self._remembered(track)
        self._listener.ended(
            Sighting(track.track_id, track.identity, track.liveness, track.ood_score)
        )
