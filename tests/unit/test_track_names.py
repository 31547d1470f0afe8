"""What a track is called, and whether it lives: names, doubts, best shots, fusion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.fakes.tracks import (
    FRAME,
    MS,
    PARAMS,
    at,
    frontal,
    match,
    one,
    play,
)

from facelane_server import config, limits, tracking
from facelane_server.domain import (
    Box,
    Decision,
    DetectedFace,
    Identity,
    LivenessVerdict,
)
from facelane_server.liveness.sequential import SequentialTest
from facelane_server.tracking import Params, Track, update
from facelane_server.tracking.track import suspected

SECOND = 1_000 * MS


UNKNOWN = Identity(Decision.UNKNOWN, "", 0.1)
REJECTED = Identity(Decision.REJECTED_OOD)


@dataclass
class Thresholds:
    live: float = 0.9
    spoof: float = 0.5


# -- names ---------------------------------------------------------------------------------


def recognized(
    track: Track,
    identity: Identity,
    ood: float,
    now_ns: int,
    found: DetectedFace | None = None,
    *,
    link: int = 0,
) -> Track:
    return tracking.with_recognition(track, found or at(10), ood, identity, now_ns, link=link)


def shown(track: Track, now_ns: int) -> Identity:
    return tracking.identity_at(track, now_ns, PARAMS)


@pytest.fixture
def fresh() -> Track:
    return one(play([[at(10)]]))


def test_a_new_track_is_recognised_once_and_then_rests(fresh: Track) -> None:
    assert tracking.wants_recognition(fresh, at(10), 0, PARAMS)
    assert shown(fresh, 0).decision is Decision.NOT_EVALUATED
    known = recognized(fresh, match("ada"), 0.9, 0)
    for n in range(1, 75):
        assert not tracking.wants_recognition(known, at(10 + n), n * FRAME, PARAMS)
        assert shown(known, n * FRAME) == match("ada")
    assert tracking.wants_recognition(known, at(10), 3 * SECOND, PARAMS)


def test_interval_zero_recognises_every_frame(fresh: Track) -> None:
    params = PARAMS.with_interval(0)
    known = recognized(fresh, match("ada"), 0.9, 0)
    assert tracking.wants_recognition(known, at(10), 1, params)
    assert tracking.identity_at(known, FRAME, params) == match("ada")
    assert tracking.identity_at(known, SECOND, params).decision is Decision.NOT_EVALUATED


def test_a_better_shot_is_embedded_and_a_similar_one_is_not(fresh: Track) -> None:
    far = at(10, size=30)
    known = recognized(fresh, match("ada"), 0.5, 0, far)
    assert not tracking.wants_recognition(known, at(10, size=31), FRAME, PARAMS)
    near = at(10, size=100)
    assert tracking.wants_recognition(known, near, FRAME, PARAMS)
    # A shot that did not keep its promise is not repeated on every frame.
    tried = recognized(known, match("ada"), 0.45, FRAME, near)
    assert tried.ood_score == 0.5
    assert not tracking.wants_recognition(tried, near, 2 * FRAME, PARAMS)
    # Where there is nothing left to gain, the best shot in the world is not worth it.
    perfect = recognized(fresh, match("ada"), 0.99, 0, far)
    assert not tracking.wants_recognition(perfect, near, FRAME, PARAMS)


def test_the_best_shot_speaks(fresh: Track) -> None:
    known = recognized(fresh, match("ada", 0.5), 0.6, 0)
    better = recognized(known, match("ada", 0.7), 0.8, FRAME)
    assert (better.identity.similarity, better.ood_score) == (0.7, 0.8)
    worse = recognized(better, match("ada", 0.4), 0.5, 2 * FRAME)
    assert (worse.identity.similarity, worse.ood_score) == (0.7, 0.8)
    assert worse.confirmed_ns == 2 * FRAME


def uncertain(subject: str) -> Identity:
    return replace(match(subject), certain=False)


def test_a_name_needs_two_looks_that_agree_or_one_that_is_certain(fresh: Track) -> None:
    first = recognized(fresh, uncertain("ada"), 0.9, 0)
    assert shown(first, 0).decision is Decision.NOT_EVALUATED
    assert tracking.wants_recognition(first, at(10), FRAME, PARAMS), "at once"
    second = recognized(first, uncertain("ada"), 0.6, FRAME)
    assert shown(second, FRAME).subject_id == "ada"
    assert not tracking.wants_recognition(second, at(10), 2 * FRAME, PARAMS)
    # From now on every look that says the same confirms, certain or not.
    third = recognized(second, uncertain("ada"), 0.9, SECOND)
    assert third.confirmed_ns == SECOND
    assert shown(recognized(fresh, match("ada"), 0.9, 0), 0).subject_id == "ada"


@pytest.mark.parametrize("other", [uncertain("bob"), UNKNOWN])
def test_looks_that_do_not_agree_name_nobody(fresh: Track, other: Identity) -> None:
    first = recognized(fresh, uncertain("ada"), 0.9, 0)
    second = recognized(first, other, 0.9, FRAME)
    assert shown(second, FRAME).subject_id == ""
    third = recognized(second, uncertain("ada"), 0.9, 2 * FRAME)
    assert shown(third, 2 * FRAME).subject_id == "", "ada was not said twice in a row"


def test_a_rejected_look_between_two_that_agree_changes_nothing(fresh: Track) -> None:
    first = recognized(fresh, uncertain("ada"), 0.9, 0)
    hidden = recognized(first, REJECTED, 0.1, FRAME)
    assert shown(hidden, FRAME).decision is Decision.REJECTED_OOD
    assert (
        shown(recognized(hidden, uncertain("ada"), 0.9, 2 * FRAME), 2 * FRAME).subject_id == "ada"
    )


def test_an_uncertain_name_for_a_stranger_counts_when_it_is_repeated(fresh: Track) -> None:
    stranger = recognized(fresh, UNKNOWN, 0.95, 0)
    first = recognized(stranger, uncertain("ada"), 0.9, SECOND)
    assert shown(first, SECOND) == UNKNOWN
    second = recognized(first, uncertain("ada"), 0.9, SECOND + FRAME)
    assert shown(second, SECOND + FRAME).subject_id == "ada"
    assert tracking.forgotten(first).pending == ""


def test_another_match_replaces_the_name_at_once(fresh: Track) -> None:
    known = with_live(recognized(fresh, match("ada"), 0.95, 0), [0.99] * 4)
    switched = recognized(known, match("bob"), 0.45, SECOND)
    assert shown(switched, SECOND) == match("bob")
    assert switched.ood_score == 0.45
    assert switched.liveness.verdict is LivenessVerdict.UNDECIDED
    assert tracking.wants_liveness(switched, at(10), SECOND, PARAMS)


def test_a_contradiction_of_lower_quality_takes_two(fresh: Track) -> None:
    known = recognized(fresh, match("ada"), 0.9, 0)
    doubted = recognized(known, UNKNOWN, 0.6, SECOND)
    assert shown(doubted, SECOND) == match("ada")
    assert tracking.wants_recognition(doubted, at(10), SECOND + FRAME, PARAMS)
    assert shown(recognized(doubted, UNKNOWN, 0.6, 2 * SECOND), 2 * SECOND) == UNKNOWN
    # A confirmation in between settles it.
    settled = recognized(doubted, match("ada"), 0.6, 2 * SECOND)
    assert shown(recognized(settled, UNKNOWN, 0.6, 3 * SECOND), 3 * SECOND) == match("ada")


def test_a_contradiction_of_better_quality_counts_at_once(fresh: Track) -> None:
    known = recognized(fresh, match("ada"), 0.6, 0)
    assert shown(recognized(known, UNKNOWN, 0.9, SECOND), SECOND) == UNKNOWN


def test_somebody_enrolled_while_on_camera_is_named_soon(fresh: Track) -> None:
    stranger = recognized(fresh, UNKNOWN, 0.95, 0)
    first = recognized(stranger, match("ada"), 0.9, 3 * SECOND)
    assert tracking.wants_recognition(first, at(10), 3 * SECOND + FRAME, PARAMS)
    second = recognized(first, match("ada"), 0.9, 3 * SECOND + FRAME)
    assert shown(second, 3 * SECOND + FRAME) == match("ada")


def test_a_rejected_shot_says_nothing_but_is_repeated_soon(fresh: Track) -> None:
    known = recognized(fresh, match("ada"), 0.9, 0)
    now = 3 * SECOND
    blurred = recognized(known, REJECTED, 0.1, now)
    assert shown(blurred, now) == match("ada")
    asked = [
        t
        for t in range(now, now + 3 * SECOND, FRAME)
        if tracking.wants_recognition(blurred, at(10), t, PARAMS)
    ]
    assert asked[0] - now <= 320 * MS
    # Two intervals after the last confirmation the name is gone.
    assert shown(blurred, 6 * SECOND) == match("ada")
    assert shown(blurred, 6 * SECOND + 1).decision is Decision.REJECTED_OOD
    assert tracking.ood_score_at(blurred, 6 * SECOND + 1, PARAMS) == 0.1
    assert shown(known, 6 * SECOND + 1).decision is Decision.NOT_EVALUATED
    assert tracking.ood_score_at(known, 6 * SECOND + 1, PARAMS) is None


def test_retries_of_a_rejected_face_become_rarer(fresh: Track) -> None:
    track, asked = fresh, []
    for t in range(0, 20 * SECOND, FRAME):
        if tracking.wants_recognition(track, at(10), t, PARAMS):
            asked.append(t)
            track = recognized(track, REJECTED, 0.2, t)
    gaps = np.diff(asked)
    assert gaps[0] <= 400 * MS
    assert (np.diff(gaps) >= 0).all()
    assert gaps[-1] == PARAMS.interval_ns
    assert shown(track, 20 * SECOND).decision is Decision.REJECTED_OOD


def test_a_name_after_rejections_is_taken(fresh: Track) -> None:
    rejected = recognized(fresh, REJECTED, 0.3, 0)
    assert shown(rejected, 0) == REJECTED
    assert shown(recognized(rejected, match("ada"), 0.5, FRAME), FRAME) == match("ada")


def test_no_answer_changes_nothing(fresh: Track) -> None:
    known = recognized(fresh, match("ada"), 0.9, 0)
    assert recognized(known, Identity(Decision.NOT_EVALUATED), 0.0, SECOND) == known


# -- identity switches -----------------------------------------------------------------------


def test_somebody_else_after_an_occlusion_does_not_inherit_the_name() -> None:
    tracks = play([[at(10)]] * 5)[-1].tracks
    known = with_live(recognized(tracks.active[0], match("ada"), 0.95, 0), [0.99] * 4)
    tracks = tracks.replace(known)
    hidden = play([[]] * 10, start=tracks, begin_ns=5 * FRAME)[-1].tracks
    now = 15 * FRAME
    back = update(hidden, [at(10)], now, PARAMS)
    track = one(back)
    assert track.track_id == 1
    assert shown(track, now).decision is Decision.NOT_EVALUATED
    assert tracking.liveness_at(track, now, PARAMS).verdict is LivenessVerdict.UNDECIDED
    assert tracking.reached(track, track.links).liveness.verdict is LivenessVerdict.UNDECIDED
    assert tracking.wants_recognition(track, at(10), now, PARAMS)
    assert tracking.wants_liveness(track, at(10), now, PARAMS)
    # What was shot before the gap does not settle it.
    late = recognized(track, match("ada"), 0.9, 4 * FRAME, link=5)
    assert shown(late, now).decision is Decision.NOT_EVALUATED
    assert tracking.identity_at(late, 4 * FRAME, PARAMS, link=5) == match("ada")
    # A stranger, even in a worse shot than the best of the one before.
    stranger = recognized(track, UNKNOWN, 0.5, now)
    assert shown(stranger, now) == UNKNOWN
    # An unclear shot settles nothing; the right person does.
    unclear = recognized(track, REJECTED, 0.2, now)
    assert shown(unclear, now).decision is Decision.REJECTED_OOD
    assert shown(recognized(track, match("ada"), 0.6, now), now) == match("ada")


def test_one_missed_frame_is_no_occlusion() -> None:
    tracks = play([[at(10)]] * 5)[-1].tracks
    tracks = tracks.replace(recognized(tracks.active[0], match("ada"), 0.95, 0))
    again = play([[], [at(10)]], start=tracks, begin_ns=5 * FRAME)[-1]
    assert shown(one(again), 6 * FRAME) == match("ada")


def test_a_link_by_distance_alone_must_be_confirmed() -> None:
    tracks = play([[at(10)]] * 3)[-1].tracks
    tracks = tracks.replace(recognized(tracks.active[0], match("ada"), 0.95, 0))
    hop = update(tracks, [at(10 + 55)], 3 * FRAME, PARAMS)
    assert hop.assignments == (1,)
    assert shown(one(hop), 3 * FRAME).decision is Decision.NOT_EVALUATED


def test_a_face_that_vanished_behind_another_makes_both_suspect() -> None:
    approach = [[at(100 + 5 * n), at(200 - 5 * n)] for n in range(9)]
    merged = [[at(150)] for _ in range(30)]
    updates = play(approach + merged)
    seen = [u for u in updates if u.ended]
    assert len(seen) == 1
    survivor = one(updates)
    assert survivor.suspect is not None


def test_without_the_recogniser_the_name_fades(fresh: Track) -> None:
    known = recognized(fresh, match("ada"), 0.95, 0)
    decisions = [shown(known, t).decision for t in range(0, 10 * SECOND, SECOND)]
    assert decisions == [Decision.MATCH] * 7 + [Decision.NOT_EVALUATED] * 3


identities = st.one_of(
    st.builds(match, st.sampled_from(["ada", "bob"])),
    st.just(UNKNOWN),
    st.just(REJECTED),
    st.just(Identity(Decision.AMBIGUOUS, "", 0.5)),
    st.just(Identity(Decision.NOT_EVALUATED)),
)
histories = st.lists(
    st.tuples(st.integers(0, 4000), st.none() | st.tuples(identities, st.floats(0, 1))),
    max_size=12,
)


@settings(max_examples=300)
@given(histories)
def test_a_shown_name_was_confirmed_lately_and_nobody_else_matched_since(
    history: list[tuple[int, tuple[Identity, float] | None]],
) -> None:
    track, now = one(play([[at(10)]])), 0
    answers: list[tuple[int, Identity]] = []
    for step, answer in history:
        now += step * MS
        if answer is not None:
            track = recognized(track, *answer, now)
            answers.append((now, answer[0]))
        said = shown(track, now)
        if said.decision is not Decision.MATCH:
            assert said.subject_id == ""
            continue
        own = [k for k, (_, i) in enumerate(answers) if i.subject_id == said.subject_id]
        assert own, "a name out of nothing"
        assert now - answers[own[-1]][0] <= 2 * PARAMS.interval_ns
        since = [i for _, i in answers[own[-1] :]]
        others = {i.subject_id for i in since if i.decision is Decision.MATCH}
        assert others == {said.subject_id}


# -- quality -----------------------------------------------------------------------------------


def test_frontalness_falls_with_yaw_and_pitch_but_not_with_tilt() -> None:
    straight = np.array(frontal(Box(0, 0, 100, 100)))

    def turned(dx: float = 0.0, dy: float = 0.0, degrees: float = 0.0) -> float:
        points = straight.copy()
        points[2] += (dx, dy)
        angle = math.radians(degrees)
        spin = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return tracking.frontalness(tuple(map(tuple, (points @ spin.T).tolist())))

    assert turned() > 0.9
    assert turned() > turned(dx=5) > turned(dx=12) > turned(dx=22)
    assert turned(dx=5) == pytest.approx(turned(dx=-5))
    assert turned() > turned(dy=8) > turned(dy=16)
    for degrees in (-60, 20, 90, 180):
        assert turned(dx=6, degrees=degrees) == pytest.approx(turned(dx=6))


@given(
    st.lists(st.tuples(st.floats(), st.floats()), min_size=5, max_size=5),
    st.floats(0, 1),
    st.floats(1, 1e4),
)
def test_quality_is_always_a_share(
    points: list[tuple[float, float]], score: float, size: float
) -> None:
    found = DetectedFace(Box(0, 0, size, size), score, tuple(points))
    assert 0.0 <= tracking.quality(found) <= 1.0


# -- liveness ------------------------------------------------------------------------------------


def with_live(track: Track, scores: Iterable[float], *, begin: int = 0) -> Track:
    for n, score in enumerate(scores):
        track = tracking.with_liveness(track, score, begin + n * FRAME, Thresholds())
    return track


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([0.95], LivenessVerdict.LIVE),
        ([0.1], LivenessVerdict.SPOOF),
        ([0.7], LivenessVerdict.UNDECIDED),
        ([0.95] * 8, LivenessVerdict.LIVE),
        # Outliers upwards do not help, downwards count.
        ([0.7, 0.99, 0.7, 0.99], LivenessVerdict.UNDECIDED),
        ([0.99] * 7 + [0.3], LivenessVerdict.UNDECIDED),
        ([0.99] * 3 + [0.3] + [0.99] * 7, LivenessVerdict.UNDECIDED),
        ([0.99] * 3 + [0.3] + [0.99] * 8, LivenessVerdict.LIVE),
        # Two attack scores in memory: SPOOF until the memory is all live again.
        ([0.3, 0.99, 0.3], LivenessVerdict.SPOOF),
        ([0.3, 0.3] + [0.99] * 7, LivenessVerdict.SPOOF),
        ([0.3, 0.3] + [0.99] * 8, LivenessVerdict.LIVE),
        ([0.3, 0.3] + ([0.99] * 7 + [0.8]) * 4, LivenessVerdict.SPOOF),
        # Two that are never in memory together are two outliers.
        ([0.3] + [0.99] * 8 + [0.3], LivenessVerdict.UNDECIDED),
    ],
)
def test_fusion(fresh: Track, scores: list[float], verdict: LivenessVerdict) -> None:
    assert with_live(fresh, scores).liveness.verdict is verdict


def test_a_live_verdict_does_not_flicker(fresh: Track) -> None:
    wobbling = [0.95, 0.92, 0.85, 0.95, 0.86, 0.93, 0.84, 0.95] * 3
    verdicts = {with_live(fresh, wobbling[: n + 1]).liveness.verdict for n in range(24)}
    assert verdicts == {LivenessVerdict.LIVE}
    # The same scores never become LIVE where the verdict was another before.
    assert with_live(fresh, [0.8, *wobbling[1:3]]).liveness.verdict is LivenessVerdict.UNDECIDED


def test_the_memory_is_bounded_and_no_answer_is_none(fresh: Track) -> None:
    track = with_live(fresh, [0.95] * 100)
    assert len(track.liveness_shots) == limits.MAX_LIVENESS_SHOTS
    assert tracking.with_liveness(track, math.nan, 0, Thresholds()) == track


def test_attack_evidence_survives_suspicion_and_a_switch(fresh: Track) -> None:
    attacked = with_live(recognized(fresh, match("ada"), 0.9, 0), [0.95, 0.2, 0.2, 0.95])
    assert attacked.liveness.verdict is LivenessVerdict.SPOOF
    switched = recognized(attacked, match("bob"), 0.9, SECOND)
    assert switched.liveness.verdict is LivenessVerdict.SPOOF
    assert with_live(switched, [0.99] * 7).liveness.verdict is LivenessVerdict.SPOOF
    single = with_live(recognized(fresh, match("ada"), 0.9, 0), [0.95, 0.2])
    switched = recognized(single, match("bob"), 0.9, SECOND)
    assert with_live(switched, [0.99]).liveness.verdict is not LivenessVerdict.LIVE


def test_when_liveness_is_asked_for(fresh: Track) -> None:
    assert tracking.wants_liveness(fresh, at(10), 0, PARAMS)
    assert tracking.wants_liveness(with_live(fresh, [0.95] * 2), at(10), FRAME, PARAMS)
    settled = with_live(fresh, [0.95] * 3)
    asked = settled.liveness_ns or 0
    assert not tracking.wants_liveness(settled, at(10), asked + 900 * MS, PARAMS)
    assert tracking.wants_liveness(settled, at(10), asked + SECOND, PARAMS)
    undecided = with_live(fresh, [0.7] * 3)
    assert not tracking.wants_liveness(undecided, at(10), asked + FRAME, PARAMS)
    assert tracking.wants_liveness(undecided, at(10), asked + 300 * MS, PARAMS)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@example([0.7] * 5)  # their mean, rounded, is below 0.7
def test_liveness_rules_hold_for_all_scores(scores: list[float]) -> None:
    limit = Thresholds()
    track = with_live(one(play([[at(10)]])), scores)
    memory = scores[-limits.MAX_LIVENESS_SHOTS :]
    attacks = sum(score < limit.spoof for score in memory)
    fused = track.liveness.score
    assert fused is not None
    assert min(memory) <= fused <= sum(memory) / len(memory) + 1e-12
    if attacks:
        assert track.liveness.verdict is not LivenessVerdict.LIVE
    if attacks >= 2:
        assert track.liveness.verdict is LivenessVerdict.SPOOF
    if all(score >= limit.live for score in memory) and len(memory) == limits.MAX_LIVENESS_SHOTS:
        assert track.liveness.verdict is LivenessVerdict.LIVE


def judged_by(track: Track, scores: Iterable[float], test: SequentialTest) -> Track:
    for n, score in enumerate(scores):
        track = tracking.with_liveness(track, score, n * FRAME, Thresholds(), test=test)
    return track


def test_a_track_is_live_once_the_sequential_test_says_so(fresh: Track) -> None:
    strict = SequentialTest(0.01, 0.01)
    assert with_live(fresh, [0.95]).liveness.verdict is LivenessVerdict.LIVE
    assert judged_by(fresh, [0.95], strict).liveness.verdict is LivenessVerdict.UNDECIDED
    assert judged_by(fresh, [0.999] * 2, strict).liveness.verdict is LivenessVerdict.LIVE
    # Who has passed stays LIVE while the scores' own rules say so.
    passed = judged_by(fresh, [*[0.999] * 2, *[0.9] * 8], strict)
    assert passed.liveness.verdict is LivenessVerdict.LIVE
    # Weak attack scores, none of them below the threshold, are an attack together.
    assert judged_by(fresh, [0.51] * 8, SequentialTest(0.3, 0.3)).liveness.verdict is (
        LivenessVerdict.SPOOF
    )
    assert with_live(fresh, [0.51] * 8).liveness.verdict is LivenessVerdict.UNDECIDED


def test_a_doubt_begins_the_test_anew_for_who_is_live_alone(fresh: Track) -> None:
    strict = SequentialTest(0.01, 0.01)
    live = judged_by(fresh, [0.999] * 4, strict)
    doubted = tracking.reached(suspected(live, live.links), live.links)
    assert (doubted.said, doubted.said_looks) == (0.0, 0)
    assert judged_by(doubted, [0.95], strict).liveness.verdict is LivenessVerdict.UNDECIDED
    attack = judged_by(fresh, [0.55] * 4, strict)
    doubted = tracking.reached(suspected(attack, attack.links), attack.links)
    assert doubted.said == attack.said < 0


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.4))
def test_a_test_makes_nobody_live_who_was_not(scores: list[float], allowed: float) -> None:
    plain = one(play([[at(10)]]))
    strict = plain
    test = SequentialTest(allowed, 0.01)
    for n, score in enumerate(scores):
        plain = tracking.with_liveness(plain, score, n * FRAME, Thresholds())
        strict = tracking.with_liveness(strict, score, n * FRAME, Thresholds(), test=test)
        if strict.liveness.verdict is LivenessVerdict.LIVE:
            assert plain.liveness.verdict is LivenessVerdict.LIVE
        if plain.liveness.verdict is LivenessVerdict.SPOOF:
            assert strict.liveness.verdict is LivenessVerdict.SPOOF


# -- parameters ------------------------------------------------------------------------------------


def test_parameters_come_from_the_config() -> None:
    params = Params.of(
        config.parse("[tracking]\nreinference_interval_s = 1.5\nmax_gap_s = 2").tracking
    )
    assert (params.interval_ns, params.max_gap_ns) == (1500 * MS, 2 * SECOND)
    assert params.with_interval(5 * SECOND).interval_ns == 5 * SECOND
    assert Params.of(config.Tracking()) == Params()


def test_a_late_answer_from_before_the_suspicion_makes_nobody_live() -> None:
    """It was under way when the face was swapped; what it says of an attack still counts."""
    seen = one(play([[at(10)]] * 3))
    suspect = tracking.reached(suspected(seen, 3), 3)
    assert tracking.with_liveness(suspect, 0.99, FRAME, Thresholds(), link=2) == suspect
    after = tracking.with_liveness(suspect, 0.99, 2 * FRAME, Thresholds(), link=3)
    assert after.liveness.verdict is LivenessVerdict.LIVE
    attacked = tracking.with_liveness(suspect, 0.1, FRAME, Thresholds(), link=2)
    assert attacked.liveness.verdict is LivenessVerdict.SPOOF
    assert attacked.liveness_shots
