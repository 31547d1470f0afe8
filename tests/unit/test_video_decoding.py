"""Video in a worker: access units looked at, decoders and their sessions."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.access_units import clip, picture
from tests.waiting import until

from facelane_server import annexb, limits
from facelane_server.annexb import Key
from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import DetectDone, InferDone, ItemDone, PictureHeld, VideoItem
from facelane_server.models.api import U8
from facelane_server.pools.groups import Decoders, Group, Wanted
from facelane_server.pools.schedule import Schedule
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import DetectAnswer, Job, Task, VideoRequest
from facelane_server.worker.decoding import video
from facelane_server.worker.decoding.cpu_video import CpuEngine
from facelane_server.worker.work import _access_units

ENCODINGS = [Encoding.H264, Encoding.H265]


def seen(units: Sequence[bytes], encoding: Encoding) -> list[annexb.AccessUnit]:
    return [annexb.examine(unit, encoding, 0) for unit in units]


def refused(unit: bytes, encoding: Encoding, max_pixels: int = 0) -> Reason:
    with pytest.raises(FacelaneError) as caught:
        annexb.examine(unit, encoding, max_pixels)
    return caught.value.reason


# -- looked at ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bframes", [0, 3])
def test_key_frames_and_sizes_are_seen(encoding: Encoding, bframes: int) -> None:
    found = seen(clip(encoding, size=(334, 246), bframes=bframes), encoding)
    keys = [i for i, unit in enumerate(found) if unit.key is not Key.NONE]
    assert keys == [0, 10]
    first = found[0].format
    assert first is not None
    assert (first.width, first.height, first.depth) == (334, 246, 8)
    assert (first.reorder > 0) is (bframes > 0)
    assert not any(unit.format for i, unit in enumerate(found) if i not in keys)


@pytest.mark.parametrize(("codec", "kind"), [("h264", 7), ("h265", 33)])
def test_parameter_sets_are_read_for_a_picture_and_not_for_thousands(codec: str, kind: int) -> None:
    """Read bit by bit, on the loop that all streams share: 77 kB of them took a seventh of a
    second."""
    unit, encoding = clip(codec)[0], Encoding(codec)
    of = (lambda head: head & 0x1F) if codec == "h264" else (lambda head: head >> 1 & 0x3F)
    [sps] = [part for part in unit.split(b"\0\0\1")[1:] if of(part[0]) == kind]
    once = annexb.examine(unit, encoding, 0)
    more = b"\0\0\1" + sps.rstrip(b"\0")
    few = more * (limits.MAX_PARAMETER_SETS - 1) + unit
    assert annexb.examine(few, encoding, 0) == once
    assert refused(more + few, encoding) is Reason.PICTURE_TOO_COSTLY


def test_slices_are_one_picture() -> None:
    found = seen(clip("h264", slices=4), Encoding.H264)
    assert [unit.key for unit in found[:2]] == [Key.HARD, Key.NONE]


def test_pictures_shown_before_a_soft_key_frame_are_known() -> None:
    found = seen(clip("h265", 30, bframes=3, open_gop=True), Encoding.H265)
    assert found[0].key is Key.HARD
    assert Key.SOFT in {unit.key for unit in found}
    assert any(unit.leading for unit in found)


def test_ten_bits() -> None:
    for encoding in ENCODINGS:
        found = seen(clip(encoding, 2, pix_fmt="yuv420p10le"), encoding)
        assert found[0].format is not None
        assert found[0].format.depth == 10


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_not_decoded_here_is_refused_with_a_reason(encoding: Encoding) -> None:
    assert refused(clip(encoding, 1, pix_fmt="yuv422p")[0], encoding) is Reason.VIDEO_UNSUPPORTED
    unit = clip(encoding, 1)[0]
    assert refused(unit, encoding, 10_000) is Reason.PICTURE_TOO_LARGE
    assert refused(unit[3:], encoding) is Reason.PICTURE_CORRUPT
    assert refused(unit + unit, encoding) is Reason.PICTURE_CORRUPT
    assert refused(b"\0\0\1\x09\xf0", encoding) is Reason.PICTURE_CORRUPT
    many = unit + b"\0\0\1\x0c\xff\xff" * limits.MAX_NAL_UNITS
    assert refused(many, encoding) is Reason.PICTURE_TOO_COSTLY


def test_interlaced_video_is_refused() -> None:
    assert refused(clip("h264", 1, interlaced=True)[0], Encoding.H264) is Reason.VIDEO_UNSUPPORTED


def without(unit: bytes, kinds: set[int], encoding: Encoding) -> bytes:
    """Some NAL units left out."""
    parts = unit.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    kind = (lambda p: p[0] & 31) if encoding is Encoding.H264 else (lambda p: p[0] >> 1 & 63)
    return b"".join(b"\0\0\1" + part for part in parts if kind(part) not in kinds)


@pytest.mark.parametrize(
    ("encoding", "sets"), [(Encoding.H264, 7), (Encoding.H264, 8), (Encoding.H265, 32)]
)
def test_a_key_frame_without_its_parameter_sets(encoding: Encoding, sets: int) -> None:
    unit = without(clip(encoding, 1)[0], {sets}, encoding)
    assert refused(unit, encoding) is Reason.PARAMETER_SETS_MISSING


@given(st.data())
def test_whatever_comes_has_a_reason(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(ENCODINGS))
    unit = bytearray(clip(encoding, 1)[0])
    for _ in range(data.draw(st.integers(1, 6))):
        unit[data.draw(st.integers(0, min(len(unit), 120) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(unit)))
    try:
        found = annexb.examine(bytes(unit[:cut]), encoding, 0)
    except FacelaneError:
        return
    if found.format is not None:
        assert found.format.width * found.format.height <= limits.MAX_VIDEO_PIXELS


@given(st.binary(max_size=200))
def test_noise_behind_a_start_code(noise: bytes) -> None:
    for encoding in ENCODINGS:
        with contextlib.suppress(FacelaneError):
            assert annexb.examine(b"\0\0\1" + noise, encoding, 0).format is None


# -- decoded ------------------------------------------------------------------------------


class Clock:
    """Every look at it takes ``step`` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def sessions(step: float = 0.0) -> video.Sessions:
    return video.Sessions(CpuEngine(), max_pixels=0, clock=Clock(step))


