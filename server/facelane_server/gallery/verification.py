"""1:1 verification: is the one face of a picture a given subject?"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from facelane_server.domain import (
    Decision,
    Face,
    FacelaneError,
    Identity,
    LivenessVerdict,
    Picture,
    Reason,
    Stage,
)
from facelane_server.gallery import decide
from facelane_server.gallery.enrolment import Analyse
from facelane_server.gallery.gallery import Gallery


def unanswered() -> FacelaneError:
    """No answer is no proof."""
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        "the recognizer stage did not answer; try again",
        metadata={"stage": Stage.RECOGNIZER.value},
        retryable=True,
    )


@dataclass(frozen=True, slots=True)
class Verification:
    """``similarity``: cosine to the subject's nearest template; ``None`` for a face that the
    recogniser cannot be trusted on. ``threshold``: what it was compared with."""

    face: Face
    verified: bool
    similarity: float | None
    threshold: float


async def verify(
    gallery: Gallery,
    gallery_id: str,
    subject_id: str,
    picture: Picture,
    *,
    analyse: Analyse,
    thresholds: decide.Thresholds,
    liveness: bool,
) -> Verification:
    """Whether the picture's face is the subject's, and that of a person who is there: with
    ``liveness``, a face is verified when its verdict is LIVE alone.

    Raises ``FacelaneError``: SUBJECT_NOT_FOUND, NO_FACE, MULTIPLE_FACES, NO_TEMPLATES,
    POOL_UNAVAILABLE (retryable) when the recogniser did not answer, and the picture's own.
    """
    await gallery.get_subject(gallery_id, subject_id)
    reading = await analyse(picture)
    if not reading.readings:
        raise FacelaneError(
            Reason.NO_FACE,
            "no face was found; send a picture that shows the face upright as it is stored "
            "(an EXIF rotation is not applied)",
        )
    if len(reading.readings) > 1:
        raise FacelaneError(
            Reason.MULTIPLE_FACES,
            "the picture shows several faces; crop it to the one that is meant",
            metadata={"faces": str(len(reading.readings))},
        )
    [found] = reading.readings
    if not found.vector:
        raise unanswered()
    similarity = gallery.similarity(gallery_id, subject_id, found.vector, model_id=reading.model_id)
    decision = decide.verify(found.face.ood_score, similarity, thresholds)
    matches = decision is Decision.MATCH
    verified = matches and (not liveness or found.face.liveness.verdict is LivenessVerdict.LIVE)
    shown = None if decision is Decision.REJECTED_OOD else similarity
    needed = thresholds.match_at(found.face.ood_score or 0.0, 1)
    identity = Identity(decision, subject_id if matches else "", shown, threshold=needed)
    return Verification(replace(found.face, identity=identity), verified, shown, needed)
