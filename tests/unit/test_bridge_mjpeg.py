"""The splitter of HTTP-MJPEG against streams as cameras write them, and against hostile ones."""

from __future__ import annotations

import contextlib
import random

import pytest
from bench.camera_fuzz import feed, one_input
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.cameras import jpeg as real_jpeg

from facelane_bridge.sources.mjpeg import (
    MAX_HEADER_BYTES,
    MjpegError,
    MjpegSplitter,
    media_type,
)

REAL = [real_jpeg(number) for number in range(4)]
STEPS = [1, 37, 100_000]


def jpeg(number: int, size: int = 50, *, end: bool = True) -> bytes:
    """Markers as in a picture: a comment, then image data."""
    head = b"\xff\xd8\xff\xfe\x00\x06" + number.to_bytes(4)
    return head + b"\xff\xda\x00\x02" + b"x" * size + (b"\xff\xd9" if end else b"")


def part(
    body: bytes,
    *,
    length: int | None = None,
    boundary: bytes = b"--frame",
    kind: str = "image/jpeg",
    line: bytes = b"\r\n",
    end: bytes = b"\r\n",
) -> bytes:
    """``length``: ``None`` for the right one, -1 for none."""
    lines = [boundary, f"Content-Type: {kind}".encode()]
    if length != -1:
        lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return line.join([*lines, b"", b""]) + body + end


def split(data: bytes, step: int = 1000, boundary: str = "frame", **options: int) -> list[bytes]:
    splitter = MjpegSplitter(boundary, **options)
    return feed(splitter, data, step)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 400),
    st.sampled_from([b"\r\n", b"", b"\r\n\r\n", b"\n"]),
)
def test_pictures_come_out_as_they_went_in(
    parts: list[tuple[int, bool]], step: int, end: bytes
) -> None:
    bodies = [jpeg(number, size) for number, (size, _) in enumerate(parts)]
    data = b"".join(
        part(body, length=None if known else -1, end=end)
        for body, (_, known) in zip(bodies, parts, strict=True)
    )
    assert split(data + b"--frame--", step) == bodies


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("announced", "written"),
    [
        ("frame", b"--frame"),
        ("--frame", b"--frame"),
        ("--frame", b"----frame"),
        ("--frame--", b"--frame--"),
        ("frame", b"frame"),
        ("frame", b"--frame--"),
        ("something else", b"--frame"),
        ("", b"--frame"),
        ("", b"frame"),
        ("--", b"--"),
        ("my frame", b"--my frame"),
    ],
)
@pytest.mark.parametrize("length", [None, -1])
def test_customs_of_writing_the_boundary(
    announced: str, written: bytes, length: int | None, step: int
) -> None:
    data = b"".join(part(body, boundary=written, length=length) for body in REAL)
    assert split(data, step, announced) == REAL


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("off", [2, 100, 100_000, -1, -100])
@pytest.mark.parametrize("marked", [True, False], ids=["end marker", "no end marker"])
def test_lengths_that_are_wrong(off: int, marked: bool, step: int) -> None:
    bodies = REAL if marked else [body[:-2] for body in REAL]
    data = b"".join(part(body, length=len(body) + off) for body in bodies)
    assert split(data, step) == bodies


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("written", [b"--frame", b"--other", b""])
def test_pictures_without_an_end_marker(written: bytes, step: int) -> None:
    bodies = [body[:-2] for body in REAL]
    data = b"".join(part(body, boundary=written, length=-1) for body in bodies)
    found = split(data, step)
    if written:
        assert found == bodies
    else:
        # Nothing else says so: the next picture ends the one before, its headers included.
        assert all(one.startswith(body) for one, body in zip(found, bodies, strict=True))


def test_an_end_marker_ends_a_picture_without_waiting_for_the_next() -> None:
    splitter = MjpegSplitter("frame")
    assert splitter.feed(part(REAL[0], length=-1, end=b"")) == [REAL[0]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "text/plain", "image/x-jpeg", "", "image/jpeg; charset=x"]
)
def test_what_begins_as_a_jpeg_is_one_whatever_its_part_says(kind: str, step: int) -> None:
    assert split(b"".join(part(body, kind=kind) for body in REAL), step) == REAL


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "data",
    [
        b"".join(REAL),
        b"\0\0\0\0".join(REAL),
        b"\r\n\r\n".join(REAL),
        # No boundary before the first picture.
        b"".join(part(body, boundary=b"")[2:] + b"--frame\r\n" for body in REAL),
        # Padding within the part, empty lines, a second picture (MPO) or a preview in it.
        b"".join(part(body + b"\0" * 300) for body in REAL),
        b"\r\n\r\n" + b"".join(part(body, end=b"\r\n\r\n\r\n") for body in REAL),
        b"".join(part(body + REAL[0]) for body in REAL),
        # Stray bytes between segments, fill bytes.
        b"".join(part(body) for body in REAL),
        b"".join(part(body, line=b"\n", end=b"\n") for body in REAL),
        b"HTTP/1.1 200 OK\r\n" + b"".join(part(body) for body in REAL),
    ],
)
def test_no_multipart_or_not_much_of_one(data: bytes, step: int) -> None:
    assert split(data, step) == REAL


