"""Enrolment: one picture, one face, one template; or a refusal that says why.

The picture goes through the same stages as any other (the pipeline gives a ``Reading``). What
would poison a gallery is refused: a face that the recogniser cannot be trusted on, a face
that may be an attack, a picture from which it is not clear whose face is meant.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from facelane_server import limits
from facelane_server.domain import (
    Box,
    Decision,
    Face,
    FacelaneError,
    FaceReading,
    Identity,
    Liveness,
    LivenessVerdict,
    Picture,
    Reading,
    Reason,
    Stage,
)
from facelane_server.gallery import decide
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.gallery import Gallery
from facelane_server.naming import check_identifier, gallery_name
from facelane_server.store.records import (
    Correction,
    RequestKey,
    Subject,
    Template,
    check_display_name,
)

Analyse = Callable[[Picture], Awaitable[Reading]]
"""The pipeline, with embeddings asked for and no gallery searched. Raises the picture's own
errors and POOL_UNAVAILABLE for the detector."""


@dataclass(frozen=True, slots=True)
class Request:
    """``request_id``: empty, or 1-128 characters that make the call repeatable."""

    gallery_id: str
    subject_id: str
    picture: Picture
    request_id: str = ""
    create_subject: bool = False
    display_name: str = ""
    allow_multiple_faces: bool = False
    require_live: bool = False
    may_reassign: bool = False
    correction: Correction = Correction.NONE


class Caution(enum.StrEnum):
    """What is worth knowing about a face that was enrolled."""

    LOW_OOD_SCORE = "LOW_OOD_SCORE"
    """It would not be trusted in a stream."""
    LOW_QUALITY = "LOW_QUALITY"
    """The subject has a template of twice the quality or more."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """``created`` is false when the template was there before: the request was a repetition,
    or the subject had this very picture."""

    subject: Subject
    template: Template
    face: Face
    created: bool
    warnings: tuple[Caution, ...] = ()


_NOTHING: Final = Identity(Decision.NOT_EVALUATED)


async def enroll(
    gallery: Gallery,
    request: Request,
    *,
    analyse: Analyse,
    thresholds: Thresholds,
) -> Enrolment:
    """Adds the picture's face to the subject.

    Refusals (``FacelaneError``): NO_FACE; MULTIPLE_FACES unless ``allow_multiple_faces``,
    which takes the largest; OOD_REJECTED below ``thresholds.enrolled_ood``; and
    POOL_UNAVAILABLE (retryable) when the recogniser did not answer, because no answer is no
    proof, and while its model is being changed. With ``require_live`` the verdict must be
    LIVE: SPOOF_SUSPECTED, NO_CONTEXT, LIVENESS_UNDECIDED, or POOL_UNAVAILABLE else.
    Further SUBJECT_NOT_FOUND, GALLERY_FULL, REQUEST_ID_REUSED, TEMPLATE_NOT_FOUND,
    ARGUMENT_INVALID, GALLERY_UNAVAILABLE as the store says, and the picture's own errors.
    """
    gallery_id = gallery_name(request.gallery_id)
    check_identifier(request.subject_id, "subject_id")
    check_display_name(request.display_name)
    if not gallery.model_id:
        raise FacelaneError(
            Reason.POOL_UNAVAILABLE,
            "this server runs without a recogniser, so nobody can be enrolled; switch it on in "
            "[pools.recognizer]",
            metadata={"stage": Stage.RECOGNIZER.value},
        )
    key = None
    if request.request_id:
        _check_request_id(request.request_id)
        key = RequestKey(request.request_id, await asyncio.to_thread(_fingerprint, request))
        known = await gallery.recall(gallery_id, key)
        if known is not None:
            face = _face_from(known.answer, known.template)
            return Enrolment(known.subject, known.template, face, created=False)
    if not request.create_subject:
        # Before the expensive part, and before an answer about the face: the caller's first
        # mistake is told first.
        await gallery.get_subject(gallery_id, request.subject_id)
    reading = await analyse(request.picture)
    chosen = choose(
        reading,
        thresholds,
        allow_multiple_faces=request.allow_multiple_faces,
        require_live=request.require_live,
        centred=request.correction is not Correction.NONE,
    )
    if not request.may_reassign:
        refuse_others(chosen, request.subject_id, thresholds)
    assert chosen.face.ood_score is not None
    enrolled = await gallery.enroll(
        gallery_id,
        request.subject_id,
        vector=np.frombuffer(chosen.vector, np.float32),
        ood_score=chosen.face.ood_score,
        model_id=reading.model_id,
        create_subject=request.create_subject,
        display_name=request.display_name,
        request=key,
        quality=quality_of(chosen.face),
        chip=chosen.chip,
        answer=_face_facts(chosen.face),
        correction=request.correction,
    )
    warnings = []
    if chosen.face.ood_score < thresholds.ood:
        warnings.append(Caution.LOW_OOD_SCORE)
    if enrolled.best_quality >= 2 * enrolled.template.quality > 0.0:
        warnings.append(Caution.LOW_QUALITY)
    return Enrolment(
        enrolled.subject, enrolled.template, chosen.face, enrolled.created, tuple(warnings)
    )


def choose(
    reading: Reading,
    thresholds: Thresholds,
    *,
    allow_multiple_faces: bool,
    require_live: bool,
    centred: bool = False,
) -> FaceReading:
    """The face to enrol, or the refusal; see ``enroll``. ``centred``: the picture was cut around
    the face that is meant, and a larger one beside it is somebody else's. Pure."""
    if not reading.readings:
        raise FacelaneError(
            Reason.NO_FACE,
            "no face was found; send a picture that shows one face from the front, upright as it "
            "is stored (an EXIF rotation is not applied), at least 80 pixels wide",
        )
    if centred:
        middle = (reading.result.width / 2, reading.result.height / 2)
        chosen = min(reading.readings, key=lambda one: _off(one.face.box, middle))
    else:
        chosen = max(reading.readings, key=lambda one: (_area(one.face.box), one.face.score))
    # What looks like a face and could not be enrolled itself is nobody who could be meant, unless
    # it is the largest.
    meant = [
        one
        for one in reading.readings
        if one is chosen
        or one.face.ood_score is None
        or one.face.ood_score >= thresholds.enrolled_ood
    ]
    if len(meant) > 1 and not allow_multiple_faces:
        raise FacelaneError(
            Reason.MULTIPLE_FACES,
            "the picture shows several faces; crop it to the one that is meant, or set "
            "allow_multiple_faces to take the largest",
            metadata={"faces": str(len(meant))},
        )
    ood = chosen.face.ood_score
    if ood is None or not chosen.vector or Stage.RECOGNIZER in reading.result.missing_stages:
        raise _no_answer(Stage.RECOGNIZER, "")
    if not ood >= thresholds.enrolled_ood:
        raise FacelaneError(
            Reason.OOD_REJECTED,
            "the face is not clear enough to be recognised by; take a sharper, brighter picture "
            "from the front, without anything before the face",
            metadata={"ood_score": f"{ood:.3f}", "threshold": f"{thresholds.enrolled_ood:.3f}"},
        )
    if require_live:
        missing = Stage.LIVENESS in reading.result.missing_stages
        _check_live(chosen.face.liveness, missing, thresholds)
    return chosen


