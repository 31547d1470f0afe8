"""Liveness scores of a track, fused into a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

from msgspec.structs import replace

from facelane_server import limits
from facelane_server.domain import DetectedFace, Liveness, LivenessVerdict
from facelane_server.liveness.sequential import SequentialTest, evidence
from facelane_server.tracking.track import (
    UNDECIDED,
    LivenessShot,
    Params,
    Track,
    clock_stands_still,
    last_doubt,
    without_bona_fide,
)

RETRY_SHARE: Final = 0.1
"""Share of ``reinference_interval`` after which an undecided face is judged again."""
LIVENESS_SHARE: Final = 1 / 3
"""Share of ``reinference_interval`` after which a settled verdict is checked again."""
SETTLED_SHOTS: Final = 3
"""Liveness is judged on every shot until there are so many."""


class LivenessThresholds(Protocol):
    """Scores from ``live`` on are bona fide, scores below ``spoof`` an attack; [0, 1]."""

    @property
    def live(self) -> float: ...

    @property
    def spoof(self) -> float: ...


def wants_liveness(track: Track, found: DetectedFace, now_ns: int, params: Params) -> bool:
    """Whether this shot is to be judged. The caller does not ask while one is under way."""
    del found  # attacks come in every quality: a bad shot is no reason not to look
    if track.liveness_ns is None or len(track.liveness_shots) < SETTLED_SHOTS:
        return True
    if track.suspect_last > track.reached:
        return True  # what there is will count no more
    undecided = track.liveness.verdict is LivenessVerdict.UNDECIDED
    share = RETRY_SHARE if undecided else LIVENESS_SHARE
    since = now_ns - track.liveness_ns
    if clock_stands_still(since, track.links - track.judged_link):
        return True
    return since >= params.interval_ns * share


def with_liveness(
    track: Track,
    score: float,
    now_ns: int,
    thresholds: LivenessThresholds,
    *,
    link: int = 0,
    test: SequentialTest | None = None,
) -> Track:
    """The track after the liveness score, [0, 1], of a shot taken at ``now_ns``. NaN is no
    answer and changes nothing; nor does a shot from before the newest doubt that was ``reached``,
    unless it shows an attack: it may be of another person. With a ``test`` it is LIVE only once
    that says so, too, and SPOOF as soon as that says so."""
    if math.isnan(score):
        return track
    link = link or track.links
    if link < track.reached and score >= thresholds.spoof:
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
    said = track.said + evidence(score, thresholds.live, thresholds.spoof)
    looks = track.said_looks + 1
    passed = True
    if test is not None:
        attacked = attacked or test.says_spoof(said, looks)
        # Who has passed it has passed it: from then on the scores' own rules hold.
        live = track.liveness.verdict is LivenessVerdict.LIVE
        passed = live or test.says_live(said, looks)
    if attacked or fused < thresholds.spoof:
        verdict = LivenessVerdict.SPOOF
    elif attacks == 0 and passed and fused >= enough:
        verdict = LivenessVerdict.LIVE
    else:
        verdict = LivenessVerdict.UNDECIDED
    return replace(
        track,
        liveness=Liveness(verdict, fused),
        liveness_shots=shots,
        liveness_ns=now_ns if track.liveness_ns is None else max(now_ns, track.liveness_ns),
        attacked=attacked,
        said=said,
        said_looks=looks,
        judged_link=link,
    )


def liveness_at(track: Track, now_ns: int, params: Params, *, link: int = 0) -> Liveness:
    """What may be said of the picture ``link`` (0 = the last) at ``now_ns``: nothing while it
    is not certain whose face it is, unless an attack was seen since, and no LIVE from a score
    that is too old."""
    link = link or track.links
    suspect = track.suspect is not None and link >= track.suspect
    if suspect and track.judged_link < last_doubt(track, link):
        return UNDECIDED
    if track.liveness.verdict is LivenessVerdict.LIVE:
        since = math.inf if track.liveness_ns is None else now_ns - track.liveness_ns
        still = clock_stands_still(since, (link - track.judged_link) // 2)
        if suspect or still or since > params.stale_ns:
            return UNDECIDED
    return track.liveness


def judged_anew(track: Track) -> Track:
    """The track when another model judges from now on: its scores do not go with the old ones'.
    What was an attack stays one until the new model has said otherwise."""
    return replace(without_bona_fide(track), liveness_ns=None)


def fused_score(scores: Sequence[float]) -> float:
    """The mean of the lower half (the middle one included) of at least one score."""
    lower = sorted(scores)[: (len(scores) + 1) // 2]
    # Rounded, the mean of equal scores can fall below them, and so below a threshold they reach.
    return max(lower[0], sum(lower) / len(lower))
