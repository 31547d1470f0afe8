"""The event feed: nothing is skipped silently, nobody slows it down."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from facelane_server.events import EventFeed, EventKind, Watcher

SEEN, LEFT, POOL = EventKind.SUBJECT_SEEN, EventKind.UNKNOWN_SEEN, EventKind.POOL_CHANGED


def feed_of(history: int = 8, watchers: int = 4) -> EventFeed:
    return EventFeed(history=history, max_watchers=watchers, clock_ns=lambda: 7, epoch=b"epoch--1")


def fill(feed: EventFeed, count: int, kind: EventKind = SEEN) -> None:
    for n in range(count):
        feed.publish(kind, message=str(n))


async def numbers(watcher: Watcher) -> list[int]:
    async with asyncio.timeout(30):
        return [event.sequence for event in await watcher.batch()]


def reason_of(token: str, feed: EventFeed) -> Reason:
    with pytest.raises(FacelaneError) as caught:
        feed.watch(token)
    return caught.value.reason


async def test_a_watcher_sees_what_happens_from_now_on() -> None:
    feed = feed_of()
    fill(feed, 3)
    with feed.watch() as watcher:
        waiting = asyncio.create_task(watcher.batch())
        await asyncio.sleep(0)
        assert not waiting.done()
        feed.publish(SEEN, stream_id="s")
        [event] = await asyncio.wait_for(waiting, 30)
        assert (event.sequence, event.time_ns, event.stream_id) == (4, 7, "s")


async def test_a_token_resumes_behind_its_event() -> None:
    feed = feed_of()
    fill(feed, 5)
    token = feed.token_after(3)
    with feed.watch(token) as watcher:
        assert await numbers(watcher) == [4, 5]
    with feed.watch(feed.token_after(5)) as watcher:
        feed.publish(LEFT)
        assert await numbers(watcher) == [6]


async def test_kinds_are_filtered_and_still_advance() -> None:
    feed = feed_of()
    with feed.watch(kinds=[POOL]) as watcher:
        waiting = asyncio.create_task(numbers(watcher))
        for _ in range(5):
            fill(feed, 6)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
        feed.publish(POOL, pool="detector")
        assert await waiting == [31]


async def test_a_slow_watcher_is_cut_and_does_not_slow_the_others() -> None:
    feed = feed_of(history=8)
    with feed.watch() as slow, feed.watch() as quick:
        for _ in range(3):
            fill(feed, 4)
            assert len(await numbers(quick)) == 4
        with pytest.raises(FacelaneError) as caught:
            await numbers(slow)
        assert caught.value.reason is Reason.HISTORY_LOST
        assert "resume_token" in caught.value.message


async def test_exactly_the_kept_history_can_be_resumed() -> None:
    feed = feed_of(history=8)
    fill(feed, 20)
    with feed.watch(feed.token_after(12)) as watcher:
        assert await numbers(watcher) == list(range(13, 21))
    assert reason_of(feed.token_after(11), feed) is Reason.HISTORY_LOST


async def test_a_token_of_another_life_is_lost_history() -> None:
    before = EventFeed(epoch=b"epoch--0")
    token = before.token(before.publish(SEEN))
    after = feed_of()
    after.publish(SEEN)
    assert reason_of(token, after) is Reason.HISTORY_LOST


async def test_a_token_from_the_future_is_invalid() -> None:
    ahead = feed_of()
    fill(ahead, 9)
    token = ahead.token(ahead.publish(SEEN))
    assert reason_of(token, feed_of()) is Reason.RESUME_TOKEN_INVALID


@given(st.text(min_size=1, max_size=60))
def test_any_other_text_is_an_invalid_token(text: str) -> None:
    reason = reason_of(text, feed_of())
    assert reason in (Reason.RESUME_TOKEN_INVALID, Reason.HISTORY_LOST)


@pytest.mark.parametrize("token", ["x", "!!!!", "AAAA", "é", "A" * 200, "\x00"])
def test_malformed_tokens(token: str) -> None:
    assert reason_of(token, feed_of()) is Reason.RESUME_TOKEN_INVALID


async def test_watchers_are_bounded_and_give_their_place_back() -> None:
    feed = feed_of(watchers=2)
    first, second = feed.watch(), feed.watch()
    with pytest.raises(FacelaneError) as caught:
        feed.watch()
    assert (caught.value.reason, caught.value.retryable) == (Reason.STREAM_LIMIT, True)
    first.close()
    first.close()
    with feed.watch():
        assert feed.watchers == 2
    second.close()
    assert feed.watchers == 0


async def test_batches_are_bounded() -> None:
    feed = EventFeed()
    with feed.watch() as watcher:
        fill(feed, limits.EVENT_HISTORY)
        seen: list[int] = []
        while len(seen) < limits.EVENT_HISTORY:
            batch = await numbers(watcher)
            assert len(batch) <= limits.MAX_EVENT_BATCH
            seen += batch
    assert seen == list(range(1, limits.EVENT_HISTORY + 1))


async def test_lost_history_says_what_is_left_of_it() -> None:
    feed = feed_of(history=4)
    token = feed.token_after(0)
    fill(feed, 10)
    with pytest.raises(FacelaneError) as gone:
        feed.watch(token)
    assert gone.value.reason == Reason.HISTORY_LOST
    with feed.watch(gone.value.metadata["resume_token"]) as watcher:
        assert await numbers(watcher) == [7, 8, 9, 10]


async def test_close_lets_watchers_read_to_the_end() -> None:
    feed = feed_of()
    with feed.watch() as reader, feed.watch() as waiter:
        blocked = asyncio.create_task(waiter.batch())
        await asyncio.sleep(0)
        fill(feed, 2)
        feed.close()
        feed.close()
        assert [e.sequence for e in await asyncio.wait_for(blocked, 30)] == [1, 2]
        seen: list[int] = []

        async def read() -> None:
            async for event in reader:
                seen.append(event.sequence)  # noqa: PERF401 - the error ends the loop

        with pytest.raises(FacelaneError) as caught:
            await read()
        assert seen == [1, 2]
        assert (caught.value.reason, caught.value.retryable) == (Reason.DRAINING, True)
    with pytest.raises(FacelaneError):
        feed.watch()


@given(st.lists(st.one_of(st.integers(1, 6), st.just(0)), max_size=30))
def test_a_reader_sees_every_event_once_or_is_told(steps: list[int]) -> None:
    """0 = read once; n = that many events happen."""

    async def play() -> None:
        feed = feed_of(history=8)
        seen: list[int] = []
        behind = 0
        with feed.watch() as watcher:
            for step in steps:
                if step:
                    fill(feed, step)
                    behind += step
                elif behind > 8:
                    with pytest.raises(FacelaneError):
                        await numbers(watcher)
                    return
                elif behind:
                    seen += await numbers(watcher)
                    behind = 0
                assert seen == list(range(1, len(seen) + 1))

    asyncio.run(play())


async def test_a_deleted_subject_is_named_by_no_event_that_is_kept() -> None:
    def track(decision: Decision, name: str, *near: str) -> TrackReport:
        candidates = tuple(Candidate(subject, 0.5) for subject in near)
        identity = Identity(decision, name, 0.9, candidates)
        return TrackReport(
            1, 0, 1, None, None, Box(0, 0, 1, 1), identity, Liveness(LivenessVerdict.LIVE)
        )

    feed = feed_of()
    start = feed.token_after(0)
    for gallery, report in (
        ("staff", track(Decision.MATCH, "ada", "ada", "bo")),
        ("staff", track(Decision.MATCH, "bo", "bo", "ada")),
        ("board", track(Decision.MATCH, "ada", "ada")),
    ):
        feed.publish(SEEN, gallery_id=gallery, track=report)
    feed.publish(EventKind.POOL_CHANGED, pool="detector")
    feed.forget_subject("staff", "ada")
    with feed.watch(start) as watcher:
        told = await watcher.batch()
    assert [event.sequence for event in told] == [1, 2, 3, 4], "nothing is missing"
    first, second, third = (event.track.identity for event in told if event.track)
    assert first == Identity(Decision.NOT_EVALUATED)
    assert (second.subject_id, [c.subject_id for c in second.candidates]) == ("bo", ["bo"])
    assert third.subject_id == "ada", "another gallery's"
