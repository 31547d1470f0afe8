"""Faces over the frames of one stream: pure functions, tracks x detections -> tracks.

Time is media time (``stream_offset`` in nanoseconds), never a clock, so a recording gives
the same tracks however fast it is played. Nothing here waits, allocates without a bound or
knows of a model. A track is a claim that the face in these boxes is one person; the rules
below say how long that claim, and a name that hangs on it, may be trusted.

**Linking.** A detection continues a track when it overlaps the place where the track is
expected (constant velocity), or lies within ``max_centre_distance`` of it and has about
its size. Of all such pairs the assignment of least total cost is taken (Jonker-Volgenant). A jump
further than that is a new track.

**Doubt.** A name must not pass silently from one person to another. A link is doubtful where
the face was not seen for a while; was linked by distance alone; looks unlike the picture
before, or unlike the one that the recogniser saw last (``appearance``: a cut of the scene,
somebody else in the same place); or where its box has just come apart from another track's.
From a doubtful link on the track is *suspect*: it shows no name, no verdict and no OOD score
of before, and asks for a look at once, and its picture's outcome waits for the answer as it
does for a new face's. What that look says is shown. If it says the same as before, the track
goes on, and so it does where the look names nobody but the face, compared with the one who was
named and nobody else, still passes for that one (``resembles``: a face that is blurred or turned
for some pictures). If it says another name, or twice that this is nobody known, the track has
ended there and another begins (``contradicts``, ``successor``). Doubts are known singly: what a
look says holds for the pictures up to the next one, also where that was known before the answer.
While a look is under way pictures are compared with its own; where it then names nobody, each is
compared with the one that did before it is told (``looked``, ``compared``).

**Names.** The best shot by OOD score speaks for the track.

* A shot rejected as out of distribution says nothing of who it is: the name stays, but the
  track asks again soon, and a name that no shot has confirmed for ``identity_max_age`` is
  not shown any more.
* A name needs two looks that agree, or one that is certain (``Identity.certain``): after a first
  uncertain match the track asks again on the next frame, and shows what it showed before. A
  doubt between the two does not part them: who moves looks otherwise in every picture of a slow
  stream.
* A match with *another* subject ends the track at once.
* Any other contradiction (a name becomes unknown, or the reverse) counts at once when its
  OOD score is at least as good as the best shot's; otherwise it takes two in a row, and the
  first makes the track ask again: on the next frame, or, while the face still passes for the
  one who was named, in another moment (two pictures of one moment say the same).

Time that stands still (a client that gives every picture one time) keeps nothing young: after
``STILL_LINKS`` such pictures a track is looked at again, and after twice as many what was said
before is shown no more.

**Liveness.** The last ``limits.MAX_LIVENESS_SHOTS`` scores are kept. The fused score is the
mean of their lower half: a high outlier cannot lift it. Attack evidence is not averaged
away: one score below ``spoof`` in memory bars LIVE, two make the verdict SPOOF until the
whole memory is at or above ``live``. A LIVE track stays LIVE while the fused score is in
the upper half of the band between ``spoof`` and ``live``, so that the verdict does not
flicker. When a name is lost, or outcomes come to a doubtful link (``reached``), the scores that
speak for a living person are forgotten and those of an attack are kept; scores that come later, but
of shots that were taken before, are treated alike.
"""

from __future__ import annotations

from facelane_server.tracking.linking import Update, update
from facelane_server.tracking.liveness import (
    LivenessThresholds,
    fused_score,
    judged_anew,
    liveness_at,
    wants_liveness,
    with_liveness,
)
from facelane_server.tracking.shots import (
    Shown,
    compared,
    contradicts,
    forgotten,
    frontalness,
    identity_at,
    looked,
    looking,
    named,
    ood_score_at,
    promised_gain,
    quality,
    shown_at,
    successor,
    wants_recognition,
    with_recognition,
)
from facelane_server.tracking.track import LivenessShot, Params, Shot, Track, Tracks, reached

__all__ = [
    "LivenessShot",
    "LivenessThresholds",
    "Params",
    "Shot",
    "Shown",
    "Track",
    "Tracks",
    "Update",
    "compared",
    "contradicts",
    "forgotten",
    "frontalness",
    "fused_score",
    "identity_at",
    "judged_anew",
    "liveness_at",
    "looked",
    "looking",
    "named",
    "ood_score_at",
    "promised_gain",
    "quality",
    "reached",
    "shown_at",
    "successor",
    "update",
    "wants_liveness",
    "wants_recognition",
    "with_liveness",
    "with_recognition",
]
