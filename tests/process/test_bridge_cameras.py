"""The bridge and cameras that misbehave, scripted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from tests.fakes.bridge_scenes import (
    PICTURE,
    assert_balanced,
    run,
    settings,
    states,
)
from tests.fakes.cameras import HttpServer, jpeg, send_stream, write_clip
from tests.fakes.scripted_server import (
    ScriptedServer,
    answering,
    opened,
    outcome,
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
    UpdateLine,
)
from facelane_bridge.sources import (
    CapturedFrame,
    SourceError,
    SourceInfo,
    SourceReason,
)


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
            await auntil(lambda: any(source.given > 5 for source in cameras.opened[1:]))
    assert running.states()[:5] == ["STREAMING", "STALLED", "BACKOFF", "CONNECTING", "STREAMING"]


async def test_a_reader_that_hangs_is_left_behind() -> None:
    cameras = Cameras(hanging, steady)
    with ScriptedServer() as server:
        patience = {"open_timeout": 0.5, "stall_after": 0.2, "stall_limit": 0.2}
        given = settings(server.target, LIVE | patience)
        async with Running(given, open_source=cameras) as running:
            # A busy machine may take the second one for a camera that hangs, too.
            await auntil(lambda: any(source.given > 5 for source in cameras.opened[1:]))
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
