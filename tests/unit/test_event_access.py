"""What a key learns of events that are not for it: nothing, whatever it asks."""

from __future__ import annotations

import asyncio
import itertools
from contextvars import copy_context
from dataclasses import replace
from typing import Any, cast

import pytest

from facelane.v1 import event_service_pb2 as pb
from facelane_server import limits
from facelane_server.domain import (
    Box,
    Decision,
    FacelaneError,
    Identity,
    Liveness,
    LivenessVerdict,
    Reason,
    TrackReport,
)
from facelane_server.edge import gate
from facelane_server.edge.operations import EventService, kinds_of
from facelane_server.edge.roles import Caller, Grant
from facelane_server.events import Event, EventFeed, EventKind
from facelane_server.events.feed import PROGRESS_EVENTS, PROGRESS_S, Progress
from facelane_server.store.events import without

SEEN, CANDIDATE = EventKind.SUBJECT_SEEN, EventKind.SUBJECT_CANDIDATE
CAMERA = Caller("door", (Grant(frozenset({"analyze", "events"}), own_events=True),))
AT_THE_DOOR = Caller("guard", (Grant(frozenset({"events", "view"}), sources=(("door",),)),))
WATCHMAN = Caller("watch", (Grant(frozenset({"events"})),))
CONFIRMS = Caller("desk", (Grant(frozenset({"events", "confirm"})),))


def report(picture: str = "") -> TrackReport:
    identity = Identity(Decision.MATCH, "grace", 0.9)
    return TrackReport(
        1, 0, 1, None, 5, Box(0, 0, 1, 1), identity, Liveness(LivenessVerdict.LIVE, 0.9),
        picture=picture,
    )  # fmt: skip


class Gone:
    """Services that a test does not come to."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


def service(feed: EventFeed) -> EventService:
    gone = cast("Any", Gone())
    return EventService(feed, gone, gone, gone, {})


def feed_of(*events: tuple[EventKind, str, str], history: int = 10_000) -> EventFeed:
    """Of kinds, sources and senders, oldest first."""
    feed = EventFeed(history=history, clock_ns=itertools.count(1).__next__)
    for kind, source, sender in events:
        feed.publish(kind, source_id=source, gallery_id="default", sender=sender, track=report())
    return feed


async def pages(feed: EventFeed, caller: Caller, **asked: Any) -> list[pb.ListEventsResponse]:
    """All of them, as this caller gets them."""

    async def read() -> list[pb.ListEventsResponse]:
        gate._caller.set(caller)
        found = [await service(feed).ListEvents(pb.ListEventsRequest(**asked), Any)]  # type: ignore[arg-type]
        while found[-1].next_before_sequence:
            asked["before_sequence"] = found[-1].next_before_sequence
            found.append(await service(feed).ListEvents(pb.ListEventsRequest(**asked), Any))  # type: ignore[arg-type]
        return found

    return await asyncio.create_task(read(), context=copy_context())


@pytest.mark.parametrize("caller", [CAMERA, AT_THE_DOOR], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "asked",
    [
        {"source_ids": ["vault"]},
        {"source_ids": ["vault"], "kinds": [pb.EVENT_KIND_SUBJECT_SEEN], "page_size": 1},
        {"gallery_ids": ["default"], "page_size": 1},
        {"page_size": 1},
    ],
    ids=str,
)
async def test_a_filter_does_not_tell_what_happened_elsewhere(
    caller: Caller, asked: dict[str, Any]
) -> None:
    """Page after page is the same whether somebody was at the vault or at the kiosk."""
    own = (SEEN, "door", "door")
    for other in (SEEN, CANDIDATE):
        there = feed_of(own, (other, "vault", "vault"), own, (other, "vault", "vault"))
        elsewhere = feed_of(own, (other, "kiosk", "kiosk"), own, (other, "kiosk", "kiosk"))
        told = [
            [(p.next_before_sequence, [e.sequence for e in p.events]) for p in found]
            for found in (
                await pages(there, caller, **asked),
                await pages(elsewhere, caller, **asked),
            )
        ]
        assert told[0] == told[1]


async def test_a_candidate_is_not_even_counted_for_those_who_do_not_confirm() -> None:
    feed = feed_of(*[(CANDIDATE, "door", "door")] * 3, (SEEN, "door", "door"))
    asked = {"kinds": [pb.EVENT_KIND_SUBJECT_CANDIDATE], "page_size": 1}
    [page] = await pages(feed, WATCHMAN, **asked)
    assert not page.events
    assert [len(p.events) for p in await pages(feed, CONFIRMS, **asked)] == [1, 1, 1, 0]


async def test_what_is_heard_is_found_however_much_lies_between() -> None:
    own, other = (SEEN, "door", "door"), (SEEN, "vault", "vault")
    far = limits.MAX_EVENT_BATCH * 3
    feed = feed_of(own, *itertools.repeat(other, far), own, own)
    found = await pages(feed, CAMERA, page_size=2)
    assert [e.sequence for p in found for e in p.events] == [far + 3, far + 2, 1]


async def watched(
    feed: EventFeed, caller: Caller, after: int, **asked: Any
) -> list[tuple[int, str]]:
    """What a watcher is sent up to the feed's end: numbers of events (0 = none) and tokens."""
    sent: list[tuple[int, str]] = []

    class Peer:
        async def write(self, response: pb.WatchEventsResponse) -> None:
            feed.close()  # it is told all the same what is there
            sent.append((response.event.sequence, response.resume_token))

    async def call() -> None:
        gate._caller.set(caller)
        request = pb.WatchEventsRequest(resume_token=feed.token_after(after), **asked)
        await service(feed).WatchEvents(request, cast("Any", Peer()))

    with pytest.raises(FacelaneError) as ended:
        await asyncio.create_task(call(), context=copy_context())
    assert ended.value.reason is Reason.DRAINING
    return sent


