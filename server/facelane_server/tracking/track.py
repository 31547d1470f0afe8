"""What is known of a face over time, and the bounds of that knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import msgspec
from msgspec.structs import replace

from facelane_server import config, limits
from facelane_server.domain import Box, Decision, Identity, Liveness, LivenessVerdict

SECOND: Final = 1_000_000_000
STALE_FLOOR_NS: Final = SECOND // 5
"""A name is shown for so long even if ``reinference_interval`` is shorter."""

STILL_LINKS: Final = 100
"""Pictures of a track within less than ``STILL_NS`` each: their time is none. A look is taken again
after so many, and what it said is shown for twice as many, however little time they claim."""
STILL_NS: Final = SECOND // 1000

NOT_EVALUATED: Final = Identity(Decision.NOT_EVALUATED)
UNDECIDED: Final = Liveness(LivenessVerdict.UNDECIDED)


class Params(msgspec.Struct, frozen=True, gc=False):
    """``max_centre_distance`` is in box widths, ``min_iou`` and ``better_shot_margin`` in
    [0, 1], times in nanoseconds of media time."""

    interval_ns: int = 3 * SECOND
    max_gap_ns: int = SECOND
    min_iou: float = 0.2
    max_centre_distance: float = 1.0
    better_shot_margin: float = 0.05
    max_age_ns: int = 0
    """0 = twice ``interval_ns``."""

    @classmethod
    def of(cls, section: config.Tracking) -> Self:
        return cls(
            interval_ns=int(section.reinference_interval_s * SECOND),
            max_gap_ns=int(section.max_gap_s * SECOND),
            min_iou=section.min_iou,
            max_centre_distance=section.max_centre_distance,
            better_shot_margin=section.better_shot_margin,
            max_age_ns=int(section.identity_max_age_s * SECOND),
        )

    def with_interval(self, interval_ns: int) -> Self:
        """The same with another re-inference interval; 0 = recognise every frame."""
        return replace(self, interval_ns=interval_ns)

    @property
    def stale_ns(self) -> int:
        """For how long the evidence of a look is shown."""
        return max(self.max_age_ns or 2 * self.interval_ns, STALE_FLOOR_NS)


class Shot(msgspec.Struct, frozen=True, gc=False):
    """What the recogniser said of one shot. ``ood_score`` in [0, 1]."""

    identity: Identity
    ood_score: float


class LivenessShot(msgspec.Struct, frozen=True, gc=False):
    """``attack``: the score was below the spoof threshold."""

    score: float
    attack: bool


class Track(msgspec.Struct, frozen=True, gc=False):
    """One face over time. ``velocity`` in pixels a nanosecond.

    A *link* is the number of a picture of this track, from 1: what came before what is
    told by links, because a client may give two pictures one time.
    """

    track_id: int
    box: Box
    started_ns: int
    seen_ns: int
    velocity: tuple[float, float] = (0.0, 0.0)
    missed: bool = False
    """The last frame did not show it."""
    crossing: bool = False
    """Its box overlaps another track's so far that the two could be swapped."""
    links: int = 1
    """Pictures so far."""
    signature: bytes = b""
    """Of the last picture."""
    suspect: int | None = None
    """The first link from which on it is not certain that this is still the same person,
    and no look has made it certain since."""
    suspect_last: int = 0
    """The last doubtful link, whether settled or not."""
    doubted: tuple[int, ...] = ()
    """The doubtful links that are not settled, the newest ``limits.MAX_DOUBTS``. Between
    ``suspect`` and the first of them every link counts as doubtful."""
    reached: int = 0
    """The newest doubtful link that outcomes have come to; what spoke for a living face before it
    counts no more."""
    strict: bool = False
    """A doubt came with a loss of detail: a look that is not trusted settles nothing."""

    shot: Shot | None = None
    """The best so far."""
    confirmed_ns: int = 0
    """When a shot last said what ``shot`` says."""
    confirmed_link: int = 0
    reference: bytes = b""
    """The signature of that shot."""
    looking: bytes = b""
    """The signature of the newest shot that was asked for and has no answer yet."""
    unproven: int = 0
    """Pictures up to this link may not have been compared with ``reference``, but with a shot that
    has not become it."""
    latest: Shot | None = None
    """The last shot that was answered."""
    pending: str = ""
    """Whom the last look named, without being certain enough to name the track by itself."""
    asked_ns: int | None = None
    """When ``latest`` was taken."""
    asked_link: int = 0
    tried_quality: float = 0.0
    """The best ``quality`` among the shots."""
    doubts: int = 0
    """Trustworthy shots in a row that contradict ``shot``."""
    passing: bool = False
    """Whoever the last of them shows still passes for the one who is named by ``shot``."""
    rejected: tuple[float, ...] = ()
    """OOD scores of the shots in a row, at most 8, that were rejected since ``shot``."""

    liveness: Liveness = UNDECIDED
    liveness_shots: tuple[LivenessShot, ...] = ()
    liveness_ns: int | None = None
    judged_link: int = 0
    attacked: bool = False
    """Two attack scores were in memory together, and it has not been all live since."""
    said: float = 0.0
    """The evidence of all liveness looks since the last doubt, in nats; ``liveness.sequential``."""
    said_looks: int = 0

    @property
    def identity(self) -> Identity:
        """What the best shot says, however old; ``identity_at`` is what may be shown."""
        return NOT_EVALUATED if self.shot is None else self.shot.identity

    @property
    def ood_score(self) -> float | None:
        """The best shot's."""
        return None if self.shot is None else self.shot.ood_score


