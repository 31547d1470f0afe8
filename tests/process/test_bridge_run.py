"""The bridge from camera to output, against a scripted server on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from structlog.testing import capture_logs
from tests.fakes.cameras import HttpServer, jpeg, send_stream, write_clip
from tests.fakes.scripted_server import (
    ScriptedServer,
    answering,
    breaking_after,
    drop,
    opened,
    outcome,
    refusing,
    summary,
    update,
)
from tests.waiting import auntil, until

from facelane_bridge import bridge as bridge_module
from facelane_bridge import config, runner
from facelane_bridge.bridge import Bridge, BridgeReport
from facelane_bridge.camera import CameraState
from facelane_bridge.config import BridgeSettings
from facelane_bridge.output import (
    Callback,
    DropLine,
    ErrorLine,
    Line,
    ResultLine,
    StateLine,
    SummaryLine,
    UpdateLine,
)
from facelane_bridge.sources import (
    CapturedFrame,
    SourceError,
    SourceInfo,
    SourceReason,
)


def settings(target: str, *cameras: dict[str, Any], **server: Any) -> BridgeSettings:
    return config.from_mapping({"server": {"target": target} | server, "camera": list(cameras)})


async def run(
    given: BridgeSettings, timeout: float = 30.0, **options: Any
) -> tuple[BridgeReport, list[Line]]:
    lines: list[Line] = []
    bridge = Bridge(given, Callback(lines.append), **options)
    async with asyncio.timeout(timeout):
        report = await bridge.run()
    assert_balanced(report, lines)
    return report, lines


def assert_balanced(report: BridgeReport, lines: list[Line]) -> None:
    """Every frame has exactly one outcome, and the lines say the same as the counters."""
    for name, totals in report.summary.cameras.items():
        assert totals.balanced, (name, totals)
        mine = [line for line in lines if getattr(line, "camera", None) == name]
        ids: list[int] = []
        for line in mine:
            if isinstance(line, DropLine):
                ids += range(line.frame_id, line.frame_id + line.count)
            elif isinstance(line, ResultLine | ErrorLine):
                ids.append(line.frame_id)
        assert sorted(ids) == list(range(1, totals.frames + 1))
        results = [line.frame_id for line in mine if isinstance(line, ResultLine)]
        assert results == sorted(results)
        assert len(results) == totals.results


def states(lines: list[Line], camera: str = "a") -> list[str]:
    return [line.state for line in lines if isinstance(line, StateLine) and line.camera == camera]


async def test_a_file_from_end_to_end(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        report, lines = await run(
            settings(
                server.target,
                {"name": "a", "source": str(clip), "pace": "fast", "gallery": "staff"},
            )
        )
    totals = report.summary.cameras["a"]
    assert (totals.frames, totals.results, totals.faces) == (20, 20, 20)
    assert totals.decisions == {"MATCH": 20}
    assert (report.failed, report.server_failed) == ((), False)
    assert states(lines) == ["STREAMING", "STOPPED"]
    first = next(line for line in lines if isinstance(line, ResultLine))
    assert (first.frame_id, first.offset_s, first.width) == (1, 0.0, 640)
    face = first.faces[0]
    assert (face.subject_id, face.decision, face.liveness) == ("grace", "MATCH", "LIVE")
    assert face.box == (10, 20, 60, 80)
    assert totals.p50_ms is not None
    assert totals.p50_ms <= (totals.p99_ms or 0)
    opening, *frames = server.streams[0]
    assert opening.config.source_id == "a"
    assert opening.config.options.gallery_id == "staff"
    offsets = [request.frame.stream_offset.ToNanoseconds() / 1e9 for request in frames]
    assert offsets == pytest.approx([index / 10 for index in range(20)], abs=1e-6)
    assert all(request.frame.HasField("capture_time") for request in frames)
    assert isinstance(lines[-1], SummaryLine)


async def test_cameras_do_not_touch_each_other(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        report, lines = await run(
            settings(
                server.target,
                {"name": "a", "source": str(clip), "pace": "fast"},
                {"name": "gone", "source": str(tmp_path / "none.mp4")},
                {"name": "wrong", "source": str(Path(__file__))},
                {"name": "b", "source": str(clip)},
            )
        )
    assert set(report.failed) == {"gone", "wrong"}
    assert report.summary.cameras["a"].results == 20
    assert report.summary.cameras["b"].frames == 20
    assert report.summary.cameras["gone"].reason == "NOT_FOUND"
    assert report.summary.cameras["wrong"].reason == "FORMAT_INVALID"
    assert report.summary.frames == 40
    assert states(lines, "gone") == ["FAILED"]


async def test_drops_errors_and_updates_are_told(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=4)

    def script(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened()
        first, second, third, fourth = (next(requests).frame for _ in range(4))
        yield outcome(first)
        yield update("STAGE_LOST", stage=3, message="liveness is away")
        yield outcome(second, drop=drop("TOO_OLD"))
        bad = outcome(third)
        bad.outcome.error.code = 3
        bad.outcome.error.message = "the JPEG is cut short"
        yield bad
        yield outcome(fourth)
        yield summary(results=2, drops=1, errors=1, drops_by_reason={"TOO_OLD": 1})

    with ScriptedServer(script) as server:
        report, lines = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
    totals = report.summary.cameras["a"]
    assert (totals.results, totals.drops, totals.errors) == (2, 1, 1)
    assert totals.drops_by_reason == {"TOO_OLD": 1}
    (told,) = [line for line in lines if isinstance(line, DropLine)]
    assert (told.frame_id, told.count, told.reason, told.where) == (2, 1, "TOO_OLD", "server")
    (failed,) = [line for line in lines if isinstance(line, ErrorLine)]
    assert (failed.frame_id, failed.message) == (3, "the JPEG is cut short")
    (noted,) = [line for line in lines if isinstance(line, UpdateLine)]
    assert (noted.kind, noted.stage) == ("STAGE_LOST", "liveness")


async def test_a_picture_that_cannot_be_sent_is_an_error_of_its_own(tmp_path: Path) -> None:
    for name, data in {"a.jpg": jpeg(1), "b.jpg": b"", "c.jpg": b"zzz", "d.jpg": jpeg(2)}.items():
        (tmp_path / name).write_bytes(data)
    with ScriptedServer() as server:
        report, _lines = await run(
            settings(server.target, {"name": "a", "source": str(tmp_path), "pace": "fast"})
        )
    totals = report.summary.cameras["a"]
    assert (totals.frames, totals.results, totals.errors) == (4, 2, 2)
    assert totals.errors_by_reason == {"PICTURE_EMPTY": 1, "ENCODING_UNSUPPORTED": 1}


async def test_a_broken_connection_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer(breaking_after(3, 5)) as server:
        report, _lines = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
        assert len(server.streams) == 2
    totals = report.summary.cameras["a"]
    assert totals.frames == 20
    assert totals.connections == 2
    assert set(totals.errors_by_reason) == {"CONNECTION_LOST"}
    assert 2 <= totals.errors <= 4, "only what was in flight"
    assert totals.drops == 0, "a lossless source waits"


async def test_a_server_that_refuses_ends_the_camera(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    script = refusing(grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND", "there is no such subject")
    with ScriptedServer(script) as server:
        report, _lines = await run(settings(server.target, {"name": "a", "source": str(clip)}))
    assert report.server_failed
    assert report.failed == ("a",)
    assert report.summary.cameras["a"].reason == "SUBJECT_NOT_FOUND"
    assert report.summary.frames == 0, "no camera is opened for nobody"


async def test_a_busy_server_is_tried_again(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", "too many streams")
    with ScriptedServer(busy) as server:
        report, _ = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
    assert report.summary.results == 20


async def test_a_server_that_opens_no_stream_is_not_called_absent(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", "too many streams")
    with ScriptedServer(*[busy] * 1000) as server, capture_logs() as logs:
        report, _ = await run(settings(server.target, {"name": "a", "source": str(clip)}, wait=0.2))
    assert report.server_failed
    (told,) = [line for line in logs if line["event"] == "server refused or absent"]
    assert "the server answers (SERVING) and opens no stream" in told["message"]


async def test_an_absent_server_is_given_up_after_the_wait(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    report, _lines = await run(
        settings(f"unix:{tmp_path}/none", {"name": "a", "source": str(clip)}, wait=0.2)
    )
    assert report.server_failed
    assert report.summary.cameras["a"].reason == "SERVER_UNREACHABLE"
    assert report.summary.frames == 0


async def test_what_is_waited_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absent server is waited for without an end, but not without a word."""
    monkeypatch.setattr(runner, "CONNECT_HINT", 0.05)
    clip = write_clip(tmp_path / "clip.mp4")
    target = f"unix:{tmp_path}/server.sock"
    lines: list[Line] = []
    bridge = Bridge(
        settings(target, {"name": "a", "source": str(clip), "pace": "fast"}),
        Callback(lines.append),
    )
    with capture_logs() as logs:

        def told(event: str) -> list[bool]:
            return [line["target"] == target for line in logs if event in line["event"]]

        task = asyncio.create_task(bridge.run())
        await auntil(lambda: told("waiting for the server"), what="a word")
        with ScriptedServer(address=target):
            report = await asyncio.wait_for(task, 30)
    assert report.summary.results == 20
    assert told("waiting for the server") == [True]
    assert told("server reached") == [True]