async def test_who_hears_little_is_told_how_far_it_has_come() -> None:
    own, other = (SEEN, "door", "door"), (SEEN, "vault", "vault")
    far = limits.MAX_EVENT_BATCH * 4
    feed = feed_of(own, *itertools.repeat(other, far))
    for asked in ({}, {"kinds": [pb.EVENT_KIND_SPOOF_SUSPECTED]}, {"source_ids": ["vault"]}):
        told = await watched(feed, AT_THE_DOOR, 0, **asked)
        heard = [number for number, _ in told if number]
        assert heard == ([1] if not asked else [])
        newest = told[-1][1]
        feed._closed = False
        assert feed.watch(newest).seen >= far - limits.MAX_EVENT_BATCH, "nothing before it is read"


@pytest.mark.parametrize("asked", [{"source_ids": ["vault"]}, {}], ids=str)
async def test_how_far_a_watcher_has_come_does_not_tell_what_happened_elsewhere(
    asked: dict[str, Any],
) -> None:
    own, far = (SEEN, "door", "door"), limits.MAX_EVENT_BATCH * 2
    told = []
    for source in ("vault", "kiosk"):
        feed = feed_of(own, *itertools.repeat((SEEN, source, source), far), own)
        feed._epoch = b"the same"
        told.append(await watched(feed, AT_THE_DOOR, 0, **asked))
    assert told[0] == told[1]


def test_progress_is_told_after_so_many_events_or_so_long() -> None:
    now = [0.0]
    progress = Progress(10, clock=lambda: now[0])
    assert not progress.is_due(10 + PROGRESS_EVENTS - 1)
    assert progress.is_due(10 + PROGRESS_EVENTS)
    assert not progress.is_due(11 + PROGRESS_EVENTS)
    now[0] += PROGRESS_S
    assert progress.is_due(12 + PROGRESS_EVENTS)
    now[0] += PROGRESS_S - 1
    progress.told(13 + PROGRESS_EVENTS)
    now[0] += 1
    assert not progress.is_due(14 + PROGRESS_EVENTS)


