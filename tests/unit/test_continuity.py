"""A name belongs to one person: no name without a look at that face since the last doubt."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import cv2
import msgspec
import numpy as np
import pytest
from bench import material
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fakes.faces import THRESHOLDS, Stage, detected, evidence, signature

from facelane_server import limits, tracking
from facelane_server.domain import (
    Decision,
    Encoding,
    Face,
    Frame,
    Identity,
    LivenessVerdict,
    Picture,
)
from facelane_server.domain import Stage as Role
from facelane_server.models.promise import Promise
from facelane_server.pipeline import Evidence
from facelane_server.tracking.appearance import (
    SAME_LINK,
    SAME_LOOK,
    changed,
    correlation,
)
from facelane_server.worker.appearance import signatures

MS = 1_000_000
ADA, BOB, STRANGER = "ada", "bob", None
PARAMS = tracking.Params()


@dataclass(frozen=True)
class Measured:
    ood: float
    similarity: tuple[float, ...]


PROMISE = Promise(0.001, (Measured(0.4, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),))


def chip(seed: int, size: int = 112) -> np.ndarray:
    """Soft blobs, as faces are at this size."""
    noise = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), np.uint8)
    soft = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    fine = np.random.default_rng(seed).integers(-12, 13, soft.shape)
    return np.clip(soft.astype(int) + fine, 0, 255).astype(np.uint8)


def of(picture: np.ndarray) -> bytes:
    return signatures(picture[None]).tobytes()


# -- appearance ------------------------------------------------------------------------------


def test_a_signature_tells_faces_apart_and_one_face_from_its_own_blur() -> None:
    one, other = chip(1), chip(2)
    assert len(of(one)) == limits.SIGNATURE_BYTES
    moved = np.roll(one, 1, axis=1)
    assert not changed(of(one), of(one), SAME_LINK)
    assert not changed(of(one), of(moved), SAME_LINK)
    assert changed(of(one), of(other), SAME_LINK)
    assert changed(of(one), of(cv2.GaussianBlur(one, (0, 0), 3)), SAME_LINK)
    assert changed(of(one), of(np.clip(one.astype(int) + 60, 0, 255).astype(np.uint8)), SAME_LINK)


def test_flat_chips_are_alike_and_unlike_all_others() -> None:
    flat = np.full((112, 112, 3), 90, np.uint8)
    assert correlation(of(flat), of(flat)) == 1.0
    assert correlation(of(flat), of(chip(1))) == 0.0


def test_without_signatures_nothing_is_said() -> None:
    assert not changed(b"", of(chip(1)), SAME_LINK)
    assert not changed(of(chip(1)), b"", SAME_LINK)


@pytest.mark.parametrize("size", [96, 100, 112, 128])
def test_who_else_is_seen_changes_no_signature(size: int) -> None:
    chips = np.stack(
        [chip(seed, size) for seed in range(5)] + [np.full((size, size, 3), 9, np.uint8)]
    )
    together = signatures(chips)
    assert len({row.tobytes() for row in together}) == len(chips)
    for one, row in zip(chips, together, strict=True):
        assert of(one) == row.tobytes()


def test_no_faces_have_no_signatures() -> None:
    none = signatures(np.zeros((0, 112, 112, 3), np.uint8))
    assert none.shape == (0, limits.SIGNATURE_BYTES)


# -- swaps in place --------------------------------------------------------------------------


def watch(
    stage: Stage, who: str | None, seed: int, frames: int, step_ms: int, **said: float
) -> list[Face]:
    """So many pictures of one face in the same place, each look answered at once."""
    faces = []
    for _ in range(frames):
        stage.now = getattr(stage, "now", 0) + step_ms * MS
        for look in stage.turn([detected(100, signature(seed))], stage.now):
            stage.answer(look, evidence(who, **said))
        faces.extend(stage.emit())
    return faces


@pytest.mark.parametrize("fps", [5, 10, 25])
@pytest.mark.parametrize(
    ("who", "said"),
    [(BOB, {}), (STRANGER, {}), (STRANGER, {"ood": 0.1}), (BOB, {"live": 0.05})],
    ids=["enrolled", "stranger", "blurred", "spoof"],
)
def test_a_face_swapped_in_place_never_has_the_old_name(
    fps: int, who: str | None, said: dict[str, float]
) -> None:
    stage = Stage()
    before = watch(stage, ADA, 1, 3 * fps, 1000 // fps)
    assert all(face.identity.subject_id == ADA for face in before)
    assert before[-1].liveness.verdict is LivenessVerdict.LIVE
    after = watch(stage, who, 2, 3 * fps, 1000 // fps, **said)
    assert all(face.identity.subject_id != ADA for face in after)
    if who == BOB:
        assert all(face.identity.subject_id == BOB for face in after)
        assert after[0].track_id != before[0].track_id
        assert stage.gone == [before[0].track_id]
    if said.get("live", 1.0) < 0.3:
        assert all(face.liveness.verdict is not LivenessVerdict.LIVE for face in after)
    if said.get("ood", 1.0) < 0.4:
        assert {face.identity.decision for face in after} == {Decision.REJECTED_OOD}


def test_the_same_face_after_a_doubt_goes_on_as_the_same_track() -> None:
    stage = Stage()
    before = watch(stage, ADA, 1, 5, 40)
    after = watch(stage, ADA, 2, 5, 40)  # it has turned, say
    assert {f.track_id for f in before + after} == {1}
    assert all(f.identity.subject_id == ADA for f in after)
    assert after[0].recognized_now
    assert after[0].evidence_age_ns == 0
    assert (after[3].evidence_age_ns, after[3].links_since_evidence) == (120 * MS, 3)


def test_an_unclear_look_at_the_same_face_keeps_the_name_and_gives_none() -> None:
    stage = Stage()
    watch(stage, ADA, 1, 5, 40)
    [turned] = watch(stage, ADA, 2, 1, 40, ood=0.15)
    assert turned.identity.subject_id == ADA
    assert turned.evidence_age_ns is not None
    assert turned.evidence_age_ns > 0
    [worse] = watch(stage, ADA, 3, 1, 40, ood=0.05)
    assert worse.identity.decision is Decision.REJECTED_OOD
    fresh = Stage()
    [never] = watch(fresh, ADA, 1, 1, 40, ood=0.3)
    assert never.identity.decision is Decision.REJECTED_OOD


def test_a_doubtful_look_that_names_nobody_is_compared_with_the_one_who_was_named() -> None:
    """In a large gallery a name takes more than it takes to be the same as a moment ago."""
    stage = Stage()
    stage.pipeline.thresholds = replace(THRESHOLDS, promise=PROMISE, looks=1)
    stage.pipeline.searched = lambda _gallery: 10_000
    before = watch(stage, ADA, 1, 5, 40)
    assert before[-1].identity.subject_id == ADA
    [worse] = watch(stage, ADA, 2, 1, 40, ood=0.7, similarity=0.45)
    assert (worse.identity.subject_id, worse.track_id) == (ADA, before[0].track_id)
    assert worse.evidence_age_ns == 200 * MS, "it is no look that names"
    # Once more in another moment, and what was a name has become a doubt.
    for _ in range(7):
        [same] = watch(stage, ADA, 2, 1, 40, ood=0.7, similarity=0.45)
        assert (same.identity.subject_id, same.recognized_now) == (ADA, False)
    [again] = watch(stage, ADA, 2, 1, 40, ood=0.7, similarity=0.45)
    assert again.recognized_now
    assert again.identity.decision is Decision.UNKNOWN
    other = Stage()
    other.pipeline.thresholds = stage.pipeline.thresholds
    other.pipeline.searched = stage.pipeline.searched
    watch(other, ADA, 1, 5, 40)
    for similarity in (0.25, 0.45):
        swapped = watch(other, BOB, 3, 3, 40, ood=0.7, similarity=similarity)
        assert all(face.identity.subject_id != ADA for face in swapped)


@pytest.mark.parametrize("interval_s", [3, 60])
def test_who_still_passes_is_looked_at_in_another_moment_and_goes_on(interval_s: int) -> None:
    """Somebody whom the recogniser hardly knows, a picture above the threshold and one below."""
    stage = Stage(PARAMS.with_interval(interval_s * tracking.track.SECOND))
    stage.pipeline.thresholds = replace(THRESHOLDS, promise=PROMISE, looks=1)
    stage.pipeline.searched = lambda _gallery: 10_000
    watch(stage, ADA, 1, 5, 40)
    shown = watch(stage, ADA, 2, 2, 40, ood=0.7, similarity=0.45)
    shown += watch(stage, ADA, 2, 75, 40, ood=0.7)
    assert {face.identity.subject_id for face in shown} == {ADA}
    assert [k for k, face in enumerate(shown) if face.recognized_now] == [0, 8]


def test_a_face_that_is_suddenly_blurred_must_be_seen_clearly_again() -> None:
    stage = Stage()
    watch(stage, ADA, 1, 5, 40)
    blurred = signature(1)[:-4] + bytes((10,)) + signature(1)[-3:]
    for look in stage.turn([detected(100, blurred)], 240 * MS):
        stage.answer(look, evidence(ADA, ood=0.3))
    [face] = stage.emit()
    assert face.identity.decision is Decision.REJECTED_OOD


def test_a_face_at_the_picture_s_edge_is_not_judged() -> None:
    stage = Stage()
    stage.pipeline.context = 2.7
    for x, judged in ((300.0, True), (-20.0, False)):
        looks = stage.faces.turn([detected(x, signature(1))], 0, (), (640, 480))
        assert [look.live for look in looks] == [judged]
        frame = Frame(1, Picture(Encoding.JPEG, b""), 0)
        stage.faces.answered(looks[0], Evidence(live_score=0.95 if judged else None))
        shown = stage.faces.face(looks[0], frame, ())
        assert shown.liveness.no_context is not judged
        verdict = LivenessVerdict.LIVE if judged else LivenessVerdict.UNDECIDED
        assert shown.liveness.verdict is verdict


def test_while_looks_are_late_the_doubt_shows() -> None:
    """The look at the swapped face gets no answer: nothing is shown until one does."""
    stage = Stage()
    watch(stage, ADA, 1, 5, 40)
    for k in range(3):
        [look] = stage.turn([detected(100, signature(2))], (300 + 40 * k) * MS)
        stage.answer(look, Evidence())
        [face] = stage.emit()
        assert face.identity.decision is Decision.NOT_EVALUATED
        assert face.ood_score is None
        assert face.evidence_age_ns is None
        assert face.liveness.verdict is LivenessVerdict.UNDECIDED


def test_a_look_that_was_under_way_before_the_swap_does_not_settle_it() -> None:
    stage = Stage()
    [early] = stage.turn([detected(100, signature(1))], 0)
    [late] = stage.turn([detected(100, signature(2))], 40 * MS)
    stage.turn([detected(100, signature(2))], 80 * MS)
    stage.answer(late, evidence(BOB))
    stage.answer(early, evidence(ADA))
    shown = [stage.emit()[0] for _ in range(3)]
    assert [f.identity.subject_id for f in shown] == [ADA, BOB, BOB]
    assert [f.track_id for f in shown] == [1, 2, 2]


def test_a_slow_dissolve_is_looked_at() -> None:
    """Each picture is like the one before; the last is nobody's that was looked at."""
    first, last = chip(1).astype(float), chip(2).astype(float)
    stage, faces = Stage(), []
    for k in range(26):
        share = min(k, 25) / 25
        blend = np.rint((1 - share) * first + share * last).astype(np.uint8)
        for look in stage.turn([detected(100, of(blend))], k * 40 * MS):
            who = ADA if share < 0.5 else BOB
            stage.answer(look, evidence(who))
        faces.extend(stage.emit())
    assert faces[-1].identity.subject_id == BOB
    named = [f.identity.subject_id for f in faces]
    assert ADA not in named[22:]