def item(
    first: int,
    last: int,
    wanted: int,
    encoding: Encoding = Encoding.H264,
    *,
    lane: int = 1,
    begins: bool | None = None,
    drain: bool = False,
    ahead: bool = False,
) -> VideoItem:
    begins = first == 0 if begins is None else begins
    return VideoItem(
        lane, 0, (), encoding, first, last, wanted, begins=begins, drain=drain, ahead=ahead
    )


def read(held: video.Sessions, *asked: tuple[VideoItem, Sequence[bytes]]) -> list[video.Read]:
    found: dict[int, list[video.Read]] = {}
    for lane, call in held.calls(asked).items():
        found[lane] = list(call())
    return [found[item.lane].pop(0) for item, _ in asked]


def shows(found: video.Read, number: int, size: tuple[int, int] = (320, 240)) -> bool:
    assert isinstance(found, np.ndarray), found
    wanted = picture(number, size).astype(int)
    assert found.shape == wanted.shape
    return float(np.abs(found.astype(int) - wanted).mean()) < 4


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_picture_in_turn(encoding: Encoding) -> None:
    held, units = sessions(), clip(encoding, 8, keyint=8)
    for i, unit in enumerate(units):
        (found,) = read(held, (item(i, i, i, encoding), [unit]))
        assert shows(found, i)
    assert len(held) == 1


def test_those_between_are_decoded_for_the_last() -> None:
    held, units = sessions(), clip(count=10)
    (found,) = read(held, (item(0, 6, 6), units[:7]))
    assert shows(found, 6)
    (found,) = read(held, (item(7, 9, 9), units[7:10]))
    assert shows(found, 9)


@pytest.mark.parametrize("bframes", [0, 3])
def test_what_nobody_looks_at_is_decoded_when_it_comes(bframes: int) -> None:
    """Every third picture is wanted: what lies between costs its decoder alone, and it no time."""
    units = clip("h264", 24, keyint=24, bframes=bframes)[:24]
    found = annexb.examine(units[0], Encoding.H264, 0).format
    assert found is not None
    held, fed = sessions(), 0
    for number in range(24 - found.reorder):
        upto = number + found.reorder + 1
        ahead = number % 3 > 0
        asked = item(fed, upto - 1, number, begins=fed == 0, ahead=ahead)
        (got,) = read(held, (asked, units[fed:upto]))
        if ahead:
            assert got == PictureHeld(upto - 1)
            assert not held._sessions[1]._undecoded
        else:
            assert shows(got, number)
        fed = upto


