"""A name does not outlive what it was given for: subjects that are enrolled anew, templates that
go, models that change, clocks that stand still."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.faces import Stage, detected, evidence, signature

from facelane_server import limits, tracking
from facelane_server.domain import Decision, Face, LivenessVerdict
from facelane_server.gallery import decide
from facelane_server.gallery.index import GalleryIndex
from facelane_server.gallery.losses import Losses
from facelane_server.gallery.snapshot import AddTemplate, RemoveSubject, RemoveTemplate
from facelane_server.lanes.faces import Look
from facelane_server.tracking.track import STILL_LINKS, clock_stands_still

MS = 1_000_000
ADA, BOB = ("default", "ada"), ("default", "bob")


class Camera(Stage):
    """One face, 25 pictures a second, answered at once unless a test keeps the look."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0

    def picture(self, who: str | None = "ada", *, keeps: bool = False) -> tuple[Face, list[Look]]:
        self.now_ns += 40 * MS
        looks = self.turn([detected(100.0, signature(1))], self.now_ns)
        if not keeps:
            for look in looks:
                self.answer(look, evidence(who))
        return (self.emit()[0], []) if not keeps else (None, looks)  # type: ignore[return-value]

    @property
    def losses(self) -> Losses:
        return self.pipeline.losses


def named(face: Face) -> str:
    return face.identity.subject_id


def test_who_is_enrolled_anew_under_a_name_is_another() -> None:
    camera = Camera()
    assert named(camera.picture()[0]) == "ada"
    assert named(camera.picture()[0]) == "ada"
    camera.losses.note(ADA)  # deleted, and enrolled again before the next picture
    _, looks = camera.picture(keeps=True)
    assert not any(look.recognize for look in looks), "the tracker does not know yet"
    for look in looks:
        camera.answer(look, evidence("ada"))
    assert camera.emit()[0].identity.decision is Decision.NOT_EVALUATED
    face, _ = camera.picture(None)
    assert (face.recognized_now, face.identity.decision) == (True, Decision.UNKNOWN)


def test_whoever_is_still_known_is_named_again_by_a_new_look() -> None:
    camera = Camera()
    camera.picture()
    camera.losses.note(ADA)  # one of two templates
    camera.picture()
    face, _ = camera.picture()
    assert (named(face), face.recognized_now) == ("ada", True)


def test_a_look_that_was_asked_for_before_names_nobody() -> None:
    camera = Camera()
    _, looks = camera.picture(keeps=True)
    camera.losses.note(ADA)
    for look in looks:
        camera.answer(look, evidence("ada"))
    assert camera.emit()[0].identity.decision is Decision.NOT_EVALUATED
    assert named(camera.picture()[0]) == "ada", "the next one does"


def test_the_loss_of_another_changes_nothing() -> None:
    camera = Camera()
    camera.picture()
    camera.losses.note(BOB)
    face, _ = camera.picture()
    assert (named(face), face.recognized_now) == ("ada", False)


def test_a_new_name_after_a_loss_is_shown_at_once() -> None:
    camera = Camera()
    camera.picture(None)
    camera.losses.note(ADA)
    camera.now_ns += 4_000 * MS  # another track
    face, _ = camera.picture()
    assert named(face) == "ada"