def dissolve() -> list[bytes]:
    """A face that becomes another's, in a hundred steps."""
    first, last = chip(1).astype(float), chip(2).astype(float)
    return [of(np.rint(first + k / 100 * (last - first)).astype(np.uint8)) for k in range(101)]


DISSOLVE = dissolve()
NEAR = max(k for k in range(101) if not changed(DISSOLVE[0], DISSOLVE[k], SAME_LINK))
HALF = max(k for k in range(101) if not changed(DISSOLVE[0], DISSOLVE[k], SAME_LOOK))
FULL = max(k for k in range(101) if not changed(DISSOLVE[HALF], DISSOLVE[k], SAME_LINK))


@pytest.mark.parametrize(
    "said",
    [Evidence(missing=(Role.RECOGNIZER,)), evidence(ADA, ood=0.1), evidence(STRANGER, ood=0.5)],
    ids=["lost", "untrusted", "first contradiction"],
)
def test_a_dissolve_past_a_look_that_does_not_name_is_doubted(said: Evidence) -> None:
    """Each picture is like the one before and like the one that was asked for last, which has not
    become the one to compare with. The last is unlike the one that has the name; those between are
    not, and keep it."""
    stage = Stage()
    for k in range(8):
        for look in stage.turn([detected(100, DISSOLVE[k // 7 * NEAR])], 400 * k * MS):
            stage.answer(look, evidence(ADA))
        assert stage.emit()[0].identity.subject_id == ADA
    [lost] = stage.turn([detected(100, DISSOLVE[HALF])], 3_000 * MS)
    assert lost.recognize, "it is time"
    for k, blend in enumerate((HALF - 1, NEAR, HALF, FULL)):
        stage.turn([detected(100, DISSOLVE[blend])], (3_040 + 40 * k) * MS)
    stage.answer(lost, said)
    shown = [stage.emit()[0].identity.subject_id for _ in range(5)]
    assert shown[1:] == [ADA, ADA, ADA, ""]
    [at_once] = stage.turn([detected(100, DISSOLVE[FULL])], 3_200 * MS)
    assert at_once.recognize


@example([-34, 15, 34, -15, -34, -34, -34, 15, -34, -34], 72957, 5)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-NEAR, -15, 0, 0, 15, NEAR]), min_size=10, max_size=40),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10),
)
def test_who_has_a_name_looks_like_the_picture_that_gave_it(
    steps: list[int], seed: int, depth: int
) -> None:
    """A face that becomes another's and back, little by little, while looks are late, are lost or
    name nobody; ``depth`` frames are on their way."""
    chance = random.Random(seed)
    stage = Stage(PARAMS.with_interval(120 * MS))
    pictures: list[bytes] = []
    said: dict[int, Evidence] = {}
    blend = emitted = 0

    def finish() -> None:
        nonlocal emitted
        for look in stage.under_way[0][1]:
            if look.asked and look.evidence is None:
                stage.answer(look, said[id(look)])
        [face] = stage.emit()
        if face.identity.subject_id:
            named = pictures[emitted - face.links_since_evidence]
            assert not changed(named, pictures[emitted], SAME_LOOK), f"picture {emitted}"
        emitted += 1

    for number, step in enumerate(steps):
        blend = min(max(blend + step, 0), 100)
        pictures.append(DISSOLVE[blend])
        for look in stage.turn([detected(100, pictures[-1])], 40 * number * MS):
            said[id(look)] = chance.choice(
                [evidence(ADA), evidence(ADA, ood=0.05), evidence(STRANGER, ood=0.5), Evidence()]
            )
        stage.answer_some(said, chance)
        while len(stage.under_way) >= depth:
            finish()
    while stage.under_way:
        finish()