def refuse_others(found: FaceReading, subject_id: str, thresholds: Thresholds) -> None:
    """Raises FACE_OF_ANOTHER, which does not say whose, when the face matches somebody else:
    enrolled, it would take that subject's name, or make both AMBIGUOUS. Pure."""
    match = thresholds.match_at(found.face.ood_score or 0.0, 1)
    if any(
        c.subject_id != subject_id and c.similarity >= match
        for c in decide.standing(found.candidates)
    ):
        raise FacelaneError(
            Reason.FACE_OF_ANOTHER,
            "the face matches another subject; enrol it there, delete that subject first, or use "
            "a key with the `reassign` scope",
        )


def _check_live(live: Liveness, missing: bool, thresholds: Thresholds) -> None:
    if live.verdict is LivenessVerdict.LIVE:
        return
    otherwise = "; enrol without require_live where the picture is known to be genuine"
    if live.no_context:
        raise FacelaneError(
            Reason.NO_CONTEXT,
            "the picture shows too little around the face to judge whether it is live: send it "
            f"uncropped, the face at most a third of its height{otherwise}",
        )
    if missing or live.score is None:
        raise _no_answer(Stage.LIVENESS, ", or enrol without require_live")
    told = {"score": f"{live.score:.3f}", "threshold": f"{thresholds.live:.3f}"}
    if live.verdict is LivenessVerdict.SPOOF:
        raise FacelaneError(
            Reason.SPOOF_SUSPECTED,
            "the picture seems to show a print, a screen or a mask; take one of the person"
            f"{otherwise}",
            metadata=told,
        )
    raise FacelaneError(
        Reason.LIVENESS_UNDECIDED,
        f"the picture does not show clearly that the person is there; take another{otherwise}",
        metadata=told,
    )