async def test_stop_before_the_server_is_there(tmp_path: Path) -> None:
    lines: list[Line] = []
    bridge = Bridge(
        settings(f"unix:{tmp_path}/none", {"name": "a", "source": "rtsp://127.0.0.1:1/x"}),
        Callback(lines.append),
    )
    task = asyncio.create_task(bridge.run())
    await auntil(lambda: bridge.totals, what="the bridge runs")
    bridge.stop()
    report = await asyncio.wait_for(task, 60)
    assert report.summary.cameras["a"].state == "STOPPED"
    assert report.failed == ()


class ScriptedSource:
    """A camera that does what ``play`` says; an opening each time it is called."""

    def __init__(self, play: Callable[[ScriptedSource], CapturedFrame | None]) -> None:
        self._play = play
        self.stop = threading.Event()
        self.closed = threading.Event()
        self.given = 0
        self.skipped = 0
        self.connected = False
        self.seen = ""

    def open(self) -> SourceInfo:
        return SourceInfo(config.SourceKind.RTSP, "test", 64, 48, 25.0, None, reencodes=False)

    def read(self) -> CapturedFrame | None:
        frame = self._play(self)
        if self.stop.is_set():
            raise SourceError(SourceReason.INTERRUPTED, "told to stop")
        self.given += 1
        return frame

    def frame(self, media_time: float) -> CapturedFrame:
        return CapturedFrame(PICTURE, media_time, time.time())

    def interrupt(self) -> None:
        self.stop.set()

    def close(self) -> None:
        self.closed.set()


