"""A look at a stream: bounded for each who looks, the newest wins, video begins with key frames."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from facelane_server import limits
from facelane_server.domain import (
    DropReason,
    Encoding,
    Frame,
    FrameDrop,
    FrameResult,
    Outcome,
    Picture,
)
from facelane_server.viewing import Box, Seen, Sight, Wish

SECOND = 1_000_000_000
RESULT = FrameResult(64, 48, ())


def outcome(frame_id: int, body: FrameResult | FrameDrop = RESULT, age_ns: int = 5) -> Outcome:
    return Outcome(frame_id, 0, None, body, age_ns)


def frame(frame_id: int, encoding: Encoding = Encoding.JPEG, size: int = 10) -> Frame:
    return Frame(frame_id, Picture(encoding, frame_id.to_bytes(4, "big") * (size // 4 + 1)), 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100 * SECOND

    def __call__(self) -> int:
        return self.now


class Watched:
    """A stream that somebody looks at, with a clock by hand."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.sight = Sight(opened_ns=1, clock=self.clock)
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    def watch(self, units: list[bytes] | None = None, **wish: object) -> Box:
        return self.sight.watch(Wish(**wish), self.wake, units)  # type: ignore[arg-type]

    def pass_(self, frame_: Frame, body: FrameResult | FrameDrop = RESULT, *, key: bool) -> None:
        self.sight.receiving(frame_)
        self.sight.received(key=key)
        self.sight.outcome(outcome(frame_.frame_id, body))

    def take(self, box: Box) -> Seen | None:
        return box.take(self.clock.now)


def test_nothing_is_kept_while_nobody_looks() -> None:
    watched = Watched()
    for number in range(5):
        watched.pass_(frame(number), key=False)
    assert watched.sight.unseen_bytes == 0
    box = watched.watch()
    watched.sight.receiving(frame(5))
    assert watched.sight.unseen_bytes > 0
    watched.sight.leave(box)
    assert (watched.sight.unseen_bytes, watched.sight.watchers) == (0, 0)


def test_the_newest_still_picture_wins_and_comes_with_its_outcome() -> None:
    watched = Watched()
    box = watched.watch(max_fps=10.0)
    for number in range(4):
        watched.pass_(frame(number), key=False)
    seen = watched.take(box)
    assert seen is not None
    assert seen.outcome is not None
    assert (seen.outcome.frame_id, seen.skipped, seen.key) == (3, 3, True)
    assert seen.picture.data == frame(3).picture.data
    watched.pass_(frame(4), key=False)
    assert watched.take(box) is None, "not due yet"
    assert 0.0 < box.due_in_s(watched.clock.now) <= 0.1
    watched.clock.now += SECOND // 10
    seen = watched.take(box)
    assert seen is not None
    assert seen.skipped == 0
    assert math.isinf(box.due_in_s(watched.clock.now))


def test_a_picture_waits_for_its_outcome_and_keeps_its_order() -> None:
    watched = Watched()
    box = watched.watch(max_fps=60.0)
    watched.sight.receiving(frame(1))
    watched.sight.receiving(frame(2))
    assert watched.take(box) is None
    watched.sight.outcome(outcome(1))
    seen = watched.take(box)
    assert seen is not None
    assert seen.outcome is not None
    assert seen.outcome.frame_id == 1


def test_results_only_leaves_out_what_was_dropped() -> None:
    watched = Watched()
    box = watched.watch(results_only=True)
    watched.pass_(frame(1), FrameDrop(DropReason.SUPERSEDED), key=False)
    assert watched.take(box) is None
    watched.pass_(frame(2), key=False)
    assert watched.take(box) is not None


def test_video_begins_in_the_middle_with_the_units_since_the_key_frame() -> None:
    watched = Watched()
    units = [bytes([n]) * 8 for n in range(3)]
    for number in range(3):
        watched.pass_(frame(number, Encoding.H264), key=number == 0)
    box = watched.watch(units)
    watched.pass_(frame(3, Encoding.H264), key=False)
    taken = []
    while (seen := watched.take(box)) is not None:
        taken.append((seen.key, seen.outcome and seen.outcome.frame_id))
    assert taken == [(True, None), (False, None), (False, None), (False, 3)]


def test_frames_on_their_way_when_somebody_else_begins_to_look_are_not_shown_twice() -> None:
    watched = Watched()
    first = watched.watch()
    watched.sight.receiving(frame(0, Encoding.H264))
    watched.sight.received(key=True)
    second = watched.watch([b"key frame"])
    watched.sight.outcome(outcome(0))
    assert [watched.take(box) is not None for box in (first, second)] == [True, True]
    assert [watched.take(box) for box in (first, second)] == [None, None]


