"""HTTP-MJPEG as cameras write it, through the whole source; and pictures that mean no good."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import pytest

from facelane_bridge.output import ErrorLine
from facelane_bridge.reader import check_camera
from facelane_bridge.sources.jpeg import JpegGate, read_header
from tests.cases.cameras import Watched, failure, frames, settings
from tests.fakes.cameras import jpeg, picture
from tests.fakes.field_cameras import MULTIPART, HttpCamera, Request, head, parts
from tests.waiting import auntil

PICTURES = [jpeg(number) for number in range(5)]
LARGE = cv2.imencode(".jpg", cv2.randn(picture(640, 480).copy(), 128, 80))[1].tobytes()


def given(*pieces: bytes, kind: str | None = MULTIPART) -> list[bytes]:
    """The pictures that the source gives of a camera that writes this."""
    with HttpCamera(lambda _: iter([head(kind), *pieces, *parts(iter(PICTURES))])) as camera:
        found = frames(camera.url, len(PICTURES), read_timeout=5.0)
    assert all(frame.refused is None for frame in found)
    return [frame.data for frame in found]


def part(body: bytes, text: bytes, before: bytes = b"--frame\r\n") -> bytes:
    return before + text + b"\r\n\r\n" + body + b"\r\n"


@pytest.mark.parametrize("off", [100, 3_000, -100])
def test_lengths_that_are_wrong(off: int) -> None:
    assert (
        given(*(part(data, b"Content-Length: %d" % (len(data) + off)) for data in PICTURES))
        == PICTURES
    )


@pytest.mark.parametrize(
    "kind", [b"application/octet-stream", b"text/plain", b"image/x-jpeg", b"IMAGE/JPG"]
)
def test_parts_of_any_type(kind: bytes) -> None:
    assert given(*(part(data, b"Content-Type: " + kind) for data in PICTURES)) == PICTURES


@pytest.mark.parametrize(
    ("announced", "written"),
    [
        ("--myboundary", b"----myboundary"),
        ("myboundary", b"----myboundary"),
        ("--myboundary", b"myboundary"),
        ('"my boundary"', b"--my boundary"),
        ("one", b"--another"),
    ],
)
def test_boundaries_written_in_another_way(announced: str, written: bytes) -> None:
    kind = f"multipart/x-mixed-replace; boundary={announced}"
    texts = (part(data, b"Content-Type: image/jpeg", written + b"\r\n") for data in PICTURES)
    assert given(*texts, kind=kind) == PICTURES


def test_no_boundary_before_a_first_picture_larger_than_any_preamble() -> None:
    assert len(LARGE) > 64 * 1024
    first = part(LARGE, b"Content-Type: image/jpeg", b"")
    assert given(first, *(part(data, b"X: y") for data in PICTURES))[0] == LARGE


def test_pictures_without_an_end_marker_pass_as_they_are() -> None:
    cut = [data[:-2] for data in PICTURES]
    assert given(*(part(data, b"Content-Length: %d" % len(data)) for data in cut)) == cut


def test_a_stream_whose_answer_says_that_it_is_empty() -> None:
    """Firmware that has to write some length writes 0."""
    kind = f"{MULTIPART}\r\nContent-Length: 0"
    assert given(*(part(data, b"X: y") for data in PICTURES), kind=kind) == PICTURES


def test_what_came_instead_of_pictures_is_told() -> None:
    def other(_: Request) -> Iterator[bytes]:
        yield head(MULTIPART)
        for _ in range(20):
            yield part(b"\x89PNG and so on", b"Content-Type: image/png")
        camera.stopped.wait(30)

    with HttpCamera(other) as camera:
        result = check_camera(settings(camera.url, open_timeout=1.5))
    assert result.error is not None
    assert "none of them a JPEG (of type 'image/png')" in result.error.message
    with HttpCamera(lambda _: iter([head(MULTIPART), part(b"{}", b"Content-Type: a/b")])) as camera:
        assert "(of type 'a/b')" in failure(camera.url).message


@pytest.mark.parametrize("kind", [MULTIPART, "image/jpeg"])
async def test_one_picture_a_connection(kind: str) -> None:
    def body(request: Request) -> Iterator[bytes]:
        yield head(kind)
        data = PICTURES[request.count % 5]
        yield part(data, b"Content-Type: image/jpeg") if kind == MULTIPART else data

    with HttpCamera(body) as camera:
        async with Watched(camera.url, stall_after=2.0) as watched:
            await auntil(lambda: watched.results >= 8)
            assert watched.states == ["STREAMING"]
            assert watched.openings == 1
        assert camera.connections >= 8


async def test_a_camera_that_ends_every_connection_after_a_while_keeps_streaming() -> None:
    def body(_: Request) -> Iterator[bytes]:
        yield head(MULTIPART)
        yield from parts(iter(PICTURES))

    with HttpCamera(body) as camera:
        async with Watched(camera.url, backoff_max=0.1) as watched:
            await auntil(lambda: watched.results >= 20)
    assert "FAILED" not in watched.states


# --- pictures that mean no good ---


def progressive(scans: int) -> bytes:
    """A small progressive picture that repeats its last scan."""
    data = cv2.imencode(
        ".jpg", picture(64, 48), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_QUALITY, 50]
    )[1].tobytes()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


async def test_a_picture_of_four_thousand_scans_goes_no_further() -> None:
    def body(_: Request) -> Iterator[bytes]:
        yield head(MULTIPART)
        for data in PICTURES:
            yield from parts(iter([progressive(4000), data]))
            camera.stopped.wait(0.05)

    with HttpCamera(body) as camera:
        async with Watched(camera.url, overload="lossless") as watched:
            await auntil(lambda: watched.results >= 4)
        sent = [request for stream in watched._server.streams for request in stream]
    errors = [line for line in watched.lines if isinstance(line, ErrorLine)]
    assert {line.reason for line in errors} == {"PICTURE_TOO_COSTLY"}
    assert "scans" in errors[0].message
    assert all(len(request.frame.picture.data) < 10_000 for request in sent)


def test_a_progressive_picture_is_encoded_anew_as_a_plain_one() -> None:
    with HttpCamera(lambda _: iter([head(MULTIPART), *parts(iter([progressive(1)]))])) as camera:
        (frame,) = frames(camera.url, 1)
    header = read_header(frame.data)
    assert header is not None
    assert header.is_plain
    assert (header.width, header.height) == (64, 48)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (progressive(65), "PICTURE_TOO_COSTLY"),
        (progressive(1).replace(b"\x00\x30\x00\x40", b"\x40\x00\x40\x00"), "PICTURE_TOO_LARGE"),
        (progressive(1).replace(b"\x00\x30\x00\x40", b"\x20\x00\x20\x00"), "PICTURE_TOO_COSTLY"),
        (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9", "PICTURE_CORRUPT"),
        (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 5000 + PICTURES[0][2:], "PICTURE_CORRUPT"),
        (progressive(1)[:200], "PICTURE_CORRUPT"),
    ],
)
def test_what_is_not_worth_decoding(data: bytes, reason: str) -> None:
    taken = JpegGate(90, 0).take(data)
    assert not isinstance(taken, bytes)
    assert taken.reason == reason


def test_the_pictures_of_a_clip_pass_the_same_gate(tmp_path: Path) -> None:
    """Over RTSP, from a device or a file: MJPEG is MJPEG."""
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, data in enumerate([PICTURES[0], progressive(1), progressive(200)]):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = number
            container.mux(packet)
    first, second, third = frames(str(path), 10, pace="fast")
    assert first.data == PICTURES[0]
    assert (header := read_header(second.data)) is not None
    assert header.is_plain
    assert third.refused is not None
    assert third.refused.reason == "PICTURE_TOO_COSTLY"
