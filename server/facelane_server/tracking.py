"""Faces over the frames of one stream: pure functions, tracks x detections -> tracks.

Time is media time (``stream_offset`` in nanoseconds), never a clock, so a recording gives
the same tracks however fast it is played. Nothing here waits, allocates without a bound or
knows of a model. A track is a claim that the face in these boxes is one person; the rules
below say how long that claim, and a name that hangs on it, may be trusted.

**Linking.** A detection continues a track when it overlaps the place where the track is
expected (constant velocity), or lies within ``max_centre_distance`` of it and has about
its size. Of all such pairs the assignment of least total cost is taken (Hungarian). A jump
further than that is a new track.

**Suspicion.** A name must not pass silently from one person to another. Where a link is
weaker than continuous overlap, the track becomes *suspect*: the face was not seen for a
while; it was linked by distance alone; or its box has just come apart from another track's.
A suspect track shows no name and no LIVE verdict until a new shot confirms them, and asks
for that shot at once. A confirmed name is the old one again; anything else that can be
trusted replaces it.

**Names.** The best shot by OOD score speaks for the track.

* A shot rejected as out of distribution says nothing of who it is: the name stays, but the
  track asks again soon, and a name that no shot has confirmed for two
  ``reinference_interval`` is not shown any more.
* A match with *another* subject replaces everything at once.
* Any other contradiction (a name becomes unknown, or the reverse) counts at once when its
  OOD score is at least as good as the best shot's; otherwise it takes two in a row, and the
  first makes the track ask again on the next frame.

**Liveness.** The last ``limits.MAX_LIVENESS_SHOTS`` scores are kept. The fused score is the
mean of their lower half: a high outlier cannot lift it. Attack evidence is not averaged
away: one score below ``spoof`` in memory bars LIVE, two make the verdict SPOOF until the
whole memory is at or above ``live``. A LIVE track stays LIVE while the fused score is in
the upper half of the band between ``spoof`` and ``live``, so that the verdict does not
flicker. When a name is lost or the track becomes suspect, the scores that speak for a
living person are forgotten and those of an attack are kept; scores that come later, but of
shots that were taken before, are treated alike.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, Self

from facelane_server import config, limits
from facelane_server.domain import (
    Box,
    Decision,
    Identity,
    Landmarks,
    Liveness,
    LivenessVerdict,
)

SECOND: Final = 1_000_000_000

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

RETRY_SHARE: Final = 0.1
"""Share of ``reinference_interval`` after which a rejected face is tried again; doubles
with every further rejection, up to the whole interval."""
LIVENESS_SHARE: Final = 1 / 3
"""Share of ``reinference_interval`` after which a settled verdict is checked again."""
SETTLED_SHOTS: Final = 3
"""Liveness is judged on every shot until there are so many."""
STALE_FLOOR_NS: Final = SECOND // 5
"""A name is shown for so long even if ``reinference_interval`` is shorter."""

CHIP_SIDE: Final = 112.0
"""A face of this width fills the recogniser's input without enlargement."""

_NOT_EVALUATED: Final = Identity(Decision.NOT_EVALUATED)
_REJECTED: Final = Identity(Decision.REJECTED_OOD)
_UNDECIDED: Final = Liveness(LivenessVerdict.UNDECIDED)
_FORBIDDEN: Final = 1e6


