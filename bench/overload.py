"""More cameras than a server can serve in time: do results keep their age, and streams their
equal part?

What fits is learnt first, by cameras that are let in one after another until the server thins
them. Then so many come as send half, once, twice and four times that. A first part of each load
is not counted, in which the server learns. Ages are the server's own; the clients' view, from
when a frame was due, stands beside them.

Parts: ``null`` (models that compute nothing and take a set time), ``starter`` (the models that
ship, whose time is the processor's) and, where it is named, ``video`` (cameras of 720p H.264, with
the device's own decoder; all of it is decoded, whatever is taken).
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import facelane
import facelane.aio
from bench import load, material, streams
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import percentile

TARGET_MS = 100.0
AGE_RATIO = 1.2
SPREAD = 1.10
TIMES = (0.5, 1.0, 2.0, 4.0)
DETECT_MS = 6
RECOGNIZE_MS = 8
"""Set times of the null models: the recogniser is what is short."""
MOST_CAMERAS = 60
"""Of video, for each detector worker: it has decoders for little more. Of more each sends more."""
LEARNING_S = 15.0
"""Of video, once decoders are open: groups of pictures are a second long."""


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    pools: str
    frames: list[bytes]
    fps: float


async def run(settings: Settings) -> Report:
    report = Report("overload", smoke=settings.smoke)
    if settings.wants("null"):
        models = material.null_models(decoding=False)
        slow = {"detector": DETECT_MS, "recognizer": RECOGNIZE_MS}
        pools = models.pools_toml(
            **{
                stage: f"batch_max = 1\noptions = {{ 'fail.slow_ms' = '{ms}' }}"
                for stage, ms in slow.items()
            }
        )
        await _case(
            settings, report, _Case("null", pools, material.frames_of_size(8, 10_000), 12.5)
        )
    if settings.wants("starter"):
        models = material.real_models(settings.cache)
        frames = material.make_frames(settings.sized(24, 4), 640, 480, [1])
        await _case(settings, report, _Case(models.name, models.pools_toml(), frames, 5.0))
    if "video" in settings.only:
        await _video(settings, report)
    return report


async def _video(settings: Settings, report: Report) -> None:
    """Servers with the device's own decoder; one, if nothing else is said."""
    on_card = settings.device.startswith("cuda")
    way = streams.Way(decode="cuda" if on_card else "cpu", codec="h264")
    models = material.real_models(settings.cache)
    tables = f"[limits]\nage_target_ms = {TARGET_MS:g}\nmin_fps = 0\nmax_streams = 1024\n"
    many = settings.servers * max(1, settings.shards)
    detectors = 2 if many == 1 else many  # see ``pools_for``
    most = settings.sized(MOST_CAMERAS * detectors if on_card else 8, 2)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        folder = Path(scratch) / "video"
        streams.make_clip(settings, report, "720p", "h264", folder)
        pools = streams.pools_for(settings, models, way)
        async with streams.serving(settings, pools, tables, way) as services:
            learning = settings.lasting(LEARNING_S, 0.5)
            if on_card:
                learning += streams.OPENING_S * most

            async def trial(cameras: int, fps: float, seconds: float) -> streams.Trial:
                return await streams.trial(
                    services, folder, cameras, fps, learning + seconds, settle_s=learning
                )

            begun = asyncio.create_task(trial(most, streams.FPS, settings.lasting(6.0, 1.0)))
            await asyncio.sleep(learning + settings.lasting(5.0, 1.0))
            fits = 0.0
            for service in services:
                async with facelane.aio.Client(service.target) as client:
                    known = (await client.server_info()).load
                fits += known.capacity_fps if known is not None else 0.0
            await begun
            if settings.smoke:
                fits = fits or 2.0
            if not fits:
                raise RuntimeError(f"{most} cameras are not enough to learn what fits")
            report.note(
                f"video: {fits:.0f} pictures/s fit, learnt from {most} cameras of {streams.FPS:g}"
            )
            for times in TIMES:
                cameras = max(1, min(most, round(times * fits / streams.FPS)))
                fps = times * fits / cameras
                settings.say(f"video: {times:g} times what fits: {cameras} cameras of {fps:.1f}")
                found = await trial(cameras, fps, settings.lasting(20.0, 1.0))
                answered = len(found.ages) / max(1, found.answers) * cameras * fps
                _add(
                    report, _Load("video", models.name, times, cameras, fps),
                    found.ages, found.latencies, found.rates, answered, found.reasons,
                    errors=found.errors, lost=found.lost,
                )  # fmt: skip
                settings.keep(report)