def test_what_is_wrong_with_what_nobody_looks_at_is_found_with_the_next_picture_too() -> None:
    held, units = sessions(), clip(count=10)
    broken = units[2][:5] + bytes(len(units[2]) - 5)
    read(held, (item(0, 1, 1), units[:2]))
    assert read(held, (item(5, 5, 5, ahead=True), units[5:6])) == [PictureHeld(-1)]
    assert read(held, (item(2, 2, 2, ahead=True), [broken])) == [PictureHeld(2)]
    assert read(held, (item(3, 3, 3), units[3:4])) == [PictureHeld(-1)]
    (found,) = read(held, (item(0, 3, 3), [*units[:2], broken, units[3]]))
    assert isinstance(found, FacelaneError)
    (found,) = read(held, (item(0, 3, 3), units[:4]))
    assert shows(found, 3)


def test_a_picture_under_way_outlasts_what_nobody_looks_at_behind_it() -> None:
    """It is not there when others have their turn, and what comes after it is decoded."""
    held, units = sessions(step=video.SLICE_S), clip(count=6)
    assert read(held, (item(0, 2, 2), units[:3])) == [PictureHeld(2)], "others have their turn"
    for number in (3, 4):
        ahead = item(number, number, number, ahead=True)
        assert read(held, (ahead, units[number : number + 1])) == [PictureHeld(number)]
    found: list[video.Read] = [PictureHeld(4)]
    while isinstance(found[0], PictureHeld):
        found = read(held, (item(5, 4, 2), []))
    assert shows(found[0], 2)


def test_with_a_picture_that_is_wanted_what_comes_before_it_is_left_to_that() -> None:
    held, units = sessions(), clip(count=4)
    read(held, (item(0, 0, 0), units[:1]))
    one, other = item(1, 1, 1, ahead=True), item(2, 2, 2)
    first, second = read(held, (one, units[1:2]), (other, units[2:3]))
    assert first == PictureHeld(1)
    assert shows(second, 2)


