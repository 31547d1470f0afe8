"""Of a folder everything is analysed that can be read, and of the rest it is said what and why.

Nothing in a folder holds the command up: a pipe, a socket, a link to nowhere, a folder in it.
"""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import facelane
from facelane.cli.app import app
from facelane.cli.stills import decode, exif_orientation, load_picture, look_through
from tests.fakes import scripted_server as fake

PIXELS = np.full((48, 64, 3), 90, np.uint8)


def encoded(suffix: str) -> bytes:
    done, data = cv2.imencode(suffix, PIXELS)
    assert done
    return bytes(data.tobytes())


def by_ffmpeg(codec: str, container: str) -> bytes:
    kept = io.BytesIO()
    with av.open(kept, "w", format=container) as out:
        stream = out.add_stream(codec, rate=1)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(PIXELS, format="bgr24")))
        out.mux(stream.encode())
    return kept.getvalue()


@pytest.fixture(scope="module")
def avif() -> bytes:
    return (
        by_ffmpeg("libaom-av1", "avif") if "libaom-av1" in av.codecs_available else encoded(".avif")
    )


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


def run(server: fake.ScriptedServer, *words: object, code: int = 0) -> Any:
    start = ["--target", server.target, *map(str, words)]
    result = CliRunner().invoke(app, start, prog_name="facelane")
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def folder(tmp_path: Path, avif: bytes) -> Path:
    """Nine pictures under names of all kinds, and nine other things."""
    made = tmp_path / "photos"
    made.mkdir()
    jpeg = encoded(".jpg")
    for name in ("a.jpg", "b.JPEG", "c.jfif", "d.jpe", "without-suffix"):
        (made / name).write_bytes(jpeg)
    (made / "e.png").write_bytes(encoded(".png"))
    (made / "f.gif").write_bytes(by_ffmpeg("gif", "gif"))
    (made / "g.avif").write_bytes(avif)
    (made / "h.tiff").write_bytes(encoded(".tiff"))
    (made / "._a.jpg").write_bytes(b"\x00\x05\x16\x07" + bytes(60))
    (made / ".DS_Store").write_bytes(bytes(8))
    (made / "notes.txt").write_text("no picture")
    (made / "empty").write_bytes(b"")
    (made / "more.jpg").mkdir()
    (made / "nowhere.jpg").symlink_to(made / "gone")
    (made / "round.jpg").symlink_to(made / "round.jpg")
    os.mkfifo(made / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(made / "socket.jpg"))
    return made


PICTURES = {
    "a.jpg", "b.JPEG", "c.jfif", "d.jpe", "without-suffix", "e.png", "f.gif", "g.avif", "h.tiff",
}  # fmt: skip
OTHERS = {
    "._a.jpg": "hidden",
    ".DS_Store": "hidden",
    "notes.txt": "no picture",
    "empty": "no picture",
    "more.jpg": "a folder: give it by itself",
    "nowhere.jpg": "a link that leads nowhere",
    "round.jpg": "a link that leads nowhere",
    "pipe.jpg": "no regular file",
    "socket.jpg": "no regular file",
}


