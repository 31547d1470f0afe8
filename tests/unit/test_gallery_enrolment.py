"""Enrolment: which picture becomes a template, and what the others are told."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    Encoding,
    Face,
    FacelaneError,
    FaceReading,
    FrameResult,
    Identity,
    Liveness,
    LivenessVerdict,
    Picture,
    Reading,
    Reason,
    Stage,
)
from facelane_server.gallery.correction import is_not
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.enrolment import Caution, Enrolment, Request, enroll
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.verification import verify
from facelane_server.ipc.messages import GallerySnapshot
from facelane_server.store.records import Correction

DIM = 32
THRESHOLDS = Thresholds(match=0.35, ood=0.4, live=0.9, spoof=0.5)
LIVE = Liveness(LivenessVerdict.LIVE, 0.95)
SPOOF = Liveness(LivenessVerdict.SPOOF, 0.1)
SILENT = Liveness(LivenessVerdict.UNDECIDED, None)
UNDECIDED = Liveness(LivenessVerdict.UNDECIDED, 0.7)
TOO_TIGHT = Liveness(LivenessVerdict.UNDECIDED, no_context=True)
LIVE_ONLY = {"require_live": True}


def face(
    seed: int = 1,
    *,
    width: float = 100.0,
    ood: float | None = 0.8,
    liveness: Liveness = LIVE,
) -> FaceReading:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    found = Face(
        track_id=0,
        box=Box(10, 10, width, width),
        score=0.9,
        landmarks=((1.0, 2.0),) * 5,
        identity=Identity(Decision.NOT_EVALUATED),
        liveness=liveness,
        ood_score=ood,
    )
    return FaceReading(found, (values / np.linalg.norm(values)).tobytes())


class Pipeline:
    """Answers with prepared faces and counts how often it was asked."""

    def __init__(self, *faces: FaceReading, missing: tuple[Stage, ...] = ()) -> None:
        result = FrameResult(640, 480, tuple(one.face for one in faces), missing_stages=missing)
        self.reading = Reading(result, faces)
        self.calls = 0

    async def __call__(self, picture: Picture) -> Reading:
        self.calls += 1
        return self.reading


@pytest.fixture
async def gallery(tmp_path: Path) -> AsyncIterator[Gallery]:
    async def publish(message: GallerySnapshot, *_fds: int) -> None:
        assert message.dim == DIM

    opened = await Gallery.open(tmp_path / "g.db")
    await opened.serve("m@1", DIM, publish)
    yield opened
    await opened.close()


def request(**changes: object) -> Request:
    picture = Picture(Encoding.JPEG, b"\xff\xd8 some bytes")
    plain = Request("", "ada", picture, create_subject=True)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


async def run(gallery: Gallery, pipeline: Pipeline, asked: Request) -> Enrolment:
    return await enroll(
        gallery,
        asked,
        analyse=pipeline,
        thresholds=THRESHOLDS,
    )


async def test_one_clear_face_becomes_a_template(gallery: Gallery) -> None:
    made = await run(gallery, Pipeline(face()), request(display_name="Ada"))
    assert made.created
    assert made.subject.subject_id == "ada"
    assert made.subject.gallery_id == "default"
    assert made.subject.display_name == "Ada"
    assert made.subject.template_count == 1
    assert (made.template.model_id, made.template.ood_score) == ("m@1", 0.8)
    assert gallery.similarity("", "ada", face().vector) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("pipeline", "changes", "reason", "retryable"),
    [
        (Pipeline(), {}, Reason.NO_FACE, False),
        (Pipeline(face(1), face(2)), {}, Reason.MULTIPLE_FACES, False),
        (Pipeline(face(ood=0.19)), {}, Reason.OOD_REJECTED, False),
        (Pipeline(face(ood=float("nan"))), {}, Reason.OOD_REJECTED, False),
        (Pipeline(face(ood=None)), {}, Reason.POOL_UNAVAILABLE, True),
        (Pipeline(face(liveness=SPOOF)), LIVE_ONLY, Reason.SPOOF_SUSPECTED, False),
        (Pipeline(face(liveness=SILENT)), LIVE_ONLY, Reason.POOL_UNAVAILABLE, True),
        (Pipeline(face(liveness=UNDECIDED)), LIVE_ONLY, Reason.LIVENESS_UNDECIDED, False),
        (Pipeline(face(liveness=TOO_TIGHT)), LIVE_ONLY, Reason.NO_CONTEXT, False),
        (
            Pipeline(face(liveness=SILENT), missing=(Stage.LIVENESS,)),
            LIVE_ONLY,
            Reason.POOL_UNAVAILABLE,
            True,
        ),
        (Pipeline(face(), missing=(Stage.RECOGNIZER,)), {}, Reason.POOL_UNAVAILABLE, True),
        (Pipeline(face()), {"create_subject": False}, Reason.SUBJECT_NOT_FOUND, False),
        (Pipeline(face()), {"subject_id": "no spaces"}, Reason.ARGUMENT_INVALID, False),
        (Pipeline(face()), {"request_id": "r" * 129}, Reason.ARGUMENT_INVALID, False),
    ],
)
async def test_refusals(
    gallery: Gallery,
    pipeline: Pipeline,
    changes: dict[str, object],
    reason: Reason,
    retryable: bool,
) -> None:
    with pytest.raises(FacelaneError) as caught:
        await run(gallery, pipeline, request(**changes))
    assert (caught.value.reason, caught.value.retryable) == (reason, retryable)
    assert await gallery.counts() == (0, 0), "a refusal must leave nothing"
    assert gallery.templates == 0


async def test_an_unknown_subject_is_told_before_the_models_run(gallery: Gallery) -> None:
    pipeline = Pipeline(face())
    with pytest.raises(FacelaneError):
        await run(gallery, pipeline, request(create_subject=False))
    assert pipeline.calls == 0


@pytest.mark.parametrize("liveness", [SPOOF, SILENT, UNDECIDED, TOO_TIGHT])
async def test_liveness_is_not_judged_unless_it_is_asked_for(
    gallery: Gallery, liveness: Liveness
) -> None:
    assert (await run(gallery, Pipeline(face(liveness=liveness)), request())).created


async def test_a_live_face_satisfies_whoever_asks_for_one(gallery: Gallery) -> None:
    assert (await run(gallery, Pipeline(face()), request(require_live=True))).created


async def test_a_face_that_a_stream_would_not_trust_is_enrolled_with_a_warning(
    gallery: Gallery,
) -> None:
    made = await run(gallery, Pipeline(face(1, ood=0.3)), request())
    assert made.warnings == (Caution.LOW_OOD_SCORE,)
    clear = await run(gallery, Pipeline(face(2, ood=0.9, width=112)), request())
    assert clear.warnings == ()
    assert clear.template.quality == pytest.approx(0.9)
    small = await run(gallery, Pipeline(face(3, ood=0.9, width=40)), request())
    assert small.warnings == (Caution.LOW_QUALITY,)
    listed = await gallery.list_templates("", "ada")
    assert [t.quality for t in listed] == pytest.approx([0.3 * 100 / 112, 0.9, 0.9 * 40 / 112])


async def test_the_largest_of_several_faces(gallery: Gallery) -> None:
    crowd = Pipeline(face(1, width=50), face(2, width=90), face(3, width=60))
    made = await run(gallery, crowd, request(allow_multiple_faces=True))
    assert made.face.box.width == 90
    assert gallery.similarity("", "ada", face(2).vector) == pytest.approx(1.0, abs=1e-3)


def placed(seed: int, x: float, width: float) -> FaceReading:
    one = face(seed, width=width)
    moved = msgspec.structs.replace(one.face, box=Box(x, 200.0, width, width))
    return msgspec.structs.replace(one, face=moved, chip=bytes([seed]))


async def test_a_correction_is_of_the_face_that_the_picture_was_cut_around(
    gallery: Gallery,
) -> None:
    """Whoever stands before that one is larger, and somebody else."""
    crowd = Pipeline(placed(1, 0.0, 220.0), placed(2, 270.0, 90.0))
    said = {"allow_multiple_faces": True, "correction": Correction.IS}
    made = await run(gallery, crowd, request(**said))
    assert made.face.box.width == 90
    picture = Picture(Encoding.JPEG, b"\xff\xd8")
    kept = await is_not(gallery, "", "ada", picture, analyse=crowd, thresholds=THRESHOLDS)
    assert kept.template.correction is Correction.NOT
    assert gallery.similarity("", "ada", face(1).vector) < 0.99


async def test_what_somebody_is_not_outlives_the_recogniser_too(gallery: Gallery) -> None:
    one = placed(1, 270.0, 90.0)
    await run(gallery, Pipeline(one), request())
    picture = Picture(Encoding.JPEG, b"\xff\xd8")
    await is_not(gallery, "", "ada", picture, analyse=Pipeline(placed(2, 270.0, 90.0)),
                 thresholds=THRESHOLDS)  # fmt: skip
    assert await gallery.without_chip() == 0, "its chip was kept like all others"


async def test_the_largest_face_is_the_one_that_is_judged(gallery: Gallery) -> None:
    crowd = Pipeline(face(1, width=50), face(2, width=90, liveness=SPOOF))
    with pytest.raises(FacelaneError) as caught:
        await run(gallery, crowd, request(allow_multiple_faces=True, require_live=True))
    assert caught.value.reason is Reason.SPOOF_SUSPECTED


async def test_what_could_not_be_enrolled_itself_is_not_meant(gallery: Gallery) -> None:
    beside = Pipeline(face(1, width=90), face(2, width=80, ood=0.05))
    assert (await run(gallery, beside, request())).face.box.width == 90
    unclear = Pipeline(face(1, width=90, ood=0.05), face(2, width=80))
    with pytest.raises(FacelaneError) as caught:
        await run(gallery, unclear, request())
    assert caught.value.reason is Reason.MULTIPLE_FACES


async def test_a_repeated_request_does_not_run_the_models(gallery: Gallery) -> None:
    pipeline = Pipeline(face())
    first = await run(gallery, pipeline, request(request_id="r1"))
    again = await run(gallery, pipeline, request(request_id="r1"))
    assert pipeline.calls == 1
    assert not again.created
    assert again.template == first.template
    assert again.face.box == first.face.box
    assert again.face.landmarks == first.face.landmarks
    assert again.face.liveness == first.face.liveness
    assert again.face.ood_score == first.face.ood_score


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_id": "bob"},
        {"picture": Picture(Encoding.JPEG, b"\xff\xd8 other bytes")},
        {"require_live": True},
        {"allow_multiple_faces": True},
        {"display_name": "B"},
    ],
)
async def test_a_request_id_for_something_else(
    gallery: Gallery, changes: dict[str, object]
) -> None:
    await run(gallery, Pipeline(face()), request(request_id="r1"))
    with pytest.raises(FacelaneError) as caught:
        await run(gallery, Pipeline(face(2)), request(request_id="r1", **changes))
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert await gallery.counts() == (1, 1)


async def test_the_same_picture_again_without_a_request_id(gallery: Gallery) -> None:
    first = await run(gallery, Pipeline(face()), request())
    again = await run(gallery, Pipeline(face()), request())
    assert not again.created
    assert again.template == first.template
    assert gallery.templates == 1


async def test_without_a_recogniser_nobody_is_enrolled(tmp_path: Path) -> None:
    opened = await Gallery.open(tmp_path / "other.db")
    try:
        with pytest.raises(FacelaneError) as caught:
            await run(opened, Pipeline(face()), request())
    finally:
        await opened.close()
    assert caught.value.reason is Reason.POOL_UNAVAILABLE
    assert "pools.recognizer" in caught.value.message


async def test_a_vector_of_another_model_is_neither_kept_nor_compared(gallery: Gallery) -> None:
    """The recogniser's model was changed while the picture was on its way."""
    pipeline = Pipeline(face())
    pipeline.reading = msgspec.structs.replace(pipeline.reading, model_id="m@2")
    with pytest.raises(FacelaneError) as changing:
        await run(gallery, pipeline, request())
    assert (changing.value.reason, changing.value.retryable) == (Reason.POOL_UNAVAILABLE, True)
    assert await gallery.counts() == (0, 0)
    pipeline.reading = msgspec.structs.replace(pipeline.reading, model_id="m@1")
    assert (await run(gallery, pipeline, request())).created
    assert gallery.similarity("", "ada", face().vector, model_id="m@1") > 0.99
    with pytest.raises(FacelaneError) as changing:
        gallery.similarity("", "ada", face().vector, model_id="m@2")
    assert (changing.value.reason, changing.value.retryable) == (Reason.POOL_UNAVAILABLE, True)