def quality_of(face: Face) -> float:
    """What a template promises, in [0, 1]: OOD score x size; a face as wide as a chip (112
    pixels) or wider is not enlarged for it."""
    size = min(1.0, min(face.box.width, face.box.height) / 112.0)
    return max(0.0, (face.ood_score or 0.0) * size)


def _no_answer(stage: Stage, otherwise: str) -> FacelaneError:
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        f"the {stage.value} stage did not answer, and without it nobody is enrolled; try again"
        f"{otherwise}",
        metadata={"stage": stage.value},
        retryable=True,
    )


def _off(box: Box, middle: tuple[float, float]) -> float:
    return math.dist((box.x + box.width / 2, box.y + box.height / 2), middle)


def _area(box: Box) -> float:
    return box.width * box.height


def _check_request_id(request_id: str) -> None:
    if len(request_id.encode()) > limits.MAX_ID_CHARS:
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            f"request_id: at most {limits.MAX_ID_CHARS} bytes",
            metadata={"field": "request_id"},
        )


def _fingerprint(request: Request) -> bytes:
    """A digest of everything that the call says, the picture included."""
    said = (
        request.subject_id,
        request.display_name,
        request.create_subject,
        request.allow_multiple_faces,
        request.require_live,
        request.picture.encoding,
        request.picture.width,
        request.picture.height,
        request.picture.stride,
        hashlib.sha256(request.picture.data).hexdigest(),
    )
    return hashlib.sha256(json.dumps(said).encode()).digest()


def _face_facts(face: Face) -> dict[str, Any]:
    """What a repetition of the request is told of the face; no picture and no embedding."""
    return {
        "box": [face.box.x, face.box.y, face.box.width, face.box.height],
        "score": face.score,
        "landmarks": [list(point) for point in face.landmarks],
        "ood_score": face.ood_score,
        "verdict": face.liveness.verdict.value,
        "liveness": face.liveness.score,
    }


def _face_from(facts: Mapping[str, Any] | None, template: Template) -> Face:
    if facts is None:
        undecided = Liveness(LivenessVerdict.UNDECIDED)
        return Face(0, Box(0, 0, 0, 0), 0.0, (), _NOTHING, undecided, template.ood_score)
    return Face(
        track_id=0,
        box=Box(*facts["box"]),
        score=facts["score"],
        landmarks=tuple((x, y) for x, y in facts["landmarks"]),
        identity=_NOTHING,
        liveness=Liveness(LivenessVerdict(facts["verdict"]), facts["liveness"]),
        ood_score=facts["ood_score"],
        recognized_now=True,
    )
