"""The server's own process: does it stay small, import little and leave nothing behind, and
what does a frame cost it?

Null models, so that the front works hardest. Part ``process``: after a warm-up its resident
memory is read before and after 20,000 frames; then the server is killed with SIGKILL, and
neither a worker nor a file in /dev/shm may be left. Part ``paced``: twenty cameras, how old
results are, and the processor time of the event loop's thread, as the kernel counts it; beside it
what gRPC and a worker's socket alone would take (``bare``). The load's client shares the machine's
cores with the server and its workers.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bench import load, material
from bench.bare import bare
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import median, percentile

GROWTH_MIB = 5.0
IMPORT_S = 1.0
LEFT_BEHIND_S = 5.0
STREAMS = 8
CAMERAS = 20
PACED_P99_MS = 5.0
LOOP_MS = 0.40
_SHM = Path("/dev/shm")
_PART = 2_000


def _import_seconds(module: str) -> tuple[float, float, list[str]]:
    """How long a fresh interpreter takes to import a module, by the clock and of the processor,
    and what of the heavy kind came along. The interpreter's own start is not counted."""
    code = (
        "import sys, time; begin = time.perf_counter(); used = time.process_time(); "
        f"import {module}; print(time.perf_counter() - begin, time.process_time() - used); "
        "print(' '.join(m for m in ('torch', 'cv2', 'onnxruntime', 'numpy', 'av') "
        "if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    taken, heavy = done.stdout.splitlines()[:2]
    seconds, used = map(float, taken.split())
    return seconds, used, heavy.split()


def _libraries(pid: int) -> list[str]:
    """Heavy shared libraries mapped into a process: what it has really loaded."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name in ("libtorch", "libcuda.", "libonnxruntime") if name in maps]


async def run(settings: Settings) -> Report:
    report = Report("front", smoke=settings.smoke)
    if settings.wants("process"):
        await _process(settings, report)
    if settings.wants("paced"):
        await _paced(settings, report)
    return report


def _loop_seconds(pid: int) -> float:
    """Processor time of a process's first thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


async def _cameras(settings: Settings, target: str, pid: int) -> tuple[load.Measured, float, float]:
    """What they measured, and milliseconds a frame of the loop and of the process that they went
    to."""
    frames = material.frames_of_size(settings.sized(16, 4), 10_000)
    server = psutil.Process(pid)

    async def cameras(seconds: float) -> load.Measured:
        return await load.paced(target, frames, streams=CAMERAS, rate_hz=25.0, seconds=seconds)

    await cameras(settings.lasting(4.0, 0.5))
    before, loop = server.cpu_times(), _loop_seconds(pid)
    measured = await cameras(settings.lasting(20.0, 1.0))
    after = server.cpu_times()
    each_ms = 1e3 / max(1, measured.sent)
    loop_ms = (_loop_seconds(pid) - loop) * each_ms
    process_ms = (after.user + after.system - before.user - before.system) * each_ms
    return measured, loop_ms, process_ms


async def _paced(settings: Settings, report: Report) -> None:
    scenario = f"{CAMERAS} cameras of 25 frames/s, 10 kB, null models"
    async with Service(material.null_models(decoding=False).pools_toml()) as service:
        pid = service.front().pid
        measured, loop_ms, process_ms = await _cameras(settings, service.target, pid)
    async with bare() as (target, pid):
        least, least_loop_ms, least_process_ms = await _cameras(settings, target, pid)
    ages_ms = [age * 1e3 for age in measured.ages()]
    p99 = percentile(ages_ms, 99)
    report.add(
        Row(
            deployment="facelane-server",
            scenario=scenario,
            rate_hz=25.0,
            p50_ms=percentile(ages_ms, 50),
            p99_ms=p99,
            throughput_per_s=len(measured.results) / (measured.end - measured.begin),
            extra={
                **measured.counts(),
                "max_ms": max(ages_ms, default=math.nan),
                "loop_ms_a_frame": loop_ms,
                "process_ms_a_frame": process_ms,
            },
        )
    )
    report.add(
        Row(
            deployment="bare gRPC, and a worker's socket",
            scenario=scenario,
            rate_hz=25.0,
            throughput_per_s=len(least.results) / (least.end - least.begin),
            extra={
                **least.counts(),
                "loop_ms_a_frame": least_loop_ms,
                "process_ms_a_frame": least_process_ms,
            },
        )
    )
    report.aim("p99 age of results, ms:", p99, PACED_P99_MS, at_most=True)
    report.aim("loop time a frame, ms:", loop_ms, LOOP_MS, at_most=True)
    report.aim("frames lost:", measured.lost + measured.errors, 0, at_most=True)


async def _process(settings: Settings, report: Report) -> None:
    for module in ("facelane_server.app", "facelane"):
        runs = [_import_seconds(module) for _ in range(settings.sized(5, 2))]
        seconds = median([s for s, _, _ in runs])
        heavy = runs[0][2]
        report.add(
            Row(
                deployment=f"import {module}",
                scenario="fresh interpreter",
                extra={
                    "import_s": seconds,
                    "import_cpu_s": median([used for _, used, _ in runs]),
                    "heavy_modules": " ".join(heavy) or "none",
                },
            )
        )
        forbidden = {"torch"} if module != "facelane" else {"torch", "cv2", "numpy"}
        report.aim(f"import {module}, seconds:", seconds, IMPORT_S, at_most=True)
        report.aim(
            f"modules that {module} must not import:",
            len(forbidden & set(heavy)),
            0,
            at_most=True,
        )

    total = settings.sized(20_000, 400)
    frames = material.frames_of_size(settings.sized(16, 4), 60_000)
    shm = set(os.listdir(_SHM))
    async with Service(material.null_models().pools_toml()) as service:
        front = service.front()
        await load.saturate(
            service.target, frames, streams=STREAMS, total=settings.sized(4_000, 100)
        )
        before = front.memory_info().rss / 2**20
        samples = [before]
        lost = sent = 0
        begin = time.monotonic()
        while sent < total:
            # Streams come and go, as cameras do.
            measured = await load.saturate(
                service.target, frames, streams=STREAMS, total=min(_PART, total - sent)
            )
            sent += measured.sent
            lost += measured.lost + measured.drops + measured.errors
            samples.append(front.memory_info().rss / 2**20)
            settings.say(f"{sent} of {total} frames, {samples[-1]:.1f} MiB")
        elapsed = time.monotonic() - begin
        loaded = _libraries(front.pid)
        descriptors = front.num_fds()
        report.add(
            Row(
                deployment="facelane-server",
                scenario=f"{STREAMS} streams, null models",
                throughput_per_s=sent / elapsed,
                memory_mib=samples[-1],
                extra={
                    "frames": sent,
                    "lost": lost,
                    "rss_before_mib": before,
                    "rss_growth_mib": samples[-1] - before,
                    "descriptors": descriptors,
                    "heavy_libraries": " ".join(loaded) or "none",
                },
            )
        )
        report.aim(
            "growth of resident memory, MiB:", samples[-1] - before, GROWTH_MIB, at_most=True
        )
        report.aim("heavy libraries in the front:", len(loaded), 0, at_most=True)
        report.aim("frames lost:", lost, 0, at_most=True)
        report.aim(
            "new files in /dev/shm while serving:",
            len(set(os.listdir(_SHM)) - shm),
            0,
            at_most=True,
        )
        left, seconds = await _kill(service)
        report.add(
            Row(
                deployment="facelane-server, SIGKILL",
                scenario="what is left",
                extra={"processes_left": left, "until_gone_s": seconds},
            )
        )
        report.aim("processes left after SIGKILL:", left, 0, at_most=True)
    report.aim(
        "new files in /dev/shm at the end:", len(set(os.listdir(_SHM)) - shm), 0, at_most=True
    )


async def _kill(service: Service) -> tuple[int, float]:
    """SIGKILL to the server; how many of its workers are left, and how long they took."""
    workers = service.workers()
    assert workers, "a server without workers proves nothing"
    begin = time.monotonic()
    service.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(service.process.wait, 10)
    _, alive = await asyncio.to_thread(psutil.wait_procs, workers, LEFT_BEHIND_S)
    return len(alive), time.monotonic() - begin
