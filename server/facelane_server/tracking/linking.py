"""Detections of a frame to tracks: who is where by now."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from lap import lapjvx
from msgspec.structs import replace

from facelane_server import limits
from facelane_server.domain import Box, DetectedFace
from facelane_server.tracking.appearance import SAME_LINK, SAME_LOOK, changed, detail_differs
from facelane_server.tracking.track import SECOND, Params, Track, Tracks, suspected

MAX_WIDTH_RATIO: Final = 2.0
"""Between a track and a detection that are linked by distance alone."""
PREDICTION_NS: Final = SECOND // 2
"""A velocity is extrapolated over this time at most."""
VELOCITY_GAIN: Final = 0.5
"""Weight of the newest displacement in the velocity."""
CROSSING_IOU: Final = 0.25
"""Two tracks whose boxes overlap more could be taken for each other."""
UNSEEN_SHARE: Final = 0.25
"""Share of ``max_gap`` that a face may be missed by the detector without suspicion."""
SKIPPED_SHARE: Final = 0.5
"""The same for a gap between frames, in which nobody looked."""

_FORBIDDEN: Final = 1e6


class Update(msgspec.Struct, frozen=True, gc=False):
    """``assignments[i]`` is the track id of detection i; 0 for a face that is not tracked
    (a box without an area, or more faces than ``limits.MAX_TRACKS``)."""

    tracks: Tracks
    assignments: tuple[int, ...]
    ended: tuple[Track, ...]


def update(
    tracks: Tracks, detections: Sequence[DetectedFace], now_ns: int, params: Params
) -> Update:
    """The tracks after a frame at ``now_ns``.

    The order of ``detections`` does not matter. Media time that goes back by more than
    ``max_gap`` is another recording: every track ends. A smaller step back counts as none.
    """
    ended: list[Track] = []
    if now_ns < tracks.now_ns - params.max_gap_ns:
        ended.extend(tracks.by_id.values())
        known: list[Track] = []
    else:
        now_ns = max(now_ns, tracks.now_ns)
        known = []
        for track in tracks.by_id.values():
            alive = now_ns - track.seen_ns <= params.max_gap_ns
            (known if alive else ended).append(track)

    # A canonical order, so that equal costs are resolved alike for every permutation.
    order = [i for i, found in enumerate(detections) if _has_area(found.box)]
    if len(order) > 1:
        order.sort(key=lambda i: _order_of(detections[i]))
    links = _assign(known, [detections[i].box for i in order], now_ns, params)

    assignments = [0] * len(detections)
    state: dict[int, Track] = {}
    linked = {track_index: (i, near) for i, (track_index, near) in links.items()}
    for index, track in enumerate(known):
        link = linked.get(index)
        if link is None:
            state[track.track_id] = track if track.missed else replace(track, missed=True)
            continue
        at, near = link
        found = detections[order[at]]
        assignments[order[at]] = track.track_id
        state[track.track_id] = _moved(track, found, now_ns, params, near=near)

    created = tracks.created
    for at, i in enumerate(order):
        if at in links:
            continue
        if len(state) >= limits.MAX_TRACKS:
            lost = min(
                (t for t in state.values() if t.missed), key=lambda t: t.seen_ns, default=None
            )
            if lost is None:
                continue
            ended.append(state.pop(lost.track_id))
        created += 1
        assignments[i] = created
        state[created] = Track(
            created, detections[i].box, now_ns, now_ns, signature=detections[i].signature
        )
    if len(state) > 1:
        _mark_crossings(state, now_ns)
    elif state:
        [only] = state.values()
        if only.crossing:
            state[only.track_id] = _parted(only)
    return Update(Tracks(state, created, now_ns), tuple(assignments), tuple(ended))


def _has_area(box: Box) -> bool:
    return (
        0.0 < box.width < math.inf
        and 0.0 < box.height < math.inf
        and math.isfinite(box.x)
        and math.isfinite(box.y)
    )


def _order_of(found: DetectedFace) -> tuple[float, ...]:
    box = found.box
    return (box.x, box.y, box.width, box.height, found.score)


def _assign(
    known: Sequence[Track], boxes: Sequence[Box], now_ns: int, params: Params
) -> dict[int, tuple[int, bool]]:
    """Index of a box -> (index of its track, whether they overlap enough). ``boxes`` are
    sorted by x."""
    if not known or not boxes:
        return {}
    if len(known) == 1 == len(boxes):
        only = _cost(_expected(known[0], now_ns), boxes[0], params)
        return {} if only is None else {0: (0, only[1])}
    pairs: dict[tuple[int, int], tuple[float, bool]] = {}
    rows: dict[int, list[int]] = {}
    columns: dict[int, list[int]] = {}
    # Sorted by x (see update), so that only the boxes around a track are looked at.
    lefts = [box.x for box in boxes]
    widest = max(box.width for box in boxes)
    for column, track in enumerate(known):
        expected = _expected(track, now_ns)
        reach = max(params.max_centre_distance, 1.0) * (expected.width + widest)
        first = bisect.bisect_left(lefts, expected.x - reach)
        last = bisect.bisect_right(lefts, expected.x + expected.width + reach)
        for row in range(first, last):
            cost = _cost(expected, boxes[row], params)
            if cost is not None:
                pairs[row, column] = cost
                rows.setdefault(row, []).append(column)
                columns.setdefault(column, []).append(row)
    links: dict[int, tuple[int, bool]] = {}
    contested = False
    for row, candidates in rows.items():
        if len(candidates) == 1 and len(columns[candidates[0]]) == 1:
            links[row] = (candidates[0], pairs[row, candidates[0]][1])
        else:
            contested = True
    if contested:
        left = sorted(row for row in rows if row not in links)
        right = sorted({column for row in left for column in rows[row]})
        matrix = [[pairs.get((r, c), (_FORBIDDEN, False))[0] for c in right] for r in left]
        for at, to in _least_cost(matrix):
            row, column = left[at], right[to]
            if (row, column) in pairs:
                links[row] = (column, pairs[row, column][1])
    return links


def _least_cost(matrix: list[list[float]]) -> list[tuple[int, int]]:
    if len(matrix) == 1:
        return [(0, min(range(len(matrix[0])), key=matrix[0].__getitem__))]
    if len(matrix[0]) == 1:
        return [(min(range(len(matrix)), key=lambda row: matrix[row][0]), 0)]
    rows, columns = lapjvx(np.asarray(matrix), extend_cost=True, return_cost=False)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _expected(track: Track, now_ns: int) -> Box:
    """Where the track's box is by now, at constant velocity."""
    ahead = min(now_ns - track.seen_ns, PREDICTION_NS)
    (vx, vy), box = track.velocity, track.box
    if ahead <= 0 or (vx == 0.0 and vy == 0.0):
        return box
    return Box(box.x + vx * ahead, box.y + vy * ahead, box.width, box.height)