# -- somebody else's face, and nobody's ---------------------------------------------------------


def near(*candidates: tuple[str, float]) -> FaceReading:
    return msgspec.structs.replace(face(), candidates=tuple(Candidate(*c) for c in candidates))


@pytest.mark.parametrize(
    ("candidates", "refused"),
    [
        ((), False),
        ((("ada", 0.9),), False),
        ((("bo", 0.34),), False),
        ((("bo", 0.36),), True),
        ((("ada", 0.9), ("bo", 0.5)), True),
    ],
)
async def test_a_face_of_another_is_enrolled_by_those_alone_who_may(
    gallery: Gallery, candidates: tuple[tuple[str, float], ...], refused: bool
) -> None:
    pipeline = Pipeline(near(*candidates))
    if refused:
        with pytest.raises(FacelaneError) as told:
            await run(gallery, pipeline, request())
        assert told.value.reason is Reason.FACE_OF_ANOTHER
        assert "bo" not in str(told.value.metadata)
        assert await gallery.counts() == (0, 0)
    made = await run(gallery, pipeline, request(may_reassign=True))
    assert made.created


@pytest.mark.parametrize(
    ("liveness", "verified"), [(LIVE, True), (SPOOF, False), (UNDECIDED, False), (SILENT, False)]
)
async def test_a_match_is_verified_when_it_lives(
    gallery: Gallery, liveness: Liveness, verified: bool
) -> None:
    await run(gallery, Pipeline(face()), request())
    picture = Picture(Encoding.JPEG, b"another")

    async def asked(wanted: bool) -> tuple[bool, Decision]:
        found = await verify(
            gallery,
            "default",
            "ada",
            picture,
            analyse=Pipeline(face(liveness=liveness)),
            thresholds=THRESHOLDS,
            liveness=wanted,
        )
        return found.verified, found.face.identity.decision

    assert await asked(True) == (verified, Decision.MATCH)
    assert await asked(False) == (True, Decision.MATCH), "waived by name"
