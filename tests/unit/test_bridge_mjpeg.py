"""The multipart parser against well-meant and hostile streams."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_bridge.sources.mjpeg import (
    MAX_HEADER_BYTES,
    MAX_PREAMBLE_BYTES,
    MjpegError,
    MjpegParser,
    boundary_of,
)

BOUNDARY = "frame"


def jpeg(number: int, size: int = 50) -> bytes:
    return b"\xff\xd8\xff\xe0" + number.to_bytes(4) + b"x" * size + b"\xff\xd9"


def part(
    body: bytes, *, length: bool = True, kind: str = "image/jpeg", end: bytes = b"\r\n"
) -> bytes:
    header = f"--{BOUNDARY}\r\nContent-Type: {kind}\r\n"
    if length:
        header += f"Content-Length: {len(body)}\r\n"
    return header.encode() + b"\r\n" + body + end


def feed_all(data: bytes, step: int, **options: int) -> list[bytes]:
    parser = MjpegParser(BOUNDARY, **options)
    pictures: list[bytes] = []
    for at in range(0, len(data), step):
        pictures += parser.feed(data[at : at + step])
    return pictures


@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 400),
    st.sampled_from([b"\r\n", b"", b"\r\n\r\n"]),
)
def test_pictures_come_out_as_they_went_in(
    parts: list[tuple[int, bool]], step: int, end: bytes
) -> None:
    bodies = [jpeg(number, size) for number, (size, _) in enumerate(parts)]
    data = b"".join(
        part(body, length=length, end=end if length else b"\r\n")
        for body, (_, length) in zip(bodies, parts, strict=True)
    )
    # A part without a length ends where the next boundary begins.
    assert feed_all(data + f"--{BOUNDARY}--".encode(), step) == bodies


@pytest.mark.parametrize("announced", ["frame", "--frame"])
def test_both_customs_of_writing_the_boundary(announced: str) -> None:
    parser = MjpegParser(announced)
    assert parser.feed(part(jpeg(1)) + b"--frame") == [jpeg(1)]


def test_bare_line_feeds_are_understood() -> None:
    body = jpeg(1)
    data = b"--frame\nContent-Type: image/jpeg\nContent-Length: %d\n\n" % len(body) + body + b"\n"
    assert feed_all(data + b"--frame", 7) == [body]


def test_a_boundary_inside_a_part_with_a_length_is_data() -> None:
    body = b"\xff\xd8--frame\r\n\r\n\xff\xd9"
    assert feed_all(part(body), 3) == [body]


def test_preamble_and_other_parts_are_passed_over() -> None:
    parser = MjpegParser(BOUNDARY)
    data = b"hello\r\n" + part(b"{}", kind="application/json") + part(b"no jpeg") + part(jpeg(1))
    assert parser.feed(data) == [jpeg(1)]
    assert parser.parts_passed_over == 2


def test_a_length_of_zero_means_unknown() -> None:
    body = jpeg(1)
    data = b"--frame\r\nContent-Length: 0\r\n\r\n" + body + b"\r\n--frame\r\n"
    assert feed_all(data, 5) == [body]


def test_the_closing_boundary_ends_it() -> None:
    parser = MjpegParser(BOUNDARY)
    assert parser.feed(part(jpeg(1)) + b"--frame--\r\nepilogue") == [jpeg(1)]
    assert parser.ended
    assert parser.feed(part(jpeg(2))) == []
    assert parser.buffered == 0


@pytest.mark.parametrize("step", [1, 100, 100_000])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"--frame\r\nX: " + b"a" * 2 * MAX_HEADER_BYTES, "HEADER_TOO_LONG"),
        (b"--frame\r\n" + b"X: y\r\n" * MAX_HEADER_BYTES, "HEADER_TOO_LONG"),
        (b"--frame\r\n" + b"X: y\r\n" * MAX_HEADER_BYTES + b"\r\n", "HEADER_TOO_LONG"),
        (b"z" * 2 * MAX_PREAMBLE_BYTES, "BOUNDARY_MISSING"),
        (b"--frame\r\nContent-Length: 1001\r\n\r\n", "PART_TOO_LARGE"),
        (b"--frame\r\nContent-Length: 99999999999999999999999\r\n\r\n", "LENGTH_INVALID"),
        (b"--frame\r\nContent-Length: -5\r\n\r\n", "LENGTH_INVALID"),
        (b"--frame\r\nContent-Length: 0x10\r\n\r\n", "LENGTH_INVALID"),
        (b"--frame\r\n\r\n" + b"y" * 5000, "PART_TOO_LARGE"),
        (b"--frame\r\n\r\n" + b"y" * 1500 + b"\r\n--frame", "PART_TOO_LARGE"),
        (b"--frame\r\nContent-Length: 4\r\n\r\n" + jpeg(1) + b"\r\n--frame", "LENGTH_WRONG"),
    ],
)
def test_hostile_streams_end_with_a_reason(data: bytes, reason: str, step: int) -> None:
    with pytest.raises(MjpegError) as caught:
        feed_all(data, step, max_part_bytes=1000)
    assert caught.value.reason == reason


@given(st.binary(max_size=3000), st.integers(1, 500))
def test_nothing_makes_it_hold_more_than_a_part_or_break(data: bytes, step: int) -> None:
    parser = MjpegParser(BOUNDARY, max_part_bytes=200)
    with contextlib.suppress(MjpegError):
        for at in range(0, len(data), step):
            parser.feed(data[at : at + step])
            assert parser.buffered <= MAX_PREAMBLE_BYTES + step


@given(
    st.lists(
        st.sampled_from(
            [b"--frame", b"--", b"\r\n", b"\n", b"Content-Length: ", b"7", b"\xff\xd8\xff", b"abc"]
        ),
        max_size=60,
    )
)
def test_neither_do_pieces_of_the_grammar(pieces: list[bytes]) -> None:
    parser = MjpegParser(BOUNDARY, max_part_bytes=100)
    with contextlib.suppress(MjpegError):
        for piece in pieces:
            for picture in parser.feed(piece):
                assert picture.startswith(b"\xff\xd8")
                assert len(picture) <= 100


def test_a_part_in_small_pieces_costs_no_square() -> None:
    # 4 MiB in pieces of 64 bytes: searched from the start each time this takes minutes.
    body = jpeg(1, 4 * 1024 * 1024)
    assert feed_all(part(body, length=False) + b"--frame", 64) == [body]


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/x-mixed-replace; boundary=frame", "frame"),
        ('multipart/x-mixed-replace;boundary="--my frame"', "--my frame"),
        ("Multipart/X-Mixed-Replace; charset=x; BOUNDARY=abc", "abc"),
    ],
)
def test_boundaries_are_read_from_the_header(header: str, boundary: str) -> None:
    assert boundary_of(header) == boundary


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "NOT_MULTIPART"),
        ("text/html", "NOT_MULTIPART"),
        ("multipart/x-mixed-replace", "BOUNDARY_MISSING"),
        ('multipart/x-mixed-replace; boundary=""', "BOUNDARY_MISSING"),
        (f"multipart/x-mixed-replace; boundary={'a' * 201}", "BOUNDARY_TOO_LONG"),
    ],
)
def test_senseless_headers_are_refused(header: str, reason: str) -> None:
    with pytest.raises(MjpegError) as caught:
        boundary_of(header)
    assert caught.value.reason == reason
