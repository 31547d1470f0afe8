"""Video that is passed on: what the bridge keeps of it, and when it decodes instead."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from tests.fakes import clips
from tests.unit.test_bridge_sources import camera, read_all, size_of

import facelane
from facelane import Encoding
from facelane_bridge import handover as handover_module
from facelane_bridge.handover import VIDEO_ROOM, Handover, Taken
from facelane_bridge.passing import PATIENCE_ERRORS, PATIENCE_KEYS, Passing, picture_of
from facelane_bridge.sources import CapturedFrame, SourceError, SourceReason, open_source

KEY = "K"


def unit(key: bool, size: int = 1) -> CapturedFrame:
    return CapturedFrame(b"\0\0\1" + b"x" * size, 0.0, 0.0, video=Encoding.H264, is_key=key)


async def filled(pattern: str, *, lossless: bool = False) -> Handover:
    """With an access unit a letter, K for key frames."""
    handover, reader = Handover(asyncio.get_running_loop(), lossless=lossless), object()
    handover.admit(reader, 0.0)
    for letter in pattern:
        assert handover.offer(reader, unit(letter == KEY))
    return handover


async def taken(handover: Handover) -> list[Taken]:
    handover.close()
    every = []
    while (one := await handover.take()).frame is not None:
        every.append(one)
    return [*every, one]


def ids(every: list[Taken]) -> list[int]:
    return [one.frame.frame_id for one in every if one.frame is not None]


def counted(every: list[Taken]) -> int:
    return sum(one.replaced + (one.frame is not None) for one in every)


async def test_none_is_replaced_while_there_is_room() -> None:
    every = await taken(await filled(KEY + "p" * 99))
    assert ids(every) == list(range(1, 101))
    assert [one.replaced for one in every] == [0] * 101


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        # As far as the newest key frame;
        (KEY + "p" * 99 + KEY + "p" * (VIDEO_ROOM - 100), range(101, VIDEO_ROOM + 2)),
        # which may be the one that comes;
        (KEY + "p" * (VIDEO_ROOM - 1) + KEY + "p", range(VIDEO_ROOM + 1, VIDEO_ROOM + 3)),
        # and where there is none, until one comes.
        (KEY + "p" * (VIDEO_ROOM + 50) + KEY + "p", range(VIDEO_ROOM + 52, VIDEO_ROOM + 54)),
        (KEY + "p" * (VIDEO_ROOM + 50), range(0)),
    ],
)
async def test_what_is_given_up_ends_at_a_key_frame(pattern: str, left: range) -> None:
    every = await taken(await filled(pattern))
    assert ids(every) == list(left)
    assert counted(every) == len(pattern), "every one is told"


async def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_module, "VIDEO_ROOM_BYTES", 100)
    every = await taken(await filled(KEY + "p" * 10 + KEY + "p" * 20 + KEY + "p"))
    assert ids(every) == list(range(12, 35))
    assert counted(every) == 34


async def test_after_a_unit_that_was_not_sent_the_next_is_a_key_frame() -> None:
    handover = await filled("pp" + KEY + "p")
    handover.skip_to_key_frame()
    assert ids(await taken(handover)) == [3, 4]
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    handover.admit(reader, 0.0)
    handover.skip_to_key_frame()
    for letter in "pp" + KEY:
        handover.offer(reader, unit(letter == KEY))
    every = await taken(handover)
    assert (ids(every), counted(every)) == ([3], 3)


@pytest.mark.parametrize(
    ("pattern", "replayed"),
    [(KEY + "pp" + KEY + "pp", 3), (KEY + "p" * 300, 0), ("ppp", 0), (KEY + "p" * 300 + KEY, 1)],
)
async def test_a_group_is_given_once_more(pattern: str, replayed: int) -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    handover.admit(reader, 0.0)
    for letter in pattern:
        handover.offer(reader, unit(letter == KEY))
        assert (await handover.take()).frame is not None
    handover.replay()
    every = await taken(handover)
    first = len(pattern) + 1
    assert ids(every) == list(range(first, first + replayed))
    assert [one.frame.frame.is_key for one in every if one.frame] == (
        [True] + [False] * (replayed - 1) if replayed else []
    )


async def test_what_waits_is_part_of_what_is_given_once_more() -> None:
    handover = await filled(KEY + "pp")
    assert (await handover.take()).frame is not None
    handover.replay()
    every = await taken(handover)
    assert ids(every) == [4, 5, 6]
    assert every[0].replaced == 2, "those that waited"


async def test_a_picture_takes_the_place_of_video() -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    handover.admit(reader, 0.0)
    for frame in (unit(True), unit(False), CapturedFrame(b"jpeg", 0.0, 0.0)):
        handover.offer(reader, frame)
    every = await taken(handover)
    assert (ids(every), counted(every)) == ([3], 3)


# --- whether it goes on ---


def outcome(body: Any) -> facelane.Outcome:
    return facelane.Outcome(1, 0.0, None, body)


def waiting() -> facelane.Outcome:
    return outcome(facelane.FrameDrop(facelane.DropReason.WAITING_FOR_KEY_FRAME))


def test_a_server_that_knows_no_video() -> None:
    passing = Passing()
    error = facelane.FrameError("ENCODING_UNSUPPORTED", "one of JPEG, PNG, WEBP", False)
    assert not passing.settled(outcome(error)), "nothing was passed on"
    passing.sent(unit(True))
    assert "one of JPEG" in passing.settled(outcome(error))
    other = facelane.FrameError("PICTURE_CORRUPT", "broken", False)
    assert not passing.settled(outcome(other)), "a bad unit is no bad camera"
    lost = facelane.FrameError("CONNECTION_LOST", "the stream ended", True)
    for _ in range(2 * PATIENCE_ERRORS):
        assert not passing.settled(outcome(lost)), "which says nothing of the video"


def test_a_server_that_finds_everything_broken() -> None:
    passing = Passing()
    passing.sent(unit(True))
    broken = outcome(facelane.FrameError("PICTURE_CORRUPT", "two pictures", False))
    assert [bool(passing.settled(broken)) for _ in range(PATIENCE_ERRORS)].index(True) == (
        PATIENCE_ERRORS - 1
    )


def test_a_server_that_sees_no_key_frame() -> None:
    passing = Passing()
    for _ in range(PATIENCE_KEYS):
        passing.sent(unit(True))
        passing.sent(unit(False))
        assert not passing.settled(waiting())
    passing.sent(unit(True))
    assert "key frame" in passing.settled(waiting())


def test_a_server_that_waited_and_goes_on() -> None:
    passing = Passing()
    for _ in range(20):
        passing.sent(unit(True))
        assert not passing.settled(waiting())
        drop = facelane.FrameDrop(facelane.DropReason.SUPERSEDED)
        assert not passing.settled(outcome(drop))


def test_what_is_sent() -> None:
    assert picture_of(unit(True)).encoding is Encoding.H264
    with pytest.raises(facelane.PictureError):
        picture_of(CapturedFrame(b"no JPEG", 0.0, 0.0))


# --- sources ---


@pytest.mark.parametrize("kind", clips.KINDS)
def test_what_a_file_gives(kind: str, tmp_path: Path) -> None:
    source = open_source(camera(str(clips.write(tmp_path, kind)), pace="fast", video="auto"))
    with structlog.testing.capture_logs() as logs:
        frames = read_all(source)
    assert len(frames) == 30
    step = 0.04 if kind == "no container" else 0.1
    assert [f.media_time for f in frames] == pytest.approx([n * step for n in range(30)], abs=2e-3)
    told = [entry["why"] for entry in logs if entry["event"] == "the video is decoded here"]
    if kind in clips.NOT_PASSABLE:
        assert all(frame.video is None and size_of(frame.data) == (128, 96) for frame in frames)
        assert len(told) == (kind != "MPEG-4"), "MPEG-4 was never to be passed on"
        return
    assert not told
    assert {f.video for f in frames} == {Encoding.H265 if "H.265" in kind else Encoding.H264}
    assert frames[0].is_key
    seen = clips.shown([picture_of(frame) for frame in frames])
    assert seen == pytest.approx([clips.brightness(n) for n in range(30)], abs=4)


@pytest.mark.parametrize("options", [{"video": "decode"}, {"max_side": 64}, {"max_fps": 0.05}])
def test_what_wants_pictures_decodes(options: dict[str, Any], tmp_path: Path) -> None:
    given = {"pace": "fast", "video": "auto"} | options
    source = open_source(camera(str(clips.write(tmp_path, "plain")), **given))
    frames = read_all(source)
    assert frames
    assert all(frame.video is None for frame in frames)


def test_passing_on_may_be_wanted(tmp_path: Path) -> None:
    for kind in clips.NOT_PASSABLE:
        path = clips.write(tmp_path, kind)
        with pytest.raises(SourceError) as caught:
            read_all(open_source(camera(str(path), pace="fast", video="pass")))
        assert caught.value.reason is SourceReason.NOT_PASSABLE


@pytest.mark.parametrize("read", [17, 25])
def test_a_file_is_taken_back_to_its_key_frame(read: int, tmp_path: Path) -> None:
    source = open_source(camera(str(clips.write(tmp_path, "plain")), pace="fast", video="auto"))
    source.open()
    frames = [source.read() for _ in range(read)]
    source.wants_key_frame(frames[13].media_time)
    while (frame := source.read()) is not None:
        frames.append(frame)
    source.close()
    keys = [n for n, frame in enumerate(frames) if frame is not None and frame.is_key]
    again = next(n for n in keys if n >= read)
    assert again in (read, read + 1), "the one that was read meanwhile comes first"
    assert len(frames) == 30 + again - 10
    offsets = [frame.media_time for frame in frames if frame is not None]
    assert offsets == sorted(offsets)
    assert offsets[again] == offsets[again - 1], "sent again, at no new time"
    last = [picture_of(frame) for frame in frames[again:] if frame is not None]
    seen = clips.shown(last)
    assert seen == pytest.approx([clips.brightness(n) for n in range(10, 30)], abs=4)


def test_a_loop_of_video_goes_on_with_the_media_clock(tmp_path: Path) -> None:
    path = clips.write(tmp_path, "b-frames", frames=5)
    frames = read_all(
        open_source(camera(str(path), pace="fast", loop=True, video="auto")), limit=13
    )
    assert [f.media_time for f in frames] == pytest.approx([n / 10 for n in range(13)], abs=2e-3)
    assert [n for n, frame in enumerate(frames) if frame.is_key] == [0, 5, 10]