class Tracks(msgspec.Struct, frozen=True, gc=False):
    """All tracks of a stream. ``created`` counts them since its start."""

    by_id: Mapping[int, Track] = msgspec.field(default_factory=dict)
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

    def succeeded(self, track_id: int, by: Track) -> Tracks:
        """With a new track in the place of another."""
        others = {k: t for k, t in self.by_id.items() if k != track_id}
        return Tracks({**others, by.track_id: by}, max(self.created, by.track_id), self.now_ns)


def suspected(track: Track, link: int, *, strict: bool = False) -> Track:
    """The track when it is not certain that from ``link`` on it is the same face."""
    since = link if track.suspect is None else min(track.suspect, link)
    return replace(
        track,
        suspect=since,
        suspect_last=max(link, track.suspect_last),
        doubted=tuple(sorted({*track.doubted, link}))[-limits.MAX_DOUBTS :],
        strict=strict or (track.strict and track.suspect is not None),
        rejected=(),
    )


def reached(track: Track, link: int) -> Track:
    """The track when outcomes come to its picture ``link``: to be told before what a look says of
    it, in the order of pictures."""
    if track.suspect is None or link < track.suspect:
        return track
    doubt = last_doubt(track, link)
    return replace(without_bona_fide(track), reached=doubt) if doubt > track.reached else track


def settled(track: Track, link: int) -> Track:
    """The track when it is certain who the face of ``link`` is; doubts behind it stay, and what
    is between it and the next of them is the same face."""
    if track.suspect is None or link < track.suspect:
        return track
    later = tuple(doubt for doubt in track.doubted if doubt > link)
    return replace(track, suspect=next_doubt(track, link), doubted=later)


def next_doubt(track: Track, link: int) -> int | None:
    """The first doubtful link behind ``link``."""
    if track.suspect_last <= link:
        return None
    later = [doubt for doubt in track.doubted if doubt > link]
    known = len(later) < len(track.doubted) or track.suspect in later
    return later[0] if later and known else link + 1


def last_doubt(track: Track, link: int) -> int:
    """The newest doubtful link, not settled, up to ``link``; 0 = none."""
    if track.suspect is None or link < track.suspect:
        return 0
    known = [doubt for doubt in track.doubted if doubt <= link]
    return known[-1] if known else min(link, track.suspect_last)


def without_bona_fide(track: Track) -> Track:
    """What spoke for a living face counts no more."""
    if not track.liveness_shots:
        return track
    if track.said > 0.0:
        track = replace(track, said=0.0, said_looks=0)
    kept = tuple(shot for shot in track.liveness_shots if shot.attack)
    if track.attacked or track.liveness.verdict is LivenessVerdict.SPOOF:
        liveness = track.liveness
    else:
        liveness = UNDECIDED
    return replace(track, liveness_shots=kept, liveness=liveness)


def clock_stands_still(since_ns: float, links: int) -> bool:
    """Whether so many pictures of a track say that hardly any time has passed."""
    return links >= STILL_LINKS and since_ns < links * STILL_NS
