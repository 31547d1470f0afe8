"""What the command line reads: stills that must be turned or converted, cameras, pace."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane.cli import output, sources, stills, videos
from facelane.cli.sources import SourceError, open_source
from facelane.cli.stills import exif_orientation, load_picture
from facelane.errors import PictureError
from facelane.types import Encoding, Face, FrameResult, Identity, Liveness, Outcome


def jpeg(width: int = 64, height: int = 32) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    # White at the left, so that a turn shows.
    pixels[:, : width // 2] = 255
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def with_orientation(data: bytes, value: int, order: str = "<") -> bytes:
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    tiff = mark + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", 2)
    tiff += struct.pack(f"{order}HHIHxx", 0x010F, 2, 1, 0)
    tiff += struct.pack(f"{order}HHIHxx", 0x0112, 3, 1, value)
    body = b"Exif\x00\x00" + tiff
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_the_orientation_is_read(value: int, order: str) -> None:
    assert exif_orientation(with_orientation(jpeg(), value, order)) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe1\x00\x00",
        b"\xff\xd8\xff\xe1\x00\x01Exif\x00\x00",
        with_orientation(jpeg(), 9),
        with_orientation(jpeg(), 6)[:40],
        b"\xff\xd8\xff\xe1\x00\x12Exif\x00\x00XX*\x00\x00\x00\x00\x08",
        b"\xff\xd8\xff\xe1\x00\x12Exif\x00\x00II*\x00\xff\xff\xff\xff",
        jpeg(),
    ],
)
def test_nonsense_is_upright(data: bytes) -> None:
    assert exif_orientation(data) == 1


def test_a_turned_photo_is_sent_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(with_orientation(jpeg(), 6))
    picture = load_picture(path)
    pixels = sources.decode(picture.data)
    assert pixels.shape == (64, 32, 3)
    # Orientation 6: what was left is on top.
    assert pixels[5, 16].min() > 200
    assert pixels[60, 16].max() < 50


def test_an_upright_photo_goes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(with_orientation(jpeg(), 1))
    assert load_picture(path).data == path.read_bytes()


@pytest.mark.parametrize("suffix", [".bmp", ".tiff"])
def test_what_the_server_cannot_read_is_converted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), np.full((48, 64, 3), 200, np.uint8))
    picture = load_picture(path)
    assert picture.encoding is Encoding.JPEG
    assert sources.decode(picture.data).shape == (48, 64, 3)


def test_nonsense_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"nonsense")
    with pytest.raises(PictureError) as caught:
        load_picture(path)
    assert caught.value.reason == "PICTURE_CORRUPT"


@pytest.mark.parametrize(("width", "height"), [(70_000, 70_000), (1 << 21, 10)])
@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_a_picture_that_promises_the_world_is_told(
    tmp_path: Path, kind: str, width: int, height: int
) -> None:
    """A file of a hundred bytes in a folder is no end of the others."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bmp = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    found = {
        "png": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b""),
        "bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + bmp + bytes(50),
    }
    path = tmp_path / f"a.{kind}"
    path.write_bytes(found[kind])
    with pytest.raises(PictureError) as caught:
        load_picture(path)
    assert caught.value.reason in ("PICTURE_TOO_LARGE", "PICTURE_CORRUPT")


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def test_a_file_that_is_far_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stills, "_READ_BYTES", 1000)
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg() + bytes(1000))
    with pytest.raises(PictureError) as caught:
        load_picture(path)
    assert caught.value.reason == "PICTURE_TOO_LARGE"


def test_a_number_is_a_camera(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="/dev/video97"):
        open_source("97")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://u:p@host:554/a?b=c", "rtsp://host:554/a?b=c"),
        ("rtsp://u:p@ss@host/a", "rtsp://host/a"),
        ("http://host/a@b", "http://host/a@b"),
        ("rtsp://[::1]:554/a", "rtsp://[::1]:554/a"),
        ("rtsp://u:p@[::1/a", "rtsp://[::1/a"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert sources.without_credentials(url) == shown


def test_the_pace_is_the_clock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(videos.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(videos.time, "sleep", sleep)
    pace = videos._Pace()
    pace.wait(0.0)
    pace.wait(0.04)
    now[0] += 1.0
    pace.wait(0.08)
    pace.wait(2.0)
    assert slept == pytest.approx([0.04, 0.96])


def face(track_id: int) -> Face:
    from facelane.types import BoundingBox

    return Face(track_id, BoundingBox(0, 0, 1, 1), 0.5, (), Identity(), Liveness())


def test_the_book_of_tracks_is_bounded() -> None:
    book = output.TrackBook()
    for number in range(book.LIMIT + 5):
        result = FrameResult(1, 1, (face(number + 1), face(1)))
        book.add(Outcome(number + 1, number / 10, None, result))
    assert book.uncounted == 5
    table = book.table()
    assert table.row_count == book.LIMIT


def test_a_video_file_has_even_sides(tmp_path: Path) -> None:
    import av

    writer = output.VideoWriter(tmp_path / "a.mp4", 25.0)
    writer.write(np.zeros((51, 101, 3), np.uint8), 0.0)
    writer.write(np.zeros((60, 120, 3), np.uint8), 0.0)
    writer.close()
    writer.close()
    with av.open(str(tmp_path / "a.mp4")) as made:
        sizes = {(f.width, f.height) for f in made.decode(video=0)}
    assert sizes == {(100, 50)}


def test_frames_lie_at_their_own_time(tmp_path: Path) -> None:
    import av

    writer = output.VideoWriter(tmp_path / "a.mp4", 25.0)
    for offset in (3.0, 3.04, 5.0):
        writer.write(np.zeros((48, 64, 3), np.uint8), offset)
    writer.close(end=7.0)
    with av.open(str(tmp_path / "a.mp4")) as made:
        times = [frame.time for frame in made.decode(video=0)]
    assert times == pytest.approx([0.0, 0.04, 2.0, 4.0], abs=1e-3)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("0", "video0"),
        ("/dev/video3", "video3"),
        ("rtsp://user:s3cret@10.0.0.5:554/stream1?a=b", "10.0.0.5-554-stream1"),
        ("clips/short clip.mp4", "short-clip"),
        ("photos/", "photos"),
        ("画.jpg", "source"),
        ("http://[2001:db8::1]/" + "x" * 90, "2001-db8-1-" + "x" * 53),
    ],
)
def test_a_source_has_a_name(source: str, name: str) -> None:
    assert sources.name_of(source) == name


def test_writing_a_picture_where_it_cannot_be(tmp_path: Path) -> None:
    for bad in (tmp_path / "no" / "a.jpg", tmp_path / "a.xyz"):
        with pytest.raises(OSError, match="cannot be written"):
            output.write_picture(bad, np.zeros((4, 4, 3), np.uint8))