PICTURE = jpeg(1)
LIVE = {"name": "a", "source": "rtsp://127.0.0.1:1/x", "backoff_initial": 0.05, "backoff_max": 0.1}


class Cameras:
    """Openings of one camera, each played by the next of ``plays`` (the last for ever)."""

    def __init__(self, *plays: Callable[[ScriptedSource], CapturedFrame | None]) -> None:
        self._plays = list(plays)
        self.opened: list[ScriptedSource] = []

    def __call__(self, _: config.CameraSettings) -> ScriptedSource:
        play = self._plays[min(len(self.opened), len(self._plays) - 1)]
        self.opened.append(ScriptedSource(play))
        return self.opened[-1]


def steady(source: ScriptedSource) -> CapturedFrame:
    source.stop.wait(0.01)
    return source.frame(source.given * 0.01)


def failing_after(count: int) -> Callable[[ScriptedSource], CapturedFrame]:
    def play(source: ScriptedSource) -> CapturedFrame:
        if source.given >= count:
            raise SourceError(SourceReason.DISCONNECTED, "the camera went away")
        return steady(source)

    return play


def hanging(source: ScriptedSource) -> CapturedFrame:
    # A driver that does not listen to anybody; released when the test process ends.
    if source.given == 0:
        return source.frame(0.0)
    NEVER.wait(60)
    return source.frame(1.0)


def mute(source: ScriptedSource) -> CapturedFrame:
    """As ``hanging``, and not one frame before: when it is given up does not matter."""
    NEVER.wait(60)
    return source.frame(0.0)


NEVER = threading.Event()


def frozen(source: ScriptedSource) -> CapturedFrame:
    source.stop.wait(0.01)
    return source.frame(0.0)


def broken(source: ScriptedSource) -> CapturedFrame:
    raise ZeroDivisionError