def test_without_its_key_frame_video_waits_for_the_next_one() -> None:
    watched = Watched()
    watched.pass_(frame(0, Encoding.H264), key=True)
    box = watched.watch(None)
    watched.pass_(frame(1, Encoding.H264), key=False)
    assert watched.take(box) is None
    watched.pass_(frame(2, Encoding.H264), key=True)
    seen = watched.take(box)
    assert seen is not None
    assert (seen.key, seen.skipped) == (True, 1)


def test_what_cannot_be_decoded_is_not_shown_nor_what_follows_it() -> None:
    watched = Watched()
    box = watched.watch()
    watched.pass_(frame(0, Encoding.H264), key=True)
    lost = FrameDrop(DropReason.WAITING_FOR_KEY_FRAME)
    watched.pass_(frame(1, Encoding.H264), lost, key=False)
    watched.pass_(frame(2, Encoding.H264), key=False)
    assert watched.take(box) is None
    watched.pass_(frame(3, Encoding.H264), key=True)
    assert watched.take(box) is not None


def test_an_outcome_that_comes_while_the_lane_takes_the_frame_is_not_lost() -> None:
    watched = Watched()
    box = watched.watch()
    watched.sight.receiving(frame(0, Encoding.H264))
    watched.sight.outcome(outcome(0, FrameDrop(DropReason.SUPERSEDED)))
    assert watched.take(box) is None
    watched.sight.received(key=True)
    seen = watched.take(box)
    assert seen is not None
    assert seen.key


def test_one_who_stops_looking_gets_the_next_key_frame() -> None:
    watched = Watched()
    box = watched.watch()
    size = limits.MAX_VIEWED_BYTES // 25
    for number in range(35):
        watched.pass_(frame(number, Encoding.H264, size), key=number % 10 == 0)
        assert box.waiting_bytes <= limits.MAX_VIEWED_BYTES
    seen = watched.take(box)
    assert seen is not None
    assert seen.outcome is not None
    assert (seen.key, seen.outcome.frame_id, seen.skipped) == (True, 30, 30)


def test_key_frames_alone() -> None:
    watched = Watched()
    box = watched.watch(key_frames_only=True, max_fps=60.0)
    for number in range(21):
        watched.pass_(frame(number, Encoding.H264), key=number % 10 == 0)
    seen = watched.take(box)
    assert seen is not None
    assert seen.outcome is not None
    assert seen.outcome.frame_id == 20
    assert watched.take(box) is None


def test_the_end_of_a_stream_wakes_those_who_look() -> None:
    watched = Watched()
    box = watched.watch()
    watched.pass_(frame(1), key=False)
    woken = watched.woken
    watched.sight.close()
    assert watched.woken > woken
    assert box.closed
    assert watched.take(box) is not None, "what waits is still shown"


def test_figures_of_the_last_seconds() -> None:
    watched = Watched()
    assert watched.sight.figures().outcome_fps == 0.0
    for number in range(50):
        body = RESULT if number % 2 else FrameDrop(DropReason.SUPERSEDED)
        watched.clock.now += SECOND // 25
        watched.sight.outcome(outcome(number, body, age_ns=number))
    figures = watched.sight.figures()
    assert 24.0 <= figures.outcome_fps <= 27.0
    assert 12.0 <= figures.result_fps <= 13.5
    assert figures.age_median_ns == 25
    assert figures.age_p95_ns == 47
    watched.clock.now += 20 * SECOND
    assert watched.sight.figures().outcome_fps == 0.0


@given(st.lists(st.tuples(st.integers(1, 5_000_000), st.booleans(), st.booleans()), max_size=60))
def test_nothing_grows_with_the_stream_or_with_a_slow_watcher(
    frames: list[tuple[int, bool, bool]],
) -> None:
    """Outcomes may be held back for ever, and nobody takes what waits."""
    sight = Sight(opened_ns=0)
    box = sight.watch(Wish(), lambda: None)
    after_key = False
    for number, (size, key, settled) in enumerate(frames):
        picture = Picture(Encoding.H264, bytes(size))
        sight.receiving(Frame(number, picture, 0))
        sight.received(key=key)
        if settled:
            sight.outcome(outcome(number))
        assert sight.unseen_bytes <= max(limits.MAX_UNSEEN_BYTES, size)
        assert box.waiting_bytes <= limits.MAX_VIEWED_BYTES
    while (seen := box.take(0)) is not None:
        assert seen.key or after_key
        after_key = True