def test_candidates_that_are_gone_are_not_shown_either() -> None:
    camera = Camera()
    camera.faces._plan = camera.faces._plan.__class__(max_candidates=2)
    camera.now_ns += 40 * MS
    [look] = camera.turn([detected(100.0, signature(1))], camera.now_ns)
    camera.answer(look, evidence("bob", similarity=0.3))
    shown = camera.emit()[0].identity
    assert (shown.decision, [c.subject_id for c in shown.candidates]) == (Decision.UNKNOWN, ["bob"])
    camera.losses.note(BOB)
    face, _ = camera.picture("bob")
    assert face.identity.candidates == ()


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("picture"), st.sampled_from(["ada", "bob", None])),
            st.tuples(st.just("answer"), st.none()),
            st.tuples(st.just("loss"), st.sampled_from([ADA, BOB])),
            st.tuples(st.just("all"), st.none()),
        ),
        max_size=60,
    )
)
def test_no_name_but_by_a_look_that_was_asked_for_after_its_last_loss(
    steps: list[tuple[str, object]],
) -> None:
    """Looks are answered late, in their order; each says whom the picture shows."""
    camera = Camera()
    asked: list[tuple[list[Look], str | None, int]] = []
    last = {"ada": 0, "bob": 0}
    answered: dict[str, int] = {}
    for step, what in steps:
        if step == "picture":
            camera.now_ns += 40 * MS
            face = detected(100.0, signature({"ada": 1, "bob": 2}.get(str(what), 3)))
            looks = camera.turn([face], camera.now_ns)
            asked.append((looks, what, camera.losses.now))  # type: ignore[arg-type]
        elif step == "loss":
            camera.losses.note(what)  # type: ignore[arg-type]
            last[what[1]] = camera.losses.now  # type: ignore[index]
        elif step == "all":
            camera.losses.note_all()
            last = dict.fromkeys(last, camera.losses.now)
        elif asked:
            looks, who, moment = asked.pop(0)
            for look in looks:
                if look.recognize and who:
                    answered[who] = max(moment, answered.get(who, 0))
                camera.answer(look, evidence(who))
            for shown in camera.emit():
                if name := named(shown):
                    assert answered[name] >= last[name]


def test_losses_are_of_their_subject_until_too_many_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_LOSSES", 3)
    losses = Losses()
    before = losses.now
    losses.note(ADA)
    assert losses.since(before, *ADA)
    assert not losses.since(losses.now, *ADA)
    assert not losses.since(before, *BOB)
    for number in range(3):
        losses.note(("default", f"s{number}"))
    assert losses.since(before, *BOB), "it is not known any more whose the oldest was"
    assert not losses.since(losses.now - 3, *BOB)
    now = losses.now
    losses.note_all()
    assert losses.since(now, *BOB)


async def test_the_gallerys_index_tells_what_goes() -> None:
    async def publish(*_: object) -> bool:
        return True

    losses = Losses()
    index = GalleryIndex(4, publish, losses)  # type: ignore[arg-type]
    row = np.full(4, 0.5, np.float16)
    try:
        index.apply(
            [
                AddTemplate(1, "default", "ada", "t7", row),
                AddTemplate(1, "default", "ada", "t8", row),
            ]
        )
        assert losses.now == 0
        index.apply([RemoveTemplate(1, "t7")])
        assert losses.since(0, *ADA)
        now = losses.now
        index.apply([RemoveTemplate(1, "t7")])
        assert not losses.since(now, *ADA), "it was gone already"
        index.apply([RemoveSubject(1), AddTemplate(2, "default", "ada", "t9", row)])
        assert index.knows(ADA)
        assert losses.since(now, *ADA)
        now = losses.now
        index.apply([AddTemplate(-2, "default", decide.SHADOW + "ada", "not", row)])
        assert losses.since(now, *ADA), "what she is not: it may be her track's face"
        now = losses.now
        index.rebase("other", 4, [])
        assert losses.since(now, *BOB)
    finally:
        await index.close()


# -- models and clocks -----------------------------------------------------------------------


def test_another_liveness_model_judges_anew() -> None:
    camera = Camera()
    for _ in range(4):
        face, _ = camera.picture()
    assert face.liveness.verdict is LivenessVerdict.LIVE
    camera.pipeline.liveness_models += 1
    camera.now_ns += 40 * MS
    looks = camera.turn([detected(100.0, signature(1))], camera.now_ns)
    assert [look.live for look in looks] == [True]
    camera.answer(looks[0], evidence("ada", live=0.5))
    assert camera.emit()[0].liveness.verdict is LivenessVerdict.UNDECIDED


