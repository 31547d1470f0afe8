"""The bridge passes video on to servers that take it, and decodes for those that do not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from tests.fakes import clips
from tests.fakes.bridge_scenes import run, settings, states
from tests.fakes.field_cameras import Play, RtspCamera
from tests.fakes.scripted_server import (
    Context,
    Request,
    Response,
    ScriptedServer,
    drop,
    opened,
    outcome,
    status,
    summary,
    update,
)
from tests.waiting import auntil

import facelane
from facelane.v1 import face_pb2
from facelane_bridge.bridge import Bridge
from facelane_bridge.output import Callback, Line, StateLine

VIDEO = (face_pb2.PICTURE_ENCODING_H264, face_pb2.PICTURE_ENCODING_H265)
JPEG = face_pb2.PICTURE_ENCODING_JPEG


def before_video(requests: Iterator[Request], context: Context) -> Iterator[Response]:
    """A server that has never heard of access units."""
    next(requests)
    yield opened()
    results = errors = 0
    for request in requests:
        if request.frame.picture.encoding in VIDEO:
            errors += 1
            refusal = status(
                grpc.StatusCode.INVALID_ARGUMENT,
                "ENCODING_UNSUPPORTED",
                "picture.encoding must be one of JPEG, PNG, WEBP, BGR24, RGB24, NV12",
            )
            yield outcome(request.frame, error=refusal)
        else:
            results += 1
            yield outcome(request.frame)
    yield summary(results=results, errors=errors)


def blind(requests: Iterator[Request], context: Context) -> Iterator[Response]:
    """A server that sees no key frame in video."""
    next(requests)
    yield opened()
    yield update("KEY_FRAME_WANTED")
    results = drops = 0
    for request in requests:
        waits = request.frame.picture.encoding in VIDEO
        drops += waits
        results += not waits
        body = {"drop": drop("WAITING_FOR_KEY_FRAME")} if waits else {}
        yield outcome(request.frame, **body)
    yield summary(results=results, drops=drops)


def sent(server: ScriptedServer) -> list[list[int]]:
    """The encodings that each stream carried."""
    return [[request.frame.picture.encoding for request in stream[1:]] for stream in server.streams]


def one(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "source": str(path),
        "pace": "fast",
        "video": "auto",
        "backoff_initial": 0.05,
    } | options


async def test_a_file_goes_on_as_it_is(tmp_path: Path) -> None:
    path = clips.write(tmp_path, "b-frames")
    with ScriptedServer() as server:
        report, lines = await run(settings(server.target, one(path, max_fps=5, analysis_fps=8)))
    assert report.summary.cameras["a"].results == 30
    assert states(lines) == ["STREAMING", "STOPPED"]
    [encodings] = sent(server)
    assert encodings == [VIDEO[0]] * 30
    opening, *frames = server.streams[0]
    assert opening.config.analysis_fps == 5, "the server thins video out"
    offsets = [request.frame.stream_offset.ToNanoseconds() / 1e9 for request in frames]
    assert offsets == pytest.approx([n / 10 for n in range(30)], abs=1e-3)


@pytest.mark.parametrize("script", [before_video, blind])
async def test_a_server_that_takes_no_video_gets_pictures(script: Any, tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")  # four key frames and more: of each turn of the loop
    with ScriptedServer(script, script) as server, capture_logs() as logs:
        given = settings(server.target, one(path, loop=True))
        lines: list[Line] = []
        bridge = Bridge(given, Callback(lines.append))
        task = asyncio.create_task(bridge.run())
        await auntil(lambda: bridge.totals.get("a") is not None and bridge.totals["a"].results > 40)
        bridge.stop()
        report = await asyncio.wait_for(task, 30)
    assert report.summary.cameras["a"].balanced
    told = [entry["why"] for entry in logs if entry["event"].startswith("the video is decoded")]
    assert len(told) == 1
    first, second, *rest = sent(server)
    assert set(first) == {VIDEO[0]}
    assert set(second) == {JPEG}
    assert not rest, "a stream keeps to one kind"
    changes = [line for line in lines if isinstance(line, StateLine) and line.reason]
    assert changes[0].reason == "NOT_PASSABLE"


async def test_a_camera_that_has_to_pass_fails(tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")
    with ScriptedServer(before_video) as server:
        report, lines = await run(settings(server.target, one(path, video="pass")))
    assert report.failed == ("a",)
    [failed] = [line for line in lines if isinstance(line, StateLine) and line.state == "FAILED"]
    assert failed.reason == "NOT_PASSABLE"
    assert 'video = "auto"' in failed.message


async def test_a_wish_for_a_key_frame_takes_a_file_back(tmp_path: Path) -> None:
    path = clips.write(tmp_path, "plain")

    def wishing(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened(window=4)
        drops = 0
        for count, request in enumerate(requests, 1):
            if count == 13:
                yield update("KEY_FRAME_WANTED")
            waits = 13 <= count < 16
            drops += waits
            yield outcome(
                request.frame, **({"drop": drop("WAITING_FOR_KEY_FRAME")} if waits else {})
            )
        yield summary(results=count - drops, drops=drops)

    with ScriptedServer(wishing) as server:
        report, _ = await run(settings(server.target, one(path)))
    totals = report.summary.cameras["a"]
    assert totals.drops_by_reason == {"WAITING_FOR_KEY_FRAME": 3}
    assert 30 < totals.frames <= 30 + 20
    pictures = [
        facelane.Picture.access_unit(request.frame.picture.data)
        for request in server.streams[0][1:]
    ]
    seen = clips.shown(pictures[-20:])
    assert seen == pytest.approx([clips.brightness(n) for n in range(10, 30)], abs=4)


@pytest.mark.parametrize("sets_in_stream", [True, False])
async def test_an_rtsp_camera_goes_on_as_it_is(sets_in_stream: bool) -> None:
    """Also one that tells its parameter sets in its description alone."""
    with RtspCamera(Play(gop=5), sets_in_stream=sets_in_stream) as rtsp, ScriptedServer() as server:
        lines: list[Line] = []
        given = settings(server.target, {"name": "a", "source": rtsp.url, "video": "auto"})
        bridge = Bridge(given, Callback(lines.append))
        task = asyncio.create_task(bridge.run())
        await auntil(lambda: bridge.totals.get("a") is not None and bridge.totals["a"].results > 20)
        bridge.stop()
        await asyncio.wait_for(task, 30)
    frames = [request.frame for request in server.streams[0][1:]]
    assert {frame.picture.encoding for frame in frames} == {VIDEO[0]}
    assert all(frame.HasField("capture_time") for frame in frames)
    pictures = [facelane.Picture.access_unit(frame.picture.data) for frame in frames]
    keys = [n for n, picture in enumerate(pictures) if b"\0\0\1\x65" in picture.data]
    assert keys[0] == 0
    for key in keys[:3]:
        assert len(clips.shown(pictures[key:])) == len(pictures) - key, "begins anywhere"
    offsets = [frame.stream_offset.ToNanoseconds() / 1e9 for frame in frames]
    steps = [after - before for before, after in itertools.pairwise(offsets)]
    assert steps == pytest.approx([0.1] * len(steps), abs=0.002), "the camera's own clock"


async def test_after_a_broken_connection_the_key_frame_is_sent_again() -> None:
    """Of a camera whose next one is far away."""

    def breaking(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened()
        for _ in range(8):
            yield outcome(next(requests).frame)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    def waiting(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened()
        dry, results, drops = True, 0, 0
        for request in requests:
            was, dry = dry, dry and b"\0\0\1\x65" not in request.frame.picture.data
            if dry and was and not drops:
                yield update("KEY_FRAME_WANTED")
            drops += dry
            results += not dry
            yield outcome(request.frame, **({"drop": drop("WAITING_FOR_KEY_FRAME")} if dry else {}))
        yield summary(results=results, drops=drops)

    # A key frame in thirty seconds.
    with RtspCamera(Play(gop=300)) as rtsp, ScriptedServer(breaking, waiting) as server:
        bridge = Bridge(
            settings(server.target, {"name": "a", "source": rtsp.url, "video": "auto"}),
            Callback(lambda _: None),
        )
        task = asyncio.create_task(bridge.run())
        await auntil(lambda: bridge.totals.get("a") is not None and bridge.totals["a"].results > 20)
        bridge.stop()
        report = await asyncio.wait_for(task, 30)
    assert report.summary.cameras["a"].balanced
    pictures = [
        facelane.Picture.access_unit(request.frame.picture.data)
        for request in server.streams[1][1:]
    ]
    key = next(n for n, picture in enumerate(pictures) if b"\0\0\1\x65" in picture.data)
    assert len(clips.shown(pictures[key:])) == len(pictures) - key