async def _case(settings: Settings, report: Report, case: _Case) -> None:
    # Nobody is refused, or four times what fits would not be let in.
    tables = f"[limits]\nage_target_ms = {TARGET_MS:g}\nmin_fps = 0"
    async with Service(case.pools, tables=tables) as service:
        fits = await _fits(settings, service.target, case)
        report.note(
            f"{case.name}: {fits:.0f} frames/s fit, learnt from cameras of {case.fps:g} frames/s"
        )
        for times in TIMES:
            streams = max(1, round(times * fits / case.fps))
            fps = times * fits / streams
            settings.say(f"{case.name}: {times:g} times what fits: {streams} cameras")
            await _measure(settings, report, case, service.target, times, streams, fps)


async def _fits(settings: Settings, target: str, case: _Case) -> float:
    """Frames a second that the server says it can serve in time, loaded to its limit."""
    streams = 2
    async with facelane.aio.Client(target) as client:
        while True:
            begun = asyncio.create_task(
                load.paced(
                    target,
                    case.frames,
                    streams=streams,
                    rate_hz=case.fps,
                    seconds=settings.lasting(8.0, 2.0),
                    disable_tracking=True,
                )
            )
            await asyncio.sleep(settings.lasting(7.0, 1.5))
            known = (await client.server_info()).load
            await begun
            settings.say(f"{case.name}: {streams} cameras: {known}")
            if known is not None and (known.thinned_streams or settings.smoke):
                return known.capacity_fps
            if known is not None and known.load > 0.5:
                streams = max(streams + 1, math.ceil(streams / known.load * 1.3))
            else:
                streams *= 2
            if streams > 200:
                return streams * case.fps


async def _measure(
    settings: Settings,
    report: Report,
    case: _Case,
    target: str,
    times: float,
    streams: int,
    fps: float,
) -> None:
    learning = settings.lasting(6.0, 0.5)
    measured = await load.paced(
        target,
        case.frames,
        streams=streams,
        rate_hz=fps,
        seconds=learning + settings.lasting(15.0, 1.0),
        disable_tracking=True,
    )
    since = measured.begin + learning
    counted = [a for a in measured.results if a.at >= since]
    by_stream = Counter(a.stream for a in counted)
    rates = [by_stream[n] / (measured.end - since) for n in range(streams)]
    ages = [a.age for a in counted]
    _add(
        report,
        _Load(case.name, case.name, times, streams, fps),
        ages,
        [a.latency for a in counted],
        rates,
        len(counted) / (measured.end - since),
        Counter(a.reason for a in measured.answers if a.kind == "drop"),
        errors=measured.errors,
        lost=measured.lost,
        learning_ages=[a.age for a in measured.results if a.at < since],
    )


@dataclass(frozen=True, slots=True)
class _Load:
    name: str
    model: str
    times: float
    streams: int
    fps: float


def _add(
    report: Report,
    given: _Load,
    ages: Sequence[float],
    latencies: Sequence[float],
    rates: Sequence[float],
    answered: float,
    drops: Counter[str],
    *,
    errors: int,
    lost: int,
    learning_ages: Sequence[float] = (),
) -> None:
    """``answered``: results a second; ``rates``: of each stream. Ages and latencies in seconds."""
    p99 = percentile(ages, 99) * 1e3
    spread = max(rates) / min(rates) if min(rates) > 0 else math.inf
    learning = {"learning_p99_ms": percentile(learning_ages, 99) * 1e3} if learning_ages else {}
    report.add(
        Row(
            deployment=f"facelane, {given.model}" + " models" * (given.model == given.name),
            scenario=f"{given.times:g} times what fits",
            model=given.model,
            rate_hz=given.fps,
            p50_ms=percentile(ages, 50) * 1e3,
            p99_ms=p99,
            throughput_per_s=answered,
            extra={
                "streams": given.streams,
                "offered_per_s": given.streams * given.fps,
                "client_p99_ms": percentile(latencies, 99) * 1e3,
                **learning,
                "least_rate": min(rates),
                "spread": spread,
                "thinned": drops["THINNED"],
                "superseded": drops["SUPERSEDED"],
                "waiting_for_key_frame": drops["WAITING_FOR_KEY_FRAME"],
                "too_old": drops["TOO_OLD"],
                "errors": errors,
                "without_outcome": lost,
            },
        )
    )
    what = f"{given.name} at {given.times:g} times what fits:"
    if given.times >= 2.0:
        report.aim(f"p99 age of results, ms, {what}", p99, AGE_RATIO * TARGET_MS, at_most=True)
        report.aim(f"most / least rate of equal streams, {what}", spread, SPREAD, at_most=True)
    report.aim(f"frames without an outcome, {what}", lost, 0, at_most=True)
