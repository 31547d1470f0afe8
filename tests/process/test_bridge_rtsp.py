"""The bridge against GStreamer's RTSP server: codecs, transports, credentials, outages."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from tests.fakes import clips
from tests.fakes.scripted_server import ScriptedServer
from tests.running_server import free_port
from tests.waiting import auntil

import facelane
from facelane_bridge import config
from facelane_bridge.bridge import Bridge
from facelane_bridge.camera import Outlook
from facelane_bridge.config import CameraSettings
from facelane_bridge.output import Callback, Line, ResultLine, StateLine
from facelane_bridge.passing import picture_of
from facelane_bridge.reader import check_camera
from facelane_bridge.sources import SourceError, SourceReason, open_source
from facelane_bridge.sources.jpeg import read_header

PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).parent.parent / "fakes" / "rtsp_server.py"
USER, PASSWORD = "us@r", "p@ss/w:rd %41"
PROBE = (
    "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
)


def gstreamer_is_missing() -> bool:
    try:
        return (
            subprocess.run(
                [PYTHON, "-c", PROBE], check=False, capture_output=True, timeout=30
            ).returncode
            != 0
        )
    except OSError:
        return True


pytestmark = [
    pytest.mark.rtsp,
    pytest.mark.skipif(
        gstreamer_is_missing(),
        reason="no GStreamer RTSP server for /usr/bin/python3: apt-get install "
        "gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-good "
        "gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly",
    ),
]


class RtspCamera:
    """The RTSP server in a process of its own; it can be killed and brought back."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._arguments = arguments
        self.port = port
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [PYTHON, str(SERVER), "--port", str(self.port), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RTSP_USER": USER, "RTSP_PASSWORD": PASSWORD},
        )
        assert self._process.stdout is not None
        word, port = self._process.stdout.readline().split()
        assert word == "READY"
        self.port = int(port)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(30)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/live"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RIGHT", f"{USER}:{PASSWORD}")
    monkeypatch.setenv("WRONG", f"{USER}:hunter2")
    return


def camera(url: str, **options: Any) -> CameraSettings:
    return config.single(url, server={}, options=options).cameras[0]


@pytest.mark.parametrize(
    ("codec", "transport", "video"),
    [
        ("h264", "tcp", "auto"),
        ("h264", "udp", "decode"),
        ("h265", "tcp", "decode"),
        ("h265", "udp", "auto"),
        ("mjpeg", "tcp", "auto"),
        ("mjpeg", "udp", "auto"),
    ],
)
def test_codecs_and_transports(codec: str, transport: str, video: str) -> None:
    passes = codec != "mjpeg" and video == "auto"
    with RtspCamera("--codec", codec, "--fps", "25") as rtsp:
        source = open_source(camera(rtsp.url, transport=transport, video=video))
        info = source.open()
        assert info.codec == {"h265": "hevc"}.get(codec, codec)
        assert info.reencodes == (codec != "mjpeg" and not passes)
        frames = [source.read() for _ in range(10)]
        source.close()
    times = [frame.media_time for frame in frames if frame is not None]
    assert len(times) == 10
    steps = [after - before for before, after in itertools.pairwise(times)]
    if transport == "udp":
        # A busy machine may lose a packet, and a frame with it; the clock goes on.
        steps = [step / max(1, round(step / 0.04)) for step in steps]
    assert steps == pytest.approx([0.04] * 9, abs=0.005), "the camera's own clock"
    given = [frame for frame in frames if frame is not None]
    assert {frame.video for frame in given} == {facelane.Encoding(codec) if passes else None}
    if passes:
        assert given[0].is_key
        assert len(clips.shown([picture_of(frame) for frame in given])) == 10
        return
    headers = [read_header(frame.data) for frame in given]
    assert {(found.width, found.height) for found in headers if found} == {(320, 240)}


@pytest.mark.parametrize("scheme", ["basic", "digest"])
def test_credentials(credentials: None, scheme: str, capfd: pytest.CaptureFixture[str]) -> None:
    with RtspCamera("--auth", scheme) as rtsp:
        right = check_camera(camera(rtsp.url, credentials_env="RIGHT"))
        assert right.error is None
        assert right.first_frame_bytes > 0
        for options in ({"credentials_env": "WRONG"}, {}):
            wrong = check_camera(camera(rtsp.url, **options))
            assert wrong.error is not None
            assert wrong.error.reason is SourceReason.AUTHENTICATION_FAILED
            refused = options.get("credentials_env") == "WRONG"
            assert wrong.error.outlook is (Outlook.REFUSED if refused else Outlook.UNPROVEN)
            assert "hunter2" not in repr(wrong.error) + str(wrong.error.__cause__)
            assert wrong.error.__suppress_context__
    written = "".join(capfd.readouterr())
    for secret in ("hunter2", PASSWORD, "p%40ss"):
        assert secret not in written


def test_a_wrong_path_may_come_right() -> None:
    with RtspCamera() as rtsp, pytest.raises(SourceError) as caught:
        open_source(camera(rtsp.url + "/none")).open()
    assert caught.value.reason is SourceReason.NOT_FOUND
    assert caught.value.outlook is Outlook.PASSING