def test_all_is_analysed_or_named(server: fake.ScriptedServer, folder: Path) -> None:
    found = look_through(folder)
    assert {path.name for path in found.pictures} == PICTURES
    assert dict(found.passed_over) == OTHERS
    result = run(server, "analyze", folder, "--format", "jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    results = [line["source"] for line in lines if line["type"] == "result"]
    assert {Path(source).name for source in results} == PICTURES
    over = {line["source"]: line["why"] for line in lines if line["type"] == "passed_over"}
    assert over == OTHERS
    assert "passed over: " in result.stderr
    assert "pipe.jpg (no regular file)" in result.stderr


def test_annotated_copies_of_all(server: fake.ScriptedServer, folder: Path, tmp_path: Path) -> None:
    run(server, "analyze", folder, "-o", tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name.rpartition(".")[0] or name for name in written} >= {"c.jfif", "g.avif", "f.gif"}
    assert len(written) == len(PICTURES)


def test_a_folder_without_any(server: fake.ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    result = run(server, "analyze", tmp_path, code=2)
    assert "holds no pictures" in result.stderr
    assert "notes.txt (no picture)" in result.stderr


def test_a_damaged_one_and_a_telephone_s(server: fake.ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(".jpg"))
    (tmp_path / "b.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40) + b"infegrid")
    (tmp_path / "c.png").write_bytes(b"no picture at all")
    result = run(server, "analyze", tmp_path, "--format", "jsonl", code=1)
    unreadable = [json.loads(line) for line in result.stdout.splitlines()]
    told = {Path(r["source"]).name: r["message"] for r in unreadable if r["type"] == "error"}
    assert "save it as JPEG" in told["b.heic"]
    assert "not a picture" in told["c.png"]
    assert "b.heic: " in result.stderr


@pytest.mark.parametrize("suffix", [".DNG", ".nef", ".cr3"])
def test_a_raw_file_is_not_its_preview(
    server: fake.ScriptedServer, suffix: str, tmp_path: Path
) -> None:
    """By its first bytes it is a TIFF file, whose first picture is as small as a stamp."""
    raw = tmp_path / f"raw{suffix}"
    raw.write_bytes(encoded(".tiff"))
    (tmp_path / "a.jpg").write_bytes(encoded(".jpg"))
    found = look_through(tmp_path)
    assert found.passed_over == [(raw.name, "a camera's raw file: save it as JPEG")]
    for *words, code in (("analyze", 1), ("identify", 1), ("enroll", "ada", 3)):
        assert "raw file" in run(server, *words, raw, code=code).stderr


def test_of_an_animated_webp_the_first_picture_is_sent(tmp_path: Path) -> None:
    """As of a GIF: servers take neither."""
    still = encoded(".webp")
    frame = bytes(6) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little") + bytes(4)
    frame += still[12:] + bytes(len(still) % 2)
    body = b"WEBPVP8X\x0a\x00\x00\x00\x02\x00\x00\x00"
    body += (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    body += b"ANIM\x06\x00\x00\x00" + bytes(6)
    body += 2 * (b"ANMF" + len(frame).to_bytes(4, "little") + frame)
    path = tmp_path / "sticker.webp"
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    sent = load_picture(path)
    assert sent.encoding is facelane.Encoding.JPEG
    assert np.abs(decode(sent.data).astype(int) - PIXELS).max() < 10


def test_pictures_by_themselves(server: fake.ScriptedServer, tmp_path: Path, avif: bytes) -> None:
    for name in ("x.avif", "x.dat"):
        (tmp_path / name).write_bytes(avif)
        result = run(server, "analyze", tmp_path / name)
        assert "1 frames = 1 results" in result.stdout
    os.mkfifo(tmp_path / "pipe")
    for words in (("enroll", "ada"), ("verify", "grace"), ("identify",)):
        result = run(server, *words, tmp_path / "pipe", code=1 if words == ("identify",) else 2)
        assert "no" in result.stderr


# Case 16: what lies on its side is turned, whatever its format.


def exif(orientation: int) -> bytes:
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    return b"II*\x00\x08\x00\x00\x00\x01\x00" + entry + bytes(4)


def lying(suffix: str, orientation: int) -> bytes:
    """A picture, red at its left and blue at its right, with an EXIF block that turns it."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 2] = 255
    pixels[:, 32:, 0] = 255
    done, buffer = cv2.imencode(suffix, pixels)
    assert done
    data = bytes(buffer.tobytes())
    block = exif(orientation)
    if suffix == ".jpg":
        body = b"Exif\x00\x00" + block
        return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]
    if suffix == ".png":
        import zlib

        chunk = b"eXIf" + block
        whole = len(block).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        return data[:33] + whole + data[33:]
    assert suffix == ".webp"
    # An extended file: what it holds is told before the picture.
    extended = b"VP8X\x0a\x00\x00\x00\x08\x00\x00\x00" + (63).to_bytes(3, "little")
    extended += (47).to_bytes(3, "little")
    picture = data[12:] + b"\x00" * (len(data) % 2)
    tail = b"EXIF" + len(block).to_bytes(4, "little") + block + b"\x00" * (len(block) % 2)
    body = b"WEBP" + extended + picture + tail
    return b"RIFF" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(("orientation", "red_at"), [(3, "right"), (6, "top"), (8, "bottom")])
def test_what_lies_on_its_side_is_turned(
    suffix: str, orientation: int, red_at: str, tmp_path: Path
) -> None:
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(lying(suffix, orientation))
    assert exif_orientation(path.read_bytes()) == orientation
    sent = load_picture(path)
    assert exif_orientation(sent.data) == 1
    pixels = decode(sent.data)
    height, width = pixels.shape[:2]
    assert (width, height) == ((64, 48) if orientation == 3 else (48, 64))
    at = {
        "right": (height // 2, width - 5),
        "top": (5, width // 2),
        "bottom": (height - 5, width // 2),
    }
    blue, _, red = pixels[at[red_at]]
    assert red > 200 > 50 > blue


def test_upright_ones_go_as_they_are(tmp_path: Path) -> None:
    for suffix in (".jpg", ".png", ".webp"):
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(lying(suffix, 1))
        assert load_picture(path).data == path.read_bytes()


def test_a_turned_video_is_turned(tmp_path: Path) -> None:
    """As a telephone writes it that was held upright."""
    from facelane.cli.sources import open_source
    from facelane.cli.stills import upright

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert upright(pixels, -90).shape == (4, 2, 3)
    assert (upright(pixels, 180) == pixels[::-1, ::-1]).all()
    assert upright(pixels, 0) is pixels
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(PIXELS, format="bgr24")))
        out.mux(stream.encode())
    data = bytearray(path.read_bytes())
    # The track's matrix: a quarter turn with the clock.
    at = data.index(b"tkhd") + 4 + 40
    one, minus = (65536).to_bytes(4, "big"), (-65536 & 0xFFFFFFFF).to_bytes(4, "big")
    data[at : at + 36] = bytes(4) + one + bytes(4) + minus + bytes(16) + b"\x40\x00\x00\x00"
    path.write_bytes(bytes(data))
    source = open_source(str(path), want_pixels=True)
    try:
        shapes = {item.pixels.shape for item in source.items()}
    finally:
        source.close()
    assert shapes == {(64, 48, 3)}
