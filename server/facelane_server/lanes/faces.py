"""The faces of one stream: which are worth a look, what the looks taught, what is shown.

Between the tracker's update and the frame's result a face is a ``Look``. The lane calls in
the order of receipt: ``turn`` for each detected frame, later ``face`` for each of its looks;
``answered`` may come in any order between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

from msgspec.structs import replace

from facelane_server import tracking
from facelane_server.areas import Mask
from facelane_server.domain import (
    Box,
    Decision,
    DetectedFace,
    Face,
    Frame,
    Identity,
    Liveness,
    LivenessVerdict,
    Portrait,
    Sighting,
    Stage,
)
from facelane_server.lanes.types import LaneOptions
from facelane_server.pipeline import Evidence, Pipeline

_NOTHING: Final = tracking.Shown(Identity(Decision.NOT_EVALUATED))


class Look:
    """One detected face of one frame, and what was learnt of it on this frame."""

    __slots__ = (
        "evidence",
        "face",
        "judges",
        "link",
        "live",
        "moment",
        "no_context",
        "portrait",
        "recognize",
        "size",
        "take_back",
        "track_id",
    )

    def __init__(self, face: DetectedFace, track_id: int, size: tuple[int, int] = (0, 0)) -> None:
        self.face = face
        self.size = size
        """Width and height of the picture."""
        self.track_id = track_id
        """As the tracker had it; the track may have been succeeded since."""
        self.link = 0
        self.moment = 0
        """Of the gallery's losses, when it was taken."""
        self.judges = 0
        """``Pipeline.liveness_models`` when it was taken."""
        self.recognize = False
        self.live = False
        """Which stages are asked."""
        self.no_context = False
        """Liveness is not asked: the picture shows too little around the face."""
        self.evidence: Evidence | None = None
        self.portrait: Portrait | None = None
        self.take_back: Callable[[], None] | None = None
        """While the second stages are under way."""

    @property
    def asked(self) -> bool:
        return self.recognize or self.live


class FaceListener(Protocol):
    """What is told of tracks; see ``LaneObserver``."""

    def sighted(self, sighting: Sighting) -> None: ...

    def ended(self, track_id: int) -> None: ...