class LivenessThresholds(Protocol):
    """Scores from ``live`` on are bona fide, scores below ``spoof`` an attack; [0, 1]."""

    @property
    def live(self) -> float: ...

    @property
    def spoof(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Params:
    """``max_centre_distance`` is in box widths, ``min_iou`` and ``better_shot_margin`` in
    [0, 1], times in nanoseconds of media time."""

    interval_ns: int = 3 * SECOND
    max_gap_ns: int = SECOND
    min_iou: float = 0.2
    max_centre_distance: float = 1.0
    better_shot_margin: float = 0.05

    @classmethod
    def of(cls, section: config.Tracking) -> Self:
        return cls(
            interval_ns=int(section.reinference_interval_s * SECOND),
            max_gap_ns=int(section.max_gap_s * SECOND),
            min_iou=section.min_iou,
            max_centre_distance=section.max_centre_distance,
            better_shot_margin=section.better_shot_margin,
        )

    def with_interval(self, interval_ns: int) -> Self:
        """The same with another re-inference interval; 0 = recognise every frame."""
        return replace(self, interval_ns=interval_ns)

    @property
    def stale_ns(self) -> int:
        """For how long an unconfirmed name is shown."""
        return max(2 * self.interval_ns, STALE_FLOOR_NS)


@dataclass(frozen=True, slots=True)
class Detection:
    """A face of one frame, in pixels; ``score`` in [0, 1]."""

    box: Box
    score: float
    landmarks: Landmarks


@dataclass(frozen=True, slots=True)
class Shot:
    """What the recogniser said of one shot. ``ood_score`` in [0, 1]."""

    identity: Identity
    ood_score: float
    taken_ns: int


@dataclass(frozen=True, slots=True)
class LivenessShot:
    """``attack``: the score was below the spoof threshold."""

    score: float
    attack: bool


@dataclass(frozen=True, slots=True)
class Track:
    """One face over time. ``velocity`` in pixels a nanosecond."""

    track_id: int
    box: Box
    started_ns: int
    seen_ns: int
    velocity: tuple[float, float] = (0.0, 0.0)
    missed: bool = False
    """The last frame did not show it."""
    crossing: bool = False
    """Its box overlaps another track's so far that the two could be swapped."""
    suspect_ns: int | None = None
    """Since when it is not certain that this is still the same person."""

    shot: Shot | None = None
    """The best so far."""
    confirmed_ns: int = 0
    """When a shot last said what ``shot`` says."""
    asked_ns: int | None = None
    """When the last shot of any kind was taken."""
    tried_quality: float = 0.0
    """The best ``quality`` among the shots."""
    doubts: int = 0
    """Trustworthy shots in a row that contradict ``shot``."""
    rejected: tuple[float, ...] = ()
    """OOD scores of the shots in a row, at most 8, that were rejected since ``shot``."""

    liveness: Liveness = _UNDECIDED
    liveness_shots: tuple[LivenessShot, ...] = ()
    liveness_ns: int | None = None
    attacked: bool = False
    """Two attack scores were in memory together, and it has not been all live since."""

    @property
    def identity(self) -> Identity:
        """What the best shot says, however old; ``identity_at`` is what may be shown."""
        return _NOT_EVALUATED if self.shot is None else self.shot.identity

    @property
    def ood_score(self) -> float | None:
        """The best shot's."""
        return None if self.shot is None else self.shot.ood_score


@dataclass(frozen=True, slots=True)
class Tracks:
    """All tracks of a stream. ``created`` counts them since its start."""

    by_id: Mapping[int, Track] = field(default_factory=dict)
    """In the order of ids."""
    created: int = 0
    now_ns: int = 0

    @property
    def active(self) -> tuple[Track, ...]:
        return tuple(self.by_id.values())

    def get(self, track_id: int) -> Track | None:
        return self.by_id.get(track_id)

    def replace(self, track: Track) -> Tracks:
        """With another state of one track; an ended track does not come back."""
        if track.track_id not in self.by_id:
            return self
        return Tracks({**self.by_id, track.track_id: track}, self.created, self.now_ns)


@dataclass(frozen=True, slots=True)
class Update:
    """``assignments[i]`` is the track id of detection i; 0 for a face that is not tracked
    (a box without an area, or more faces than ``limits.MAX_TRACKS``)."""

    tracks: Tracks
    assignments: tuple[int, ...]
    ended: tuple[Track, ...]


# -- linking -------------------------------------------------------------------------------


def update(tracks: Tracks, detections: Sequence[Detection], now_ns: int, params: Params) -> Update:
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
        state[track.track_id] = _moved(track, found.box, now_ns, params, near=near)

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
        state[created] = Track(created, detections[i].box, now_ns, now_ns)
    if len(state) > 1:
        _mark_crossings(state, now_ns)
    elif state:
        [only] = state.values()
        if only.crossing:
            state[only.track_id] = _suspected(replace(only, crossing=False), now_ns)
    return Update(Tracks(state, created, now_ns), tuple(assignments), tuple(ended))


def _has_area(box: Box) -> bool:
    return (
        0.0 < box.width < math.inf
        and 0.0 < box.height < math.inf
        and math.isfinite(box.x)
        and math.isfinite(box.y)
    )


def _order_of(found: Detection) -> tuple[float, ...]:
    box = found.box
    return (box.x, box.y, box.width, box.height, found.score)


def _assign(
    known: Sequence[Track], boxes: Sequence[Box], now_ns: int, params: Params
) -> dict[int, tuple[int, bool]]:
    """Index of a box -> (index of its track, whether they overlap enough). ``boxes`` are
    sorted by x."""
    if not known or not boxes:
        return {}
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
    rows, columns = _solver()(matrix)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


@functools.cache
def _solver() -> Callable[[list[list[float]]], tuple[Any, Any]]:
    # Imported where it is first needed: scipy.optimize takes 0.4 s, more than the rest of
    # the server's imports together.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment


def prepare() -> None:
    """Imports what the first contested assignment needs; call it in a thread at the start,
    else that frame waits for it."""
    _solver()


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


def _moved(track: Track, box: Box, now_ns: int, params: Params, *, near: bool) -> Track:
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
    moved = replace(track, box=box, seen_ns=now_ns, velocity=velocity, missed=False)
    if not near or elapsed > share * params.max_gap_ns:
        return _suspected(moved, now_ns)
    return moved


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
            state[track.track_id] = _suspected(replace(track, crossing=False), now_ns)


def _suspected(track: Track, now_ns: int) -> Track:
    return _without_bona_fide(replace(track, suspect_ns=now_ns))


# -- shots -----------------------------------------------------------------------------------


def quality(found: Detection) -> float:
    """What a shot promises before any model has seen it, in [0, 1]: detection score x size
    x frontalness. A proxy that only ranks the shots of one face."""
    box = found.box
    size = min(1.0, min(box.width, box.height) / CHIP_SIDE)
    value = found.score * size * frontalness(found.landmarks)
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0


def frontalness(landmarks: Landmarks) -> float:
    """1 = seen from the front, 0 = from the side, from above or from below.

    Measured in the face's own axes (the line of the eyes, and from there to the mouth), so
    it does not change when the head is tilted in the plane of the picture.
    """
    if len(landmarks) != 5:
        return 0.5
    left, right, nose, mouth_left, mouth_right = landmarks
    middle = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2)
    across = (right[0] - left[0], right[1] - left[1])
    down = (
        (mouth_left[0] + mouth_right[0]) / 2 - middle[0],
        (mouth_left[1] + mouth_right[1]) / 2 - middle[1],
    )
    # nose = middle + u * across + v * down
    determinant = across[0] * down[1] - across[1] * down[0]
    scale = math.hypot(*across) * math.hypot(*down)
    if not abs(determinant) > 0.05 * scale:
        return 0.0
    to_nose = (nose[0] - middle[0], nose[1] - middle[1])
    u = (to_nose[0] * down[1] - to_nose[1] * down[0]) / determinant
    v = (across[0] * to_nose[1] - across[1] * to_nose[0]) / determinant
    # A frontal nose is at u = 0, v = 0.55 (the ArcFace template); at |u| = 0.6 the far eye
    # is hidden, and a nose at the eyes or at the mouth is as far as a head can nod.
    yaw = max(0.0, 1.0 - abs(u) / 0.6)
    pitch = max(0.0, 1.0 - abs(v - 0.55) / 0.6)
    return yaw * pitch


