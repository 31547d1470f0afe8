"""Shots of a track: which are worth embedding, whom they name, for how long."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from msgspec.structs import replace

from facelane_server.domain import Decision, DetectedFace, Identity, Landmarks
from facelane_server.tracking.appearance import SAME_LOOK, changed
from facelane_server.tracking.track import (
    NOT_EVALUATED,
    SECOND,
    Params,
    Shot,
    Track,
    clock_stands_still,
    last_doubt,
    next_doubt,
    settled,
    suspected,
    without_bona_fide,
)

RETRY_SHARE: Final = 0.1
"""Share of ``reinference_interval`` after which a rejected face is tried again; doubles
with every further rejection, up to the whole interval."""
SUSPECT_RETRY_SHARE: Final = RETRY_SHARE / 3
"""The same while it is not certain whose face it is: nothing is shown of it until then."""

MOMENT_NS: Final = 3 * SECOND // 10
"""Pictures of one face within so long say the same, at most (``RETRY_SHARE`` of the interval where
that is less)."""

CHIP_SIDE: Final = 112.0
"""A face of this width fills the recogniser's input without enlargement."""


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


def may_gain(track: Track, found: DetectedFace, margin: float) -> bool:
    """Whether ``promised_gain`` could be more than that, were the face seen from the front: of most
    pictures it could not, and how it is turned need not be worked out."""
    left = 1.0 - track.tried_quality
    if left <= 0.0:
        return margin < 0.0
    most = found.score * min(1.0, min(found.box.width, found.box.height) / CHIP_SIDE)
    return not (most - track.tried_quality) / left * (1.0 - (track.ood_score or 0.0)) <= margin


def wants_recognition(track: Track, found: DetectedFace, now_ns: int, params: Params) -> bool:
    """Whether this shot is worth embedding. The caller does not ask while one is under way
    that was taken since the last doubt."""
    if track.asked_ns is None or track.pending or (track.doubts and not track.passing):
        return True
    suspect = track.suspect is not None
    if suspect and track.asked_link < track.suspect_last:
        return True
    since = now_ns - track.asked_ns
    if since >= params.interval_ns or clock_stands_still(since, track.links - track.asked_link):
        return True
    if track.doubts and since >= min(params.interval_ns * RETRY_SHARE, MOMENT_NS):
        return True
    if track.rejected:
        share = SUSPECT_RETRY_SHARE if suspect else RETRY_SHARE
        if since >= params.interval_ns * share * 2 ** (len(track.rejected) - 1):
            return True
    margin = params.better_shot_margin
    return may_gain(track, found, margin) and promised_gain(track, found) > margin


def looking(track: Track, found: DetectedFace) -> Track:
    """The track when the recogniser was asked for this shot."""
    return replace(track, looking=found.signature)


def looked(track: Track, found: DetectedFace, *, link: int) -> Track:
    """The track when the look at its picture ``link`` is over, whatever it said, if anything. What
    came after was compared with that picture; where it has not become the reference, each is
    compared with that one when outcomes come to it (``compared``). The newest is at once, so that
    it is looked at soon, unless it was compared with a look that is still under way."""
    if track.looking == found.signature:
        track = replace(track, looking=b"")
    if track.links == link or track.reference == found.signature:
        return track
    track = replace(track, unproven=track.links)
    newest = track.links if not track.looking else 0
    if newest and changed(track.reference, track.signature, SAME_LOOK):
        return suspected(track, newest)
    return track


def compared(track: Track, found: DetectedFace, *, link: int) -> Track:
    """The track when outcomes come to its picture ``link``, before what a look says of it: doubtful
    from there on where ``looked`` has left the comparison with the reference to be made, and it is
    unlike it."""
    if link > track.unproven or (track.suspect is not None and link >= track.suspect):
        return track
    unlike = changed(track.reference, found.signature, SAME_LOOK)
    return suspected(track, link) if unlike else track


