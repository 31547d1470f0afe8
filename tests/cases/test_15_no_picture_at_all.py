"""A video of which not one picture can be decoded is told, and is no success of nought frames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest

from facelane_bridge.sources import SourceReason
from tests.cases.cameras import failure
from tests.fakes import scripted_server as fake
from tests.fakes.cameras import picture


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Its header is in order, and its only key frame is missing."""
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as made:
        stream = made.add_stream("libx265", rate=10, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 250, 0
        packets = []
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(picture(64, 48, number), format="bgr24")
            packets += stream.encode(frame.reformat(format="yuv420p"))
        for packet in [*packets, *stream.encode(None)]:
            if not packet.is_keyframe:
                made.mux(packet)
    return path


@pytest.mark.parametrize("video", ["auto", "decode"])
def test_the_bridge_says_so(film: Path, video: str) -> None:
    error = failure(str(film), pace="fast", video=video)
    assert error.reason is SourceReason.UNDECODABLE


@pytest.mark.parametrize("video", ["auto", "decode"])
def test_the_command_says_so(film: Path, video: str) -> None:
    with fake.ScriptedServer() as server:
        words = ["--target", server.target, "analyze", str(film), "--video", video]
        done = subprocess.run(
            [sys.executable, "-m", "facelane.cli", *words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done
    assert "not one could be decoded" in done.stderr