@pytest.mark.parametrize("named", ["a\0b", "x" * 300, "front door", "ünï"])
@pytest.mark.parametrize("field", ["source_ids", "gallery_ids"])
async def test_names_that_nothing_can_have_are_not_looked_for(field: str, named: str) -> None:
    for asked in (pb.ListEventsRequest, pb.WatchEventsRequest):
        with pytest.raises(FacelaneError) as refused:
            kinds_of(asked(**{field: ["", "door", named]}))  # type: ignore[arg-type]
        assert refused.value.reason is Reason.ARGUMENT_INVALID
        assert refused.value.metadata == {"field": field}
        assert named not in refused.value.message


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
async def test_numbers_that_no_store_can_count(number: int) -> None:
    feed = feed_of((SEEN, "door", "door"))

    class Keeper:
        """As SQLite: what has no 64 bits with a sign is an error."""

        async def before(self, sequence: int, count: int, **_: Any) -> list[Any]:
            assert sequence < 1 << 63
            return []

        async def find(self, sequence: int) -> None:
            assert sequence < 1 << 63

    feed._keeper = cast("Any", Keeper())
    assert await feed.before(number, 1) == []
    assert await feed.find(number) is None
    with pytest.raises(FacelaneError) as refused:
        feed.watch(feed.token_after(number))
    assert refused.value.reason is Reason.RESUME_TOKEN_INVALID


async def test_what_was_read_before_a_deletion_is_read_again() -> None:
    """It is on its way from the store to a watcher, or to who asks, while somebody is deleted."""
    feed = feed_of((SEEN, "door", "door"))
    told = feed.held(1)
    assert told is not None
    assert told.track is not None
    nobody = replace(told, track=without(told.track, "grace"))

    class Keeper:
        reads = 0

        async def older(self, sequence: int) -> list[Event]:
            assert sequence == 0
            return [await self.find(1)]

        async def before(self, *_asked: Any, **_filters: Any) -> list[Event]:
            return [await self.find(1)]

        async def find(self, sequence: int) -> Event:
            assert sequence == 1
            self.reads += 1
            if self.reads % 2:
                feed.forget_subject("default", "grace")
                return told  # type: ignore[return-value]
            return nobody

    feed._keeper = cast("Any", Keeper())
    feed.forget_subject("default", "somebody")
    assert await feed.find(1) == nobody
    assert await feed.before(0, 1) == [nobody]
    with feed.watch(feed.token_after(0)) as watcher:
        assert await watcher.batch() == [nobody]


async def test_who_is_gone_by_the_time_that_an_event_is_told_is_named_by_nobody() -> None:
    class Gallery:
        def __init__(self, reason: Reason) -> None:
            self.reason = reason

        async def get_subject(self, gallery_id: str, subject_id: str) -> None:
            raise FacelaneError(self.reason, f"{gallery_id}/{subject_id}")

    gone = cast("Any", Gone())
    feed = feed_of((SEEN, "door", "door"), (CANDIDATE, "door", "door"))
    reads = Caller("desk", (Grant(frozenset({"events", "confirm", "gallery.read"})),))
    for reason, named in ((Reason.GALLERY_UNAVAILABLE, "grace"), (Reason.SUBJECT_NOT_FOUND, "")):
        shown = EventService(feed, cast("Any", Gallery(reason)), gone, gone, {})
        for sequence in (1, 2):
            event = feed.held(sequence)
            assert event is not None
            message = (await shown._told(event, reads)).event
            assert (message.identity.subject_id or message.candidate_subject_id) == named
            assert message.sequence == sequence


@pytest.mark.parametrize(
    ("source", "gallery", "allowed"),
    [
        ("door", "default", True),
        ("", "default", False),
        ("vault", "default", False),
        ("door", "", True),
    ],
)
def test_what_belongs_to_no_source_is_not_for_those_of_one(
    source: str, gallery: str, *, allowed: bool
) -> None:
    if allowed:
        AT_THE_DOOR.require("view", gallery=gallery, source=source)
        return
    with pytest.raises(FacelaneError) as refused:
        AT_THE_DOOR.require("view", gallery=gallery, source=source)
    assert refused.value.reason is Reason.PERMISSION_DENIED
    assert source not in str(refused.value.metadata) or not source


async def test_a_picture_of_a_stream_without_a_source_is_not_shown_to_a_key_of_one() -> None:
    feed = EventFeed()
    feed.publish(SEEN, source_id="", gallery_id="default", track=report("a-picture"))

    async def ask() -> None:
        gate._caller.set(AT_THE_DOOR)
        await service(feed).GetEventPicture(pb.GetEventPictureRequest(sequence=1), Any)  # type: ignore[arg-type]

    with pytest.raises(FacelaneError) as refused:
        await ask()
    assert refused.value.reason is Reason.PERMISSION_DENIED
