"""One picture through the stage graph: detector, then recogniser and liveness per face.

The graph is this code: the detector, which a frame has no result without, and behind it
the recogniser and the liveness stage side by side, each of which leaves its fields absent
and is named in ``missing_stages`` when it cannot answer.

Everything here runs on the server's event loop and never blocks it. Callbacks instead
of coroutines on the way of a frame: one future a task is all that is allocated.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from facelane_server import limits
from facelane_server.domain import (
    STAGES,
    Box,
    Candidate,
    Decision,
    DetectedFace,
    Face,
    FacelaneError,
    FaceReading,
    FrameResult,
    Identity,
    Liveness,
    Picture,
    Portrait,
    Reading,
    Reason,
    Stage,
    StageTiming,
)
from facelane_server.gallery import decide
from facelane_server.gallery.asked import Asked
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.losses import Losses
from facelane_server.pools.groups import Wanted
from facelane_server.pools.tasks import (
    ANYBODY,
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    EmbedRequest,
    EncodeAnswer,
    EncodeRequest,
    LivenessAnswer,
    LivenessRequest,
    Sender,
    Task,
    Undecoded,
    VideoRequest,
)

_ASKED: Final[dict[tuple[bool, bool], tuple[Stage, ...]]] = {
    (True, True): (Stage.RECOGNIZER, Stage.LIVENESS),
    (True, False): (Stage.RECOGNIZER,),
    (False, True): (Stage.LIVENESS,),
    (False, False): (),
}
LEAST_CONTEXT: Final = 0.6
"""Share of the area around a face, enlarged as liveness wants it, that a picture must show. Less
is filled up by shifting and shrinking the crop, and a tightly cropped portrait then looks like a
photo that is held before the camera."""


Detection = Task[DetectAnswer | Undecoded]
"""``Undecoded``: of video alone."""


class PoolPort(Protocol):
    """What the pipeline needs of a pool."""

    @property
    def available(self) -> bool: ...

    def submit(self, task: Task[Any]) -> None: ...

    def withdraw(self, task: Task[Any]) -> bool: ...

    def replace(self, task: Task[Any], by: Task[Any]) -> bool: ...

    def pass_by(self, task: Task[Any]) -> None: ...

    def release(self, lane: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stream or a call asks for."""

    recognize: bool = True
    liveness: bool = True
    gallery_id: str = "default"
    source_id: str = ""
    max_faces: int = 16
    max_candidates: int = 0
    min_face_size: int = 0
    want_vectors: bool = False
    naming: Asked | None = None
    """What the caller asks of names; ``None`` = as the server is set up."""
    want_chips: bool = False
    """Of single pictures: what the recogniser saw of each face."""


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Whose work it is: for fairness and deadlines (``time.monotonic_ns``)."""

    lane: int
    weight: int
    deadline_ns: int
    sender: Sender = ANYBODY


@dataclass(slots=True)
class Evidence:
    """What the second stages said of one face. ``None``: did not run, or could not answer."""

    ood_score: float | None = None
    candidates: tuple[Candidate, ...] = ()
    vector: bytes | bytearray = b""
    live_score: float | None = None
    missing: tuple[Stage, ...] = ()
    recognized: bool = False
    models: dict[Stage, str] = field(default_factory=dict)
    """Who said it."""


@dataclass(slots=True)
class Timings:
    """The slowest task of each stage of one frame."""

    spans: dict[Stage, tuple[int, int]] = field(default_factory=dict)

    def note(self, stage: Stage, task: Task[Any]) -> None:
        if not task.dispatched_ns:
            return
        queue = task.dispatched_ns - task.submitted_ns
        service = (task.finished_ns or time.monotonic_ns()) - task.dispatched_ns
        old = self.spans.get(stage)
        if old is None or queue + service > old[0] + old[1]:
            self.spans[stage] = (queue, service)

    def freeze(self) -> tuple[StageTiming, ...]:
        told = []
        for stage in STAGES:
            if (span := self.spans.get(stage)) is not None:
                queue, service = span
                told.append(StageTiming(stage, max(0, queue), max(0, service)))
        return tuple(told)


class Pipeline:
    """The stage graph over its pools.

    ``crops``: for the recogniser and the liveness stage, the positions of their crops
    among those the detector cuts.
    """

    def __init__(
        self,
        pools: Mapping[Stage, PoolPort],
        *,
        crops: Mapping[Stage, tuple[int, ...]],
        thresholds: Thresholds,
        max_pixels: int,
        known: Callable[[str, str], bool] = lambda _gallery_id, _subject_id: True,
        searched: Callable[[str], int] = lambda _gallery_id: 1,
        losses: Losses | None = None,
        revision: Callable[[], int] = lambda: 0,
        context: float = 0.0,
        portrait: int | None = None,
        models: Mapping[Stage, str] | None = None,
    ) -> None:
        """``models``: whose thresholds these are, by stage; of one that is not there, anybody's.
        ``portrait``: the position of the crop that an event's picture is made of; None = none is
        cut. ``known``: whether (gallery id, subject id) can be recognised at this moment.
        ``losses``: when subjects lost templates. ``revision``: the gallery's, as it is searched.
        ``searched``: the number of templates in a gallery. ``context``: how many times its box
        liveness wants to see around a face; 0 = it needs nothing."""
        if Stage.DETECTOR not in pools:
            raise ValueError("the detector stage is required")
        self.pools = dict(pools)
        self.thresholds = thresholds
        self.known = known
        self.searched = searched
        self.losses = losses or Losses()
        self.revision = revision
        self.models = models or {}
        self.liveness_models = 0
        """How often liveness came to be judged by another model, or by other thresholds."""
        self.namings = 0
        """How often names came to be given by other thresholds."""
        self.context = context
        self._portrait = portrait
        self._crops = dict(crops)
        self.max_pixels = max_pixels
        self._detector = pools[Stage.DETECTOR]

    # -- first stage ---------------------------------------------------------------

    def detect(self, picture: Picture | Wanted, plan: Plan, origin: Origin) -> Detection:
        """The task of a picture, or of one of the lane's video; its future is resolved in a later
        turn of the loop."""
        task = self._detection(picture, plan, origin)
        self._detector.submit(task)
        return task

    def detect_instead(
        self, waiting: Detection, picture: Picture | Wanted, plan: Plan, origin: Origin
    ) -> Detection | None:
        """The task of a picture that takes the turn of another one of its stream, whose future
        stays unresolved; ``None`` when a worker has begun that one already."""
        task = self._detection(picture, plan, origin)
        return task if self._detector.replace(waiting, task) else None

    def _detection(self, picture: Picture | Wanted, plan: Plan, origin: Origin) -> Detection:
        request: DetectRequest | VideoRequest
        losses = 0
        if isinstance(picture, Wanted):
            request = VideoRequest(picture, plan.max_faces, self.max_pixels)
            losses = picture.group.losses
        else:
            request = DetectRequest(picture, plan.max_faces, self.max_pixels)
        return Task(
            request,
            origin.lane,
            origin.weight,
            origin.deadline_ns,
            asyncio.get_running_loop().create_future(),
            attempts=losses,
            sender=origin.sender,
        )

    def pass_by(self, picture: Picture | Wanted, origin: Origin) -> None:
        """Nobody looks at this picture of the lane: of video, later ones need it decoded."""
        if isinstance(picture, Wanted):
            request = VideoRequest(picture, 0, self.max_pixels, ahead=True)
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._detector.pass_by(
                Task(request, origin.lane, origin.weight, origin.deadline_ns, future)
            )

    def release(self, lane: int) -> None:
        """A lane of video has ended."""
        self._detector.release(lane)

    def give_up(self, task: Detection) -> None:
        """Nobody waits for the picture any more: it costs no work that was not begun."""
        _give_up(self._detector, task)

    def asked(self, plan: Plan) -> tuple[Stage, ...]:
        """The second stages that the plan wants."""
        return _ASKED[plan.recognize, plan.liveness]

    def unavailable(self, plan: Plan) -> tuple[Stage, ...]:
        """The asked-for second stages that cannot answer now."""
        return tuple([s for s in self.asked(plan) if not self._answers(s)])

    def _answers(self, stage: Stage) -> bool:
        pool = self.pools.get(stage)
        return pool is not None and pool.available

    # -- second stages ---------------------------------------------------------------

    def appraise(
        self,
        face: DetectedFace,
        plan: Plan,
        origin: Origin,
        timings: Timings,
        on_done: Callable[[Evidence], None],
        *,
        recognize: bool,
        liveness: bool,
    ) -> Callable[[], None]:
        """Runs the wanted second stages on one face; ``on_done`` is called exactly once,
        possibly at once. The answer gives up what is under way: ``on_done`` is then told that
        it is missing."""
        evidence = Evidence()
        tasks: list[tuple[Stage, Task[Any]]] = []
        loop = asyncio.get_running_loop()
        for stage, wanted in ((Stage.RECOGNIZER, recognize), (Stage.LIVENESS, liveness)):
            if not wanted:
                continue
            pool = self.pools.get(stage)
            if pool is None or not pool.available:
                evidence.missing = (*evidence.missing, stage)
                continue
            crops = tuple(face.crops[k] for k in self._crops[stage])
            request: EmbedRequest | LivenessRequest
            if stage is Stage.RECOGNIZER:
                request = EmbedRequest(
                    crops[0], plan.gallery_id, _top(plan.max_candidates), plan.want_vectors
                )
            else:
                request = LivenessRequest(crops)
            task: Task[Any] = Task(
                request,
                origin.lane,
                origin.weight,
                origin.deadline_ns,
                loop.create_future(),
                sender=origin.sender,
            )
            tasks.append((stage, task))
        if not tasks:
            on_done(evidence)
            return lambda: None
        left = len(tasks)

        def settled(stage: Stage, task: Task[Any], future: asyncio.Future[Any]) -> None:
            nonlocal left
            left -= 1
            timings.note(stage, task)
            if future.cancelled() or future.exception() is not None:
                evidence.missing = (*evidence.missing, stage)
            else:
                answer = future.result()
                evidence.models[stage] = task.model
                if isinstance(answer, EmbedAnswer):
                    evidence.recognized = True
                    evidence.ood_score = answer.ood_score
                    evidence.candidates = answer.candidates
                    evidence.vector = answer.vector
                else:
                    assert isinstance(answer, LivenessAnswer)
                    evidence.live_score = answer.score
            if left == 0:
                on_done(evidence)

        for stage, task in tasks:
            task.future.add_done_callback(functools.partial(settled, stage, task))
        for stage, task in tasks:
            self.pools[stage].submit(task)

        def take_back() -> None:
            for stage, task in tasks:
                _give_up(self.pools[stage], task)

        return take_back

    async def embed(self, chip: bytes, origin: Origin) -> EmbedAnswer:
        """What the recogniser says of a chip that was kept. Raises ``FacelaneError``."""
        task: Task[EmbedAnswer] = Task(
            EmbedRequest(chip, want_vector=True),
            origin.lane,
            origin.weight,
            origin.deadline_ns,
            asyncio.get_running_loop().create_future(),
            sender=origin.sender,
        )
        self.pools[Stage.RECOGNIZER].submit(task)
        return await task.future

    def portrait(self, face: DetectedFace, evidence: Evidence) -> Portrait | None:
        """What a picture of a face that was looked at would be made of, where one is cut."""
        if self._portrait is None or len(face.crops) <= self._portrait:
            return None
        chip = self._crops.get(Stage.RECOGNIZER)
        trust = 0.0 if evidence.ood_score is None else evidence.ood_score
        return Portrait(
            b"" if chip is None else face.crops[chip[0]],
            face.crops[self._portrait],
            0.9 * trust + 0.1 * face.score,
        )

    async def encode(self, pictures: tuple[bytes, ...], origin: Origin) -> tuple[bytes, ...]:
        """JPEGs of square pictures (BGR, side x side x 3 uint8), by a detector's worker. Raises
        ``FacelaneError``."""
        sides = tuple(math.isqrt(len(picture) // 3) for picture in pictures)
        task: Task[EncodeAnswer] = Task(
            EncodeRequest(pictures, sides),
            origin.lane,
            origin.weight,
            origin.deadline_ns,
            asyncio.get_running_loop().create_future(),
            sender=origin.sender,
        )
        self._detector.submit(task)
        return (await task.future).jpegs

    def remembers(self, subjects: Iterable[str], plan: Plan, moment: int) -> bool:
        """Whether all of these are still in the gallery, as they were known at a ``moment`` of
        ``losses``: one that was deleted is named no more, whatever was seen before, and one that
        was enrolled anew is another."""
        gallery_id = plan.gallery_id
        return all(
            self.known(gallery_id, subject_id)
            and not self.losses.since(moment, gallery_id, subject_id)
            for subject_id in subjects
        )

    def named_by(self, plan: Plan) -> Thresholds | None:
        """What holds for the plan's names; ``None``: nobody is to be named."""
        there = self.thresholds.at(plan.gallery_id, plan.source_id)
        return there if plan.naming is None else plan.naming.applied(there)

    def check_naming(self, plan: Plan) -> None:
        """Raises ``FacelaneError`` when the plan asks for names that it may not have."""
        if plan.naming is not None:
            there = self.thresholds.at(plan.gallery_id, plan.source_id)
            plan.naming.check(there, self.searched(plan.gallery_id))

    def judge_by(self, thresholds: Thresholds, models: Mapping[Stage, str]) -> None:
        """By these thresholds from now on, which are for the scores of these models. Who was LIVE
        or named by others is judged anew: no verdict or name outlives what it was given by."""
        self.liveness_models += thresholds.judging != self.thresholds.judging
        self.namings += thresholds.naming != self.thresholds.naming
        self.thresholds, self.models = thresholds, models

    def sift(self, evidence: Evidence) -> Evidence:
        """The same, before it is judged: what was said by another model than the one whose
        thresholds there are, as happens while one takes the other's place, says nothing. Its
        stage has not answered."""
        for stage, model in evidence.models.items():
            if model == self.models.get(stage, model) or stage in evidence.missing:
                continue
            evidence.missing = (*evidence.missing, stage)
            if stage is Stage.LIVENESS:
                evidence.live_score = None
            else:
                evidence.recognized, evidence.ood_score = False, None
                evidence.candidates, evidence.vector = (), b""
        return evidence

    def identity(self, evidence: Evidence, plan: Plan) -> Identity:
        thresholds = self.named_by(plan)
        if thresholds is None:
            return Identity(Decision.NOT_EVALUATED)
        return decide.identify(
            evidence.ood_score,
            evidence.candidates,
            thresholds,
            searched=self.searched(plan.gallery_id),
            keep=plan.max_candidates,
        )

    def identity_now(self, evidence: Evidence, plan: Plan, moment: int) -> Identity:
        """The same of a face that is told once and forgotten: nothing where somebody whom it would
        tell was deleted since the recogniser was asked, at this ``moment`` of ``losses``."""
        found = self.identity(evidence, plan)
        if self.remembers(found.subjects, plan, moment):
            return found
        return Identity(Decision.NOT_EVALUATED)

    def resembles(self, evidence: Evidence, plan: Plan) -> str:
        """See ``decide.resembles``."""
        thresholds = self.named_by(plan)
        if thresholds is None:
            return ""
        return decide.resembles(evidence.ood_score, evidence.candidates, thresholds)

    def liveness(self, score: float | None, plan: Plan) -> Liveness:
        return decide.liveness(score, self.thresholds.liveness_at(plan.source_id))

    def shows_context(self, face: DetectedFace, width: int, height: int) -> bool:
        """Whether a picture of this size shows enough around the face to judge its liveness:
        ``LEAST_CONTEXT`` of what the models want to see."""
        if not self.context or not width or not height:
            return True
        return _visible(face.box, self.context, width, height) >= LEAST_CONTEXT

    # -- a single picture --------------------------------------------------------------

    async def analyse(
        self, picture: Picture, plan: Plan, origin: Origin, timings: Timings | None = None
    ) -> Reading:
        """A picture without a stream. Raises ``FacelaneError``. ``timings`` is told of each task.

        Unlike in a stream, every face is appraised and waits for the slowest stage.
        """
        loop = asyncio.get_running_loop()
        timings = timings or Timings()
        task = self.detect(picture, plan, origin)
        try:
            answer = await task.future
            assert isinstance(answer, DetectAnswer)
        except asyncio.CancelledError:
            self.give_up(task)
            raise
        finally:
            timings.note(Stage.DETECTOR, task)
        found = [f for f in answer.faces if f.box.width >= plan.min_face_size]
        missing = set(self.unavailable(plan))
        judged = [
            plan.liveness and self.shows_context(face, answer.width, answer.height)
            for face in found
        ]
        moment, judges = self.losses.now, self.liveness_models
        waiting: list[asyncio.Future[Evidence]] = []
        under_way: list[Callable[[], None]] = []
        for face, live in zip(found, judged, strict=True):
            done: asyncio.Future[Evidence] = loop.create_future()
            waiting.append(done)
            under_way.append(
                self.appraise(
                    face,
                    plan,
                    origin,
                    timings,
                    functools.partial(_resolve, done),
                    recognize=plan.recognize,
                    liveness=live,
                )
            )
        try:
            evidences = [await future for future in waiting]
        except asyncio.CancelledError:
            for take_back in under_way:
                take_back()
            raise
        for evidence in evidences:
            self.sift(evidence)
        missing |= {s for e in evidences for s in e.missing}
        if judges != self.liveness_models:
            for evidence in evidences:
                evidence.live_score = None  # it says nothing by another model's thresholds
        readings = tuple(
            FaceReading(
                Face(
                    track_id=0,
                    box=face.box,
                    score=face.score,
                    landmarks=face.landmarks,
                    identity=self.identity_now(evidence, plan, moment),
                    liveness=decide.liveness(
                        evidence.live_score,
                        self.thresholds.liveness_at(plan.source_id),
                        no_context=plan.liveness and not live,
                    ),
                    ood_score=evidence.ood_score,
                    recognized_now=evidence.recognized,
                    evidence_age_ns=0 if evidence.recognized else None,
                ),
                evidence.vector,
                evidence.candidates,
                face.crops[self._crops[Stage.RECOGNIZER][0]]
                if plan.want_chips and evidence.recognized
                else b"",
            )
            for face, evidence, live in zip(found, evidences, judged, strict=True)
        )
        result = FrameResult(
            width=answer.width,
            height=answer.height,
            faces=tuple(r.face for r in readings),
            timings=timings.freeze(),
            missing_stages=tuple([s for s in STAGES if s in missing]),
        )
        return Reading(result, readings, self.models.get(Stage.RECOGNIZER, ""))


