"""The server's own process: does it stay small, import little and leave nothing behind?

Null models, so that the front works hardest. After a warm-up its resident memory is read
before and after 20,000 frames; then the server is killed with SIGKILL, and neither a
worker nor a file in /dev/shm may be left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bench import load, material
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import median

GROWTH_MIB = 5.0
IMPORT_S = 1.0
LEFT_BEHIND_S = 5.0
STREAMS = 8
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
    return report


async def _kill(service: Service) -> tuple[int, float]:
    """SIGKILL to the server; how many of its workers are left, and how long they took."""
    workers = service.workers()
    assert workers, "a server without workers proves nothing"
    begin = time.monotonic()
    service.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(service.process.wait, 10)
    _, alive = await asyncio.to_thread(psutil.wait_procs, workers, LEFT_BEHIND_S)
    return len(alive), time.monotonic() - begin