def promised_gain(track: Track, found: Detection) -> float:
    """How much more OOD score this shot may bring than the best so far: the share of the
    remaining way to a perfect shot, by ``quality``, of what is missing to a perfect score."""
    best = track.ood_score or 0.0
    left = 1.0 - track.tried_quality
    if left <= 0.0:
        return 0.0
    return (quality(found) - track.tried_quality) / left * (1.0 - best)


def wants_recognition(track: Track, found: Detection, now_ns: int, params: Params) -> bool:
    """Whether this shot is worth embedding. The caller does not ask while one is under way."""
    if track.asked_ns is None or track.doubts:
        return True
    if track.suspect_ns is not None and track.asked_ns < track.suspect_ns:
        return True
    since = now_ns - track.asked_ns
    if since >= params.interval_ns:
        return True
    if track.rejected:
        retry = params.interval_ns * RETRY_SHARE * 2 ** (len(track.rejected) - 1)
        if since >= retry:
            return True
    return promised_gain(track, found) > params.better_shot_margin


def with_recognition(
    track: Track, found: Detection, ood_score: float, identity: Identity, now_ns: int
) -> Track:
    """The track after the recogniser's answer to a shot taken at ``now_ns``.

    An answer of NOT_EVALUATED changes nothing. See the module for the rules.
    """
    if identity.decision is Decision.NOT_EVALUATED:
        return track
    asked = replace(
        track,
        asked_ns=now_ns if track.asked_ns is None else max(now_ns, track.asked_ns),
        tried_quality=max(track.tried_quality, quality(found)),
    )
    shot = Shot(identity, ood_score, now_ns)
    best = track.shot
    if identity.decision is Decision.REJECTED_OOD:
        rejected = (*track.rejected, ood_score)[-8:]
        better = best is None or (
            best.identity.decision is Decision.REJECTED_OOD and ood_score > best.ood_score
        )
        return replace(asked, rejected=rejected, shot=shot if better else best)
    settles = track.suspect_ns is None or now_ns >= track.suspect_ns
    accepted = replace(
        asked,
        shot=shot,
        confirmed_ns=max(now_ns, track.confirmed_ns),
        doubts=0,
        rejected=(),
        suspect_ns=None if settles else track.suspect_ns,
    )
    if best is None or best.identity.decision is Decision.REJECTED_OOD:
        return accepted
    old = best.identity
    if (old.decision, old.subject_id) == (identity.decision, identity.subject_id):
        return accepted if ood_score >= best.ood_score else replace(accepted, shot=best)
    somebody_else = old.decision is identity.decision is Decision.MATCH
    gone = track.suspect_ns is not None and settles
    if not (somebody_else or gone or ood_score >= best.ood_score or track.doubts):
        return replace(asked, doubts=1, rejected=())
    if old.decision is Decision.MATCH or gone:
        # Another person, or one who is not who it seemed: what was seen of the first one
        # is no evidence for this one.
        accepted = _without_bona_fide(replace(accepted, tried_quality=quality(found)))
    return accepted