class Running:
    """A bridge that runs beside the test; stopped and checked at the end."""

    def __init__(self, given: BridgeSettings, **options: Any) -> None:
        self.lines: list[Line] = []
        self.bridge = Bridge(given, Callback(self.lines.append), **options)
        self.report: BridgeReport | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.bridge.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.bridge.stop()
        self.report = await asyncio.wait_for(self._task, 30)
        assert_balanced(self.report, self.lines)

    def states(self, camera: str = "a") -> list[str]:
        return states(self.lines, camera)

    @property
    def results(self) -> int:
        return sum(1 for line in self.lines if isinstance(line, ResultLine))


async def test_a_camera_that_goes_away_is_opened_again() -> None:
    cameras = Cameras(failing_after(5), failing_after(5), steady)
    with ScriptedServer() as server:
        async with Running(settings(server.target, LIVE), open_source=cameras) as running:
            await auntil(lambda: len(cameras.opened) == 3 and cameras.opened[2].given > 20)
    assert running.states() == [
        "STREAMING", "BACKOFF", "CONNECTING", "STREAMING", "BACKOFF", "CONNECTING", "STREAMING",
        "STOPPED",
    ]  # fmt: skip
    totals = running.report.summary.cameras["a"]  # type: ignore[union-attr]
    assert totals.openings == 3
    assert totals.connections == 1, "the server's stream outlives the camera's"
    assert all(source.closed.is_set() for source in cameras.opened)
    offsets = [line.offset_s for line in running.lines if isinstance(line, ResultLine)]
    assert offsets == sorted(offsets), "media time never goes back over openings"


async def test_a_frozen_camera_is_noticed_and_opened_again() -> None:
    cameras = Cameras(frozen, steady)
    with ScriptedServer() as server:
        given = settings(server.target, LIVE | {"stall_after": 0.2, "stall_limit": 0.3})
        async with Running(given, open_source=cameras) as running:
            await auntil(lambda: len(cameras.opened) == 2 and cameras.opened[1].given > 5)
    assert running.states()[:5] == ["STREAMING", "STALLED", "BACKOFF", "CONNECTING", "STREAMING"]


async def test_a_reader_that_hangs_is_left_behind() -> None:
    cameras = Cameras(hanging, steady)
    with ScriptedServer() as server:
        patience = {"open_timeout": 0.5, "stall_after": 0.2, "stall_limit": 0.2}
        given = settings(server.target, LIVE | patience)
        async with Running(given, open_source=cameras) as running:
            await auntil(lambda: len(cameras.opened) == 2 and cameras.opened[1].given > 5)
            assert not cameras.opened[0].closed.is_set()
    assert running.report.summary.cameras["a"].state == "STOPPED"  # type: ignore[union-attr]


async def test_readers_that_hang_do_not_pile_up() -> None:
    cameras = Cameras(mute)
    with ScriptedServer() as server:
        given = settings(server.target, LIVE | {"open_timeout": 0.1})
        async with Running(given, open_source=cameras) as running:
            await auntil(lambda: running.states().count("CONNECTING") >= 6)
    assert len(cameras.opened) == 3


async def test_a_fault_in_a_reader_is_its_own() -> None:
    cameras = Cameras(broken, steady)
    with ScriptedServer() as server:
        async with Running(settings(server.target, LIVE), open_source=cameras) as running:
            await auntil(lambda: running.results > 5)
    backoff = next(
        line for line in running.lines if isinstance(line, StateLine) and line.state == "BACKOFF"
    )
    assert "ZeroDivisionError" in backoff.message


@pytest.mark.parametrize("later", [False, True])
async def test_a_fault_in_the_camera_s_life_ends_the_bridge(later: bool) -> None:
    """What cannot go on must not ask the server for one stream after the other."""

    def no_source(_: config.CameraSettings) -> ScriptedSource:
        if opened_before:
            raise ZeroDivisionError
        opened_before.append(True)
        return ScriptedSource(failing_after(2))

    opened_before = [] if later else [True]
    with ScriptedServer() as server:
        bridge = Bridge(
            settings(server.target, LIVE), Callback(lambda _: None), open_source=no_source
        )
        running = asyncio.create_task(bridge.run())
        ended, _ = await asyncio.wait({running}, timeout=30)
        assert ended
        with pytest.raises(ExceptionGroup) as caught:
            running.result()
        assert caught.group_contains(ZeroDivisionError)
        assert len(server.streams) == 1


