"""``facelane analyze`` on videos and RTSP cameras: access units, pictures, passwords."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from tests.fakes import clips
from tests.fakes.field_cameras import Play, Reply, Request, RtspCamera
from tests.fakes.scripted_server import ScriptedServer
from tests.process.test_bridge_video import JPEG, VIDEO, before_video, sent
from typer.testing import CliRunner

from facelane.cli.app import app

PASSWORD = "p@ss/w:rd %41" + "x" * 200


def run(server: ScriptedServer, *words: object, code: int = 0) -> Any:
    arguments = ["--target", server.target, "analyze", *map(str, words)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, (result.output, result.stderr)
    return result


def summary(result: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as made:
        yield made


@pytest.mark.parametrize("kind", ["b-frames", "H.265 in Matroska", "no container"])
def test_a_file_as_access_units(server: ScriptedServer, kind: str, tmp_path: Path) -> None:
    path = clips.write(tmp_path, kind)
    result = run(server, path, "--video", "auto", "--analysis-fps", 5, "-f", "jsonl")
    assert summary(result)["results"] == 30
    [encodings] = sent(server)
    assert encodings == [VIDEO["H.265" in kind]] * 30
    assert server.streams[0][0].config.analysis_fps == 5


@pytest.mark.parametrize("kind", clips.NOT_PASSABLE)
def test_what_is_not_taken_so_is_decoded(server: ScriptedServer, kind: str, tmp_path: Path) -> None:
    path = clips.write(tmp_path, kind)
    run(server, path, "--video", "auto")
    assert sent(server) == [[JPEG] * 30]
    refused = run(server, path, "--video", "pass", code=2)
    assert "cannot be passed on" in refused.stderr


def test_an_annotated_copy_takes_pixels(server: ScriptedServer, tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")
    run(server, path, "--video", "auto", "--out", tmp_path / "out.mp4")
    assert sent(server) == [[JPEG] * 30]


def test_a_video_on_its_side_is_turned_here(server: ScriptedServer, tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")
    turned = tmp_path / "turned.mp4"
    with av.open(str(path)) as given, av.open(str(turned), "w") as container:
        track = given.streams.video[0]
        copy = container.add_stream_from_template(track)
        copy.set_display_rotation(90)
        for packet in given.demux(track):
            if packet.size:
                packet.stream = copy
                container.mux(packet)
    run(server, turned, "--video", "auto")
    assert sent(server) == [[JPEG] * 30]


def test_an_older_server_gets_pictures(tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")
    with ScriptedServer(before_video) as server:
        result = run(server, path, "--video", "auto", "-f", "jsonl")
        assert "the video is decoded here" in result.stderr
        assert summary(result)["results"] == 30
        assert summary(result)["errors"] == 0
        assert set(sent(server)[1]) == {JPEG}
    with ScriptedServer(before_video) as server:
        refused = run(server, path, "--video", "pass", code=2)
    assert "takes no video" in refused.stderr


def guarded(request: Request) -> Reply | None:
    if request.method == "OPTIONS" or request.knows("us@r", PASSWORD):
        return None
    return 401, [
        ("WWW-Authenticate", 'Digest realm="cam", nonce="n", algorithm=SHA-256, qop="auth"')
    ]


@pytest.mark.parametrize("where", ["address", "file"])
@pytest.mark.parametrize("video", ["auto", "decode"])
def test_a_camera_by_the_bridge(
    server: ScriptedServer, video: str, where: str, tmp_path: Path
) -> None:
    """A password that FFmpeg would cut, in a digest that it does not know."""
    secret = tmp_path / "secret"
    secret.write_text(f"us@r:{PASSWORD}\n")
    with RtspCamera(Play(gop=5), reply=guarded) as camera:
        url, more = camera.url, ["--credentials-file", secret]
        if where == "address":
            known = f"us%40r:{urllib.parse.quote(PASSWORD, safe='')}@"
            url, more = url.replace("://", f"://{known}"), []
        result = run(server, url, *more, "--video", video, "--max-frames", 10, "-f", "jsonl")
    assert summary(result)["frames"] == 10
    assert PASSWORD[:5] not in result.stdout + result.stderr.replace(str(secret), "")
    assert set(sent(server)[0]) == ({VIDEO[0]} if video == "auto" else {JPEG})


def test_a_camera_that_refuses_says_so(server: ScriptedServer) -> None:
    with RtspCamera(reply=guarded) as camera:
        result = run(server, camera.url, code=2)
        assert "the camera asks for credentials" in result.stderr
        url = camera.url.replace("://", "://us%40r:wrong@")
        assert "refuses the credentials" in run(server, url, code=2).stderr


def test_without_the_bridge_it_is_said_what_lacks(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "structlog", None)
    with RtspCamera() as camera:
        result = run(server, camera.url, "--max-frames", 3)
        assert "pip install 'facelane[bridge]'" in result.stderr
        assert sent(server)[0][0] == JPEG
        refused = run(server, camera.url, "--credentials-file", tmp_path / "x", code=2)
        assert "structlog is missing" in refused.stderr