def forgotten(track: Track) -> Track:
    """The track as if no shot had been recognised: whom it named is in the gallery no more."""
    return replace(
        track, shot=None, confirmed_ns=0, asked_ns=None, tried_quality=0.0, doubts=0, rejected=()
    )


def identity_at(track: Track, now_ns: int, params: Params) -> Identity:
    """What may be said at ``now_ns``: the best shot's identity while it is confirmed often
    enough and the track is not suspect; else REJECTED_OOD when the newest shots were
    rejected, else NOT_EVALUATED."""
    return _shown(track, now_ns, params)[0]


def ood_score_at(track: Track, now_ns: int, params: Params) -> float | None:
    """The OOD score that belongs to ``identity_at``."""
    return _shown(track, now_ns, params)[1]


def _shown(track: Track, now_ns: int, params: Params) -> tuple[Identity, float | None]:
    shot = track.shot
    if shot is None:
        return _NOT_EVALUATED, None
    suspect = track.suspect_ns is not None and now_ns >= track.suspect_ns
    if shot.identity.decision is Decision.REJECTED_OOD:
        trusted = not suspect
    else:
        trusted = not suspect and now_ns - track.confirmed_ns <= params.stale_ns
    if trusted:
        return shot.identity, shot.ood_score
    asked_since = not suspect or (
        track.suspect_ns is not None and (track.asked_ns or 0) >= track.suspect_ns
    )
    if track.rejected and asked_since:
        return _REJECTED, track.rejected[-1]
    return _NOT_EVALUATED, None


# -- liveness -----------------------------------------------------------------------------------


def wants_liveness(track: Track, found: Detection, now_ns: int, params: Params) -> bool:
    """Whether this shot is to be judged. The caller does not ask while one is under way."""
    del found  # attacks come in every quality: a bad shot is no reason not to look
    if track.liveness_ns is None or len(track.liveness_shots) < SETTLED_SHOTS:
        return True
    undecided = track.liveness.verdict is LivenessVerdict.UNDECIDED
    share = RETRY_SHARE if undecided else LIVENESS_SHARE
    return now_ns - track.liveness_ns >= params.interval_ns * share


def with_liveness(track: Track, score: float, now_ns: int, thresholds: LivenessThresholds) -> Track:
    """The track after the liveness score, [0, 1], of a shot taken at ``now_ns``. NaN is no
    answer and changes nothing; nor does a shot from before the track became suspect, unless it
    shows an attack: it may be of another person."""
    if math.isnan(score):
        return track
    if track.suspect_ns is not None and now_ns < track.suspect_ns and score >= thresholds.spoof:
        return track
    shots = (*track.liveness_shots, LivenessShot(score, score < thresholds.spoof))
    shots = shots[-limits.MAX_LIVENESS_SHOTS :]
    attacks = sum(shot.attack for shot in shots)
    attacked = attacks >= 2 or (
        track.attacked
        and not (
            len(shots) == limits.MAX_LIVENESS_SHOTS
            and all(shot.score >= thresholds.live for shot in shots)
        )
    )
    fused = fused_score([shot.score for shot in shots])
    enough = thresholds.live
    if track.liveness.verdict is LivenessVerdict.LIVE:
        enough = (thresholds.live + thresholds.spoof) / 2
    if attacked or fused < thresholds.spoof:
        verdict = LivenessVerdict.SPOOF
    elif attacks == 0 and fused >= enough:
        verdict = LivenessVerdict.LIVE
    else:
        verdict = LivenessVerdict.UNDECIDED
    return replace(
        track,
        liveness=Liveness(verdict, fused),
        liveness_shots=shots,
        liveness_ns=now_ns if track.liveness_ns is None else max(now_ns, track.liveness_ns),
        attacked=attacked,
    )


def fused_score(scores: Sequence[float]) -> float:
    """The mean of the lower half (the middle one included) of at least one score."""
    lower = sorted(scores)[: (len(scores) + 1) // 2]
    # Rounded, the mean of equal scores can fall below them, and so below a threshold they reach.
    return max(lower[0], sum(lower) / len(lower))


def _without_bona_fide(track: Track) -> Track:
    if not track.liveness_shots:
        return track
    kept = tuple(shot for shot in track.liveness_shots if shot.attack)
    if track.attacked or track.liveness.verdict is LivenessVerdict.SPOOF:
        liveness = track.liveness
    else:
        liveness = _UNDECIDED
    return replace(track, liveness_shots=kept, liveness=liveness)
