"""Feeds a baseline and times its answers. Runs in the baseline's own main process."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.001
"""How long a polling loop sleeps when it found nothing."""
_GIVE_UP_S = 60.0


class Baseline(ABC):
    """A pipeline that takes frames and gives (frame id, faces) in any order."""

    @abstractmethod
    def submit(self, frame_id: int, data: bytes) -> None:
        """Hand over one JPEG frame."""

    @abstractmethod
    def poll(self) -> list[tuple[int, int]]:
        """The frames that are done, without waiting."""

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes."""


def _collect(
    baseline: Baseline, started: dict[int, float], latencies: list[float]
) -> tuple[int, int]:
    done = baseline.poll()
    now = time.perf_counter()
    for frame_id, _ in done:
        latencies.append(now - started.pop(frame_id))
    return len(done), sum(faces for _, faces in done)


def saturate(
    baseline: Baseline, frames: Sequence[bytes], count: int, in_flight: int
) -> dict[str, Any]:
    """``count`` frames with at most ``in_flight`` under way at one time."""
    started: dict[int, float] = {}
    latencies: list[float] = []
    faces = sent = 0
    begin = time.perf_counter()
    last = begin
    while len(latencies) < count:
        while sent < count and len(started) < in_flight:
            started[sent] = time.perf_counter()
            baseline.submit(sent, frames[sent % len(frames)])
            sent += 1
        done, found = _collect(baseline, started, latencies)
        faces += found
        if done:
            last = time.perf_counter()
        elif time.perf_counter() - last > _GIVE_UP_S:
            raise RuntimeError("the baseline stopped answering")
        else:
            time.sleep(POLL_S)
    return {"seconds": latencies, "elapsed_s": last - begin, "faces": faces}


def paced(
    baseline: Baseline, frames: Sequence[bytes], rate_hz: float, seconds: float
) -> dict[str, Any]:
    """Frames at a pace; latency counts from when a frame was due."""
    started: dict[int, float] = {}
    latencies: list[float] = []
    count = max(1, round(rate_hz * seconds))
    faces = sent = 0
    begin = time.perf_counter()
    last = begin
    while len(latencies) < count:
        now = time.perf_counter()
        while sent < count and begin + sent / rate_hz <= now:
            started[sent] = begin + sent / rate_hz
            baseline.submit(sent, frames[sent % len(frames)])
            sent += 1
        done, found = _collect(baseline, started, latencies)
        faces += found
        if done:
            last = time.perf_counter()
        elif time.perf_counter() - max(last, begin + sent / rate_hz) > _GIVE_UP_S:
            raise RuntimeError("the baseline stopped answering")
        else:
            time.sleep(POLL_S)
    return {"seconds": latencies, "elapsed_s": last - begin, "faces": faces}


def main(make: Any) -> None:
    """Read the job, run it, print one JSON line."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    frames = [file.read_bytes() for file in sorted(path.parent.glob("*.jpg"))]
    baseline: Baseline = make(job["packages"], job["threads"])
    try:
        saturate(baseline, frames, 16, 2)  # warm-up
        if job["rate_hz"]:
            found = paced(baseline, frames, job["rate_hz"], job["seconds"])
        else:
            found = saturate(baseline, frames, job["count"], job["in_flight"])
        me = psutil.Process()
        rss = sum(p.memory_info().rss for p in (me, *me.children(recursive=True)))
        print(json.dumps({**found, "rss_mib": rss / 2**20}), flush=True)
    finally:
        baseline.close()