def test_nobody_at_the_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # held, so that nobody else may listen there
        port = sock.getsockname()[1]
        result = check_camera(camera(f"rtsp://127.0.0.1:{port}/live"))
    assert result.error is not None
    assert result.error.reason is SourceReason.CONNECT_FAILED


def test_a_port_that_says_nothing_times_out() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        url = f"rtsp://127.0.0.1:{sock.getsockname()[1]}/live"
        source = open_source(camera(url, open_timeout=1.0, read_timeout=1.0))
        with pytest.raises(SourceError) as caught:
            source.open()
    assert caught.value.reason is SourceReason.TIMED_OUT


class Streaming:
    """A bridge with one RTSP camera, beside the test."""

    def __init__(self, target: str, url: str, **options: Any) -> None:
        self.lines: list[Line] = []
        settings = config.from_mapping(
            {
                "server": {"target": target},
                "camera": [
                    {"name": "door", "source": url, "backoff_initial": 0.1, "backoff_max": 0.5}
                    | options
                ],
            }
        )
        self.bridge = Bridge(settings, Callback(self.lines.append))

    @property
    def results(self) -> int:
        return sum(1 for line in self.lines if isinstance(line, ResultLine))

    @property
    def states(self) -> list[str]:
        return [line.state for line in self.lines if isinstance(line, StateLine)]

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.bridge.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.bridge.stop()
        report = await asyncio.wait_for(self._task, 30)
        totals = report.summary.cameras["door"]
        assert totals.balanced
        assert totals.state == "STOPPED"


@pytest.mark.parametrize("transport", ["tcp", "udp"])
async def test_a_camera_that_is_killed_and_comes_back(transport: str) -> None:
    # A port that nobody is given while it is away.
    with ScriptedServer() as server, RtspCamera(port=free_port()) as rtsp:
        async with Streaming(
            server.target, rtsp.url, transport=transport, read_timeout=2.0, stall_after=1.0
        ) as streaming:
            await auntil(lambda: streaming.results > 10)
            rtsp.kill()
            await auntil(lambda: streaming.states.count("BACKOFF") >= 2)
            before = streaming.results
            rtsp.start()
            await auntil(lambda: streaming.results > before + 10)
            assert streaming.states[-1] == "STREAMING"
        assert len(server.streams) == 1, "the server's stream outlives the camera's"
    offsets = [line.offset_s for line in streaming.lines if isinstance(line, ResultLine)]
    assert offsets == sorted(offsets)


async def test_a_camera_that_hangs_stalls_and_goes_on() -> None:
    with ScriptedServer() as server, RtspCamera() as rtsp:
        async with Streaming(
            server.target, rtsp.url, stall_after=0.5, stall_limit=20.0, read_timeout=20.0
        ) as streaming:
            await auntil(lambda: streaming.results > 10)
            rtsp.signal(signal.SIGSTOP)
            try:
                await auntil(lambda: "STALLED" in streaming.states)
            finally:
                rtsp.signal(signal.SIGCONT)
            await auntil(lambda: streaming.states[-1] == "STREAMING")
            before = streaming.results
            await auntil(lambda: streaming.results > before + 5)
    assert streaming.bridge.totals["door"].openings == 1


async def test_a_camera_that_hangs_for_too_long_is_opened_again() -> None:
    with ScriptedServer() as server, RtspCamera() as rtsp:
        async with Streaming(
            server.target,
            rtsp.url,
            stall_after=0.5,
            stall_limit=0.5,
            read_timeout=1.0,
            open_timeout=3.0,  # up to a second until the next key frame
        ) as streaming:
            await auntil(lambda: streaming.results > 10)
            rtsp.signal(signal.SIGSTOP)
            try:
                await auntil(lambda: streaming.states.count("BACKOFF") >= 2)
            finally:
                rtsp.signal(signal.SIGCONT)
            before = streaming.results
            await auntil(lambda: streaming.results > before + 5)


async def test_wrong_credentials_end_the_camera_after_one_try(
    credentials: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer() as server, RtspCamera("--auth", "digest") as rtsp:
        lines: list[Line] = []
        settings = config.from_mapping(
            {
                "server": {"target": server.target},
                "camera": [
                    {"name": "good", "source": rtsp.url, "credentials_env": "RIGHT"},
                    {"name": "bad", "source": rtsp.url, "credentials_env": "WRONG"},
                ],
            }
        )
        bridge = Bridge(settings, Callback(lines.append))
        task = asyncio.create_task(bridge.run())
        await auntil(lambda: bridge.totals and bridge.totals["bad"].state == "FAILED")
        await auntil(lambda: bridge.totals["good"].results > 5)
        bridge.stop()
        report = await asyncio.wait_for(task, 30)
    assert report.failed == ("bad",)
    assert report.summary.cameras["bad"].openings == 1
    told = "".join(capfd.readouterr()) + repr(lines)
    for secret in ("hunter2", PASSWORD, "p%40ss"):
        assert secret not in told
