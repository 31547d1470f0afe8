"""Three designs on the same models and frames: threads with polled queues, processes with
pickled frames (the two that one finds described), and facelane.

Saturated, with the same number of frames under way in each, and at one pace that the
slowest can keep. Rounds are interleaved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import load, material
from bench.inprocess import Timed
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import Summary, median, ratio

STREAMS = 4
WINDOW = 4
PACE_OF_SLOWEST = 0.6
BASELINES = {
    "threads": "threads, queue.Queue polled",
    "processes": "processes, mp.Queue with pickled frames",
}
_SCENARIO = "640x480 JPEG, one face, three models"


def _baseline(
    name: str,
    models: material.Models,
    frames: Sequence[bytes],
    *,
    count: int = 0,
    rate_hz: float = 0.0,
    seconds: float = 0.0,
) -> Timed:
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        folder = Path(scratch)
        for index, data in enumerate(frames):
            (folder / f"{index:06d}.jpg").write_bytes(data)
        job = {
            "packages": {str(s): str(p.folder) for s, p in models.packages.items()},
            "threads": 1,
            "count": count,
            "in_flight": STREAMS * WINDOW,
            "rate_hz": rate_hz,
            "seconds": seconds,
        }
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", f"bench.baselines.{name}", str(folder / "job.json")],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode != 0:
        raise RuntimeError(f"baseline {name} failed:\n{done.stderr[-3000:]}")
    return Timed(**json.loads(done.stdout))


async def run(settings: Settings) -> Report:
    report = Report("article", smoke=settings.smoke)
    models = material.real_models(settings.cache)
    frames = (
        material.frames_from(settings.frames)
        if settings.frames
        else material.make_frames(settings.sized(48, 6), 640, 480, [1])
    )
    count = settings.sized(400, 16)
    rounds = settings.sized(2, 1)
    seconds = settings.lasting(10.0, 1.0)
    saturated: dict[str, list[Summary]] = {name: [] for name in (*BASELINES, "facelane")}
    memory: dict[str, float] = {}
    for number in range(rounds):
        settings.say(f"round {number + 1} of {rounds}: saturated")
        for name in BASELINES:
            timed = _baseline(name, models, frames, count=count)
            saturated[name].append(Summary.of(timed.seconds, timed.elapsed_s))
            memory[name] = timed.rss_mib
        async with Service(models.pools_toml()) as service:
            await load.saturate(service.target, frames, streams=1, total=16, disable_tracking=True)
            measured = await load.saturate(
                service.target,
                frames,
                streams=STREAMS,
                window=WINDOW,
                total=count,
                disable_tracking=True,
            )
            saturated["facelane"].append(measured.summary())
            memory["facelane"] = service.rss_mib()
    slowest = min(median([s.throughput_per_s for s in found]) for found in saturated.values())
    pace = max(1.0, PACE_OF_SLOWEST * slowest)

    paced: dict[str, list[Summary]] = {name: [] for name in saturated}
    for number in range(rounds):
        settings.say(f"round {number + 1} of {rounds}: {pace:.1f} frames a second")
        for name in BASELINES:
            timed = _baseline(name, models, frames, rate_hz=pace, seconds=seconds)
            paced[name].append(Summary.of(timed.seconds, timed.elapsed_s))
        async with Service(models.pools_toml()) as service:
            await load.saturate(service.target, frames, streams=1, total=16, disable_tracking=True)
            measured = await load.paced(
                service.target,
                frames,
                streams=1,
                rate_hz=pace,
                seconds=seconds,
                disable_tracking=True,
                overload="lossless",
                max_frame_age=60.0,
            )
            paced["facelane"].append(measured.summary())
            report.aim(
                "facelane, frames without a result:",
                measured.sent - len(measured.results),
                0,
                at_most=True,
            )

    for scenario, found, rate in (
        (f"{_SCENARIO}, {STREAMS * WINDOW} under way", saturated, None),
        (f"{_SCENARIO}, paced", paced, pace),
    ):
        rows = {}
        for name, summaries in found.items():
            rows[name] = report.add(
                Row(
                    deployment=BASELINES.get(name, "facelane"),
                    scenario=scenario,
                    model=models.name,
                    rate_hz=rate,
                    p50_ms=median([s.p50_ms for s in summaries]),
                    p99_ms=median([s.p99_ms for s in summaries]),
                    throughput_per_s=median([s.throughput_per_s for s in summaries]),
                    memory_mib=memory[name],
                    extra={"rounds": len(summaries)},
                )
            )
        for row in rows.values():
            row.overhead_p50 = ratio(row.p50_ms or 0, rows["facelane"].p50_ms or 0)
            row.overhead_p99 = ratio(row.p99_ms or 0, rows["facelane"].p99_ms or 0)
    report.note("overhead_*: times facelane's in the same scenario")
    report.note(models.listed)
    return report