def contradicts(track: Track, ood_score: float, identity: Identity, *, link: int = 0) -> bool:
    """Whether the recogniser's answer to the picture ``link`` (0 = the last) shows that the
    track's face has become another person's: another subject at any time, and nobody known
    where the link was doubtful (two looks in a row, or a better one than that which named it)."""
    best = track.shot
    if best is None or best.identity.decision is not Decision.MATCH:
        return False
    if identity.decision is Decision.MATCH:
        return identity.subject_id != best.identity.subject_id
    doubtful = track.suspect is not None and (link or track.links) >= track.suspect
    sure = ood_score >= best.ood_score or track.doubts > 0
    return identity.decision is Decision.UNKNOWN and doubtful and sure


def needs_another_look(track: Track, identity: Identity) -> bool:
    """Whether a name is withheld until a second look agrees: the look is not certain, and none
    before it said the same.

    A doubtful link between the two does not matter: if it hides nobody, they are two looks at
    one face, and if it hides another person, that one had to be taken for the same subject by
    chance, which is rarer than that one face is taken for it twice.
    """
    best = track.shot
    said_before = best is not None and best.identity.subject_id == identity.subject_id
    return (
        identity.decision is Decision.MATCH
        and not identity.certain
        and not said_before
        and not _agrees(track, identity)
    )


def _agrees(track: Track, identity: Identity) -> bool:
    """Whether the look before this one named the same."""
    return bool(track.pending) and track.pending == identity.subject_id


def successor(track: Track, track_id: int, now_ns: int, *, link: int = 0) -> Track:
    """The track of the face that the picture ``link`` shows in the place of another."""
    link = link or track.links
    later = track.suspect_last > link
    return Track(
        track_id,
        track.box,
        now_ns,
        track.seen_ns,
        velocity=track.velocity,
        missed=track.missed,
        crossing=track.crossing,
        links=track.links,
        signature=track.signature,
        suspect=next_doubt(track, link),
        suspect_last=track.suspect_last if later else link,
        doubted=tuple(doubt for doubt in track.doubted if doubt > link),
        reached=link,
        looking=track.looking,
    )


def with_recognition(
    track: Track,
    found: DetectedFace,
    ood_score: float,
    identity: Identity,
    now_ns: int,
    *,
    link: int = 0,
    resembles: str = "",
) -> Track:
    """The track after the recogniser's answer to its picture ``link`` (0 = the last), taken
    at ``now_ns``.

    ``resembles``: the subject that a face without a name passes for when nobody else is looked
    for. It names nobody, but where a link was doubtful it says that the face is still the one
    that was named. An answer of NOT_EVALUATED changes nothing. See the package for the
    rules. An answer that ``contradicts`` the track belongs to its ``successor``.
    """
    if identity.decision is Decision.NOT_EVALUATED:
        return track
    link = link or track.links
    shot = Shot(identity, ood_score)
    doubtful = track.suspect is not None and link >= track.suspect
    asked = replace(
        track,
        latest=shot,
        asked_ns=now_ns if track.asked_ns is None else max(now_ns, track.asked_ns),
        asked_link=max(link, track.asked_link),
        tried_quality=max(track.tried_quality, quality(found)),
        looking=b"" if track.looking == found.signature else track.looking,
    )
    best = track.shot
    same = best is not None and resembles != "" and resembles == best.identity.subject_id
    still = same and doubtful and not track.strict
    if identity.decision is Decision.REJECTED_OOD:
        rejected = (*track.rejected, ood_score)[-8:]
        better = best is None or (
            best.identity.decision is Decision.REJECTED_OOD and ood_score > best.ood_score
        )
        after = replace(asked, rejected=rejected, shot=shot if better else best)
        return settled(replace(after, reference=found.signature), link) if still else after
    if needs_another_look(track, identity):
        return replace(asked, pending=identity.subject_id, rejected=())
    agreed = _agrees(track, identity)
    asked = replace(asked, pending="")
    accepted = settled(
        replace(
            asked,
            shot=shot,
            confirmed_ns=max(now_ns, track.confirmed_ns),
            confirmed_link=max(link, track.confirmed_link),
            reference=found.signature,
            doubts=0,
            rejected=(),
        ),
        link,
    )
    if best is None or best.identity.decision is Decision.REJECTED_OOD:
        return accepted
    old = best.identity
    if (old.decision, old.subject_id) == (identity.decision, identity.subject_id):
        return accepted if ood_score >= best.ood_score else replace(accepted, shot=best)
    matched = identity.decision is Decision.MATCH
    named = matched and (doubtful or old.decision is Decision.MATCH)
    if not (named or agreed or ood_score >= best.ood_score or track.doubts):
        asked = replace(asked, doubts=1, passing=same, rejected=())
        return settled(replace(asked, reference=found.signature), link) if still else asked
    if old.decision is Decision.MATCH or doubtful:
        # One who is not who it seemed: what was seen before is no evidence for this one.
        accepted = without_bona_fide(replace(accepted, tried_quality=quality(found)))
    return accepted