async def test_a_fault_in_a_sender_ends_the_bridge() -> None:
    def explode(line: Line) -> None:
        if isinstance(line, ErrorLine):
            raise ZeroDivisionError

    def no_picture(source: ScriptedSource) -> CapturedFrame:
        source.stop.wait(0.01)
        return CapturedFrame(b"", source.given * 0.01, time.time())

    with ScriptedServer() as server:
        bridge = Bridge(
            settings(server.target, LIVE), Callback(explode), open_source=Cameras(no_picture)
        )
        running = asyncio.create_task(bridge.run())
        ended, _ = await asyncio.wait({running}, timeout=30)
        assert ended
        with pytest.raises(ExceptionGroup) as caught:
            running.result()
        assert caught.group_contains(ZeroDivisionError)


class StuckOutput(Callback):
    """Takes lines up to the first that ``sticks``, and takes no more until it is freed."""

    def __init__(self, sticks: Callable[[Line], bool]) -> None:
        self.lines: list[Line] = []
        super().__init__(self.lines.append)
        self._sticks = sticks
        self.stuck = asyncio.Event()
        self.freed = asyncio.Event()

    async def emit(self, line: Line) -> None:
        if self.stuck.is_set() or self._sticks(line):
            self.stuck.set()
            await self.freed.wait()
        await super().emit(line)


async def test_whoever_reads_no_further_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "DRAIN_TIMEOUT", 0.3)
    monkeypatch.setattr(bridge_module, "OUTPUT_PATIENCE", 0.5)
    output = StuckOutput(lambda line: isinstance(line, ResultLine) and line.frame_id > 3)
    with ScriptedServer() as server:
        bridge = Bridge(settings(server.target, LIVE), output, open_source=Cameras(steady))
        running = asyncio.create_task(bridge.run())
        await asyncio.wait_for(output.stuck.wait(), 30)
        bridge.stop()
        report = await asyncio.wait_for(running, 30)
    assert report.output_closed
    assert report.summary.cameras["a"].balanced


