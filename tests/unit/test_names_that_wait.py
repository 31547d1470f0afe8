"""What was said of somebody is said of nobody who came later, however long it was on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes.scripted_pool import LOST, ScriptedPools, embedding, faces
from tests.unit.test_event_journal import Server, read, track
from tests.unit.test_pipeline import started, turns

from facelane_server import config
from facelane_server.domain import (
    Box,
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
    Sighting,
    Stage,
)
from facelane_server.events import EventFeed, EventKind
from facelane_server.lanes import LaneOptions
from facelane_server.observability.metrics import Metrics
from facelane_server.pipeline import Plan
from facelane_server.store import events as stored
from facelane_server.store.events import EventRecord
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store
from facelane_server.store.pictures import Photo, Pictures, new_id
from facelane_server.store.vault import open_vault
from facelane_server.watch import LaneWatch

SEEN = EventKind.SUBJECT_SEEN


@pytest.fixture
def store(place: Path | str, tmp_path: Path) -> Iterator[Store]:
    database = open_store(place)
    vault = open_vault(database, Source("", tmp_path), mode="on")
    with contextlib.closing(Store(database, vault=vault)) as opened:
        yield opened


def enrolled_anew(store: Store) -> int:
    """Another person has the id; the revision by which the one of before was known."""
    store.create_subject("staff", "ada", "", {})
    known = store.revision()
    store.delete_subject("staff", "ada")
    store.create_subject("staff", "ada", "", {})
    return known


def test_an_event_that_waited_names_nobody_who_was_enrolled_since(store: Store) -> None:
    known = enrolled_anew(store)
    store.create_subject("staff", "bo", "", {})
    for as_of in (known, store.revision()):
        record = EventRecord(0, "SUBJECT_SEEN", as_of, gallery_id="staff", as_of=as_of,
                             track=track("ada", "ada", "bo"))  # fmt: skip
        stored.append(store.database, store.vault, [record], again=False)
    late, now = stored.after(store.database, store.vault, 0)
    assert late.track is not None
    assert now.track is not None
    assert late.track.identity == Identity(Decision.NOT_EVALUATED)
    assert now.track.identity.subject_id == "ada"


def test_a_picture_that_waited_is_not_kept_with_whoever_was_enrolled_since(store: Store) -> None:
    known = enrolled_anew(store)
    pictures = Pictures(store.database, store.vault)

    def add(as_of: int) -> bool:
        of = {"gallery_id": "staff", "subject_id": "ada", "as_of": as_of}
        return pictures.add(new_id(), Photo(b"around"), 1, **of)  # type: ignore[arg-type]

    assert not add(known)
    assert add(store.revision())


async def test_what_is_published_is_written_as_it_was_meant(place: Path | str) -> None:
    server = Server(place)
    with contextlib.closing(Store(server.database)) as opened:
        server.feed.publish(SEEN, gallery_id="staff", track=track("ada"),
                            as_of=enrolled_anew(opened))  # fmt: skip
        async with server:
            [event] = await read(server.feed, server.feed.token_after(0), 1)
    assert event.track is not None
    assert event.track.identity.decision is Decision.NOT_EVALUATED


def test_a_track_ends_with_the_name_of_whom_it_showed() -> None:
    """A stream that stands still tells of its tracks when it ends: by then the name may be
    another's."""
    feed = EventFeed()
    told: list[tuple[EventKind, int]] = []
    publish = feed.publish

    def noting(kind: EventKind, **said: Any) -> object:
        told.append((kind, said.get("as_of", 0)))
        return publish(kind, **said)

    feed.publish = noting  # type: ignore[method-assign,assignment]
    gallery = SimpleNamespace(knows=lambda *_: True, is_empty=lambda _: False)
    watch = LaneWatch(Metrics(), feed, gallery, settings=config.Events())  # type: ignore[arg-type]
    lane: Any = SimpleNamespace(
        lane_id=1, stream_id="s", options=LaneOptions(), sender=SimpleNamespace(key="")
    )
    watch.opened(lane)
    live = Liveness(LivenessVerdict.LIVE, 0.9)
    seen = Sighting(7, Box(0, 0, 9, 9), 1, None, Identity(Decision.MATCH, "ada", 0.9), live,
                    as_of=41)  # fmt: skip
    watch.sighted(lane, seen)
    watch.track_ended(lane, 7)
    assert told == [
        (EventKind.STREAM_OPENED, 0),
        (EventKind.TRACK_STARTED, 41),
        (SEEN, 41),
        (EventKind.TRACK_ENDED, 41),
    ]


async def test_a_picture_names_nobody_who_was_deleted_while_its_other_faces_were_awaited() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan(gallery_id="g", max_candidates=2))
    pools.detector.answer(faces(2))
    await turns()
    pools.recognizer.answer(embedding("ada"))
    await turns()
    pools.pipeline.losses.note(("g", "ada"))  # her deletion has returned
    pools.recognizer.answer(embedding("bo"))
    for _ in range(2):
        pools.by_stage[Stage.LIVENESS].answer(LOST)
    reading = await task
    assert [face.identity.subject_id for face in reading.result.faces] == ["", "bo"]
