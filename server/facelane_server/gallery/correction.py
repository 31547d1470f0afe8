"""What people say of an event's face: that it is not whom it was taken for, or who it is.

The event's picture is looked at again, like any other. "This is not her" keeps its face beside the
subject's templates, as what the subject is not; "this is him" makes it a template, after the
refusals of every enrolment. Both can be undone, and stand in the audit log.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from facelane_server.domain import FacelaneError, Picture, Reason
from facelane_server.gallery import enrolment
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.enrolment import Analyse
from facelane_server.gallery.gallery import Gallery
from facelane_server.store.records import Correction, Subject, Template


@dataclass(frozen=True, slots=True)
class Corrected:
    """``template``: what came of it; its id undoes it."""

    subject: Subject
    template: Template


async def is_not(
    gallery: Gallery,
    gallery_id: str,
    subject_id: str,
    picture: Picture,
    *,
    analyse: Analyse,
    thresholds: Thresholds,
) -> Corrected:
    """The picture's face is not the subject's: from now on, whoever is nearer to it than to any of
    the subject's templates is not the subject. Raises what an enrolment raises."""
    reading = await analyse(picture)
    chosen = enrolment.choose(
        reading, thresholds, allow_multiple_faces=True, require_live=False, centred=True
    )
    assert chosen.face.ood_score is not None
    kept = await gallery.enroll(
        gallery_id,
        subject_id,
        vector=np.frombuffer(chosen.vector, np.float32),
        ood_score=chosen.face.ood_score,
        quality=enrolment.quality_of(chosen.face),
        chip=chosen.chip,
        model_id=reading.model_id,
        correction=Correction.NOT,
    )
    return Corrected(kept.subject, kept.template)


async def is_he(
    gallery: Gallery,
    request: enrolment.Request,
    *,
    analyse: Analyse,
    thresholds: Thresholds,
) -> Corrected:
    """The picture's face is the subject's. Raises what an enrolment raises."""
    made = await enrolment.enroll(gallery, request, analyse=analyse, thresholds=thresholds)
    return Corrected(made.subject, made.template)


def nobody_named() -> FacelaneError:
    return FacelaneError(
        Reason.ARGUMENT_INVALID,
        "the event names nobody who could be taken out of it; say who it is instead (subject_id)",
        metadata={"field": "is_not"},
    )
