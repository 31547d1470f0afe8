"""Events in the store, on each engine: once told, found again, in order, naming nobody deleted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import sqlalchemy as sa
from tests.postgres import Postgres
from tests.waiting import auntil

from facelane_server import limits
from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    FacelaneError,
    Identity,
    Liveness,
    LivenessVerdict,
    Reason,
    TrackReport,
)
from facelane_server.events import Event, EventFeed, EventJournal, EventKind
from facelane_server.events import journal as journal_module
from facelane_server.gallery_rules import Expiry
from facelane_server.store import events as stored
from facelane_server.store import schema
from facelane_server.store.database import unavailable
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.records import NewTemplate
from facelane_server.store.vault import open_vault
from facelane_server.store.watching import StoreWatch

SEEN = EventKind.SUBJECT_SEEN


def track(name: str, *near: str) -> TrackReport:
    candidates = tuple(Candidate(subject, 0.5) for subject in near)
    identity = Identity(Decision.MATCH, name, 0.9, candidates)
    return TrackReport(
        1, 0, 1, None, 5, Box(0, 0, 1, 1), identity, Liveness(LivenessVerdict.LIVE, 0.9)
    )


class Server:
    """A life of a server, as far as events go."""

    def __init__(self, place: Path | str, keep: int = 1_000_000, keep_days: float = 30.0) -> None:
        self.database = open_store(place)
        vault = open_vault(self.database)
        self.feed = EventFeed(recorded=True)
        self.watch = StoreWatch(self.database)
        self.journal = EventJournal(self.database, vault, self.feed, keep=keep, keep_days=keep_days)

    async def __aenter__(self) -> Self:
        await self.journal.start(self.watch)
        self.watch.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.journal.close()
        await asyncio.to_thread(self.watch.close)
        self.database.close()

    def die(self) -> None:
        """kill -9: what it has not written is gone, and nothing is said."""
        assert self.journal._task is not None
        self.journal._task.cancel()
        self.journal._waiting.clear()


async def read(feed: EventFeed, token: str, count: int) -> list[Event]:
    found: list[Event] = []
    with feed.watch(token) as watcher:
        async with asyncio.timeout(60):
            while len(found) < count:
                found += await watcher.batch()
    return found


@pytest.fixture
async def server(place: Path | str) -> AsyncIterator[Server]:
    async with Server(place) as made:
        yield made


async def test_an_event_is_told_as_it_happened(server: Server) -> None:
    start = server.feed.token_after(0)
    early = track("ada", "ada", "bo")
    with contextlib.closing(Store(server.database)) as store:
        for name in ("ada", "bo"):
            store.create_subject("staff", name, "", {})
        server.feed.publish(SEEN, source_id="door", stream_id="s", gallery_id="staff", track=early)
        server.feed.publish(EventKind.POOL_CHANGED, pool="detector", message="SERVING")
        first, second = await read(server.feed, start, 2)
    assert (first.sequence, first.kind, first.source_id, first.track) == (1, SEEN, "door", early)
    assert (second.pool, second.message, second.track) == ("detector", "SERVING", None)


async def test_what_happened_before_the_store_was_open_is_told(place: Path | str) -> None:
    made = Server(place)
    made.feed.publish(EventKind.POOL_CHANGED, pool="detector")
    async with made:
        [event] = await read(made.feed, made.feed.token_after(0), 1)
        assert event.pool == "detector"


async def test_a_token_goes_on_at_another_server_and_in_another_life(place: Path | str) -> None:
    async with Server(place) as first, Server(place) as second:
        for n in range(10):
            (first if n % 2 else second).feed.publish(SEEN, stream_id=f"s{n % 2}", message=str(n))
        told = await read(first.feed, first.feed.token_after(0), 10)
        token = first.feed.token(told[3])
        here = await read(second.feed, token, 6)
        assert here == told[4:]
    async with Server(place) as third:
        assert third.feed.newest == 10
        assert await read(third.feed, token, 6) == told[4:]
        for stream in ("s0", "s1"):
            numbers = [int(e.message) for e in told if e.stream_id == stream]
            assert numbers == sorted(numbers), "order of a stream"


async def test_a_clock_that_is_set_takes_no_history_along_and_stamps_no_events(
    place: Path | str,
) -> None:
    day, now = 86_400 * 10**9, [time.time_ns()]
    server = Server(place)
    server.feed._clock_ns = lambda: now[0]
    server.journal._expiry = Expiry(30 * day, wall_ns=lambda: now[0])
    async with server:
        for step in (0, 400 * day, -800 * day, 400 * day + 10):
            now[0] += step
            server.feed.publish(SEEN, message=str(now[0]))
            server.feed.publish(SEEN, message=str(now[0] + 1))
            await server.journal.flush()
            await server.journal._prune()
        told = await read(server.feed, server.feed.token_after(0), 8)
        assert [event.time_ns for event in told] == [int(event.message) for event in told]


async def test_a_token_of_a_history_that_a_backup_has_ended_is_no_place_to_go_on(
    tmp_path: Path,
) -> None:
    """The restored store goes on, and its numbers are given again: what happened behind the token
    would be missing without a word."""
    path, backup = tmp_path / "gallery.db", tmp_path / "backup.db"
    async with Server(path) as server:
        server.feed.publish(SEEN, message="before")
        [before] = await read(server.feed, server.feed.token_after(0), 1)
        with sqlite3.connect(path) as raw:
            raw.execute(f"VACUUM INTO '{backup}'")
        for _ in range(3):
            server.feed.publish(SEEN, message="lost")
        lost = (await read(server.feed, server.feed.token(before), 3))[-1]
        with server.feed.watch(server.feed.token_after(0)) as watcher:
            await watcher.batch()
            far = watcher.resume_token
    for left in tmp_path.glob("gallery.db*"):
        left.unlink()
    backup.rename(path)
    async with Server(path) as server:
        for _ in range(9):
            server.feed.publish(SEEN, message="after")
        whole = await read(server.feed, server.feed.token(before), 9)
        assert [event.message for event in whole] == ["after"] * 9
        for token in (server.feed.token(lost), far):
            with pytest.raises(FacelaneError) as told:
                await read(server.feed, token, 1)
            assert told.value.reason is Reason.HISTORY_LOST
        assert len(await read(server.feed, server.feed.token_after(4), 6)) == 6, "as before"


async def test_history_ends_by_number_and_by_age(place: Path | str) -> None:
    async with Server(place) as server:
        for n in range(30):
            server.feed.publish(SEEN, message=str(n))
        await read(server.feed, server.feed.token_after(0), 30)
        start = server.feed.token_after(0)
        assert stored.prune(server.database, keep=12, before_ns=0) == 18
        assert stored.prune(server.database, keep=12, before_ns=0) == 0
        await server.journal._prune()
        with pytest.raises(FacelaneError) as lost:
            server.feed.watch(start)
        assert lost.value.reason is Reason.HISTORY_LOST
        exactly = server.feed.token_after(18)
        assert len(await read(server.feed, exactly, 12)) == 12
        assert stored.prune(server.database, keep=12, before_ns=1 << 62) == 12
    async with Server(place) as later:
        assert later.feed.newest == 30
        later.feed.publish(SEEN)
        [event] = await read(later.feed, later.feed.token_after(30), 1)
        assert event.sequence == 31, "no number is used twice"
        with pytest.raises(FacelaneError) as lost:
            later.feed.watch(exactly)
        assert lost.value.reason is Reason.HISTORY_LOST


async def test_a_token_of_another_store_is_lost_history(tmp_path: Path) -> None:
    async with Server(tmp_path / "a.db") as one, Server(tmp_path / "b.db") as other:
        token = one.feed.token_after(0)
        with pytest.raises(FacelaneError) as lost:
            other.feed.watch(token)
        assert lost.value.reason is Reason.HISTORY_LOST
        # Ahead of the store, as after a backup was restored.
        with one.feed.watch(one.feed.token_after(99)) as ahead, pytest.raises(FacelaneError) as gap:
            await ahead.batch()
        assert gap.value.reason is Reason.HISTORY_LOST


async def test_a_slow_watcher_reads_from_the_store(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_EVENT_BATCH", 16)
    made = Server(place)
    made.feed = EventFeed(history=8, recorded=True)
    made.journal._feed = made.feed
    async with made:
        with made.feed.watch() as slow:
            for n in range(100):
                made.feed.publish(SEEN, message=str(n))
            await auntil(lambda: made.feed.newest == 100)
            seen: list[int] = []
            while len(seen) < 100:
                seen += [event.sequence for event in await slow.batch()]
        assert seen == list(range(1, 101))


async def test_the_deleted_are_named_by_no_event(place: Path | str) -> None:
    async with Server(place) as server, Server(place) as other:
        store = Store(server.database)
        new = NewTemplate("m", np.ones(8, np.float32), 0.9)
        for gallery, name in (("staff", "ada"), ("staff", "bo"), ("board", "ada")):
            store.enroll(gallery, name, new, create_subject=True)
        start = server.feed.token_after(0)
        for gallery, report in (
            ("staff", track("ada", "ada", "bo")),
            ("staff", track("bo", "bo", "ada")),
            ("board", track("ada", "ada")),
        ):
            server.feed.publish(SEEN, gallery_id=gallery, track=report)
        await auntil(lambda: other.feed.newest == 3)
        store.delete_subject("staff", "ada")
        for feed in (server.feed, other.feed):  # as ``Gallery.on_forgotten`` has it
            feed.forget_subject("staff", "ada")
        # Written after the deletion: it happened before, and waited.
        server.feed.publish(SEEN, gallery_id="staff", track=track("ada", "ada", "bo"))
        for feed in (server.feed, other.feed):
            told = await read(feed, start, 4)
            first, second, third, late = (e.track.identity for e in told if e.track)
            assert first == late == Identity(Decision.NOT_EVALUATED)
            assert (second.subject_id, [c.subject_id for c in second.candidates]) == ("bo", ["bo"])
            assert third.subject_id == "ada", "another gallery's"
        with server.database.reading() as connection:
            bodies = connection.execute(sa.select(schema.events.c.body)).scalars().all()
            assert not any(b"ada" in body for body in bodies), "numbers alone"


async def test_deleted_while_a_watcher_is_being_told(server: Server) -> None:
    store = Store(server.database)
    for name in ("ada", "bo"):
        store.create_subject("staff", name, "", {})
    start = server.feed.token_after(0)
    for n in range(6):
        server.feed.publish(SEEN, gallery_id="staff", track=track("bo" if n % 2 else "ada"))
    await auntil(lambda: server.feed.newest == 6)
    names = []
    with server.feed.watch(start) as watcher:
        async for event in watcher:
            assert event.track is not None
            names.append((event.sequence, event.track.identity.subject_id))
            if len(names) == 2:
                store.delete_subject("staff", "ada")
                server.feed.forget_subject("staff", "ada")
            if len(names) == 6:
                break
    assert names == [(1, "ada"), (2, "bo"), (3, ""), (4, "bo"), (5, ""), (6, "bo")]


async def test_watchers_are_told_what_they_want(server: Server) -> None:
    start = server.feed.token_after(0)
    for n in range(8):
        server.feed.publish(SEEN, source_id=f"cam{n % 2}", gallery_id=f"g{n // 4}", message=str(n))
    server.feed.publish(EventKind.POOL_CHANGED, pool="detector")
    await auntil(lambda: server.feed.newest == 9)
    for wanted, expected in (
        ({"source_ids": ["cam1"]}, [2, 4, 6, 8]),
        ({"gallery_ids": ["g1"]}, [5, 6, 7, 8]),
        ({"source_ids": ["cam0"], "gallery_ids": ["g0", "g1"]}, [1, 3, 5, 7]),
        ({"kinds": [EventKind.POOL_CHANGED]}, [9]),
    ):
        with server.feed.watch(start, **wanted) as watcher:  # type: ignore[arg-type]
            assert [event.sequence for event in await watcher.batch()] == expected


async def test_events_wait_for_a_store_that_is_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    monkeypatch.setattr(limits, "MAX_EVENTS_WAITING", 20)
    away = True

    def append(*call: Any, again: bool) -> None:
        if away:
            raise unavailable("away", cause="08006", trouble="UNREACHABLE", retryable=True)
        real(*call, again=again)

    real = stored.append
    monkeypatch.setattr(stored, "append", append)
    for n in range(25):
        server.feed.publish(SEEN, message=str(n))
    await auntil(lambda: server.journal.trouble == "UNREACHABLE")
    assert (server.feed.newest, server.journal.waiting, server.journal.dropped) == (0, 20, 5)
    away = False
    told = await read(server.feed, server.feed.token_after(0), 20)
    assert [int(event.message) for event in told] == list(range(20))
    await auntil(lambda: server.journal.trouble == "")


@pytest.mark.slow
async def test_an_event_that_cannot_be_written_keeps_no_other_from_being(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    real, wrong = stored.append, {"7", "21"}

    def append(*call: Any, again: bool) -> None:
        if wrong & {record.message for record in call[2]}:
            raise OverflowError("an integer that nobody foresaw")
        real(*call, again=again)

    monkeypatch.setattr(stored, "append", append)
    for n in range(30):
        server.feed.publish(SEEN, message=str(n))
    told = await read(server.feed, server.feed.token_after(0), 28)
    assert [event.message for event in told] == [str(n) for n in range(30) if str(n) not in wrong]
    await auntil(lambda: not server.journal.waiting)
    assert server.journal.dropped == len(wrong)
    server.feed.publish(SEEN, message="and on")
    assert (await read(server.feed, server.feed.token_after(28), 1))[0].message == "and on"


async def test_an_error_that_passes_costs_no_event(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    real, calls = stored.append, []

    def append(*call: Any, again: bool) -> None:
        calls.append(again)
        if len(calls) <= 2:
            raise MemoryError
        real(*call, again=again)

    monkeypatch.setattr(stored, "append", append)
    for n in range(10):
        server.feed.publish(SEEN, message=str(n))
    told = await read(server.feed, server.feed.token_after(0), 10)
    assert [int(event.message) for event in told] == list(range(10))
    assert server.journal.dropped == 0


async def test_a_commit_that_was_not_answered_is_not_written_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    real, calls = stored.append, []

    def append(*call: Any, again: bool) -> None:
        calls.append(again)
        real(*call, again=again)
        if len(calls) % 2:
            raise unavailable("gone in the middle", retryable=True)

    monkeypatch.setattr(stored, "append", append)
    for n in range(40):
        server.feed.publish(SEEN, message=str(n))
        await asyncio.sleep(0)
    told = await read(server.feed, server.feed.token_after(0), 40)
    assert [int(event.message) for event in told] == list(range(40))
    assert server.feed.newest == 40


# A server that dies here leaves the connection of what it was writing to the collector, as its
# process would to the kernel.
@pytest.mark.filterwarnings("ignore:.*psycopg.Connection.* was deleted while still open")
@pytest.mark.parametrize("steps", [150, pytest.param(3_500, marks=pytest.mark.slow)])
async def test_no_event_once_told_is_missing_whoever_dies(
    place: Path | str, steps: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A history of operations on three servers against a model: the list of what was told. Three
    events a step; servers are killed, PostgreSQL is killed, watchers come back with old tokens."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.02)
    rng = random.Random(steps)
    servers = [await Server(place).__aenter__() for _ in range(3)]
    lives = [0, 0, 0]
    told: dict[int, tuple[str, str]] = {}
    published: dict[str, int] = {}
    tokens = [servers[0].feed.token_after(0)]
    postgres: Postgres | None = None
    if isinstance(place, str):
        postgres = request.getfixturevalue("postgres")

    async def look(server: Server, token: str) -> str:
        """Reads all that there is for the moment behind a token; nothing may contradict."""
        with server.feed.watch(token) as watcher:
            seen = watcher._seen
            while seen < server.feed.newest:
                try:
                    batch = await asyncio.wait_for(watcher.batch(), 60)
                except FacelaneError as error:
                    if not error.retryable:
                        raise
                    break
                for event in batch:
                    assert event.sequence == seen + 1, "an event is missing"
                    seen = event.sequence
                    line = (event.stream_id, event.message)
                    assert told.setdefault(seen, line) == line, "it was told otherwise before"
            return watcher.resume_token

    try:
        for step in range(steps):
            which = rng.randrange(3)
            server = servers[which]
            # Not by its id: what follows a server that died may lie where that lay.
            stream = f"{which}-{lives[which]}"
            for _ in range(3):
                published[stream] = published.get(stream, 0) + 1
                server.feed.publish(SEEN, stream_id=stream, message=str(published[stream]))
            action = rng.random()
            if action < 0.3:
                tokens.append(await look(server, rng.choice(tokens)))
                tokens = tokens[-8:]
            elif action < 0.32:
                server.die()
                await asyncio.to_thread(server.watch.close)
                server.database.close()
                servers[which] = await Server(place).__aenter__()
                lives[which] += 1
            elif action < 0.325 and postgres is not None and step % 10 == 0:
                await asyncio.to_thread(postgres.kill)
                await asyncio.to_thread(postgres.start)
            else:
                await asyncio.sleep(0)
        for server in servers:
            await auntil(lambda s=server: not s.journal.waiting)  # type: ignore[misc]
        newest = stored.span(servers[0].database)[1]
        for server in servers:
            await auntil(lambda s=server: s.feed.newest == newest)  # type: ignore[misc]
            await look(server, tokens[0])
        by_stream: dict[str, list[int]] = {}
        everything = await read(servers[1].feed, servers[1].feed.token_after(0), newest)
        for event in everything:
            by_stream.setdefault(event.stream_id, []).append(int(event.message))
            assert told.get(event.sequence, ("", ""))[0] in ("", event.stream_id)
        for stream, numbers in by_stream.items():
            assert numbers == list(range(1, len(numbers) + 1)), "order, once each"
            if any(stream == f"{n}-{life}" for n, life in enumerate(lives)):
                assert len(numbers) == published[stream], "a server that lives loses none"
    finally:
        for server in servers:
            await server.__aexit__()
        gc.collect()  # here, where it is expected, and not in whatever test comes next
        gc.collect()
