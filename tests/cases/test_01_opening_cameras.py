"""Opening a camera: far-off key frames, slow ones, useless clocks, covers, refused transports."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest

from facelane.cli import sources as cli_sources
from facelane_bridge.camera import Outlook
from facelane_bridge.reader import check_camera
from facelane_bridge.sources import SourceError, SourceReason, open_source
from tests.cases.cameras import Watched, failure, frames, settings
from tests.fakes.cameras import jpeg, picture, write_clip
from tests.fakes.field_cameras import (
    CLOCK,
    MULTIPART,
    HttpCamera,
    Play,
    Request,
    RtspCamera,
    head,
    parts,
)
from tests.waiting import auntil, until

# --- the key frame that comes first ---


def test_the_key_frame_that_a_camera_sends_first_is_the_first_frame() -> None:
    with RtspCamera(Play(frames=250, gop=250, fps=20)) as camera:
        (frame,) = frames(camera.url, 1)
    assert frame.media_time == 0


def test_every_frame_from_the_first_on_is_there() -> None:
    with RtspCamera(Play(frames=100, gop=100)) as camera:
        found = frames(camera.url, 20)
    steps = [b.media_time - a.media_time for a, b in itertools.pairwise(found)]
    assert steps == pytest.approx([0.1] * 19, abs=0.001)


@pytest.mark.slow
def test_a_time_out_says_that_packets_came_and_names_the_setting() -> None:
    with RtspCamera(Play(frames=250, gop=250, first=3, fps=10)) as camera:
        result = check_camera(settings(camera.url, open_timeout=2.0))
    assert result.error is not None
    assert "packets came, and no key frame" in result.error.message
    assert "open_timeout" in result.error.message


async def test_a_camera_that_answers_is_given_time_for_its_key_frame() -> None:
    # The next key frame comes two and a half seconds after PLAY, the opening time is less.
    with RtspCamera(Play(frames=50, gop=50, first=1, fps=20)) as camera:
        async with Watched(camera.url, open_timeout=2.0) as watched:
            await auntil(lambda: watched.results > 3)
            assert watched.openings == 1


# --- slow cameras ---


async def test_a_slow_camera_streams_and_is_opened_once() -> None:
    """A frame a second, with the patience of a camera that gives ten: scaled down by five."""
    with RtspCamera(Play(fps=5, stamp=lambda index: (index + 1) * CLOCK)) as camera:
        async with Watched(
            camera.url, stall_after=0.1, stall_limit=9.0, open_timeout=9.0
        ) as watched:
            await auntil(lambda: watched.results >= 6)
            # One pause of a busy machine aside: unlearned, every gap would be a stall.
            assert watched.states.count("STALLED") <= 1
            assert watched.openings == 1


async def test_a_slow_mjpeg_camera_streams_and_is_opened_once() -> None:
    def slow(_: Request) -> Iterator[bytes]:
        yield head(MULTIPART)
        for number in range(100):
            yield from parts(iter([jpeg(number)]))
            camera.stopped.wait(0.2)

    with HttpCamera(slow) as camera:
        async with Watched(
            camera.url, stall_after=0.1, stall_limit=9.0, open_timeout=9.0
        ) as watched:
            await auntil(lambda: watched.results >= 6)
            assert watched.states.count("STALLED") <= 1
            assert watched.openings == 1


# --- clocks ---


@pytest.mark.parametrize(("options", "results"), [({}, 110), ({"max_fps": 20}, 45)])
async def test_a_clock_that_never_moved_says_nothing(
    options: dict[str, float], results: int
) -> None:
    """In more than two seconds: were the clock believed, it had stalled by then."""
    with RtspCamera(Play(stamp=lambda _: CLOCK)) as camera:
        async with Watched(
            camera.url, stall_after=1.5, stall_limit=1.5, open_timeout=9.0, **options
        ) as watched:
            await auntil(lambda: watched.results > results)
            assert watched.states == ["STREAMING"]
            assert watched.openings == 1


async def test_a_clock_that_moved_and_stands_is_a_stall() -> None:
    with RtspCamera(Play(stamp=lambda index: min(index + 1, 20) * CLOCK // 10)) as camera:
        async with Watched(camera.url, stall_after=0.4, stall_limit=60.0) as watched:
            await auntil(lambda: "STALLED" in watched.states)
    assert watched.openings == 1


def test_stamps_that_come_in_pairs_or_jump_are_frames_all_the_same() -> None:
    for stamp in (
        lambda i: (i // 2 + 1) * CLOCK // 5,
        lambda i: (i + 1) * CLOCK // 10 + (i > 5) * 10**9,
    ):
        with RtspCamera(Play(stamp=stamp)) as camera:
            found = frames(camera.url, 30)
        times = [frame.media_time for frame in found]
        assert times == sorted(times)
        assert 1.0 < times[-1] < 10.0


# --- which of several streams ---


def film(path: Path, *, cover_first: bool, frames: int = 25) -> Path:
    """A clip with a picture as another video track, smaller or larger than the film."""
    with av.open(str(path), "w") as container:
        tracks = []
        for is_cover in (True, False) if cover_first else (False, True):
            track = container.add_stream("mjpeg" if is_cover else "libx264", rate=Fraction(10))
            track.width, track.height = (320, 240) if is_cover else (64, 48)
            track.pix_fmt = "yuvj420p" if is_cover else "yuv420p"
            tracks.append((track, is_cover))
        for track, is_cover in tracks:
            for index in range(1 if is_cover else frames):
                frame = av.VideoFrame.from_ndarray(
                    picture(track.width, track.height, index), format="bgr24"
                ).reformat(format=track.pix_fmt)
                frame.pts, frame.time_base = index, Fraction(1, 10)
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path


@pytest.mark.parametrize("cover_first", [True, False])
def test_the_film_is_taken_and_not_its_cover(tmp_path: Path, cover_first: bool) -> None:
    clip = film(tmp_path / "clip.mp4", cover_first=cover_first)
    assert len(frames(str(clip), 100, pace="fast")) == 25
    command = cli_sources.open_source(str(clip))
    assert sum(1 for _ in command.items()) == 25


def test_a_clip_of_one_frame_is_a_clip(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=1)
    assert len(frames(str(clip), 100, pace="fast")) == 1


@pytest.mark.shared
def test_the_clip_of_the_case(shared: Path) -> None:
    clip = shared / "cases/15-cover-art-first/cover_first.mp4"
    if not clip.exists():
        pytest.skip("no such case here")
    assert len(frames(str(clip), 1000, pace="fast")) == 200


# --- what the camera refuses ---


@pytest.mark.parametrize(
    ("status", "method", "text"),
    [
        (461, "SETUP", r"refuses to send over TCP .* set transport = \"udp\""),
        (453, "SETUP", "no place for another viewer"),
        (453, "DESCRIBE", "no place for another viewer"),
        (503, "DESCRIBE", "busy or still starts"),
        (500, "PLAY", "a fault of its own .RTSP 500 to PLAY"),
        (454, "PLAY", "answers RTSP 454 to PLAY"),
        (404, "DESCRIBE", "no such stream"),
        (400, "OPTIONS", "answers RTSP 400 to OPTIONS"),
    ],
)
def test_a_refusal_is_told_in_words_and_passes(status: int, method: str, text: str) -> None:
    with RtspCamera(reply=lambda r: (status, []) if r.method == method else None) as camera:
        error = failure(camera.url)
    assert re.search(text, error.message), error.message
    assert error.outlook is Outlook.PASSING


def test_a_camera_that_moves_is_followed() -> None:
    with (
        RtspCamera() as there,
        RtspCamera(reply=lambda _: (302, [("Location", there.url)])) as here,
    ):
        assert len(frames(here.url, 3)) == 3
    with RtspCamera(reply=lambda r: (302, [("Location", r.uri)])) as circle:
        assert "redirects to nowhere" in failure(circle.url).message


def test_an_interrupted_source_lets_go_at_once() -> None:
    """Also while FFmpeg waits: the relay ends its connection."""
    with RtspCamera(Play(fps=0.02)) as camera:
        source = open_source(settings(camera.url, read_timeout=60.0))
        said: list[SourceReason] = []

        def run() -> None:
            try:
                source.open()
                while source.read() is not None:
                    pass
            except SourceError as error:
                said.append(error.reason)
            finally:
                source.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        until(lambda: source.connected)
        source.interrupt()
        thread.join(40)
        assert not thread.is_alive()
    assert said == [SourceReason.INTERRUPTED]