def test_what_was_seen_expires() -> None:
    stage = Stage(tracking.Params(max_age_ns=500 * MS))
    watch(stage, ADA, 1, 1, 40)
    stage.turn([detected(100, signature(1))], 540 * MS)
    [face] = stage.emit()
    assert face.identity.subject_id == ADA
    for look in stage.turn([detected(100, signature(1))], 541 * MS):
        stage.answer(look, Evidence())
    [face] = stage.emit()
    assert face.identity.decision is Decision.NOT_EVALUATED
    assert face.liveness.verdict is LivenessVerdict.UNDECIDED


# -- portraits ---------------------------------------------------------------------------------


def portraits() -> dict[str, np.ndarray]:
    """Two real faces, 112 pixels wide."""
    found = {}
    for who, (x, y, height) in ((ADA, (262, 205, 190)), (BOB, (224, 112, 115))):
        name = "grace_hopper.jpg" if who == ADA else "astronaut.png"
        half = int(height * 0.55)
        cut = material.photo(name)[y - half : y + half, x - half : x + half]
        found[who] = cv2.resize(cut, (112, 112), interpolation=cv2.INTER_AREA)
    return found


def camera(chip: np.ndarray, rng: np.random.Generator) -> bytes:
    """What the worker sees of a face in one picture more: it shakes, and there is noise."""
    (dx, dy), light = rng.uniform(-1, 1, 2), rng.uniform(-4, 4)
    moved = cv2.warpAffine(
        chip, np.array([[1, 0, dx], [0, 1, dy]]), (112, 112), borderMode=cv2.BORDER_REPLICATE
    )
    return of(np.clip(moved + rng.normal(light, 2, moved.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("fps", [5, 10, 25])
@pytest.mark.parametrize("then", ["somebody else", "blurred", "dark", "small"])
def test_a_portrait_swapped_in_place_is_looked_at_and_one_that_shakes_is_not(
    fps: int, then: str
) -> None:
    """Pixels of real faces; only the recogniser's answers are given."""
    try:
        people = portraits()
    except material.MissingError as error:
        pytest.skip(str(error))
    other = people[BOB]
    if then == "blurred":
        other = cv2.GaussianBlur(other, (0, 0), 5)
    if then == "dark":
        other = other // 4
    if then == "small":
        other = cv2.resize(cv2.resize(other, (20, 20), interpolation=cv2.INTER_AREA), (112, 112))
    who = BOB if then == "somebody else" else STRANGER
    ood = 0.8 if who == BOB else 0.1
    rng = np.random.default_rng(7)
    stage, shown, looks = Stage(), [], []
    for k in range(6 * fps):
        first = k < 3 * fps
        face = camera(people[ADA] if first else other, rng)
        asked = stage.turn([detected(100, face)], k * 1000 // fps * MS)
        looks.append(bool(asked and asked[0].recognize))
        for look in asked:
            stage.answer(look, evidence(ADA) if first else evidence(who, ood=ood))
        shown.extend(stage.emit())
    assert {f.identity.subject_id for f in shown[: 3 * fps]} == {ADA}
    assert sum(looks[: 3 * fps]) == 1, "an honest face that shakes is not looked at again"
    assert looks[3 * fps], "at once"
    assert ADA not in {f.identity.subject_id for f in shown[3 * fps :]}


# -- doubts that come before the answers -------------------------------------------------------


def test_what_is_between_a_look_and_the_next_doubt_has_its_name() -> None:
    """Answers are late: two doubts are known before the look at the first is answered."""
    stage = Stage()
    watch(stage, ADA, 1, 2, 40)
    asked = []
    for k, seed in enumerate((2, 2, 2, 3, 3)):
        asked += stage.turn([detected(100, signature(seed))], (120 + 40 * k) * MS)
    assert [look.link for look in asked if look.recognize] == [3, 6]
    for look in asked:
        stage.answer(look, evidence(ADA) if look.link < 6 else Evidence())
    shown = [stage.emit()[0] for _ in range(5)]
    assert [f.identity.subject_id for f in shown] == [ADA, ADA, ADA, "", ""]
    assert [f.evidence_age_ns for f in shown] == [0, 40 * MS, 80 * MS, None, None]


def test_who_lives_lives_up_to_the_next_doubt_and_from_the_look_after_it() -> None:
    stage = Stage()
    watch(stage, ADA, 1, 5, 40)
    asked = []
    for k, seed in enumerate((1, 1, 2, 2, 3, 3)):
        asked += stage.turn([detected(100, signature(seed))], (240 + 40 * k) * MS)
    for look in asked:
        stage.answer(look, evidence(ADA) if look.link < 10 else Evidence())
    live = [stage.emit()[0].liveness.verdict is LivenessVerdict.LIVE for _ in range(6)]
    assert live == [True, True, True, True, False, False]


people = st.lists(
    st.tuples(st.sampled_from([ADA, ADA, BOB, STRANGER]), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=100, deadline=None)
@given(people, st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_nobody_lives_by_the_looks_of_another(
    walk: list[tuple[str | None, bool]], seed: int, depth: int
) -> None:
    """Bob is a photo of Ada. However late answers are, and where some are missing, no picture of
    him is LIVE."""
    chance = random.Random(seed)
    stage, look_of, last, emitted = Stage(), 0, "", 0
    said: dict[int, Evidence] = {}

    def finish() -> None:
        nonlocal emitted
        for look in stage.under_way[0][1]:
            if look.asked and look.evidence is None:
                known = said[id(look)]
                stage.answer(
                    look, chance.choice([Evidence(), known, replace(known, live_score=None)])
                )
        [face] = stage.emit()
        if walk[emitted][0] == BOB:
            assert face.liveness.verdict is not LivenessVerdict.LIVE, f"picture {emitted}"
        emitted += 1

    for number, (who, turned) in enumerate(walk):
        look_of += who != last or turned
        last = who
        for look in stage.turn([detected(100, signature(look_of))], 40 * number * MS):
            score = chance.choice([0.05, 0.5]) if who == BOB else 0.99
            shown = ADA if who == BOB else who
            said[id(look)] = evidence(shown, ood=chance.choice([0.1, 0.8, 0.95]), live=score)
        stage.answer_some(said, chance)
        while len(stage.under_way) >= depth:
            finish()
    while stage.under_way:
        finish()


@given(
    st.lists(st.integers(1, 3 * limits.MAX_DOUBTS), max_size=3 * limits.MAX_DOUBTS),
    st.lists(st.integers(1, 3 * limits.MAX_DOUBTS), max_size=4),
)
def test_no_doubt_is_forgotten_before_it_is_settled(doubts: list[int], looks: list[int]) -> None:
    """Against a set of all of them: what is certain here is certain there, and as long as not too
    many wait, the reverse."""
    [track] = tracking.update(tracking.Tracks(), [detected(100, b"")], 0, PARAMS).tracks.active
    all_of_them = set(doubts)
    for link in sorted(all_of_them):
        track = tracking.track.suspected(track, link)
    assert len(track.doubted) <= limits.MAX_DOUBTS
    for link in sorted(looks):
        if all_of_them and link >= min(all_of_them):
            all_of_them = {doubt for doubt in all_of_them if doubt > link}
        track = tracking.track.settled(track, link)
        first = min(all_of_them, default=None)
        if len(set(doubts)) <= limits.MAX_DOUBTS:
            assert track.suspect == first
        if first is not None:
            assert track.suspect is not None
            assert track.suspect <= first


# -- any sequence ----------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from([ADA, ADA, ADA, BOB, STRANGER]),  # who is before the camera
        st.sampled_from([0, 40, 40, 200, 400]),  # ms since the last picture
        st.sampled_from([0, 0, 0, 30, 60]),  # pixels that the face has moved
        st.booleans(),  # whether another doubt comes with it: it looks otherwise
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_no_name_without_a_look_at_that_face_since_the_last_doubt(
    walk: list[tuple[str | None, int, int, bool]], seed: int, depth: int
) -> None:
    """Answers come late, in any order, or not at all; ``depth`` frames are on their way."""
    chance = random.Random(seed)
    stage, now, x, look_of = Stage(), 0, 100.0, 0
    truth: list[str | None] = []
    emitted = 0
    last: str | None = ""

    def finish() -> None:
        nonlocal emitted
        _, looks = stage.under_way[0]
        for look in looks:
            if look.asked and look.evidence is None:
                stage.answer(look, chance.choice([Evidence(), said[id(look)]]))
        [face] = stage.emit()
        named = face.identity.subject_id
        assert named in ("", truth[emitted]), f"picture {emitted} shows {truth[emitted]}"
        emitted += 1

    said: dict[int, Evidence] = {}
    for who, elapsed, moved, turned in walk:
        now += elapsed * MS
        x += moved
        if who != last or turned:
            look_of += 1  # who is swapped looks otherwise
        last = who
        truth.append(who)
        for look in stage.turn([detected(x, signature(look_of))], now):
            ood = chance.choice([0.1, 0.5, 0.8, 0.95])
            live = chance.choice([0.05, 0.5, 0.99])
            said[id(look)] = evidence(
                who, ood=ood, live=live, similarity=chance.choice([0.55, 0.9])
            )
        stage.answer_some(said, chance)
        while len(stage.under_way) >= depth:
            finish()
    while stage.under_way:
        finish()
    stage.faces.finish()
    started = {s.track_id for s in stage.sightings}
    assert set(stage.gone) == started, "every track that was seen has ended, once"
    assert len(stage.gone) == len(set(stage.gone))


def test_two_looks_agree_over_a_doubt_between_them() -> None:
    """Who moves looks otherwise in every picture of a slow stream, and is named all the same:
    whoever took the first one's place would have to be taken for the same subject by chance."""
    unsure = Identity(Decision.MATCH, ADA, 0.6, certain=False)
    first, second = detected(100, signature(1)), detected(100, signature(2))
    [track] = tracking.update(tracking.Tracks(), [first], 0, PARAMS).tracks.active
    said = tracking.with_recognition(track, first, 0.8, unsure, 0)
    assert tracking.identity_at(said, 0, PARAMS).decision is Decision.NOT_EVALUATED
    [track] = tracking.update(
        tracking.Tracks({1: said}, 1), [second], 40 * MS, PARAMS
    ).tracks.active
    assert track.suspect == 2
    other = msgspec.structs.replace(unsure, subject_id=BOB)
    not_yet = tracking.with_recognition(track, second, 0.8, other, 40 * MS)
    assert tracking.identity_at(not_yet, 40 * MS, PARAMS).decision is Decision.NOT_EVALUATED
    twice = tracking.with_recognition(track, second, 0.8, unsure, 40 * MS)
    assert tracking.identity_at(twice, 40 * MS, PARAMS).subject_id == ADA
    assert twice.suspect is None
