"""Lanes as metrics and events: what operators count, and what security software is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

import structlog
from msgspec.structs import replace

from facelane_server import config, limits
from facelane_server.areas import Area, nearly
from facelane_server.domain import Outcome, RuleReport, Sighting, TrackReport
from facelane_server.events import EventFeed, EventKind, EventPictures
from facelane_server.gallery.gallery import Gallery
from facelane_server.lanes import Lane
from facelane_server.observability.metrics import Metrics
from facelane_server.pipeline import Origin, Pipeline
from facelane_server.presence import Presence, Telling
from facelane_server.store.events import renamed
from facelane_server.store.pictures import Pictures
from facelane_server.viewing import Sights
from facelane_server.zoning import Zoning

log = structlog.get_logger(__name__)


class LaneWatch:
    """A ``LaneObserver``."""

    def __init__(
        self,
        metrics: Metrics,
        events: EventFeed,
        gallery: Gallery,
        *,
        settings: config.Events,
        seen: Callable[[str, str], None] = lambda _gallery_id, _subject_id: None,
        sights: Sights | None = None,
        placed: Iterable[Area] = (),
        pictures: EventPictures | None = None,
        confirmed: Collection[str] = (),
    ) -> None:
        """``seen``: told of whoever is named, gallery and subject. ``placed``: the zones and lines
        of the configuration, with their sources. ``confirmed``: galleries in which people have to
        say so before anybody was seen."""
        self._metrics = metrics
        self._events = events
        self._gallery = gallery
        self._seen = seen
        self._confirmed = frozenset(confirmed)
        self._unknown_after_ns = int(settings.unknown_after_s * 1e9)
        self._hidden_after_ns = int(settings.hidden_after_s * 1e9)
        self._present: dict[int, Presence] = {}
        self._sights = sights or Sights()
        self._sources = tuple({source for area in placed for source in area.sources})
        self._zoning: dict[int, Zoning] = {}
        """Of lanes that have zones or lines."""
        self._pictures = pictures

    def opened(self, lane: Lane) -> None:
        plan = lane.options.plan
        if plan.recognize and self._gallery.is_empty(plan.gallery_id):
            # Right before the first enrolment; else a name that was mistyped, and nobody
            # would ever be recognised without a word about it.
            log.warning("a stream searches an empty gallery", gallery=plan.gallery_id)
        self._metrics.streams_opened.inc()
        self._sights.opened(lane.lane_id)
        self._present[lane.lane_id] = Presence(
            unknown_after_ns=self._unknown_after_ns, hidden_after_ns=self._hidden_after_ns
        )
        if lane.options.zones or lane.options.lines:
            self._zoning[lane.lane_id] = Zoning(lane.options.zones, lane.options.lines)
        elif meant := nearly(lane.options.source_id, self._sources):
            log.warning(
                "a stream's source has no zones or lines, one with nearly its name has",
                source=lane.options.source_id,
                configured=meant,
            )
        self._events.publish(
            EventKind.STREAM_OPENED,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
            sender=lane.sender.key,
        )

    def closed(self, lane: Lane) -> None:
        self._present.pop(lane.lane_id, None)
        self._zoning.pop(lane.lane_id, None)
        self._sights.closed(lane.lane_id)
        if self._pictures is not None:
            self._pictures.forget(lane.lane_id)
        self._events.publish(
            EventKind.STREAM_CLOSED,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
            sender=lane.sender.key,
        )

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        # Metrics are not kept a stream: their number would grow without a bound.
        self._metrics.outcome(outcome, lane.options.overload)
        sight = self._sights.of(lane.lane_id)
        if sight is not None:
            sight.outcome(outcome)

    def sighted(self, lane: Lane, sighting: Sighting) -> None:
        present = self._present.get(lane.lane_id)
        if present is None:
            return
        if sighting.portrait is not None and self._pictures is not None:
            self._pictures.note(lane.lane_id, sighting.track_id, sighting.portrait)
        self._publish(lane, present.sighted(sighting), sighting.as_of)
        if (zoning := self._zoning.get(lane.lane_id)) is not None:
            track = present.report(sighting.track_id)
            for kind, report in zoning.sighted(sighting):
                self._tell(lane, kind, track, report, as_of=sighting.as_of)

    def track_ended(self, lane: Lane, track_id: int) -> None:
        self._metrics.tracks_ended.inc()
        present = self._present.get(lane.lane_id)
        if present is not None and (report := present.report(track_id)) is not None:
            gallery_id, named = lane.options.plan.gallery_id, report.identity.subjects
            gone = not all(self._gallery.knows(gallery_id, subject) for subject in named)
            as_of = present.as_of(track_id)
            ends = present.ended(track_id, forget=gone)
            if (zoning := self._zoning.get(lane.lane_id)) is not None:
                for kind, rule in zoning.ended(track_id):
                    self._tell(lane, kind, ends[0][1], rule, as_of=as_of)
            self._publish(lane, ends, as_of)
        if self._pictures is not None:
            self._pictures.forget(lane.lane_id, track_id)

    def tracks(self, lane_id: int) -> int:
        """Tracks of a lane that have begun and not ended."""
        present = self._present.get(lane_id)
        return 0 if present is None else len(present)

    def _publish(self, lane: Lane, tellings: Iterable[Telling], as_of: int) -> None:
        for kind, report in tellings:
            if kind is EventKind.SUBJECT_SEEN:
                self._seen(lane.options.plan.gallery_id, report.identity.subject_id)
            if self._pictures is not None:
                picture = self._pictures.take(
                    lane.lane_id,
                    kind,
                    report,
                    gallery_id=lane.options.plan.gallery_id,
                    keeping=lane.options.pictures,
                    as_of=as_of,
                )
                report = replace(report, picture=picture)
            self._tell(lane, kind, report, as_of=as_of)

    def _tell(
        self,
        lane: Lane,
        kind: EventKind,
        track: TrackReport | None,
        rule: RuleReport | None = None,
        *,
        as_of: int,
    ) -> None:
        gallery_id = lane.options.plan.gallery_id
        if track is not None and gallery_id in self._confirmed:
            kind, track = as_candidate(kind, track)
        self._events.publish(
            kind,
            source_id=lane.options.source_id,
            stream_id=lane.stream_id,
            sender=lane.sender.key,
            gallery_id=gallery_id,
            track=track,
            rule=rule,
            as_of=as_of,
        )


def keep_pictures(settings: config.Config, gallery: Gallery, pipeline: Pipeline) -> EventPictures:
    """What keeps pictures of events. Raises ``ConfigError`` where they are to be kept in a store
    that lies open."""
    kept = settings.events
    store = Pictures(gallery.database, gallery.vault)
    if settings.keeps_pictures and not store.are_kept:
        raise config.ConfigError(
            "events are to keep pictures, and the store is not encrypted: set store.encryption = "
            "'on', or events.pictures (and that of galleries and sources) to 'none'"
        )

    async def encode(pictures: tuple[bytes, ...]) -> tuple[bytes, ...]:
        deadline_ns = time.monotonic_ns() + int(limits.PICTURE_S * 1e9)
        return await pipeline.encode(pictures, Origin(0, 1, deadline_ns))

    return EventPictures(store, encode, keep=kept.pictures_keep, keep_days=kept.pictures_keep_days)


def as_candidate(kind: EventKind, report: TrackReport) -> Telling:
    """What is told in a gallery where people have to confirm: who it might be to those who do,
    and nobody's name to all others."""
    if kind is EventKind.SUBJECT_SEEN:
        return EventKind.SUBJECT_CANDIDATE, report
    return kind, renamed(report, {})
