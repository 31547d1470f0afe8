"""What the service costs: the same models on the same frames, in one loop in one process,
and through client, server and worker processes.

Rounds of each are interleaved, so that another load on the machine meets both; ratios are
of medians over the rounds. Tracking is off, because it would spare the service work that
the loop does. The null part has models that compute nothing, so the service alone remains.
"""

from __future__ import annotations

import os

from bench import inprocess, load, material
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import Summary, median, percentile, ratio

THROUGHPUT_RATIO = 0.85
ADDED_P50_MS = 4.0
NULL_FRAMES_PER_S = 1_000
NULL_STREAMS = 8
NULL_BYTES = 60_000
_WARM = 20


async def run(settings: Settings) -> Report:
    report = Report("overhead", smoke=settings.smoke)
    if settings.wants("real"):
        await _real(settings, report)
    if settings.wants("null"):
        await _null(settings, report, decoding=False)
        await _null(settings, report, decoding=True)
    return report


async def _real(settings: Settings, report: Report) -> None:
    models = material.real_models(settings.cache)
    frames = (
        material.frames_from(settings.frames)
        if settings.frames
        else material.make_frames(settings.sized(48, 6), 640, 480, [1])
    )
    count = settings.sized(300, 12)
    rounds = settings.sized(3, 1)
    cores = len(os.sched_getaffinity(0))
    # The loop may use every core inside of an operation; which is better is its choice.
    thread_choices = sorted({1, min(cores, 4)})
    loop: dict[int, list[inprocess.Timed]] = {threads: [] for threads in thread_choices}
    full: list[load.Measured] = []
    alone: list[load.Measured] = []
    rss = 0.0
    for number in range(rounds):
        for threads in thread_choices:
            settings.say(f"round {number + 1} of {rounds}: one loop, threads: {threads}")
            loop[threads].append(inprocess.measure(models, frames, count=count, threads=threads))
        settings.say(f"round {number + 1} of {rounds}: facelane")
        async with Service(models.pools_toml()) as service:
            await load.saturate(
                service.target, frames, streams=1, total=_WARM, disable_tracking=True
            )
            full.append(
                await load.saturate(
                    service.target, frames, streams=4, total=count, disable_tracking=True
                )
            )
            alone.append(
                await load.saturate(
                    service.target, frames, streams=1, total=count, window=1, disable_tracking=True
                )
            )
            rss = service.rss_mib()

    rates = {}
    for threads, runs in loop.items():
        summaries = [Summary.of(r.seconds, r.elapsed_s) for r in runs]
        rates[threads] = median([s.throughput_per_s for s in summaries])
        report.add(
            Row(
                deployment=f"one loop, {threads} thread{'s' * (threads > 1)}",
                scenario="640x480 JPEG, one face, three models",
                model=models.name,
                batch=1,
                p50_ms=median([s.p50_ms for s in summaries]),
                p99_ms=median([s.p99_ms for s in summaries]),
                throughput_per_s=rates[threads],
                memory_mib=max(r.rss_mib for r in runs),
                extra={"frames": count * rounds, "faces": sum(r.faces for r in runs)},
            )
        )
    base = report.rows[0]
    for name, measured in (("4 streams saturated", full), ("1 stream, one frame at a time", alone)):
        summaries = [m.summary() for m in measured]
        report.add(
            Row(
                deployment=f"facelane, {name}",
                scenario="640x480 JPEG, one face, three models",
                model=models.name,
                p50_ms=median([s.p50_ms for s in summaries]),
                p99_ms=median([s.p99_ms for s in summaries]),
                throughput_per_s=median([s.throughput_per_s for s in summaries]),
                memory_mib=rss,
                overhead_p50=ratio(median([s.p50_ms for s in summaries]), base.p50_ms or 0),
                extra={
                    "frames": sum(m.sent for m in measured),
                    "faces": sum(a.faces for m in measured for a in m.answers),
                    "lost": sum(m.lost + m.drops + m.errors for m in measured),
                },
            )
        )
    best = max(rates.values())
    through = report.rows[-2].throughput_per_s or 0.0
    report.aim(
        "throughput, service / best loop:", ratio(through, best), THROUGHPUT_RATIO, at_most=False
    )
    # A loop with one thread is what the service's one-threaded workers compare with.
    added = (report.rows[-1].p50_ms or 0.0) - (base.p50_ms or 0.0)
    report.aim("added p50 at one stream, ms:", added, ADDED_P50_MS, at_most=True)
    report.note(models.listed)


async def _null(settings: Settings, report: Report, *, decoding: bool) -> None:
    models = material.null_models(decoding=decoding)
    frames = material.frames_of_size(settings.sized(16, 4), NULL_BYTES)
    total = settings.sized(16_000, 400)
    settings.say("null models" + (" behind a decoder" if decoding else ""))
    async with Service(models.pools_toml()) as service:
        await load.saturate(service.target, frames, streams=NULL_STREAMS, total=total // 8)
        measured = await load.saturate(service.target, frames, streams=NULL_STREAMS, total=total)
        single = await load.saturate(
            service.target, frames, streams=1, total=settings.sized(2_000, 100), window=1
        )
        rss = service.rss_mib()
    scenario = f"{sum(map(len, frames)) // len(frames) // 1000} kB JPEG, null models"
    scenario += ", decoded" if decoding else ", not decoded"
    for name, found in ((f"{NULL_STREAMS} streams", measured), ("one frame at a time", single)):
        summary = found.summary()
        report.add(
            Row(
                deployment=f"facelane, {name}",
                scenario=scenario,
                model="null",
                p50_ms=summary.p50_ms,
                p99_ms=summary.p99_ms,
                throughput_per_s=summary.throughput_per_s,
                memory_mib=rss,
                extra={
                    "frames": found.sent,
                    "lost": found.lost + found.drops + found.errors,
                    "server_age_p50_ms": percentile(found.ages(), 50) * 1e3,
                },
            )
        )
    if not decoding:
        report.aim(
            f"frames a second, {NULL_STREAMS} streams, client included:",
            measured.summary().throughput_per_s,
            NULL_FRAMES_PER_S,
            at_most=False,
        )
    report.aim("frames lost:", measured.lost + measured.drops + measured.errors, 0, at_most=True)