def test_a_decoder_that_fails_over_what_nobody_looks_at_is_not_gone_on_with() -> None:
    """An access unit is missing in it."""
    held, units = sessions(), clip(count=10)
    read(held, (item(0, 0, 0), units[:1]), (item(0, 0, 0, lane=2), units[:1]))

    def fail(*_: object) -> Any:
        raise MemoryError

    held._sessions[1]._decoder.decode = fail  # type: ignore[union-attr, method-assign]
    with pytest.raises(MemoryError):
        read(held, (item(1, 1, 1, ahead=True), units[1:2]))
    ahead = item(1, 1, 1, lane=2, ahead=True)
    assert read(held, (ahead, units[1:2])) == [PictureHeld(1)]
    assert read(held, (item(2, 2, 2), units[2:3])) == [PictureHeld(-1)]
    (found,) = read(held, (item(2, 2, 2, lane=2), units[2:3]))
    assert shows(found, 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_nth_access_unit_is_the_nth_picture_shown(encoding: Encoding) -> None:
    units = clip(encoding, 10, keyint=10, bframes=3)
    found = annexb.examine(units[0], encoding, 0).format
    assert found is not None
    held, delay = sessions(), found.reorder
    (early,) = read(held, (item(0, 0, 0, encoding), units[:1]))
    assert early == PictureHeld(0, 1)
    assert delay > 0
    for i in range(10):
        last = min(i + delay, 9)
        fed = 0 if i == 0 else min(i - 1 + delay, 9)
        (got,) = read(
            held,
            (
                item(fed + 1, last, i, encoding, begins=False, drain=i + delay > 9),
                units[fed + 1 : last + 1],
            ),
        )
        assert shows(got, i)


def test_a_decoder_that_is_elsewhere_says_so() -> None:
    held, units = sessions(), clip(count=10)
    assert read(held, (item(3, 3, 3), units[3:4])) == [PictureHeld(-1)]
    read(held, (item(0, 1, 1), units[:2]))
    assert read(held, (item(3, 3, 3), units[3:4])) == [PictureHeld(-1)]
    (found,) = read(held, (item(0, 3, 3), units[:4]))
    assert shows(found, 3)


def test_a_long_group_is_decoded_in_slices() -> None:
    held, units = sessions(step=video.SLICE_S / 3), clip(count=10)
    (found,) = read(held, (item(0, 9, 9), units))
    rounds = 1
    while isinstance(found, PictureHeld):
        assert found == PictureHeld(9), "it has them all, and others have their turn"
        rounds += 1
        (found,) = read(held, (item(10, 9, 9), []))
    assert rounds > 2
    assert shows(found, 9)


class Seat:
    """Of a worker that has several batches under way."""

    def __init__(self, batch_max: int, places: int) -> None:
        self.jobs: deque[Job] = deque()
        self.sent: deque[list[tuple[VideoItem, list[bytes]]]] = deque()
        self.batch_max = batch_max
        self.overlaps = True
        self.service_ns = 0.0
        self.free_slots = self.places = places
        self.decoders = Decoders()


@pytest.mark.parametrize("places", [2, 3])
@pytest.mark.parametrize("batch_max", [1, 2])
def test_pictures_of_one_lane_under_way_together_do_not_undo_each_other(
    batch_max: int, places: int
) -> None:
    """Their group takes long to decode, and the first is not there when others are asked for, nor
    when more of them come."""
    units = clip(count=30, keyint=30)
    found = annexb.examine(units[0], Encoding.H264, 0).format
    assert found is not None
    group = Group(Encoding.H264, found, 1 << 20)
    codec, seat = Codec(Stage.DETECTOR, []), Seat(batch_max, places)
    schedule, held = Schedule("detector", codec), sessions(step=video.SLICE_S / 3)
    tasks: list[Task[Any]] = []
    decoded = begun = 0
    come = iter(range(7, 30))

    def arrive() -> None:
        if (number := next(come, None)) is None:
            return
        while len(group) <= number:
            group.append(units[len(group)])
        wanted = Wanted(1, group, number, number)
        one: Task[Any] = Task(VideoRequest(wanted, 4, 0), 1, 1, 10**18, Future())  # type: ignore[arg-type]
        one.submitted_ns = number
        tasks.append(one)
        assert schedule.submit(one, 0, lambda _: True, [seat]) is None

    arrive()
    while not all(task.future.done() for task in tasks):
        while len(seat.jobs) < places and (batch := schedule.next([seat])) is not None:
            slot = memoryview(bytearray(1 << 20))
            items, _ = codec.write([one.request for one in batch[1]], slot, seat.decoders)
            seat.jobs.append(Job(1, 0, batch[1]))
            seat.sent.append(
                [(one, _access_units(slot, one)) for one in items if isinstance(one, VideoItem)]
            )
        asked = seat.sent.popleft()
        decoded += sum(len(fresh) for _, fresh in asked)
        begun += sum(one.begins for one, _ in asked)
        answers = read(held, *asked)
        done: list[ItemDone] = []
        for (one, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, PictureHeld):
                done.append(answer)
            else:
                assert shows(answer, one.picture)
                done.append(DetectDone(320, 240, 0, 0, 0))
        ended, _ = schedule.answered(
            seat.jobs.popleft(), InferDone(1, done), codec, memoryview(b""), 0, seat.decoders
        )
        for task, outcome in ended:
            assert isinstance(outcome, DetectAnswer)
            task.future.set_result(outcome)
        arrive()
    assert [task.request.wanted.picture for task in tasks] == list(range(7, 30))
    assert begun == 1, "again and again"
    assert decoded < 5 * len(units)


class SlowEngine:
    """Opens decoders when it is let."""

    opens_slowly = True
    waits = False

    def settle_in(self) -> None:
        pass

    def __init__(self) -> None:
        self.let = threading.Event()
        self.closed: list[str] = []
        self.fault: Exception | None = None
        self._other = CpuEngine(1)

    def open(
        self, codec: Encoding, found: annexb.Format, key_frame: bytes = b""
    ) -> video.VideoDecoder:
        assert key_frame, "which is what opens it"
        assert self.let.wait(60)
        if self.fault is not None:
            raise self.fault
        decoder = self._other.open(codec, found)
        decoder.close = lambda: self.closed.append("one")  # type: ignore[method-assign]
        return decoder


def test_others_do_not_wait_for_a_decoder_that_is_being_opened() -> None:
    engine, units = SlowEngine(), clip(count=10)
    held = video.Sessions(engine, max_pixels=0)
    engine.let.set()
    (found,) = read(held, (item(0, 0, 0, lane=1), units[:1]))
    assert shows(found, 0), "the first waits for its own"
    engine.let.clear()
    of_first, of_second = read(
        held, (item(1, 1, 1, lane=1), units[1:2]), (item(0, 1, 1, lane=2), units[:2])
    )
    assert shows(of_first, 1)
    opening = PictureHeld(1, opening=True)
    assert of_second == opening, "it has them, and there is no picture yet"
    later = item(2, 4, 4, lane=2), units[2:5]
    for _ in range(limits.JOBS_PER_DECODER - 1):
        assert read(held, later) == [PictureHeld(0, waits=True)], "the one before is to be shown"
    assert read(held, later) == [PictureHeld(4, opening=True)], "it was not asked for again"
    engine.let.set()

    def shown() -> bool:
        nonlocal of_second
        (of_second,) = read(held, (item(5, 4, 4, lane=2), []))
        return not isinstance(of_second, PictureHeld)

    until(shown, what="the picture")
    assert shows(of_second, 4)


def test_a_group_that_begins_while_its_decoder_is_being_opened() -> None:
    engine, units = SlowEngine(), clip(count=10)
    held = video.Sessions(engine, max_pixels=0)
    engine.let.set()
    read(held, (item(0, 0, 0, lane=1), units[:1]))
    engine.let.clear()
    for last in (5, 2):
        asked = item(0, last, last, lane=2), units[: last + 1]
        assert read(held, asked) == [PictureHeld(last, opening=True)]
    engine.let.set()

    def shown() -> bool:
        (found,) = read(held, (item(3, 2, 2, lane=2), []))
        return not isinstance(found, PictureHeld) and shows(found, 2)

    until(shown, what="the newer group's picture")


def test_a_lane_that_ends_while_its_decoder_is_being_opened_leaves_none() -> None:
    engine, units = SlowEngine(), clip(count=10)
    held = video.Sessions(engine, max_pixels=0)
    engine.let.set()
    read(held, (item(0, 0, 0, lane=1), units[:1]))
    engine.let.clear()
    read(held, (item(0, 0, 0, lane=2), units[:1]))
    held.close(2)
    assert engine.closed == []
    engine.let.set()
    until(lambda: engine.closed == ["one"], what="its end")


def test_a_key_frame_that_opens_a_decoder_and_is_broken() -> None:
    engine, units = SlowEngine(), clip(count=4)
    engine.let.set()
    held = video.Sessions(engine, max_pixels=0)
    broken = units[0][: len(units[0]) // 2]
    (found,) = read(held, (item(0, 1, 1), [broken, units[1]]))
    assert isinstance(found, FacelaneError)
    assert found.reason is Reason.PICTURE_CORRUPT
    (found,) = read(held, (item(0, 1, 1), units[:2]))
    assert shows(found, 1)


@pytest.mark.parametrize("reason", [Reason.VIDEO_UNSUPPORTED, Reason.PICTURE_CORRUPT])
def test_a_decoder_that_cannot_be_opened_is_its_lane_s_error(reason: Reason) -> None:
    engine, units = SlowEngine(), clip(count=2)
    engine.fault = FacelaneError(reason, "not this")
    engine.let.set()
    held = video.Sessions(engine, max_pixels=0)
    (found,) = read(held, (item(0, 0, 0), units[:1]))
    assert isinstance(found, FacelaneError)
    assert found.reason is reason
    assert len(held) == 0
    engine.fault = None
    (found,) = read(held, (item(0, 1, 1), units))
    assert shows(found, 1), "the next group opens another"


def test_another_size_with_a_key_frame() -> None:
    held = sessions()
    (small,) = read(held, (item(0, 3, 3), clip(count=4)))
    (large,) = read(held, (item(0, 3, 3), clip(count=4, size=(640, 480))))
    assert shows(small, 3)
    assert shows(large, 3, (640, 480))
    (other,) = read(held, (item(0, 3, 3, Encoding.H265), clip("h265", 4)))
    assert shows(other, 3)
    assert len(held) == 1


def test_a_broken_access_unit_is_its_own_error() -> None:
    held, units = sessions(), clip(count=10)
    (found,) = read(held, (item(0, 2, 2), [units[0], units[1][: len(units[1]) // 2], units[2]]))
    assert isinstance(found, FacelaneError)
    assert found.reason is Reason.PICTURE_CORRUPT
    # What follows would be wrong.
    assert read(held, (item(3, 3, 3), units[3:4])) == [PictureHeld(-1)]
    assert read(held, (item(2, 3, 3), units[2:4])) == [PictureHeld(-1)]
    (again,) = read(held, (item(0, 2, 2), units[:3]))
    assert shows(again, 2)


def test_garbage_costs_a_reason_and_nothing_else() -> None:
    rng = random.Random(7)
    for encoding in ENCODINGS:
        units = clip(encoding, 5)
        for _ in range(60):
            broken = [bytearray(unit) for unit in units]
            for unit in broken[1:]:
                for _ in range(rng.randint(0, 4)):
                    unit[rng.randrange(6, len(unit))] = rng.randrange(256)
            (found,) = read(sessions(), (item(0, 4, 4, encoding), [bytes(unit) for unit in broken]))
            assert isinstance(found, np.ndarray | FacelaneError)


def test_lanes_do_not_meet() -> None:
    held, units = sessions(), clip(count=4)
    one, other = item(0, 3, 3), item(0, 2, 2, lane=2)
    first, second = read(held, (one, units), (other, units[:3]))
    assert shows(first, 3)
    assert shows(second, 2)
    assert len(held) == 2
    held.close(1)
    assert len(held) == 1
    held.close(7)


def test_more_decoders_than_a_worker_has() -> None:
    held, unit = sessions(), clip(count=1)[0]
    for lane in range(limits.MAX_DECODERS):
        read(held, (item(0, 0, 0, lane=lane), [unit]))
    with pytest.raises(ProtocolError):
        held.calls([(item(0, 0, 0, lane=999), [unit])])
    held.close_all()
    assert not len(held)


def test_a_decoding_that_was_given_up_takes_its_session_along() -> None:
    held, units = sessions(), clip(count=4)
    read(held, (item(0, 0, 0), units[:1]))
    held.given_up(1)  # its thread is still at it
    assert read(held, (item(1, 1, 1), units[1:2])) == [PictureHeld(-1)]


def test_who_looks_at_no_pixels_decodes_none() -> None:
    held = video.Sessions(None, max_pixels=0)
    (found,) = read(held, (item(0, 0, 0), clip(count=1)))
    assert isinstance(found, np.ndarray)
    assert found.shape == (240, 320, 3)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [(320, 240), (1280, 720)])
def test_colours_are_those_of_the_picture(size: tuple[int, int], full: bool) -> None:
    """By range and matrix: what the video names, or the convention for its size."""
    pixels: U8 = np.zeros((size[1], size[0], 3), np.uint8)
    for i, colour in enumerate(
        [(0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255), (30, 30, 30)]
    ):
        pixels[:, i * size[0] // 5 : (i + 1) * size[0] // 5] = colour
    units = colour_bars(pixels, full=full)
    (found,) = read(sessions(), (item(0, 0, 0, drain=True), units))
    assert isinstance(found, np.ndarray)
    for i in range(5):
        x = (2 * i + 1) * size[0] // 10
        assert np.abs(found[size[1] // 2, x].astype(int) - pixels[size[1] // 2, x]).max() < 6


def colour_bars(pixels: U8, *, full: bool) -> list[bytes]:
    import av

    hd = pixels.shape[0] > 576
    frame = av.VideoFrame.from_ndarray(pixels, format="bgr24").reformat(
        format="yuv420p",
        src_color_range=2,
        dst_color_range=2 if full else 1,
        dst_colorspace=1 if hd else 5,
    )
    options = {"x264-params": "fullrange=on" if full else "fullrange=off", "qp": "4"}
    return encode_frames([frame], options)


def encode_frames(frames: Sequence[object], options: dict[str, str]) -> list[bytes]:
    import av

    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, av.VideoCodecContext)
    first = frames[0]
    assert isinstance(first, av.VideoFrame)
    context.width, context.height, context.pix_fmt = first.width, first.height, "yuv420p"
    context.framerate = 25  # type: ignore[assignment]
    context.options = options
    units = []
    for frame in frames:
        assert isinstance(frame, av.VideoFrame)
        units += [bytes(packet) for packet in context.encode(frame)]
    return units + [bytes(packet) for packet in context.encode(None)]


def test_decoders_that_are_being_opened_come_last_and_are_waited_for_once() -> None:
    engine, units = SlowEngine(), clip(count=2)
    clock = Clock()
    held = video.Sessions(engine, max_pixels=0, clock=clock)
    engine.let.set()
    read(held, (item(0, 0, 0, lane=1), units[:1]))
    engine.let.clear()
    new = [(item(0, 0, 0, lane=lane), units[:1]) for lane in (2, 3)]
    calls = held.calls([*new, (item(1, 1, 1, lane=1), units[1:2])])
    assert list(calls) == [1, 2, 3]
    waited: list[float] = []

    def opened(session: video.Session, wait_s: float) -> bool:
        if not session.is_open:
            waited.append(wait_s)
            clock.now += wait_s
        return session.is_open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video.Session, "opened", opened)
        for call in calls.values():
            call()
    assert waited == [video.OPENING_S, 0.0]
    engine.let.set()
    held.close_all()
