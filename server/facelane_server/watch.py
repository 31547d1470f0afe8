"""Lanes as metrics and events: what operators count, and what security software is told."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from facelane_server.domain import Decision, Outcome, Sighting
from facelane_server.events import EventFeed, EventKind
from facelane_server.lanes import Lane
from facelane_server.observability.metrics import Metrics

log = structlog.get_logger(__name__)


class LaneWatch:
    """A ``LaneObserver``."""

    def __init__(
        self, metrics: Metrics, events: EventFeed, is_empty: Callable[[str], bool]
    ) -> None:
        """``is_empty``: whether nobody is in a gallery."""
        self._metrics = metrics
        self._events = events
        self._is_empty = is_empty

    def opened(self, lane: Lane) -> None:
        plan = lane.options.plan
        if plan.recognize and self._is_empty(plan.gallery_id):
            # Right before the first enrolment; else a name that was mistyped, and nobody
            # would ever be recognised without a word about it.
            log.warning("a stream searches an empty gallery", gallery=plan.gallery_id)
        self._metrics.streams_opened.inc()
        self._events.publish(
            EventKind.STREAM_OPENED,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
        )

    def closed(self, lane: Lane) -> None:
        self._events.publish(
            EventKind.STREAM_CLOSED,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
        )

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        del lane  # metrics are not kept a stream: their number would grow without a bound
        self._metrics.outcome(outcome)

    def track_decided(self, lane: Lane, sighting: Sighting) -> None:
        self._publish(EventKind.SUBJECT_SEEN, lane, sighting)

    def track_suspected(self, lane: Lane, sighting: Sighting) -> None:
        self._publish(EventKind.SPOOF_SUSPECTED, lane, sighting)

    def track_ended(self, lane: Lane, sighting: Sighting) -> None:
        self._metrics.tracks_ended.inc()
        if sighting.identity.decision in (Decision.UNKNOWN, Decision.AMBIGUOUS):
            self._publish(EventKind.UNKNOWN_SEEN, lane, sighting)

    def _publish(self, kind: EventKind, lane: Lane, sighting: Sighting) -> None:
        self._events.publish(
            kind,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
            gallery_id=lane.options.plan.gallery_id,
            sighting=sighting,
        )