@pytest.mark.parametrize("stuck_on", [UpdateLine, DropLine])
async def test_a_frame_is_counted_though_a_line_before_its_own_finds_no_reader(
    stuck_on: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits with a frame in hand may be cancelled; the frame must not go with it."""
    monkeypatch.setattr(runner, "DRAIN_TIMEOUT", 0.3)
    monkeypatch.setattr(bridge_module, "OUTPUT_PATIENCE", 10.0)
    noted = threading.Event()

    def script(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened(window=2)
        count = 0
        for request in requests:
            if not noted.is_set():
                yield update("STAGE_LOST", stage=3)
                noted.set()
            # The model's time: the camera is faster, so that frames are superseded.
            count += 1
            time.sleep(0.05)  # the pace
            yield outcome(request.frame)
        yield summary(results=count)

    output = StuckOutput(lambda line: isinstance(line, stuck_on))
    with ScriptedServer(script) as server:
        bridge = Bridge(settings(server.target, LIVE), output, open_source=Cameras(steady))
        running = asyncio.create_task(bridge.run())
        await asyncio.wait_for(output.stuck.wait(), 30)
        bridge.stop()
        # Sender and receiver are given up; then the reader reads on.
        await auntil(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "send a"])
        output.freed.set()
        report = await asyncio.wait_for(running, 30)
    assert report.summary.cameras["a"].balanced, report.summary


async def test_updates_after_the_last_outcome_are_told(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=2)

    def script(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened()
        count = 0
        for request in requests:
            count += 1
            yield outcome(request.frame)
        yield update("TRACK_ENDED", track_id=9)
        yield summary(results=count)

    with ScriptedServer(script) as server:
        _, lines = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
    assert [line.track_id for line in lines if isinstance(line, UpdateLine)] == [9]


async def test_attempts_run_out() -> None:
    cameras = Cameras(failing_after(0))
    with ScriptedServer() as server:
        report, _lines = await run(
            settings(server.target, LIVE | {"max_attempts": 3}), open_source=cameras
        )
    assert report.failed == ("a",)
    assert len(cameras.opened) == 3


async def test_a_slow_server_costs_old_frames_not_memory() -> None:
    behind: list[int] = []

    def infer(frame_id: int) -> None:
        """Takes its time, in frames of the camera: on any machine it is ten times slower."""
        (source,) = cameras.opened
        now = source.given
        behind.append(now - frame_id)
        until(lambda: source.given >= now + 10 or source.stop.is_set())

    def slow(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened(window=1)
        count = 0
        for request in requests:
            infer(request.frame.frame_id)
            count += 1
            yield outcome(request.frame)
        yield summary(results=count)

    cameras = Cameras(steady)
    with ScriptedServer(slow) as server:
        async with Running(settings(server.target, LIVE), open_source=cameras) as running:
            await auntil(lambda: running.results >= 40)
    totals = running.report.summary.cameras["a"]  # type: ignore[union-attr]
    assert totals.drops_by_reason.get("SUPERSEDED", 0) > 3 * totals.results
    # Were the oldest sent, the last ones would be some 400 frames behind.
    assert sorted(behind[-11:])[5] < 100, "the newest frame goes, not the oldest"
    assert totals.state == CameraState.STOPPED


async def test_a_lossless_camera_is_held_back_and_not_called_stalled() -> None:
    released = threading.Event()

    def reluctant(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened(window=1)
        first = next(requests)
        assert released.wait(60)
        yield outcome(first.frame)
        count = 1
        for request in requests:
            count += 1
            yield outcome(request.frame)
        yield summary(results=count)

    cameras = Cameras(steady)
    with ScriptedServer(reluctant) as server:
        given = settings(server.target, LIVE | {"overload": "lossless", "stall_after": 1.0})
        async with Running(given, open_source=cameras) as running:
            await auntil(lambda: running.states() == ["STREAMING"])
            await asyncio.sleep(1.5)  # past `stall_after`, which must not fire
            assert running.states() == ["STREAMING"]
            released.set()
            await auntil(lambda: running.results > 5)
    totals = running.report.summary.cameras["a"]  # type: ignore[union-attr]
    assert set(totals.drops_by_reason) <= {"STOPPED"}


async def test_while_the_server_is_away_live_frames_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    address = f"unix:{tmp_path}/grpc.sock"
    cameras = Cameras(steady)
    server = ScriptedServer(answering(window=2), address=address)
    try:
        async with Running(settings(address, LIVE), open_source=cameras) as running:
            await auntil(lambda: running.results > 5)
            server.stop()
            before = running.results
            await auntil(lambda: running.bridge.totals["a"].drops_by_reason.get("NOT_CONNECTED"))
            await auntil(lambda: running.bridge.totals["a"].drops > 20)
            server = ScriptedServer(answering(window=2), address=address)
            await auntil(lambda: running.results > before + 10, timeout=40)
            assert len(cameras.opened) == 1, "the camera is not blamed for the server"
    finally:
        server.stop()
    totals = running.report.summary.cameras["a"]  # type: ignore[union-attr]
    assert totals.connections == 2
    assert totals.drops_by_reason["NOT_CONNECTED"] > 0
    # A machine that is busy for half a second has a full window as well.
    allowed = {"SUPERSEDED", "THINNED", "NOT_CONNECTED", "WINDOW_FULL", "STOPPED"}
    assert allowed >= set(totals.drops_by_reason)


async def test_http_mjpeg_camera_that_restarts() -> None:
    pictures = [jpeg(n) for n in range(3)]
    with ScriptedServer() as server:
        with HttpServer(lambda handler: send_stream(handler, pictures)) as web:
            given = settings(
                server.target, LIVE | {"source": f"http://127.0.0.1:{web.port}/video.mjpg"}
            )
            async with Running(given) as running:
                await auntil(lambda: running.states().count("STREAMING") >= 3)
        sent = {r.frame.picture.data for r in server.streams[0] if r.HasField("frame")}
    assert sent <= set(pictures), "the camera's own bytes"


# --- the command ---


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "facelane_bridge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def test_the_command_writes_json_lines_and_a_summary(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        code, lines, err = finish(
            command("run", "--source", str(clip), "--pace", "fast", "--target", server.target)
        )
    assert code == 0, err
    assert [line["type"] for line in lines].count("result") == 20
    assert lines[-1]["type"] == "summary"
    assert lines[-1]["cameras"]["camera"]["results"] == 20
    assert "grace" not in err, "no subject in the logs"
    assert all(json.loads(line)["event"] for line in err.splitlines())


def test_sigterm_ends_it_cleanly_and_tells_systemd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(30)
        with HttpServer(endless) as web, ScriptedServer() as server:
            file = tmp_path / "bridge.toml"
            file.write_text(
                f'[server]\ntarget = "{server.target}"\n[[camera]]\nname = "door"\n'
                f'source = "http://127.0.0.1:{web.port}/v"\n'
            )
            process = command(
                "run",
                str(file),
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"),
                     "WATCHDOG_USEC": "200000"},
            )  # fmt: skip
            said: list[bytes] = []
            while b"WATCHDOG=1" not in said or said.count(b"WATCHDOG=1") < 3:
                said.append(notified.recv(1000))
            assert b"READY=1" in said
            until(lambda: len(server.streams) == 1 and len(server.streams[0]) > 10)
            process.send_signal(signal.SIGTERM)
            code, lines, err = finish(process)
            assert code == 0, err
    totals = lines[-1]["cameras"]["door"]
    assert totals["frames"] == totals["results"] + totals["drops"] + totals["errors"] > 0
    assert totals["state"] == "STOPPED"


def endless(handler: BaseHTTPRequestHandler) -> None:
    def pictures() -> Any:
        for _ in range(3000):
            yield PICTURE
            time.sleep(0.01)  # the camera's pace

    with contextlib.suppress(OSError):  # the bridge goes away
        send_stream(handler, pictures())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run"], 2, "give either"),
        (["run", "--source", "x.mp4", "a.toml"], 2, "give either"),
        (["run", "none.toml"], 2, "no such file"),
        (["run", "none.toml", "--max-fps", "3"], 2, "--max-fps: with a configuration file"),
        (["run", "--source", "rtsp://u:hunter2@h/x"], 2, "credentials_env"),
        (["run", "--source", "x.mp4", "--max-fps", "-3"], 2, "max_fps: expected float >= 0"),
        (["frobnicate"], 2, "invalid choice"),
        (["check", "--source", "none.mp4", "--cameras-only"], 3, ""),
        (["check", "--source", str(Path(__file__)), "--target", "unix:/nowhere"], 4, ""),
    ],
)
def test_wrong_use_is_told(arguments: list[str], code: int, text: str) -> None:
    process = command(*arguments)
    out, err = process.communicate(timeout=40)
    assert process.returncode == code
    assert text in err
    assert "hunter2" not in out + err
    assert "Traceback" not in err


def test_run_ends_with_the_code_of_what_failed(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        code, lines, _ = finish(
            command("run", "--source", str(tmp_path / "none.mp4"), "--target", server.target)
        )
        assert code == 3
    code, lines, _ = finish(
        command("run", "--source", "x.mp4", "--target", f"unix:{tmp_path}/none", "--wait", "0.1")
    )
    assert code == 4
    assert lines[-1]["cameras"]["camera"]["reason"] == "SERVER_UNREACHABLE"


def test_check_says_what_it_found(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("check", "--source", str(clip), "--target", server.target)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "camera: ok, file, h264, 64x48, 10 fps, 2.0 s, passed on as it is" in out
    assert "SERVING" in out


def test_a_reader_of_the_output_that_goes_away(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("run", "--source", str(clip), "--loop", "--target", server.target)
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 5
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()


def test_a_reader_of_the_table_that_goes_away(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command(
            "run", "--table", "--source", str(clip), "--loop", "--target", server.target
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 5
        assert process.stderr is not None
        said = process.stderr.read()
        assert "whoever read the results has gone" in said
        assert "Traceback" not in said
        assert "BrokenPipe" not in said
        process.stderr.close()


def test_a_reader_of_the_logs_that_goes_away_is_nobody_s_loss(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("run", "--source", str(clip), "--pace", "fast", "--target", server.target)
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
        process.stdout.close()
        assert process.wait(30) == 0
    assert lines[-1]["results"] == 20
    assert len(server.streams) == 1


def test_a_table_where_there_is_no_terminal(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command(
            "run", "--table", "--source", str(clip), "--pace", "fast", "--target", server.target
        )
        out, _ = process.communicate(timeout=40)
    assert "grace 0.75 (ood 0.80) live" in out
    assert "20 frames = 20 results + 0 drops + 0 errors" in out