class _UnderWay:
    """Looks of one stage without an answer, by track."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        self._newest: dict[int, int] = {}

    def begin(self, track_id: int, link: int) -> None:
        self._count[track_id] += 1
        self._newest[track_id] = link

    def end(self, track_id: int) -> None:
        self._count[track_id] -= 1
        if self._count[track_id] <= 0:
            del self._count[track_id]
            del self._newest[track_id]

    def since_doubt(self, track: tracking.Track) -> bool:
        """Whether one is under way that will tell who the face is by now."""
        newest = self._newest.get(track.track_id, 0)
        return newest > 0 and (track.suspect is None or newest >= track.suspect_last)

    def rename(self, old: int, new: int) -> None:
        if old in self._count:
            self._count[new] = self._count.pop(old)
            self._newest[new] = self._newest.pop(old)


class Faces:
    """See the module. Without tracking every face is a picture of its own."""

    def __init__(
        self,
        pipeline: Pipeline,
        options: LaneOptions,
        params: tracking.Params,
        listener: FaceListener,
    ) -> None:
        self._portraits = options.keeps_portraits
        self._pipeline = pipeline
        self._plan = options.plan
        self._params = params if options.tracking else None
        self._mask = Mask.of(options.zones)
        self._listener = listener
        self._tracks = tracking.Tracks()
        self._recognizing = _UnderWay()
        self._judging = _UnderWay()
        self._ended: dict[int, tracking.Track] = {}
        self._succeeded: dict[int, int] = {}
        """Tracks that ended by a contradiction -> those that go on in their place."""
        self._moments: dict[int, int] = {}
        """Of the gallery's losses: what tracks know is of looks that were asked for since."""
        self._liveness_models = pipeline.liveness_models
        self._namings = pipeline.namings

    @property
    def created(self) -> int:
        """Tracks since the stream's start."""
        return self._tracks.created

    def turn(
        self,
        found: Sequence[DetectedFace],
        now_ns: int,
        missing: Collection[Stage],
        size: tuple[int, int] = (0, 0),
    ) -> list[Look]:
        """Tracks the faces of a frame and says which of them are to be looked at, and by what.

        ``missing``: stages that cannot answer now. ``size``: width and height of the picture.
        """
        plan, params = self._plan, self._params
        faces = [face for face in found if face.box.width >= plan.min_face_size]
        if self._mask is not None:
            faces = [face for face in faces if self._mask.keeps(_middle(face.box, size))]
        recognizer = plan.recognize and Stage.RECOGNIZER not in missing
        judge = plan.liveness and Stage.LIVENESS not in missing
        if params is None:
            assignments: Sequence[int] = (0,) * len(faces)
        else:
            update = tracking.update(self._tracks, faces, now_ns, params)
            self._tracks = update.tracks
            for gone in update.ended:
                self._ended[gone.track_id] = gone
            assignments = update.assignments
        self._follow_thresholds()
        looks = []
        moment = self._pipeline.losses.now
        for face, track_id in zip(faces, assignments, strict=True):
            look = Look(face, track_id, size)
            look.moment = moment
            look.judges = self._liveness_models
            look.no_context = plan.liveness and not self._pipeline.shows_context(face, *size)
            look.recognize, look.live = recognizer, judge and not look.no_context
            # A track beyond the tracker's bound has id 0: it is treated as a picture.
            track = self._tracks.get(track_id)
            if track is not None and params is not None:
                self._ask(look, track, now_ns, params)
            looks.append(look)
        return looks

    def _follow_thresholds(self) -> None:
        """What tracks were found by thresholds that hold no more is found anew."""
        if self._liveness_models != self._pipeline.liveness_models:
            self._liveness_models = self._pipeline.liveness_models
            self._change_all(tracking.judged_anew)
        if self._namings != self._pipeline.namings:
            self._namings = self._pipeline.namings
            self._change_all(tracking.forgotten)

    def _change_all(self, changed: Callable[[tracking.Track], tracking.Track]) -> None:
        for track in self._tracks.active:
            self._tracks = self._tracks.replace(changed(track))
        self._ended = {track_id: changed(track) for track_id, track in self._ended.items()}

    def _ask(self, look: Look, track: tracking.Track, now_ns: int, params: tracking.Params) -> None:
        """Which stages are to see this picture of the track."""
        look.link = track.links
        look.recognize = (
            look.recognize
            and not self._recognizing.since_doubt(track)
            and tracking.wants_recognition(track, look.face, now_ns, params)
        )
        look.live = (
            look.live
            and not self._judging.since_doubt(track)
            and tracking.wants_liveness(track, look.face, now_ns, params)
        )
        if look.recognize:
            self._recognizing.begin(track.track_id, look.link)
            self._tracks = self._tracks.replace(tracking.looking(track, look.face))
        if look.live:
            self._judging.begin(track.track_id, look.link)

    def answered(self, look: Look, evidence: Evidence) -> None:
        """The second stages have said what they can of this look."""
        look.evidence = evidence
        if self._portraits and (evidence.recognized or evidence.live_score is not None):
            look.portrait = self._pipeline.portrait(look.face, evidence)
        look.take_back = None  # lets go of the crops
        look.face = replace(look.face, crops=())
        if look.link:
            track_id = self._now_called(look.track_id)
            if look.recognize:
                self._recognizing.end(track_id)
            if look.live:
                self._judging.end(track_id)

    def _now_called(self, track_id: int) -> int:
        while track_id in self._succeeded:
            track_id = self._succeeded[track_id]
        return track_id

    def face(self, look: Look, frame: Frame, missing: Collection[Stage]) -> Face:
        """The look's evidence fused into its track, then the track's state read.

        ``missing``: stages that did not answer.
        """
        self._follow_thresholds()
        now_ns = frame.stream_offset_ns
        track_id = self._now_called(look.track_id)
        track = self._tracks.get(track_id) or self._ended.get(track_id)
        evidence = look.evidence or Evidence()
        if look.judges != self._pipeline.liveness_models:
            evidence.live_score = None  # it says nothing by another model's thresholds
        as_of = self._pipeline.revision()  # before it is looked whether names still hold
        if track is None or self._params is None:
            age_ns = 0 if evidence.recognized else None
            identity = self._pipeline.identity_now(evidence, self._plan, look.moment)
            shown = tracking.Shown(identity, evidence.ood_score, age_ns)
            liveness = self._pipeline.liveness(evidence.live_score, self._plan)
        else:
            track = self._fused(track, look, evidence, now_ns)
            track_id = track.track_id
            shown, liveness = self._shown(track, look.link, evidence, now_ns, self._params, missing)
            self._listener.sighted(
                Sighting(
                    track_id,
                    look.face.box,
                    now_ns,
                    frame.capture_time_ns,
                    shown.identity,
                    liveness,
                    shown.ood_score,
                    evidence.recognized,
                    look.size,
                    self._doubtful(track, look.link, missing),
                    look.portrait,
                    as_of,
                )
            )
            look.portrait = None
        if look.no_context and liveness.verdict is LivenessVerdict.UNDECIDED:
            liveness = replace(liveness, no_context=True)
        return Face(
            track_id=track_id,
            box=look.face.box,
            score=look.face.score,
            landmarks=look.face.landmarks,
            identity=shown.identity,
            liveness=liveness,
            ood_score=shown.ood_score,
            recognized_now=evidence.recognized,
            evidence_age_ns=shown.age_ns,
            links_since_evidence=shown.links,
        )

    def _doubtful(self, track: tracking.Track, link: int, missing: Collection[Stage]) -> bool:
        """Whether the picture may show another face than those before, and somebody will say."""
        asked = self._plan.recognize and Stage.RECOGNIZER not in missing
        return asked and track.suspect is not None and link >= track.suspect

    def _fused(
        self, track: tracking.Track, look: Look, evidence: Evidence, now_ns: int
    ) -> tracking.Track:
        """The track, or its successor, with what this look has taught; kept."""
        link = look.link
        track = tracking.compared(self._remembering(track, look.moment), look.face, link=link)
        track = tracking.reached(track, link)
        if (
            evidence.recognized
            and evidence.ood_score is not None
            and look.moment >= self._moments[track.track_id]
        ):
            identity = self._pipeline.identity(evidence, self._plan)
            if tracking.contradicts(track, evidence.ood_score, identity, link=link):
                track = self._succeed(track, now_ns, link)
                self._moments[track.track_id] = look.moment
            track = tracking.with_recognition(
                track,
                look.face,
                evidence.ood_score,
                identity,
                now_ns,
                link=link,
                resembles=(
                    ""
                    if identity.decision is Decision.MATCH
                    else self._pipeline.resembles(evidence, self._plan)
                ),
            )
        if look.recognize:
            track = tracking.looked(track, look.face, link=link)
        if evidence.live_score is not None:
            thresholds = self._pipeline.thresholds
            track = tracking.with_liveness(
                track,
                evidence.live_score,
                now_ns,
                thresholds.liveness_at(self._plan.source_id),
                link=link,
                test=thresholds.test,
            )
        if evidence.recognized:
            # Deleted while it was being looked for: named no more, nor as a candidate.
            track = self._remembering(track, look.moment)
        if track.track_id in self._ended:
            self._ended[track.track_id] = track
        else:
            self._tracks = self._tracks.replace(track)
        return track

    def _remembering(self, track: tracking.Track, moment: int) -> tracking.Track:
        """The track, without what it knew if somebody whom it names has lost templates since.
        ``moment``: of the look that is there now."""
        known = self._moments.get(track.track_id, moment)
        named = tracking.named(track)
        if not named:
            known = max(known, moment)
        elif not self._pipeline.remembers(named, self._plan, known):
            track = tracking.forgotten(track)
            # Looks that are under way were asked of the gallery as it was: they count no more.
            known = self._pipeline.losses.now
        self._moments[track.track_id] = known
        return track

    def _succeed(self, track: tracking.Track, now_ns: int, link: int) -> tracking.Track:
        """Another's face has taken this track's place: from this picture on a new track has
        it, also in the pictures on their way."""
        new_id = self._tracks.created + 1
        follows = tracking.successor(track, new_id, now_ns, link=link)
        if track.track_id in self._ended:
            self._tracks = replace(self._tracks, created=new_id)
            self._ended[new_id] = follows
        else:
            self._tracks = self._tracks.succeeded(track.track_id, follows)
            self._ended[track.track_id] = track
        self._succeeded[track.track_id] = new_id
        self._recognizing.rename(track.track_id, new_id)
        self._judging.rename(track.track_id, new_id)
        return follows

    def _shown(
        self,
        track: tracking.Track,
        link: int,
        evidence: Evidence,
        now_ns: int,
        params: tracking.Params,
        missing: Collection[Stage],
    ) -> tuple[tracking.Shown, Liveness]:
        shown = tracking.shown_at(track, now_ns, params, link=link)
        liveness = tracking.liveness_at(track, now_ns, params, link=link)
        # What the track remembers stands only while the stage could contradict it: while
        # its pool is gone, a photo held before a known face would inherit both verdicts.
        if Stage.RECOGNIZER in missing and not evidence.recognized:
            shown = _NOTHING
        lost = Stage.LIVENESS in missing and evidence.live_score is None
        if lost and liveness.verdict is LivenessVerdict.LIVE:
            liveness = Liveness(LivenessVerdict.UNDECIDED)
        return shown, liveness

    def settle(self, under_way: Callable[[], Iterable[Look]]) -> list[int]:
        """Tells of ended tracks, and gives their ids: of those that no look on its way can
        still refer to (``under_way``)."""
        if not self._ended and not self._succeeded:
            return []
        looks = list(under_way())
        held = {self._now_called(look.track_id) for look in looks}
        gone = [track_id for track_id in self._ended if track_id not in held]
        for track_id in gone:
            del self._ended[track_id]
            self._moments.pop(track_id, None)
            self._listener.ended(track_id)
        if self._succeeded:
            self._forget_names({look.track_id for look in looks})
        return gone

    def _forget_names(self, in_use: set[int]) -> None:
        needed: set[int] = set()
        for track_id in in_use:
            while track_id in self._succeeded:
                needed.add(track_id)
                track_id = self._succeeded[track_id]
        self._succeeded = {k: v for k, v in self._succeeded.items() if k in needed}

    def finish(self) -> None:
        """The stream is over: its remaining tracks end. Safe to call twice."""
        for track_id in (*self._ended, *self._tracks.by_id):
            self._listener.ended(track_id)
        self._ended.clear()
        self._moments.clear()
        self._tracks = tracking.Tracks(created=self._tracks.created)


def _middle(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    """Of a face, in fractions of the picture."""
    width, height = size
    if not width or not height:
        return 0.0, 0.0
    return (box.x + box.width / 2) / width, (box.y + box.height / 2) / height