def _cost(expected: Box, box: Box, params: Params) -> tuple[float, bool] | None:
    """The cost of a link and whether it is one by overlap; ``None`` = it is none."""
    dx = (expected.x + expected.width / 2) - (box.x + box.width / 2)
    width = (expected.width + box.width) / 2
    reach = max(width, (expected.height + box.height) / 2, params.max_centre_distance * width)
    if dx > reach or dx < -reach:
        return None
    dy = (expected.y + expected.height / 2) - (box.y + box.height / 2)
    if dy > reach or dy < -reach:
        return None
    distance = math.hypot(dx, dy) / width
    overlap = _iou(expected, box)
    if overlap > 0.0 and overlap >= params.min_iou:
        return 1.0 - overlap + distance, True
    ratio = expected.width / box.width
    if distance > params.max_centre_distance or not 1 / MAX_WIDTH_RATIO <= ratio <= MAX_WIDTH_RATIO:
        return None
    return 1.0 - overlap + distance, False


def _iou(a: Box, b: Box) -> float:
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    if width <= 0.0:
        return 0.0
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    if height <= 0.0:
        return 0.0
    shared = width * height
    return shared / (a.width * a.height + b.width * b.height - shared)


def _moved(track: Track, found: DetectedFace, now_ns: int, params: Params, *, near: bool) -> Track:
    box = found.box
    elapsed = now_ns - track.seen_ns
    velocity = track.velocity
    if elapsed > PREDICTION_NS:
        velocity = (0.0, 0.0)
    elif elapsed > 0:
        old = track.box
        vx = (box.x + box.width / 2 - old.x - old.width / 2) / elapsed
        vy = (box.y + box.height / 2 - old.y - old.height / 2) / elapsed
        velocity = (
            velocity[0] + VELOCITY_GAIN * (vx - velocity[0]),
            velocity[1] + VELOCITY_GAIN * (vy - velocity[1]),
        )
    share = UNSEEN_SHARE if track.missed else SKIPPED_SHARE
    moved = replace(
        track,
        box=box,
        seen_ns=now_ns,
        velocity=velocity,
        missed=False,
        links=track.links + 1,
        signature=found.signature,
    )
    if (
        not near
        or elapsed > share * params.max_gap_ns
        or changed(track.signature, found.signature, SAME_LINK)
        or changed(track.looking or track.reference, found.signature, SAME_LOOK)
    ):
        strict = detail_differs(track.signature, found.signature) or detail_differs(
            track.reference, found.signature
        )
        return suspected(moved, moved.links, strict=strict)
    return moved


def _parted(track: Track) -> Track:
    """Its box has come apart from another's: either may be the other from here on."""
    return suspected(replace(track, crossing=False), track.links + track.missed)


def _mark_crossings(state: dict[int, Track], now_ns: int) -> None:
    boxes = sorted(
        ((_expected(track, now_ns), track.track_id) for track in state.values()),
        key=lambda item: item[0].x,
    )
    crossing: set[int] = set()
    for k, (box, track_id) in enumerate(boxes):
        for other, other_id in boxes[k + 1 :]:
            if other.x >= box.x + box.width:
                break
            if _iou(box, other) > CROSSING_IOU:
                crossing |= {track_id, other_id}
    for track in list(state.values()):
        if track.track_id in crossing:
            if not track.crossing:
                state[track.track_id] = replace(track, crossing=True)
        elif track.crossing:
            state[track.track_id] = _parted(track)
