"""Sources against real files, folders and a real HTTP server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import structlog.testing
from tests.fakes.cameras import HttpServer, jpeg, picture, send_stream, write_clip

from facelane_bridge import config
from facelane_bridge.camera import Outlook
from facelane_bridge.reader import check_camera
from facelane_bridge.sources import (
    CapturedFrame,
    Refusal,
    SourceError,
    SourceReason,
    open_source,
)
from facelane_bridge.sources import container as container_module
from facelane_bridge.sources.access import load_credentials
from facelane_bridge.sources.jpeg import JpegEncoder, JpegGate, fit, read_header
from facelane_bridge.sources.pace import MediaClock


def size_of(data: bytes) -> tuple[int, int] | None:
    header = read_header(data)
    return None if header is None else (header.width, header.height)


SECRET = "p@ss/w:rd %41"


def camera(source: str, **options: Any) -> config.CameraSettings:
    return config.single(source, server={}, options=options).cameras[0]


def read_all(source: Any, limit: int = 1000) -> list[CapturedFrame]:
    frames = []
    try:
        source.open()
        while len(frames) < limit and (frame := source.read()) is not None:
            frames.append(frame)
    finally:
        source.close()
    return frames


def brightness(frame: CapturedFrame) -> float:
    image = cv2.imdecode(np.frombuffer(frame.data, np.uint8), cv2.IMREAD_GRAYSCALE)
    return float(image.mean())


# --- files ---


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_file_gives_all_its_frames_in_order(tmp_path: Path, codec: str) -> None:
    clip = write_clip(tmp_path / "clip.mp4", codec=codec)
    options = {"pace": "fast", "video": "decode"}
    source = open_source(camera(str(clip), **options))
    info = source.open()
    assert (info.width, info.height, info.fps) == (64, 48, 10)
    assert info.duration == pytest.approx(2.0, abs=0.11)
    assert info.reencodes
    source.close()
    frames = read_all(open_source(camera(str(clip), **options)))
    assert len(frames) == 20
    assert [frame.media_time for frame in frames] == pytest.approx([i / 10 for i in range(20)])
    for index, frame in enumerate(frames):
        assert brightness(frame) == pytest.approx(20 + index * 10, abs=4)
        assert size_of(frame.data) == (64, 48)


def test_mjpeg_bytes_pass_untouched(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", codec="mjpeg", frames=5)
    with av.open(str(clip)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert [f.data for f in read_all(open_source(camera(str(clip), pace="fast")))] == packets


def test_real_time_takes_its_time(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=6)
    begun = time.monotonic()
    read_all(open_source(camera(str(clip))))
    assert time.monotonic() - begun >= 0.45


def test_real_time_can_be_interrupted(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "slow.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1, 1000))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(picture(), format="bgr24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    source = open_source(camera(str(tmp_path / "slow.mp4")))
    source.open()
    assert source.read() is not None
    threading.Timer(0.1, source.interrupt).start()
    with pytest.raises(SourceError) as caught:
        source.read()  # is due in a thousand seconds, longer than a test may take
    assert caught.value.reason is SourceReason.INTERRUPTED
    source.close()


def test_a_loop_goes_on_with_the_media_clock(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=5)
    options = {"pace": "fast", "loop": True, "video": "decode"}
    frames = read_all(open_source(camera(str(clip), **options)), limit=13)
    assert [frame.media_time for frame in frames] == pytest.approx([i / 10 for i in range(13)])
    assert brightness(frames[5]) == pytest.approx(20, abs=4)


@pytest.mark.parametrize(("max_fps", "expected"), [(5, 10), (10, 20), (4, 8), (3, 6), (100, 20)])
def test_decimation(tmp_path: Path, max_fps: float, expected: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    source = open_source(camera(str(clip), pace="fast", max_fps=max_fps, video="decode"))
    frames = read_all(source)
    assert abs(len(frames) - expected) <= 1
    assert len(frames) + source.skipped == 20


def test_scaling_down_keeps_the_proportions(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=3)
    frames = read_all(open_source(camera(str(clip), pace="fast", max_side=32)))
    assert {size_of(frame.data) for frame in frames} == {(32, 24)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, SourceReason.NOT_FOUND),
        (b"", SourceReason.FORMAT_INVALID),
        (b"this is no video" * 100, SourceReason.FORMAT_INVALID),
    ],
)
def test_what_is_no_video_is_told(
    tmp_path: Path, content: bytes | None, reason: SourceReason
) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(camera(str(path))).open()
    assert caught.value.reason is reason
    assert caught.value.outlook is Outlook.HOPELESS


def test_a_truncated_file_gives_what_it_has(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", frames=40)
    clip.write_bytes(clip.read_bytes()[:-400])
    frames = read_all(open_source(camera(str(clip), pace="fast")))
    assert 5 < len(frames) <= 40


def test_a_file_of_which_nothing_more_can_be_decoded_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be the same again, and what was found in it be told twice."""
    monkeypatch.setattr(container_module, "MAX_BAD_PACKETS", 5)
    clip = write_clip(tmp_path / "clip.mp4", frames=40)
    with av.open(str(clip)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(clip.read_bytes())
    for at, size in places[10:]:
        data[at : at + size] = b"\xff" * size
    clip.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_all(open_source(camera(str(clip), pace="fast", video="decode")))
    assert caught.value.outlook is Outlook.HOPELESS


def test_a_file_without_video_is_told(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError) as caught:
        open_source(camera(str(tmp_path / "sound.wav"))).open()
    assert caught.value.reason is SourceReason.NO_VIDEO


def test_a_playlist_cannot_reach_the_network(tmp_path: Path) -> None:
    asked: list[str] = []
    with HttpServer(lambda handler: asked.append(handler.path)) as web:
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
            f"http://127.0.0.1:{web.port}/a.ts\n#EXT-X-ENDLIST\n"
        )
        with pytest.raises(SourceError):
            read_all(open_source(camera(str(playlist), kind="file")))
    assert asked == []


