"""``facelane-bridge host``: cameras that come and go while the bridge runs.

Whoever hosts the bridge (``facelane-fleet``) says on standard input which cameras it has, a JSON
object a line, the whole set each time; the bridge starts and ends what is new and what is gone and
leaves the others as they are. It tells on standard output how each fares, and once more when one
has ended. End-of-file ends it, and so does silence: a host that has nothing to say says ``keep``,
and after ``lease`` seconds without a word the cameras belong to somebody else.

Results are not told: a fleet's events come from its servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
import structlog

from facelane import aio
from facelane_bridge.bridge import CAMERAS_PER_CONNECTION, RESTART_PAUSE, new_client
from facelane_bridge.camera import CameraState
from facelane_bridge.config import MAX_CAMERAS, CameraSettings, ConfigError, ServerSettings
from facelane_bridge.output import CameraTotals, Line, ResultLine
from facelane_bridge.runner import CameraRunner
from facelane_bridge.sources import open_source

log = structlog.get_logger("facelane_bridge")

MAX_LINE_BYTES: Final = 8 << 20
TELL_S: Final = 0.5
END_S: Final = 2.0
"""What outcomes that are on their way have left when the host has gone."""
_COUNTS: Final = (
    "frames", "results", "drops", "errors", "faces", "skipped", "openings", "connections"
)  # fmt: skip


class HostedCamera(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A camera and where its frames go. ``term``: which of the times that it was given out this
    is; another one is another run of the camera, with books of its own."""

    term: int
    camera: CameraSettings
    server: ServerSettings


class Want(msgspec.Struct, frozen=True, kw_only=True, tag="want"):
    """In: the cameras, all of them."""

    cameras: Annotated[tuple[HostedCamera, ...], msgspec.Meta(max_length=MAX_CAMERAS)]


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """In: nothing has changed."""


class CameraReport(msgspec.Struct, kw_only=True):
    """Out: one camera. Times are of the system's clock; ``gap_s``: the longest time between two
    results since the report before."""

    term: int
    totals: CameraTotals
    ended: bool = False
    first_result_at: float | None = None
    last_result_at: float | None = None
    gap_s: float = 0.0


class Told(msgspec.Struct, kw_only=True, tag="told"):
    """Out: every camera that there is, and those that have ended since the line before."""

    cameras: dict[str, CameraReport]
    ended: dict[str, CameraReport] = {}


@dataclass(eq=False)
class _Hosted:
    """One camera: its runs, one after the other, and their books."""

    wanted: HostedCamera
    before: CameraTotals = field(default_factory=CameraTotals)
    """Of runs that have ended."""
    runner: CameraRunner | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    fault: str = ""
    first_result_at: float | None = None
    last_result_at: float | None = None
    gap_s: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.wanted.camera.name

    def stop(self) -> None:
        self.stopped.set()
        if self.runner is not None:
            self.runner.stop()

    async def heard(self, line: Line) -> None:
        if isinstance(line, ResultLine):
            now = time.time()
            if self.last_result_at is None:
                self.first_result_at = now
            else:
                self.gap_s = max(self.gap_s, now - self.last_result_at)
            self.last_result_at = now

    def report(self, *, ended: bool = False) -> CameraReport:
        totals = self.before
        if self.runner is not None:
            totals = added(self.before, self.runner.totals())
        elif self.fault:
            totals.state, totals.reason = CameraState.FAILED.value, self.fault
        gap, self.gap_s = self.gap_s, 0.0
        return CameraReport(
            term=self.wanted.term,
            totals=totals,
            ended=ended,
            first_result_at=self.first_result_at,
            last_result_at=self.last_result_at,
            gap_s=round(gap, 4),
        )


def added(before: CameraTotals, now: CameraTotals) -> CameraTotals:
    """The books of two runs as one; what is no count is that of the later one."""
    total = msgspec.structs.replace(now)
    for name in _COUNTS:
        setattr(total, name, getattr(before, name) + getattr(now, name))
    for name in ("drops_by_reason", "errors_by_reason", "decisions"):
        counts = dict(getattr(before, name))
        for reason, count in getattr(now, name).items():
            counts[reason] = counts.get(reason, 0) + count
        setattr(total, name, counts)
    return total


class _Connections:
    """Clients by server, so many cameras each; closed with the last of them."""

    def __init__(self) -> None:
        self._open: dict[ServerSettings, list[_Shared]] = {}

    @contextlib.asynccontextmanager
    async def client(self, server: ServerSettings) -> Any:
        """Raises ``ConfigError``."""
        clients = self._open.setdefault(server, [])
        shared = next((one for one in clients if one.users < CAMERAS_PER_CONNECTION), None)
        if shared is None:
            stack = AsyncExitStack()
            shared = _Shared(await stack.enter_async_context(new_client(server)), stack)
            clients.append(shared)
        shared.users += 1
        try:
            yield shared.client
        finally:
            shared.users -= 1
            if not shared.users:
                clients.remove(shared)
                if not clients:
                    self._open.pop(server, None)
                await shared.stack.aclose()


@dataclass(eq=False)
class _Shared:
    client: aio.Client
    stack: AsyncExitStack
    users: int = 0


