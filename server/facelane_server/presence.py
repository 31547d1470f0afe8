"""From the sightings of a stream's tracks to what security software is told of them: pure.

For **every** track, trusted or not: TRACK_STARTED at its first sighting, TRACK_UPDATED when
its decision, its subject or its liveness verdict has changed, TRACK_ENDED. A state that the
track was not in before is told at once, a return to an earlier one at most once in
``UPDATE_INTERVAL_NS``, and not when it did not last so long.

Derived from the same sightings, for software that wants no more:

* SUBJECT_SEEN when a track is named, and again when it is LIVE under that name.
* SPOOF_SUSPECTED when it is judged an attack, once a track.
* UNKNOWN_SEEN when it has had a trusted face that nobody knows for ``unknown_after``, once.
* FACE_HIDDEN when it has been rejected as untrusted, and not been trusted in between, for
  ``hidden_after``; again only after it was trusted.

All times are media time, so a recording tells the same however fast it is played.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from facelane_server import limits
from facelane_server.domain import (
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
    Sighting,
    TrackReport,
)
from facelane_server.events import EventKind

UPDATE_INTERVAL_NS: Final = 200_000_000
_NAMELESS: Final = (Decision.UNKNOWN, Decision.AMBIGUOUS)
_TRUSTED: Final = (Decision.MATCH, *_NAMELESS)

Telling = tuple[EventKind, TrackReport]
State = tuple[Decision, str, LivenessVerdict]


@dataclass(slots=True)
class _Known:
    """One track, and what was told of it."""

    report: TrackReport
    as_of: int
    """See ``Sighting``; of the newest one."""
    told: State
    told_ns: int
    states: set[State]
    """All that were told; a track has few, for it has hardly more than one subject."""
    named: str = ""
    live: bool = False
    suspected: bool = False
    unknown_ns: int | None = None
    unknown_told: bool = False
    untrusted_ns: int | None = None
    hidden_told: bool = False


class Presence:
    """Who is in one stream. ``unknown_after_ns``, ``hidden_after_ns``: see the module."""

    def __init__(self, *, unknown_after_ns: int, hidden_after_ns: int) -> None:
        self._unknown_after_ns = unknown_after_ns
        self._hidden_after_ns = hidden_after_ns
        self._tracks: dict[int, _Known] = {}

    def __len__(self) -> int:
        return len(self._tracks)

    def sighted(self, seen: Sighting) -> list[Telling]:
        """What is to be told after a sighting; in the order of the stream's outcomes."""
        known = self._tracks.get(seen.track_id)
        state = (seen.identity.decision, seen.identity.subject_id, seen.liveness.verdict)
        if known is None:
            report = _first(seen)
            known = self._tracks[seen.track_id] = _Known(
                report, seen.as_of, state, seen.at_ns, {state}
            )
            kinds = [EventKind.TRACK_STARTED]
        else:
            known.report, known.as_of = _next(known.report, seen), seen.as_of
            kinds = []
            rested = seen.at_ns - known.told_ns >= UPDATE_INTERVAL_NS
            if state != known.told and (rested or state not in known.states):
                known.told, known.told_ns = state, seen.at_ns
                known.states.add(state)
                kinds = [EventKind.TRACK_UPDATED]
        kinds.extend(self._derived(known, seen))
        return [(kind, known.report) for kind in kinds]

    def ended(self, track_id: int, *, forget: bool = False) -> list[Telling]:
        """What is to be told when a track has ended. ``forget``: whom it names was deleted."""
        known = self._tracks.pop(track_id, None)
        if known is None:
            return []
        report = known.report
        if forget:
            report = replace(report, identity=Identity(Decision.NOT_EVALUATED))
        return [(EventKind.TRACK_ENDED, report)]

    def report(self, track_id: int) -> TrackReport | None:
        known = self._tracks.get(track_id)
        return None if known is None else known.report

    def as_of(self, track_id: int) -> int:
        """The gallery's revision by which a track was named last; see ``Sighting``."""
        known = self._tracks.get(track_id)
        return 0 if known is None else known.as_of

    def _derived(self, known: _Known, seen: Sighting) -> Iterator[EventKind]:
        decision, subject = seen.identity.decision, seen.identity.subject_id
        live = seen.liveness.verdict is LivenessVerdict.LIVE
        if decision is Decision.MATCH:
            if subject != known.named:
                known.named, known.live = subject, live
                yield EventKind.SUBJECT_SEEN
            elif live and not known.live:
                known.live = True
                yield EventKind.SUBJECT_SEEN
            known.unknown_ns = None
        if seen.liveness.verdict is LivenessVerdict.SPOOF and not known.suspected:
            known.suspected = True
            yield EventKind.SPOOF_SUSPECTED
        if decision in _NAMELESS and not known.named and not known.unknown_told:
            if known.unknown_ns is None:
                known.unknown_ns = seen.at_ns
            if seen.at_ns - known.unknown_ns >= self._unknown_after_ns:
                known.unknown_told = True
                yield EventKind.UNKNOWN_SEEN
        if decision in _TRUSTED:
            known.untrusted_ns, known.hidden_told = None, False
            return
        if known.untrusted_ns is None:
            known.untrusted_ns = seen.at_ns
        lasted = seen.at_ns - known.untrusted_ns >= self._hidden_after_ns
        if decision is Decision.REJECTED_OOD and lasted and not known.hidden_told:
            known.hidden_told = True
            yield EventKind.FACE_HIDDEN


def _first(seen: Sighting) -> TrackReport:
    start = TrackReport(
        seen.track_id,
        first_ns=seen.at_ns,
        last_ns=seen.at_ns,
        first_capture_ns=_captured(seen),
        last_capture_ns=_captured(seen),
        box=seen.box,
        identity=seen.identity,
        liveness=Liveness(LivenessVerdict.UNDECIDED),
    )
    return _next(start, seen)


def _captured(seen: Sighting) -> int | None:
    """The camera's clock, of which nothing is told where it says what cannot be kept: a clock
    that was never set may stand in the year 1."""
    at_ns = seen.capture_time_ns
    return at_ns if at_ns is not None and abs(at_ns) <= limits.MAX_KEPT_NS else None


def _next(report: TrackReport, seen: Sighting) -> TrackReport:
    best = report.best_ood_score
    if seen.ood_score is not None and seen.identity.decision in _TRUSTED:
        best = seen.ood_score if best is None else max(best, seen.ood_score)
    similarity = seen.identity.similarity
    if (
        report.identity.subject_id == seen.identity.subject_id
        and report.best_similarity is not None
    ):
        similarity = max(similarity or report.best_similarity, report.best_similarity)
    return replace(
        report,
        last_ns=seen.at_ns,
        last_capture_ns=_captured(seen),
        box=seen.box,
        identity=seen.identity,
        liveness=seen.liveness,
        ood_score=seen.ood_score,
        best_ood_score=best,
        looks=report.looks + seen.looked,
        best_similarity=similarity,
    )