def test_a_device_that_is_absent_may_come_back() -> None:
    with pytest.raises(SourceError) as caught:
        open_source(camera("/dev/video63")).open()
    assert caught.value.reason is SourceReason.NOT_FOUND
    assert caught.value.outlook is Outlook.PASSING


# --- folders ---


def test_a_folder_gives_its_pictures_in_the_order_of_their_names(tmp_path: Path) -> None:
    contents = {"b.jpg": jpeg(1), "a.JPEG": jpeg(2), "c.png": b"\x89PNG...", "empty.jpg": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes.txt").write_text("x")
    frames = read_all(open_source(camera(str(tmp_path), pace="fast", folder_fps=4)))
    assert [frame.data for frame in frames] == [contents[name] for name in sorted(contents)]
    assert [frame.media_time for frame in frames] == [0, 0.25, 0.5, 0.75]


def test_a_folder_tells_what_it_passes_over_and_waits_for_no_pipe(
    tmp_path: Path,
) -> None:
    cv2.imwrite(str(tmp_path / "1.jpg"), np.zeros((16, 16, 3), np.uint8))
    for name in ("2.heic", "3.avif", "._1.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    os.mkfifo(tmp_path / "4.jpg")
    (tmp_path / "5.png").mkdir()
    with structlog.testing.capture_logs() as told:
        frames = read_all(open_source(camera(str(tmp_path), pace="fast")))
    assert len(frames) == 1
    (line,) = told
    assert line["log_level"] == "warning"
    for kind in ("1 .heic", "1 .avif", "1 ._ file", "1 pipe or device", "1 folder"):
        assert kind in line["passed_over"]
    assert "4.jpg" not in str(line), "names of files are not told: they may be people's"


def test_a_folder_scales_down_what_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1, 200, 100))
    (tmp_path / "b.jpg").write_bytes(small := jpeg(1, 40, 20))
    (tmp_path / "c.png").write_bytes(cv2.imencode(".png", picture(100, 200))[1].tobytes())
    (tmp_path / "d.jpg").write_bytes(broken := jpeg()[:30])
    frames = read_all(open_source(camera(str(tmp_path), pace="fast", max_side=50)))
    assert [size_of(frame.data) for frame in frames[:3]] == [(50, 25), (40, 20), (25, 50)]
    assert frames[1].data == small
    assert frames[3].data == broken, "what cannot be read is the server's to refuse"


