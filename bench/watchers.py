"""Somebody looks at streams: what does it cost the streams?

Null models. Cameras send all the time, pictures and video; beside them, in turns with nobody,
watchers: some that stop reading, thirty-two that read, one on a video stream from its middle on.
Compared are the ages of the streams' results while somebody looks with those of the seconds beside,
when nobody did. The watchers are a process of their own, of low priority: their side of a machine
is not the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import facelane
import facelane.aio
from bench import load, material
from bench.report import Report, Row
from bench.service import Service, ServiceError
from bench.settings import Settings
from bench.stats import percentile

CASES: Final = {
    "two that stop reading": "stopped",
    "32 that read": "many",
    "one on video": "video",
}
STILLS, STILL_HZ, VIDEO_HZ = 8, 10.0, 20.0
SETTLE_S: Final = 0.4
"""After somebody has come or gone, before what is measured counts."""
P99_AT_MOST: Final = 1.05
ANSWER_S: Final = 30.0


@dataclass(slots=True)
class _Beside:
    """``windows``: seconds of the monotonic clock with somebody, and those beside with nobody."""

    looking: list[tuple[float, float]] = field(default_factory=list)
    nobody: list[tuple[float, float]] = field(default_factory=list)
    pictures: int = 0


async def run(settings: Settings) -> Report:
    report = Report("watchers", smoke=settings.smoke)
    rounds, lasting = settings.sized(24, 1), settings.lasting(2.5, 1.0)
    found = {case: _Beside() for case in CASES}
    stills = [facelane.Picture.encoded(data) for data in material.frames_of_size(25, 20_000)]
    video = [
        facelane.Picture.access_unit(unit, "h264")
        for unit in material.make_clip(100, 640, 480, "h264", VIDEO_HZ)
    ]
    models = material.null_models()
    seconds = len(CASES) * rounds * 2 * (lasting + SETTLE_S) + 20
    async with Service(models.pools_toml()) as service:
        cameras = [
            asyncio.create_task(
                load.paced(
                    service.target,
                    pictures,
                    streams=streams,
                    rate_hz=rate,
                    seconds=seconds,
                    source_id=source,
                )
            )
            for source, pictures, streams, rate in (
                ("stills", stills, STILLS, STILL_HZ),
                ("video", video, 1, VIDEO_HZ),
            )
        ]
        try:
            async with contextlib.AsyncExitStack() as stack:
                watchers = {
                    case: await stack.enter_async_context(_watchers(service.target, kind))
                    for case, kind in CASES.items()
                }
                await asyncio.sleep(2.0)
                for number in range(rounds):
                    settings.say(f"round {number + 1} of {rounds}")
                    for case, beside in found.items():
                        for somebody in (True, False) if number % 2 else (False, True):
                            if somebody:
                                await watchers[case].say("go")
                            await asyncio.sleep(SETTLE_S)
                            begin = time.monotonic()
                            await asyncio.sleep(lasting)
                            window = begin, time.monotonic()
                            (beside.looking if somebody else beside.nobody).append(window)
                            if somebody:
                                beside.pictures += int(await watchers[case].say("stop"))
            if any(camera.done() for camera in cameras):
                raise ServiceError("the cameras ended before the watchers did")
            measured = await asyncio.gather(*cameras)
        finally:
            for camera in cameras:
                camera.cancel()
            await asyncio.gather(*cameras, return_exceptions=True)
    for case, beside in found.items():
        _row(report, case, beside, measured)
    lost = sum(one.lost for one in measured)
    report.aim("frames without an outcome", lost, 0, at_most=True)
    return report


def _row(report: Report, case: str, beside: _Beside, measured: Sequence[load.Measured]) -> None:
    ages = {"looking": _ages(measured, beside.looking), "nobody": _ages(measured, beside.nobody)}
    p99 = {what: percentile(found, 99) * 1e3 for what, found in ages.items()}
    p50 = {what: percentile(found, 50) * 1e3 for what, found in ages.items()}
    report.add(
        Row(
            case,
            f"{STILLS} cameras at {STILL_HZ:g}/s, one of video at {VIDEO_HZ:g}/s",
            "null",
            p50_ms=p50["looking"],
            p99_ms=p99["looking"],
            overhead_p50=p50["looking"] / p50["nobody"],
            overhead_p99=p99["looking"] / p99["nobody"],
            extra={
                "nobody_p50_ms": p50["nobody"],
                "nobody_p99_ms": p99["nobody"],
                "results": len(ages["looking"]),
                "nobody_results": len(ages["nobody"]),
                "pictures_seen": beside.pictures,
            },
        )
    )
    worst = p99["looking"] / p99["nobody"]
    report.aim(f"{case}: p99 age, beside nobody's", worst, P99_AT_MOST, at_most=True)


def _ages(measured: Sequence[load.Measured], windows: Sequence[tuple[float, float]]) -> list[float]:
    return [
        answer.age
        for one in measured
        for answer in one.results
        if any(begin <= answer.at < end for begin, end in windows)
    ]


class _Child:
    """A process of watchers, which waits for ``go`` and ``stop``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def say(self, word: str) -> str:
        """What it answers, once it has done so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n".encode())
        async with asyncio.timeout(ANSWER_S):
            answer = await self._process.stdout.readline()
        if not answer:
            raise ServiceError("the watchers have ended")
        return answer.decode()


@contextlib.asynccontextmanager
async def _watchers(target: str, kind: str) -> AsyncIterator[_Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.watchers", target, kind,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        child = _Child(process)
        await child.say("hello")
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# -- the watchers' process ------------------------------------------------------------------


async def _look(
    client: facelane.aio.Client, stream: str, counts: list[int], *, reads: bool
) -> None:
    looking = client.watch_stream(stream_id=stream, max_fps=30.0)
    async with contextlib.aclosing(looking) as pictures:
        async for _ in pictures:
            counts[0] += 1
            if not reads:
                await asyncio.Event().wait()


async def _serve(target: str, kind: str) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: list[asyncio.Task[None]] = []
    counts = [0]
    async with facelane.aio.Client(target) as client:
        while word := (await reader.readline()).decode().strip():
            if word == "go":
                streams = await client.list_streams()
                stills = [one.stream_id for one in streams if one.source_id == "stills"]
                video = [one.stream_id for one in streams if one.source_id == "video"]
                wanted = {
                    "stopped": [*stills[:1], *video],
                    "many": [(*stills, *video)[number % len(streams)] for number in range(32)],
                    "video": video,
                }[kind]
                counts = [0]
                tasks = [
                    asyncio.create_task(_look(client, one, counts, reads=kind != "stopped"))
                    for one in wanted
                ]
                while not counts[0]:
                    await asyncio.sleep(0.01)
            elif word == "stop":
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            print(counts[0], flush=True)


if __name__ == "__main__":
    os.nice(10)
    asyncio.run(_serve(*sys.argv[1:]))
