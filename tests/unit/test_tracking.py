"""Tracks: who is linked to whom, how long a name holds, and what an attack cannot undo."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from tests.fakes.tracks import (
    FRAME,
    MS,
    PARAMS,
    at,
    match,
    one,
    play,
)

from facelane_server import limits, tracking
from facelane_server.domain import (
    Box,
    DetectedFace,
)
from facelane_server.tracking import Shot, Track, Tracks, linking, shots, update

# -- linking -------------------------------------------------------------------------------


def test_a_walking_face_is_one_track() -> None:
    updates = play([[at(10 + 6 * n)] for n in range(50)])
    assert {u.assignments for u in updates} == {(1,)}
    assert not any(u.ended for u in updates)
    assert one(updates).suspect is None


def test_a_fast_face_is_followed_by_its_velocity() -> None:
    # 55 px a frame at 60 px width: boxes of neighbouring frames overlap by an IoU of 0.04.
    still = [[at(100)] for _ in range(3)]
    speeding = [[at(100 + 8 * n * n)] for n in range(5)]
    running = [[at(228 + 55 * n)] for n in range(1, 20)]
    updates = play(still + speeding + running)
    assert {u.assignments for u in updates} == {(1,)}


def test_a_jump_is_a_new_track() -> None:
    updates = play([[at(10)], [at(10)], [at(400)]])
    assert [u.assignments for u in updates] == [(1,), (1,), (2,)]
    # The old one lingers for a while, then it ends.
    assert [t.track_id for t in updates[-1].tracks.active] == [1, 2]


def test_a_face_of_another_size_at_the_same_place_is_not_linked_by_distance() -> None:
    updates = play([[at(100, size=40)], [at(60, 60, size=150)]])
    assert updates[-1].assignments == (2,)


def test_a_track_ends_after_the_gap_and_never_returns() -> None:
    seen = play([[at(10)]] * 5)
    gone = play([[]] * 40, start=seen[-1].tracks, begin_ns=5 * FRAME)
    ended = [(n, t.track_id) for n, u in enumerate(gone) for t in u.ended]
    last_seen = 4 * FRAME
    [(frame, track_id)] = ended
    assert track_id == 1
    assert (5 + frame) * FRAME - last_seen > PARAMS.max_gap_ns
    assert (5 + frame - 1) * FRAME - last_seen <= PARAMS.max_gap_ns
    back = update(gone[-1].tracks, [at(10)], 50 * FRAME, PARAMS)
    assert back.assignments == (2,)
    assert back.tracks.created == 2
    # Neither does a late answer bring it back.
    stale = tracking.with_recognition(seen[-1].tracks.active[0], at(10), 0.9, match("a"), 0)
    assert back.tracks.replace(stale) == back.tracks


def test_a_short_occlusion_keeps_the_track() -> None:
    before = play([[at(10 + 4 * n)] for n in range(10)])
    hidden = play([[]] * 10, start=before[-1].tracks, begin_ns=10 * FRAME)
    after = update(hidden[-1].tracks, [at(10 + 4 * 20)], 20 * FRAME, PARAMS)
    assert after.assignments == (1,)


def test_two_faces_that_cross_keep_their_tracks() -> None:
    frames = [[at(0 + 10 * n, 100), at(400 - 10 * n, 130)] for n in range(41)]
    updates = play(frames)
    assert {u.assignments for u in updates} == {(1, 2)}
    # They were near enough to be swapped, so both names must be confirmed.
    for track in updates[-1].tracks.active:
        assert track.suspect is not None
        assert not track.crossing


def test_faces_side_by_side_are_no_suspects() -> None:
    updates = play([[at(100 + n), at(165 + n), at(230 + n)] for n in range(30)])
    assert {u.assignments for u in updates} == {(1, 2, 3)}
    assert all(t.suspect is None for t in updates[-1].tracks.active)


def test_the_assignment_is_the_best_in_all_not_greedy() -> None:
    start = play([[at(100), at(130)]])
    # The first face moved onto the second's old place; greedy would give it the second track.
    moved = update(start[-1].tracks, [at(126), at(156)], FRAME, PARAMS)
    assert moved.assignments == (1, 2)


def test_media_time_that_goes_far_back_is_another_recording() -> None:
    seen = play([[at(10)]] * 50)
    again = update(seen[-1].tracks, [at(10)], 0, PARAMS)
    assert again.assignments == (2,)
    assert [t.track_id for t in again.ended] == [1]
    assert again.tracks.now_ns == 0
    # A small step back is clock jitter.
    jitter = update(seen[-1].tracks, [at(10)], 40 * FRAME, PARAMS)
    assert jitter.assignments == (1,)


def test_a_frozen_media_time_still_links() -> None:
    updates = play([[at(10 + n)] for n in range(10)], step_ns=0)
    assert {u.assignments for u in updates} == {(1,)}
    assert one(updates).velocity == (0.0, 0.0)


@pytest.mark.parametrize(
    "box",
    [
        Box(0, 0, 0, 10),
        Box(0, 0, 10, -1),
        Box(math.nan, 0, 10, 10),
        Box(0, math.inf, 10, 10),
        Box(0, 0, math.nan, 10),
    ],
)
def test_a_box_without_an_area_is_not_tracked(box: Box) -> None:
    done = update(Tracks(), [DetectedFace(box, 0.9, ()), at(10)], 0, PARAMS)
    assert done.assignments == (0, 1)


def test_tracks_are_bounded() -> None:
    """Faces in new places on every frame: the longest unseen make room."""
    tracks = Tracks()
    ended = 0
    for n in range(20):
        found = [at(1000 * n + 100 * k, 1000 * n) for k in range(limits.MAX_FACES)]
        done = update(tracks, found, n, PARAMS)
        tracks = done.tracks
        ended += len(done.ended)
        assert len(tracks.active) <= limits.MAX_TRACKS
        assert 0 not in done.assignments
    assert tracks.created == 20 * limits.MAX_FACES == ended + len(tracks.active)


def test_more_faces_than_tracks_leaves_the_rest_untracked() -> None:
    crowd = [at(100 * k) for k in range(limits.MAX_TRACKS + 10)]
    done = update(Tracks(), crowd, 0, PARAMS)
    assert done.assignments.count(0) == 10
    assert len(done.tracks.active) == limits.MAX_TRACKS


coordinates = st.floats(0, 300, allow_nan=False)
detections = st.builds(at, coordinates, coordinates, st.floats(20, 120), st.floats(0, 1))
scenes = st.lists(
    st.tuples(st.lists(detections, max_size=6), st.integers(0, 600)), min_size=1, max_size=8
)


@settings(max_examples=150)
@given(scenes)
def test_what_always_holds(scene: list[tuple[list[DetectedFace], int]]) -> None:
    tracks, now = Tracks(), 0
    ended: set[int] = set()
    for found, step in scene:
        now += step * MS
        done = update(tracks, found, now, PARAMS)
        ids = [track_id for track_id in done.assignments if track_id]
        assert len(done.assignments) == len(found)
        assert len(set(ids)) == len(ids), "one track took two faces"
        assert ended.isdisjoint(ids), "an ended track returned"
        assert ended.isdisjoint(t.track_id for t in done.ended), "a track ended twice"
        ended |= {t.track_id for t in done.ended}
        alive = [t.track_id for t in done.tracks.active]
        assert alive == sorted(alive)
        assert set(ids) <= set(alive)
        assert ended.isdisjoint(alive)
        assert len(alive) + len(ended) == done.tracks.created
        for track in done.tracks.active:
            assert track.missed == (track.track_id not in ids)
            assert now - track.seen_ns <= PARAMS.max_gap_ns
        for track_id, detection in zip(done.assignments, found, strict=True):
            linked = done.tracks.get(track_id)
            assert linked is not None
            assert linked.box == detection.box
        tracks = done.tracks


@settings(max_examples=100)
@given(scenes, st.randoms())
def test_the_order_of_detections_does_not_matter(
    scene: list[tuple[list[DetectedFace], int]], random: object
) -> None:
    tracks, now = Tracks(), 0
    for found, step in scene:
        now += step * MS
        order = list(range(len(found)))
        random.shuffle(order)  # type: ignore[attr-defined]
        plain = update(tracks, found, now, PARAMS)
        mixed = update(tracks, [found[i] for i in order], now, PARAMS)
        assert mixed.tracks == plain.tracks
        seen = sorted(zip((repr(d) for d in found), plain.assignments, strict=True))
        also = sorted(zip((repr(found[i]) for i in order), mixed.assignments, strict=True))
        assert seen == also
        tracks = plain.tracks


@settings(max_examples=100)
@given(st.integers(1, 7), st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_linking_costs_as_little_as_any(rows: int, columns: int, random: object) -> None:
    """The shortcuts for uncontested pairs against the plain assignment over all pairs."""
    draw = random.uniform  # type: ignore[attr-defined]
    known = [Track(k + 1, Box(draw(0, 200), draw(0, 200), 60, 60), 0, 0) for k in range(columns)]
    boxes = [Box(draw(0, 200), draw(0, 200), draw(30, 90), 60) for _ in range(rows)]
    boxes.sort(key=lambda box: box.x)
    links = linking._assign(known, boxes, 0, PARAMS)
    matrix = np.full((rows, columns), 1e6)
    for r, box in enumerate(boxes):
        for c, track in enumerate(known):
            cost = linking._cost(track.box, box, PARAMS)
            if cost is not None:
                matrix[r, c] = cost[0]
    best = [(r, c) for r, c in zip(*linear_sum_assignment(matrix), strict=True)]
    best = [(r, c) for r, c in best if matrix[r, c] < 1e6]
    assert len(links) == len(best)
    total = sum(matrix[r, c] for r, (c, _near) in links.items())
    assert total == pytest.approx(sum(matrix[r, c] for r, c in best))


@given(
    st.floats(5.0, 200.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(-0.4, 0.4),
)
def test_a_shot_that_may_not_promise_more_does_not(
    size: float, score: float, tried: float, best: float, margin: float, turned: float
) -> None:
    found = at(100.0, size=size, score=score)
    left, right, nose, *mouth = found.landmarks
    found = DetectedFace(
        found.box, score, (left, right, (nose[0] + turned * size, nose[1]), *mouth)
    )
    shot = Shot(match("alice"), best)
    track = Track(1, found.box, 0, 0, shot=shot, tried_quality=tried)
    promises = tracking.promised_gain(track, found) > margin
    assert shots.may_gain(track, found, margin) or not promises


def test_a_larger_shot_may_promise_more_and_one_like_the_best_not() -> None:
    track = Track(1, at(100.0).box, 0, 0, shot=Shot(match("alice"), 0.5), tried_quality=0.4)
    assert shots.may_gain(track, at(100.0, size=112.0), PARAMS.better_shot_margin)
    assert not shots.may_gain(track, at(100.0, size=50.0), PARAMS.better_shot_margin)