def test_folders_that_hold_nothing_are_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(camera(str(tmp_path))).open()
    assert caught.value.reason is SourceReason.NO_VIDEO
    with pytest.raises(SourceError) as caught:
        open_source(camera(str(tmp_path / "none"), kind="folder")).open()
    assert caught.value.reason is SourceReason.NOT_FOUND


# --- HTTP-MJPEG ---


def drain(source: Any) -> Iterator[CapturedFrame]:
    source.open()
    while True:
        try:
            frame = source.read()
        except SourceError as error:
            if error.reason is SourceReason.DISCONNECTED:
                return
            raise
        assert frame is not None
        yield frame


def test_http_mjpeg_passes_untouched() -> None:
    pictures = [jpeg(n) for n in range(5)]
    with HttpServer(lambda handler: send_stream(handler, pictures)) as web:
        source = open_source(camera(f"http://127.0.0.1:{web.port}/video"))
        frames = list(drain(source))
        source.close()
    assert [frame.data for frame in frames] == pictures
    times = [frame.media_time for frame in frames]
    assert times == sorted(times)


def test_http_mjpeg_is_scaled_down_on_request() -> None:
    pictures = [jpeg(1, 200, 100), jpeg(1, 40, 20), jpeg(1, 200, 100)[:200]]
    with HttpServer(lambda handler: send_stream(handler, pictures)) as web:
        frames = list(drain(open_source(camera(f"http://127.0.0.1:{web.port}/", max_side=100))))
    assert [size_of(frame.data) for frame in frames[:2]] == [(100, 50), (40, 20)]
    assert frames[1].data == pictures[1]


def digest_ok(header: str, password: str) -> bool:
    fields = dict(part.strip().split("=", 1) for part in header.removeprefix("Digest ").split(","))
    fields = {key: value.strip('"') for key, value in fields.items()}

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    ha1 = md5(f"{fields['username']}:{fields['realm']}:{password}")
    ha2 = md5(f"GET:{fields['uri']}")
    middle = f"{fields['nonce']}:{fields['nc']}:{fields['cnonce']}:{fields['qop']}"
    return fields["response"] == md5(f"{ha1}:{middle}:{ha2}")


@pytest.mark.parametrize("scheme", ["basic", "digest"])
@pytest.mark.parametrize("password", [SECRET, "wrong"])
def test_http_credentials(monkeypatch: pytest.MonkeyPatch, scheme: str, password: str) -> None:
    tries: list[str] = []

    def respond(handler: BaseHTTPRequestHandler) -> None:
        given = handler.headers.get("Authorization", "")
        if given:
            tries.append(given)
        right = base64.b64encode(f"us@r:{SECRET}".encode()).decode()
        if given == f"Basic {right}" or (given.startswith("Digest") and digest_ok(given, SECRET)):
            send_stream(handler, [jpeg(1)])
            return
        handler.send_response(401)
        challenge = f'Digest realm="cam", qop="auth", nonce="n{len(tries)}", algorithm=MD5'
        handler.send_header(
            "WWW-Authenticate", 'Basic realm="cam"' if scheme == "basic" else challenge
        )
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setenv("CAM", f"us@r:{password}")
    with HttpServer(respond) as web:
        source = open_source(camera(f"http://127.0.0.1:{web.port}/v", credentials_env="CAM"))
        if password == SECRET:
            assert next(drain(source)).data == jpeg(1)
        else:
            with pytest.raises(SourceError) as caught:
                source.open()
            assert caught.value.reason is SourceReason.AUTHENTICATION_FAILED
            assert caught.value.outlook is Outlook.REFUSED
            assert "wrong" not in repr(caught.value)
        source.close()
    assert len(tries) == 1, "cameras lock accounts after a few wrong passwords"


@pytest.mark.parametrize(
    ("status", "kind", "reason", "text"),
    [
        (401, "text/html", SourceReason.AUTHENTICATION_FAILED, "asks for no password"),
        (403, "text/html", SourceReason.AUTHENTICATION_FAILED, "403"),
        (404, "text/html", SourceReason.NOT_FOUND, "no such stream"),
        (500, "text/html", SourceReason.CONNECT_FAILED, "HTTP 500"),
        (503, "text/html", SourceReason.CONNECT_FAILED, "busy or still starts"),
        (200, "text/html", SourceReason.FORMAT_INVALID, "answers 'text/html', and no pictures"),
        (200, "multipart/x-mixed-replace", SourceReason.FORMAT_INVALID, "gives no picture"),
    ],
)
def test_what_a_camera_answers_while_it_starts_is_passing(
    status: int, kind: str, reason: SourceReason, text: str
) -> None:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with HttpServer(respond) as web, pytest.raises(SourceError, match=text) as caught:
        read_all(open_source(camera(f"http://127.0.0.1:{web.port}/v")))
    assert caught.value.reason is reason
    assert caught.value.outlook is Outlook.PASSING