def test_stray_and_fill_bytes_between_segments() -> None:
    odd = jpeg(1).replace(b"\xff\xda", b"\x00\x13\xff\xff\xff\xda")
    assert split(part(odd, length=-1) + part(jpeg(2), length=-1), 3) == [odd, jpeg(2)]


def test_a_picture_in_a_segment_is_no_picture() -> None:
    inner = jpeg(7)
    outer = b"\xff\xd8\xff\xe1" + (len(inner) + 2).to_bytes(2) + inner + jpeg(1)[2:]
    assert split(part(outer, length=-1) * 2, 5) == [outer, outer]


def test_a_boundary_inside_a_part_with_a_length_is_data() -> None:
    body = b"\xff\xd8\xff\xda\x00\x02--frame\r\n\r\nmore than sixteen\xff\xd9"
    assert split(part(body), 3) == [body]


def test_preamble_and_other_parts_are_passed_over_and_told() -> None:
    splitter = MjpegSplitter("frame")
    data = b"hello\r\n" + part(b"{}", kind="application/json") + part(b"no jpeg")
    assert splitter.feed(data) == []
    assert splitter.describe() == "parts came, none of them a JPEG (of type 'image/jpeg')"
    assert splitter.feed(part(jpeg(1))) == [jpeg(1)]
    assert splitter.parts_passed_over == 2
    assert splitter.describe() == ""


def test_what_came_instead_is_told() -> None:
    splitter = MjpegSplitter("frame")
    assert splitter.describe() == ""
    splitter.feed(b"<html>")
    assert splitter.describe() == "data came, and no JPEG in it"
    splitter.feed(b"\n" + jpeg(1)[:30])
    assert splitter.describe() == "a picture began and did not end"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("length", [None, -1])
def test_the_end_of_the_stream_ends_the_last_picture(length: int | None, marked: bool) -> None:
    body = jpeg(1, end=marked)
    assert split(part(body, length=length)) == [body]
    assert split(part(body, length=length)[:-20]) == [body[:-18]] or marked is False


@pytest.mark.parametrize("step", [100, 100_000])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"--frame\r\nX: " + b"a" * 5 * MAX_HEADER_BYTES, "NO_PICTURE"),
        (b"z" * 5 * MAX_HEADER_BYTES, "NO_PICTURE"),
        (b"--frame\r\n\r\n\xff\xd8\xff\xda" + b"y" * 50_000, "PART_TOO_LARGE"),
        (b"\xff\xd8\xff" + b"\xff" * 50_000, "PART_TOO_LARGE"),
        (part(jpeg(1)) + b"z" * 5 * MAX_HEADER_BYTES, "NO_PICTURE"),
    ],
)
def test_hostile_streams_end_with_a_reason(data: bytes, reason: str, step: int) -> None:
    with pytest.raises(MjpegError) as caught:
        split(data, step, max_part_bytes=10_000)
    assert caught.value.reason == reason


@given(st.binary(max_size=3000), st.integers(1, 500))
def test_nothing_makes_it_hold_more_than_a_part_or_break(data: bytes, step: int) -> None:
    splitter = MjpegSplitter("frame", max_part_bytes=200)
    with contextlib.suppress(MjpegError):
        for at in range(0, len(data), step):
            splitter.feed(data[at : at + step])
            assert splitter.buffered <= 2 * MAX_HEADER_BYTES + step


@pytest.mark.parametrize("seed", range(4))
def test_a_few_fuzzed_streams(seed: int) -> None:
    """``make fuzz-cameras`` goes on with this for millions."""
    source = random.Random(seed)
    for _ in range(500):
        one_input(source)


def test_a_part_in_small_pieces_costs_no_square() -> None:
    # 4 MiB in pieces of 64 bytes: searched from the start each time this takes minutes.
    body = jpeg(1, 4 * 1024 * 1024)
    assert split(part(body, length=-1), 64) == [body]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("multipart/x-mixed-replace; boundary=frame", ("multipart/x-mixed-replace", "frame")),
        ('multipart/x-mixed-replace;boundary="--my frame"', (..., "--my frame")),
        ("Multipart/X-Mixed-Replace; charset=x; BOUNDARY=abc", (..., "abc")),
        ("multipart/x-mixed-replace", (..., "")),
        ("multipart/x-mixed-replace; boundary=", (..., "")),
        (f"multipart/x-mixed-replace; boundary={'a' * 201}", (..., "")),
        ("text/html", ("text/html", "")),
        ("", ("", "")),
    ],
)
def test_what_an_answer_announces(header: str, expected: tuple[object, str]) -> None:
    kind, boundary = media_type(header)
    assert boundary == expected[1]
    assert kind == ("multipart/x-mixed-replace" if expected[0] is ... else expected[0])