def _give_up(pool: PoolPort, task: Task[Any]) -> None:
    task.future.cancel()  # which is how the pool knows that nobody waits for it
    pool.withdraw(task)


def _resolve(future: asyncio.Future[Evidence], evidence: Evidence) -> None:
    if not future.done():
        future.set_result(evidence)


def error_of(future: asyncio.Future[Any]) -> FacelaneError:
    """The failure of a task, whatever it was, as an error with a reason."""
    if future.cancelled():
        return FacelaneError(Reason.CANCELLED, "the work was cancelled", retryable=True)
    error = future.exception()
    if isinstance(error, FacelaneError):
        return error
    return FacelaneError(Reason.INTERNAL, "the server failed on this picture; see its log")


def _top(candidates: int) -> int:
    """How many subjects are asked for: two to decide by, each with what it is not."""
    return min(max(4, candidates + 2), limits.MAX_CANDIDATES)


def _visible(box: Box, scale: float, width: int, height: int) -> float:
    """The share of a box, enlarged around its centre, that lies inside the picture."""

    def along(start: float, length: float, end: int) -> float:
        wanted = max(length, 1.0) * scale
        low = start + length / 2 - wanted / 2
        return max(0.0, min(low + wanted, end) - max(low, 0.0)) / wanted

    return along(box.x, box.width, width) * along(box.y, box.height, height)