def test_http_that_falls_silent_times_out() -> None:
    done = threading.Event()

    def respond(handler: BaseHTTPRequestHandler) -> None:
        send_stream(handler, [jpeg(1)], close=False)
        done.wait(60)

    with HttpServer(respond) as web:
        source = open_source(camera(f"http://127.0.0.1:{web.port}/v", read_timeout=1.5))
        source.open()
        assert source.read() is not None
        with pytest.raises(SourceError) as caught:
            source.read()
        assert caught.value.reason is SourceReason.TIMED_OUT
        source.close()
        done.set()


def test_http_that_gives_anything_but_pictures_ends_and_says_what() -> None:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"--frame\r\nContent-Type: text/x-poem\r\n\r\n" + b"y" * 10_000)

    with HttpServer(respond) as web:
        source = open_source(camera(f"http://127.0.0.1:{web.port}/v"))
        with pytest.raises(SourceError, match="no pictures") as caught:
            source.open()
        assert source.seen == "parts came, none of them a JPEG (of type 'text/x-poem')"
        assert caught.value.reason is SourceReason.FORMAT_INVALID
        source.close()


def test_nobody_there() -> None:
    with HttpServer(lambda _: None) as web:
        pass
    with pytest.raises(SourceError) as caught:
        open_source(camera(f"http://127.0.0.1:{web.port}/v")).open()
    assert caught.value.reason is SourceReason.CONNECT_FAILED
    assert caught.value.outlook is Outlook.PASSING


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_name_that_nobody_knows_is_told_and_may_be_known_later(scheme: str) -> None:
    with pytest.raises(SourceError, match="name is not known") as caught:
        open_source(camera(f"{scheme}://camera.invalid/v")).open()
    assert caught.value.reason is SourceReason.CONNECT_FAILED
    assert caught.value.outlook is Outlook.PASSING


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_an_authority_that_cannot_be_used(
    tmp_path: Path, scheme: str, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    settings = camera(f"{scheme}://127.0.0.1:1/v", tls_ca_file=str(path))
    with pytest.raises(SourceError, match=r"tls_ca_file .*ca\.pem") as caught:
        open_source(settings).open()
    assert caught.value.reason is SourceReason.TLS_FAILED
    assert caught.value.outlook is Outlook.HOPELESS
    checked = check_camera(settings)
    assert checked.error is not None
    assert checked.error.reason is SourceReason.TLS_FAILED


# --- credentials ---


def test_credentials_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "door"
    path.write_text(f"us@r:{SECRET}\n")
    found = load_credentials(camera("rtsp://h/x", credentials_file=str(path)))
    assert found is not None
    assert (found.user, found.password) == ("us@r", SECRET)
    assert SECRET not in repr(found)


@pytest.mark.parametrize("text", ["", "user", ":password", "\n"])
def test_credentials_without_a_user_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CAM", text)
    with pytest.raises(SourceError) as caught:
        load_credentials(camera("rtsp://h/x", credentials_env="CAM"))
    assert caught.value.reason is SourceReason.CREDENTIALS_MISSING


def test_missing_credentials_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAM", raising=False)
    for options in ({"credentials_env": "CAM"}, {"credentials_file": str(tmp_path / "none")}):
        with pytest.raises(SourceError, match="user:password") as caught:
            open_source(camera("rtsp://127.0.0.1:1/x", **options)).open()
        assert caught.value.outlook is Outlook.HOPELESS
    lent = "/run/credentials/facelane-bridge@none.service/camera"
    with pytest.raises(SourceError, match="lends it to the running service alone"):
        open_source(camera("rtsp://127.0.0.1:1/x", credentials_file=lent)).open()


# --- pieces ---


def test_the_clock_never_goes_back() -> None:
    clock = MediaClock()
    assert clock.media_time(100.0, 0.0) == 0
    assert clock.media_time(100.04, 0.04) == pytest.approx(0.04)
    assert clock.media_time(100.02, 0.05) == pytest.approx(0.04), "frames out of order"
    assert clock.media_time(100.08, 0.08) == pytest.approx(0.08)
    assert clock.media_time(5.0, 0.12) == pytest.approx(0.12), "the camera set its clock"
    assert clock.media_time(5.04, 0.16) == pytest.approx(0.16)
    assert clock.media_time(9e6, 0.20) == pytest.approx(0.20)


def test_a_clock_that_stands_still_is_seen() -> None:
    clock = MediaClock()
    assert {clock.media_time(7.0, float(arrival)) for arrival in range(100)} == {0.0}


def test_without_timestamps_arrival_counts() -> None:
    clock = MediaClock()
    assert [clock.media_time(None, t) for t in (5.0, 5.5, 7.0)] == [0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((640, 480), 0, (640, 480)),
        ((640, 480), 640, (640, 480)),
        ((1920, 1080), 640, (640, 360)),
        ((1080, 1920), 640, (360, 640)),
        ((10_000, 1), 100, (100, 2)),
    ],
)
def test_fit(size: tuple[int, int], max_side: int, expected: tuple[int, int]) -> None:
    assert fit(*size, max_side) == expected