class Host:
    """The cameras of a hosted bridge. ``tell`` is given each ``Told``, while ``free`` says that
    it can be told something; ``pause``: before a camera that has failed for good is begun again."""

    def __init__(
        self,
        tell: Callable[[Told], None],
        *,
        free: Callable[[], bool] = lambda: True,
        pause: float = RESTART_PAUSE,
    ) -> None:
        self._tell = tell
        self._free = free
        self._pause = pause
        self._connections = _Connections()
        self._cameras: dict[str, _Hosted] = {}
        self._leaving: set[_Hosted] = set()
        self._ended: dict[str, CameraReport] = {}
        self._wanted: dict[str, HostedCamera] = {}
        self._changed = asyncio.Event()

    def want(self, cameras: tuple[HostedCamera, ...]) -> None:
        """Starts what is new and ends what is gone; a camera of another term, or with other
        settings, ends first and is started when it has."""
        wanted = {one.camera.name: one for one in cameras}
        for name, hosted in list(self._cameras.items()):
            if wanted.get(name) != hosted.wanted:
                del self._cameras[name]
                self._leaving.add(hosted)
                hosted.stop()
        self._wanted = wanted
        self._start()

    def _start(self) -> None:
        busy = {hosted.name for hosted in self._leaving}
        for name, one in self._wanted.items():
            if name not in self._cameras and name not in busy:
                hosted = self._cameras[name] = _Hosted(one)
                hosted.task = asyncio.create_task(self._run(hosted), name=f"hosted {name}")
        self._changed.set()

    async def _run(self, hosted: _Hosted) -> None:
        try:
            while not hosted.stopped.is_set():
                await self._run_once(hosted)
                if hosted.stopped.is_set():
                    break
                # It has failed for good, or its file is at its end: again later.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause):
                        await hosted.stopped.wait()
        finally:
            self._ended[hosted.name] = hosted.report(ended=True)
            self._leaving.discard(hosted)
            if self._cameras.get(hosted.name) is hosted:
                del self._cameras[hosted.name]
            self._start()

    async def _run_once(self, hosted: _Hosted) -> None:
        wanted = hosted.wanted
        try:
            async with self._connections.client(wanted.server) as client:
                runner = CameraRunner(
                    wanted.camera, wanted.server, client, hosted.heard, random.random, open_source
                )
                hosted.runner, hosted.fault = runner, ""
                if hosted.stopped.is_set():
                    runner.stop()
                await runner.run()
        except ConfigError as error:
            hosted.fault = str(error)
            log.error("camera not started", camera=hosted.name, why=str(error))
        except Exception as error:
            hosted.fault = type(error).__name__
            log.exception("camera broke", camera=hosted.name)
        if hosted.runner is not None:
            hosted.before = added(hosted.before, hosted.runner.totals())
            hosted.runner = None

    async def tell_for_ever(self) -> None:
        """A line now and then, and at once when a camera came or went."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._changed.wait()
            self._changed.clear()
            if self._free():
                self.tell()

    def tell(self) -> None:
        ended, self._ended = self._ended, {}
        present = [*self._leaving, *self._cameras.values()]
        self._tell(Told(cameras={one.name: one.report() for one in present}, ended=ended))

    async def close(self, seconds: float) -> None:
        """Ends all cameras; outcomes that do not come in time are not waited for."""
        self.want(())
        tasks = [hosted.task for hosted in self._leaving if hosted.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()


async def run(lease: float) -> int:
    """Until end-of-file or silence; gives the exit code."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(MAX_LINE_BYTES, loop)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop), sys.stdin
    )
    encoder = msgspec.json.Encoder()
    decoder: msgspec.json.Decoder[Want | Keep] = msgspec.json.Decoder(Want | Keep)
    writer = _Writer()
    host = Host(lambda told: writer.put(encoder.encode(told) + b"\n"), free=lambda: writer.free)
    telling = asyncio.create_task(host.tell_for_ever(), name="tell")
    try:
        while True:
            async with asyncio.timeout(lease):
                line = await reader.readline()
            if not line:
                break
            match decoder.decode(line):
                case Want(cameras=cameras):
                    host.want(cameras)
                case Keep():
                    pass
    except TimeoutError:
        log.error("the host is silent: its cameras are let go", lease_s=lease)
    except (ValueError, msgspec.DecodeError) as error:
        log.error("the host says what is no order", why=str(error))
        return 1
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await host.close(END_S)
        await writer.flush(1.0)
        if writer.free:
            host.tell()
            await writer.flush(1.0)
        transport.close()
    return 0


class _Writer:
    """To standard output, by a thread that may hang with whoever does not read."""

    def __init__(self) -> None:
        self._lines: queue.Queue[bytes] = queue.Queue(1)
        threading.Thread(target=self._write, name="tell", daemon=True).start()

    @property
    def free(self) -> bool:
        """Whether the line before has been taken."""
        return not self._lines.unfinished_tasks

    def put(self, line: bytes) -> None:
        self._lines.put_nowait(line)

    async def flush(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.free:
                    await asyncio.sleep(0.01)

    def _write(self) -> None:
        while True:
            view = memoryview(self._lines.get())
            # Who has gone reads nothing any more, and its end-of-file ends the cameras.
            with contextlib.suppress(OSError):
                while view:
                    view = view[os.write(1, view) :]
            self._lines.task_done()
