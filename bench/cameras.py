"""Simulated cameras in a process of their own: ``python -m bench.cameras JOB.json``.

A client process is one core of Python; many cameras need several of them, or the client
would be measured instead of the server. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import collections
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import facelane
from bench import load


@dataclass(frozen=True, slots=True)
class Job:
    """``start_at``: ``time.monotonic`` seconds at which all client processes begin. ``frames``: a
    folder of JPEG files, or of access units of one group of pictures after the other.
    ``analysis_fps``: as in a stream's config; 0 = every picture."""

    target: str
    frames: str
    streams: int
    rate_hz: float
    seconds: float
    start_at: float
    max_frame_age: float
    analysis_fps: float = 0.0
    settle_s: float = 1.0
    """What comes first is not counted: streams are opened, and all tracks are new."""


async def run(job: Job, pictures: list[facelane.Picture]) -> dict[str, Any]:
    """What the cameras of this process saw."""
    await asyncio.sleep(max(0.0, job.start_at - time.monotonic()))
    cpu = time.process_time()
    measured = await load.paced(
        job.target,
        pictures,
        streams=job.streams,
        rate_hz=job.rate_hz,
        seconds=job.seconds,
        max_frame_age=job.max_frame_age,
        **({"analysis_fps": job.analysis_fps} if job.analysis_fps else {}),
    )
    elapsed = measured.end - measured.begin
    warm = [a for a in measured.answers if a.at >= measured.begin + job.settle_s]
    results = [a for a in warm if a.kind == "result"]
    first: dict[int, float] = {}
    for answer in measured.results:
        first[answer.stream] = min(answer.at, first.get(answer.stream, math.inf))
    by_stream = collections.Counter(a.stream for a in results)
    counted_s = max(1e-9, elapsed - job.settle_s)
    # A camera that wants ten analyses a second has no others; the newest picture of those that
    # wait takes the others' places then, and that is told by the same word.
    not_wanted = 0
    if job.analysis_fps:
        superseded = sum(a.kind == "drop" and a.reason == "SUPERSEDED" for a in warm)
        not_wanted = min(superseded, round(len(warm) * (1 - job.analysis_fps / job.rate_hz)))
    stages: dict[str, list[float]] = {}
    for answer in results:
        for stage, seconds in answer.stages.items():
            stages.setdefault(stage, []).append(round(seconds, 6))
    return {
        "sent": measured.sent,
        "held_back": measured.held_back,
        "lost": measured.lost,
        "drops": sum(a.kind == "drop" for a in warm) - not_wanted,
        "not_wanted": not_wanted,
        "errors": sum(a.kind == "error" for a in warm),
        "degraded": sum(bool(a.missing) for a in results),
        "faces": sum(a.faces for a in results),
        "answers": len(warm),
        "reasons": collections.Counter(a.reason for a in warm if a.kind != "result"),
        "ages": [round(a.age, 6) for a in results],
        "latencies": [round(a.latency, 6) for a in results],
        "rates": [by_stream[stream] / counted_s for stream in range(job.streams)],
        "opened_s": max(first.values()) - measured.begin if len(first) == job.streams else None,
        "stages": stages,
        "cpu_share": (time.process_time() - cpu) / elapsed,
        "sdk": facelane.__version__,
    }


def _read(file: Path) -> facelane.Picture:
    data = file.read_bytes()
    if file.suffix == ".jpg":
        return facelane.Picture.encoded(data)
    return facelane.Picture.access_unit(data, facelane.Encoding(file.suffix[1:]))


def main(path: Path) -> None:
    job = Job(**json.loads(path.read_text()))
    pictures = [_read(file) for file in sorted(Path(job.frames).iterdir())]
    print(json.dumps(asyncio.run(run(job, pictures))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