@pytest.mark.parametrize("quality", [50, 90])
def test_the_encoder_is_faithful(quality: int) -> None:
    image = cv2.GaussianBlur(
        np.random.default_rng(1).integers(0, 255, (240, 320, 3), dtype=np.uint8), (0, 0), 4
    )
    frame = av.VideoFrame.from_ndarray(image, format="bgr24")
    data = JpegEncoder(quality, 0).encode(frame)
    header = read_header(data)
    assert header is not None
    assert header.is_plain
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert cv2.PSNR(image, decoded) > 32


def test_the_encoder_follows_a_change_of_size() -> None:
    encoder = JpegEncoder(90, 0)
    for size in ((64, 48), (64, 48), (32, 64), (64, 48)):
        frame = av.VideoFrame.from_ndarray(picture(*size), format="bgr24")
        assert size_of(encoder.encode(frame)) == size


def test_jpegs_without_huffman_tables_are_not_passed_on() -> None:
    whole = jpeg()
    at = whole.index(b"\xff\xc4")
    stripped = bytearray(whole)
    while (at := stripped.find(b"\xff\xc4")) >= 0:
        del stripped[at : at + 2 + int.from_bytes(stripped[at + 2 : at + 4])]
    gate = JpegGate(90, 0)
    assert gate.take(whole) == whole
    mended = gate.take(bytes(stripped))
    assert isinstance(mended, bytes)
    assert (header := read_header(mended)) is not None
    assert header.is_plain
    for broken in (b"", b"\xff\xd8\xff\xe0"):
        refusal = gate.take(broken)
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "PICTURE_CORRUPT"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x02" * 3, b"\xff\xd8\x00" * 9]
)
def test_no_size_where_there_is_none(data: bytes) -> None:
    assert size_of(data) is None


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
def test_colours_survive_whatever_matrix_the_video_has(matrix: str) -> None:
    from av.video.reformatter import Colorspace

    # Flat patches of strong colours, where a wrong matrix shows as a shift of 10 and more.
    image = np.zeros((64, 128, 3), np.uint8)
    for index, colour in enumerate([(40, 60, 200), (60, 180, 60), (200, 80, 40), (90, 120, 180)]):
        image[:, index * 32 : index * 32 + 32] = colour
    frame = av.VideoFrame.from_ndarray(image, format="bgr24").reformat(
        format="yuv420p", dst_colorspace=Colorspace[matrix]
    )
    frame.colorspace = 1 if matrix == "ITU709" else 5  # as the stream's header would say
    decoded = cv2.imdecode(np.frombuffer(JpegEncoder(95, 0).encode(frame), np.uint8), 1)
    for index in range(4):
        middle = (slice(16, 48), slice(index * 32 + 8, index * 32 + 24))
        assert np.abs(decoded[middle].mean((0, 1)) - image[middle].mean((0, 1))).max() < 7