def test_who_was_live_by_other_thresholds_is_judged_by_these() -> None:
    """A verdict stays LIVE down to the middle of the band: not one that these would not give."""
    camera = Camera()
    for _ in range(4):
        face, _ = camera.picture()
    assert face.liveness.verdict is LivenessVerdict.LIVE
    score = face.liveness.score
    assert score is not None
    pipeline = camera.pipeline
    pipeline.judge_by(pipeline.thresholds, {})
    assert pipeline.liveness_models == 0
    stricter = replace(pipeline.thresholds, live=min(1.0, score + 0.01), spoof=score - 0.2)
    pipeline.judge_by(stricter, {})
    verdicts = {camera.picture()[0].liveness.verdict for _ in range(12)}
    assert verdicts == {LivenessVerdict.UNDECIDED}


def test_a_name_does_not_outlive_the_thresholds_that_it_was_given_by() -> None:
    camera = Camera()
    for _ in range(3):
        face, _ = camera.picture()
    assert named(face) == "ada"
    pipeline = camera.pipeline
    pipeline.judge_by(replace(pipeline.thresholds, live=0.9, spoof=0.1), {})
    assert named(camera.picture()[0]) == "ada", "no name was given by those of liveness"
    _, looks = camera.picture(keeps=True)
    assert not any(look.recognize for look in looks), "she is known"
    for look in looks:
        camera.answer(look, evidence("ada"))
    pipeline.judge_by(replace(pipeline.thresholds, match=0.95), {})
    assert named(camera.emit()[0]) == "", "nor in a picture that was on its way"
    face, _ = camera.picture()
    assert (face.recognized_now, face.identity.decision) == (True, Decision.UNKNOWN)


@pytest.mark.parametrize("within", ["galleries", "sources"])
def test_thresholds_of_names_are_those_of_galleries_and_sources_too(within: str) -> None:
    pipeline = Camera().pipeline
    general = replace(pipeline.thresholds, **{within: {"door": pipeline.thresholds}})
    pipeline.judge_by(general, {})
    before = pipeline.namings
    pipeline.judge_by(replace(general), {})
    assert pipeline.namings == before
    strict = {"door": replace(pipeline.thresholds, margin=0.2)}
    pipeline.judge_by(replace(general, **{within: strict}), {})
    assert pipeline.namings == before + 1


def test_what_one_model_said_is_not_judged_by_another_s_thresholds() -> None:
    camera = Camera()
    camera.picture()
    _, looks = camera.picture(keeps=True)
    assert [look.live for look in looks] == [True]
    camera.answer(looks[0], evidence("ada"))  # and its picture waits for those before it
    camera.pipeline.liveness_models += 1
    camera.now_ns += 40 * MS
    for look in camera.turn([detected(100.0, signature(1))], camera.now_ns):
        camera.answer(look, evidence("ada", live=None))
    verdicts = [camera.emit()[0].liveness.verdict for _ in range(2)]
    assert LivenessVerdict.LIVE not in verdicts


def test_time_that_stands_still_keeps_no_name() -> None:
    camera = Camera()
    camera.picture()
    looks = names = 0
    for _ in range(5 * STILL_LINKS):
        camera.now_ns -= 40 * MS  # the client gives every picture one time
        face, _ = camera.picture()
        looks += face.recognized_now
        names += named(face) == "ada"
    assert looks == pytest.approx(5, abs=1)
    assert names == 5 * STILL_LINKS, "who is looked at again keeps it"
    for number in range(3 * STILL_LINKS):
        camera.now_ns -= 40 * MS
        _, kept = camera.picture(keeps=True)
        for look in kept:
            look.recognize = False
            camera.answer(look, evidence(None, live=None))
        face = camera.emit()[0]
        assert named(face) == "ada" or number >= STILL_LINKS
    assert face.identity.decision is Decision.NOT_EVALUATED, "nobody looked for too long"
    assert face.liveness.verdict is not LivenessVerdict.LIVE


@given(st.integers(0, 10**6), st.floats(1.0, 999.0))
def test_no_camera_is_so_quick(links: int, fps: float) -> None:
    assert not clock_stands_still(links * tracking.track.SECOND / fps, links)