def named(track: Track) -> set[str]:
    """All subjects that the track has heard of and might tell, candidates included."""
    found = {track.pending} if track.pending else set()
    best, latest = track.shot, track.latest
    if best is not None:
        best.identity.tell(found)
    if latest is not None and latest is not best:
        latest.identity.tell(found)
    return found


def forgotten(track: Track) -> Track:
    """The track as if no shot had been recognised: whom it named is in the gallery no more."""
    return replace(
        track,
        shot=None,
        latest=None,
        confirmed_ns=0,
        confirmed_link=0,
        reference=b"",
        asked_ns=None,
        tried_quality=0.0,
        doubts=0,
        rejected=(),
        pending="",
    )


class Shown(msgspec.Struct, frozen=True, gc=False):
    """What may be said of one picture of a track. ``age_ns`` and ``links`` since the look
    that says so; 0 for a look at this very picture."""

    identity: Identity
    ood_score: float | None = None
    age_ns: int | None = None
    links: int = 0


NOTHING: Final = Shown(NOT_EVALUATED)


def shown_at(track: Track, now_ns: int, params: Params, *, link: int = 0) -> Shown:
    """What may be said of the picture ``link`` (0 = the last) at ``now_ns``.

    What the best shot says, while a look has said so since the last doubt and within
    ``max_age``; else what the newest look says, if it names nobody; else nothing.
    """
    link = link or track.links
    suspect = track.suspect is not None and link >= track.suspect
    shot = track.shot
    if shot is not None and shot.identity.decision is not Decision.REJECTED_OOD and not suspect:
        age_ns, links = max(0, now_ns - track.confirmed_ns), max(0, link - track.confirmed_link)
        if age_ns <= params.stale_ns and not clock_stands_still(age_ns, links // 2):
            return Shown(shot.identity, shot.ood_score, age_ns, links)
    latest = track.latest
    if latest is None or latest.identity.decision is Decision.MATCH or track.asked_ns is None:
        return NOTHING
    age_ns, links = max(0, now_ns - track.asked_ns), max(0, link - track.asked_link)
    doubted_since = suspect and track.asked_link < last_doubt(track, link)
    if doubted_since or age_ns > params.stale_ns or clock_stands_still(age_ns, links // 2):
        return NOTHING
    return Shown(latest.identity, latest.ood_score, age_ns, links)


def identity_at(track: Track, now_ns: int, params: Params, *, link: int = 0) -> Identity:
    """The identity of ``shown_at``."""
    return shown_at(track, now_ns, params, link=link).identity


def ood_score_at(track: Track, now_ns: int, params: Params, *, link: int = 0) -> float | None:
    """The OOD score of ``shown_at``."""
    return shown_at(track, now_ns, params, link=link).ood_score
