"""Shots of a track: which are worth embedding, whom they name, for how long."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from facelane_server.domain import Decision, DetectedFace, Identity, Landmarks
from facelane_server.tracking.track import (
    NOT_EVALUATED,
    Params,
    Shot,
    Track,
    without_bona_fide,
)

RETRY_SHARE: Final = 0.1
"""Share of ``reinference_interval`` after which a rejected face is tried again; doubles
with every further rejection, up to the whole interval."""

CHIP_SIDE: Final = 112.0
"""A face of this width fills the recogniser's input without enlargement."""

_REJECTED: Final = Identity(Decision.REJECTED_OOD)


def quality(found: DetectedFace) -> float:
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


def promised_gain(track: Track, found: DetectedFace) -> float:
    """How much more OOD score this shot may bring than the best so far: the share of the
    remaining way to a perfect shot, by ``quality``, of what is missing to a perfect score."""
    best = track.ood_score or 0.0
    left = 1.0 - track.tried_quality
    if left <= 0.0:
        return 0.0
    return (quality(found) - track.tried_quality) / left * (1.0 - best)


def wants_recognition(track: Track, found: DetectedFace, now_ns: int, params: Params) -> bool:
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
    track: Track, found: DetectedFace, ood_score: float, identity: Identity, now_ns: int
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
    shot = Shot(identity, ood_score)
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
        accepted = without_bona_fide(replace(accepted, tried_quality=quality(found)))
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
        return NOT_EVALUATED, None
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
    return NOT_EVALUATED, None
