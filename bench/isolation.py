"""Models that share one card: what each way of keeping them apart costs.

Deployments: every model alone; threads of one process; a process each; processes under
MPS; under MPS with a share of the multiprocessors each. Scenarios: the pair (RTS
recogniser IR-SE-64 with random weights, and a detector), the trio (liveness too), and a
noisy neighbour (a paced recogniser beside a detector saturated with batches of 32).

The worker processes are driven directly through the pools, without client or server, on
pictures that need no decoding: what is measured is the device, the worker's loop and the
hop to it. `--device cpu --smoke` runs the same code without MPS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from bench import drawing, material
from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import Summary, median, ratio
from facelane_server import config
from facelane_server.domain import Encoding, FacelaneError, Picture, Stage
from facelane_server.pools.host import Launchers
from facelane_server.pools.pool import Pool
from facelane_server.pools.tasks import (
    DetectRequest,
    EmbedRequest,
    LivenessRequest,
    Request,
    Task,
)
from facelane_server.worker.models.api import AlignedCrop
from facelane_server.worker.models.catalog import Catalog
from facelane_server.worker.models.package import Package

PACE_HZ: Final = 60.0
NOISY_BATCH: Final = 32
BATCH: Final = {Stage.DETECTOR: NOISY_BATCH, Stage.RECOGNIZER: 8, Stage.LIVENESS: 8}
SHARES: Final = {Stage.RECOGNIZER: 70, Stage.DETECTOR: 30, Stage.LIVENESS: 30}
START_S: Final = 300.0
ALONE, THREADS, PROCESSES, MPS, MPS_SHARES = (
    "alone",
    "threads",
    "processes",
    "mps",
    "mps with shares",
)
ARTICLE: Final = {"alone": 15.2, "processes": 16.8, "threads": 18.3, "containers": 17.1}
"""The article's own table, on its card: milliseconds a recognition."""
_MARGIN_S: Final = 0.5
"""Left out at the beginning of every measurement."""


# -- one deployment ------------------------------------------------------------------------


@dataclass(slots=True)
class Rig:
    """Pools that run, and what is asked of them."""

    pools: dict[Stage, Pool]
    requests: dict[Stage, Request]
    errors: dict[str, int] = field(default_factory=dict)

    async def _one(self, stage: Stage, lane: int) -> float:
        """One task; seconds from submission to answer, nan for a failure (counted)."""
        loop = asyncio.get_running_loop()
        now = time.monotonic_ns()
        task: Task[Any] = Task(
            request=self.requests[stage],
            lane=lane,
            weight=1,
            deadline_ns=now + 30_000_000_000,
            future=loop.create_future(),
        )
        self.pools[stage].submit(task)
        try:
            await task.future
        except FacelaneError as error:
            self.errors[error.reason.value] = self.errors.get(error.reason.value, 0) + 1
            return math.nan
        return (time.monotonic_ns() - now) / 1e9

    async def closed(self, stage: Stage, in_flight: int, seconds: float) -> Summary:
        """As fast as it goes, with ``in_flight`` tasks at one time."""
        begin = time.monotonic()
        times: list[float] = []

        async def worker(lane: int) -> None:
            while time.monotonic() < begin + _MARGIN_S + seconds:
                taken = await self._one(stage, lane)
                if time.monotonic() >= begin + _MARGIN_S and not math.isnan(taken):
                    times.append(taken)

        await asyncio.gather(*(worker(lane) for lane in range(in_flight)))
        return Summary.of(times, time.monotonic() - begin - _MARGIN_S)

    async def paced(self, stage: Stage, rate_hz: float, seconds: float) -> Summary:
        """One task at each tick, whether the one before is back or not."""
        count = max(2, round(rate_hz * seconds))
        skip = max(1, round(rate_hz * _MARGIN_S))
        begin = time.monotonic()
        running: set[asyncio.Task[float]] = set()
        times: list[float] = []
        for index in range(count + skip):
            await asyncio.sleep(max(0.0, begin + index / rate_hz - time.monotonic()))
            one = asyncio.create_task(self._one(stage, index % 8))
            running.add(one)
            one.add_done_callback(running.discard)
            if index >= skip:
                one.add_done_callback(lambda done: times.append(done.result()))
        await asyncio.gather(*running)
        good = [taken for taken in times if not math.isnan(taken)]
        return Summary.of(good, count / rate_hz)

    def memory_mib(self, stage: Stage) -> float | None:
        """Of the stage's workers on their device; None on a CPU."""
        found = sum(worker.memory_mib for worker in self.pools[stage].info().workers)
        return float(found) if found else None


@contextlib.asynccontextmanager
async def deployed(
    deployment: str,
    packages: Mapping[Stage, Package],
    requests: Mapping[Stage, Request],
    device: str,
) -> AsyncIterator[Rig]:
    """A deployment of some models, started and warm; ended on leaving."""
    isolation = {THREADS: "thread", MPS: "mps", MPS_SHARES: "mps"}.get(deployment, "process")
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        pipes = Path(scratch) / "mps"
        async with contextlib.AsyncExitStack() as stack:
            if isolation == "mps":
                stack.enter_context(mps_daemon(pipes))
            launchers = Launchers(Path(scratch), mps_pipe_directory=pipes)
            stack.push_async_callback(launchers.close)
            rig = Rig({}, dict(requests))
            crops = tuple(
                crop
                for stage in (Stage.RECOGNIZER, Stage.LIVENESS)
                if stage in packages
                for crop in packages[stage].crops
            )
            for stage, package in packages.items():
                chosen = config.Pool(
                    model=str(package.folder),
                    devices=(device,),
                    isolation=isolation,  # type: ignore[arg-type]
                    batch_max=BATCH[stage],
                    sm_share=SHARES[stage] if deployment == MPS_SHARES else 100,
                    load_timeout_s=START_S,
                    job_timeout_ms=60_000,
                    stream_priority=-1 if stage is Stage.RECOGNIZER and device != "cpu" else 0,
                )
                rig.pools[stage] = Pool(
                    stage,
                    chosen,
                    package,
                    launchers.for_pool(stage, chosen),
                    crops=crops if stage is Stage.DETECTOR else (),
                )
            for pool in rig.pools.values():
                await pool.start()
                stack.push_async_callback(pool.stop, 5.0)
            for pool in rig.pools.values():
                if not await pool.wait_ready(START_S):
                    losses = [w.last_loss for w in pool.info().workers]
                    raise RuntimeError(f"{deployment}: pool {pool.name} did not start: {losses}")
            yield rig


@contextlib.contextmanager
def mps_daemon(pipes: Path) -> Any:
    """NVIDIA's control daemon in a folder of its own."""
    pipes.mkdir(mode=0o700)
    logs = pipes.parent / "mps-log"
    logs.mkdir()
    environ = {
        **os.environ,
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "CUDA_MPS_LOG_DIRECTORY": str(logs),
    }
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environ, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(
            ["nvidia-cuda-mps-control"],
            input=b"quit\n",
            env=environ,
            check=False,
            timeout=60,
        )


def requests_for(packages: Mapping[Stage, Package]) -> dict[Stage, Request]:
    """One request a stage, the same every time: a raw picture with a face, a chip, crops."""
    import cv2
    import numpy as np

    [data] = material.make_frames(1, 640, 640, [1])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    found: dict[Stage, Request] = {}
    for stage, package in packages.items():
        sizes = [crop.size for crop in package.crops]
        crops = tuple(
            cv2.resize(picture[140:500, 140:500], (size, size)).tobytes() for size in sizes
        )
        if stage is Stage.DETECTOR:
            raw = Picture(Encoding.BGR24, picture.tobytes(), 640, 640, 640 * 3)
            found[stage] = DetectRequest(raw, max_faces=4, max_pixels=16_000_000)
        elif stage is Stage.RECOGNIZER:
            assert isinstance(package.crops[0], AlignedCrop)
            found[stage] = EmbedRequest(crops[0])
        else:
            found[stage] = LivenessRequest(crops)
    return found


# -- the benchmark -------------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """Summaries of rounds by (deployment, scenario, stage)."""

    summaries: dict[tuple[str, str, Stage], list[Summary]] = field(default_factory=dict)
    memory: dict[tuple[str, Stage], float | None] = field(default_factory=dict)

    def add(self, deployment: str, scenario: str, stage: Stage, summary: Summary) -> None:
        self.summaries.setdefault((deployment, scenario, stage), []).append(summary)

    def value(self, deployment: str, scenario: str, stage: Stage, name: str) -> float:
        """The median over the rounds; nan where it was not measured."""
        rounds = self.summaries.get((deployment, scenario, stage), [])
        return median([getattr(summary, name) for summary in rounds])


PACED, SATURATED = "paced", "saturated"
PAIR, TRIO, NOISY = "pair", "trio", "noisy neighbour"


async def run(settings: Settings) -> Report:
    # The table is the output; what a worker has to complain of still appears.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report("isolation", smoke=settings.smoke)
    on_card = settings.device.startswith("cuda")
    packages = _packages(settings)
    requests = requests_for(packages)
    rate = PACE_HZ if on_card else settings.lasting(2.0, 2.0)
    seconds = settings.lasting(10.0, 1.5)
    rounds = settings.sized(3, 1)
    deployments = [THREADS, PROCESSES]
    if not on_card:
        report.note("mps: not run, it needs a CUDA device")
    elif shutil.which("nvidia-cuda-mps-control") is None:
        report.note("mps: not run, nvidia-cuda-mps-control is not installed")
    else:
        deployments += [MPS, MPS_SHARES]

    found = Found()
    for number in range(rounds):
        for stage in packages:
            async with deployed(ALONE, {stage: packages[stage]}, requests, settings.device) as rig:
                await _alone(rig, stage, rate, seconds, found)
        # Another order each round: a warm card is a slower card.
        for deployment in (
            deployments[number % len(deployments) :] + deployments[: number % len(deployments)]
        ):
            try:
                async with deployed(deployment, packages, requests, settings.device) as rig:
                    await _together(rig, deployment, rate, seconds, found)
                    if rig.errors:
                        report.note(f"{deployment}: failed tasks {rig.errors}")
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                report.note(f"{deployment}: round {number + 1} not measured: {error}")

    _rows(report, found, packages, rate)
    if on_card:
        _aims(report, found)
    path = settings.docs / ("isolation-smoke.svg" if settings.smoke else "isolation.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_draw(found, [ALONE, *deployments], rate))
    report.note(f"drawn: {path}")
    report.note(
        "the article's table, its own card, ms a recognition: "
        + ", ".join(f"{name} {ms}" for name, ms in ARTICLE.items())
    )
    return report


def _packages(settings: Settings) -> dict[Stage, Package]:
    real = material.real_models(settings.cache).packages
    return {
        Stage.DETECTOR: real[Stage.DETECTOR],
        Stage.RECOGNIZER: Catalog().resolve("rts-irse64-random"),
        Stage.LIVENESS: real[Stage.LIVENESS],
    }


async def _alone(rig: Rig, stage: Stage, rate: float, seconds: float, found: Found) -> None:
    found.memory[ALONE, stage] = rig.memory_mib(stage)
    found.add(ALONE, PACED, stage, await rig.paced(stage, rate, seconds))
    found.add(ALONE, SATURATED, stage, await rig.closed(stage, 1, seconds / 2))
    if stage is Stage.DETECTOR:
        found.add(ALONE, NOISY, stage, await rig.closed(stage, 2 * NOISY_BATCH, seconds / 2))
    if stage is Stage.RECOGNIZER:
        found.add(ALONE, NOISY, stage, found.summaries[ALONE, PACED, stage][-1])


async def _together(rig: Rig, deployment: str, rate: float, seconds: float, found: Found) -> None:
    for stage in rig.pools:
        found.memory[deployment, stage] = rig.memory_mib(stage)

    async def all_of(scenario: str, stages: Sequence[Stage], ask: Callable[[Stage], Any]) -> None:
        summaries = await asyncio.gather(*(ask(stage) for stage in stages))
        for stage, summary in zip(stages, summaries, strict=True):
            found.add(deployment, scenario, stage, summary)

    pair = [Stage.RECOGNIZER, Stage.DETECTOR]
    trio = [*pair, Stage.LIVENESS]
    await all_of(f"{PAIR}, {PACED}", pair, lambda s: rig.paced(s, rate, seconds))
    await all_of(f"{PAIR}, {SATURATED}", pair, lambda s: rig.closed(s, 1, seconds / 2))
    await all_of(f"{TRIO}, {PACED}", trio, lambda s: rig.paced(s, rate, seconds))
    await all_of(f"{TRIO}, {SATURATED}", trio, lambda s: rig.closed(s, 1, seconds / 2))

    # The neighbour is noisy for a while before and after the paced measurement.
    noise = asyncio.create_task(
        rig.closed(Stage.DETECTOR, 2 * NOISY_BATCH, seconds + 2 * _MARGIN_S)
    )
    await asyncio.sleep(_MARGIN_S)
    found.add(deployment, NOISY, Stage.RECOGNIZER, await rig.paced(Stage.RECOGNIZER, rate, seconds))
    found.add(deployment, NOISY, Stage.DETECTOR, await noise)


def _base_of(scenario: str) -> str:
    """Which measurement alone a scenario is compared with."""
    if scenario == NOISY:
        return NOISY
    return SATURATED if scenario.endswith(SATURATED) else PACED


def _rows(report: Report, found: Found, packages: Mapping[Stage, Package], rate: float) -> None:
    for deployment, scenario, stage in found.summaries:
        value = {
            name: found.value(deployment, scenario, stage, name)
            for name in ("p50_ms", "p99_ms", "throughput_per_s")
        }
        base = _base_of(scenario)
        noisy = scenario == NOISY and stage is Stage.DETECTOR
        is_paced = scenario.endswith(PACED) or (scenario == NOISY and not noisy)
        report.add(
            Row(
                deployment=deployment,
                scenario=scenario,
                model=packages[stage].name,
                batch=NOISY_BATCH if noisy else 1,
                rate_hz=rate if is_paced else None,
                memory_mib=found.memory.get((deployment, stage)),
                overhead_p50=ratio(value["p50_ms"], found.value(ALONE, base, stage, "p50_ms")),
                overhead_p99=ratio(value["p99_ms"], found.value(ALONE, base, stage, "p99_ms")),
                extra={"rounds": len(found.summaries[deployment, scenario, stage])},
                **value,
            )
        )


def _aims(report: Report, found: Found) -> None:
    rec = Stage.RECOGNIZER
    report.aim(
        "recogniser alone, p50 ms:", found.value(ALONE, SATURATED, rec, "p50_ms"), 2.6, at_most=True
    )
    report.aim(
        "recogniser alone, p99 ms:", found.value(ALONE, SATURATED, rec, "p99_ms"), 3.5, at_most=True
    )
    trio = f"{TRIO}, {PACED}"
    modes = [m for m in (PROCESSES, MPS, MPS_SHARES) if (m, trio, rec) in found.summaries]
    for name, bound in (("p50_ms", 1.10), ("p99_ms", 1.25)):
        base = found.value(ALONE, PACED, rec, name)
        best = min((ratio(found.value(m, trio, rec, name), base), m) for m in modes)
        report.aim(
            f"trio beside, {name} against alone, best ({best[1]}):", best[0], bound, at_most=True
        )
    if (MPS_SHARES, NOISY, rec) in found.summaries:
        report.aim(
            "noisy neighbour, recogniser's p99 against alone, mps with shares:",
            ratio(
                found.value(MPS_SHARES, NOISY, rec, "p99_ms"),
                found.value(ALONE, NOISY, rec, "p99_ms"),
            ),
            1.6,
            at_most=True,
        )
        report.aim(
            "noisy neighbour's own throughput against alone:",
            ratio(
                found.value(MPS_SHARES, NOISY, Stage.DETECTOR, "throughput_per_s"),
                found.value(ALONE, NOISY, Stage.DETECTOR, "throughput_per_s"),
            ),
            0.55,
            at_most=False,
        )


def _draw(found: Found, deployments: Sequence[str], rate: float) -> str:
    rec = Stage.RECOGNIZER
    panels = []
    for title, scenario in (
        (f"Pair: recogniser at {rate:g} Hz beside a detector", f"{PAIR}, {PACED}"),
        (f"Trio: liveness too, all at {rate:g} Hz", f"{TRIO}, {PACED}"),
        ("Trio, all saturated", f"{TRIO}, {SATURATED}"),
        (f"Noisy neighbour: detector saturated, batches of {NOISY_BATCH}", NOISY),
    ):
        bars = []
        for deployment in deployments:
            where = _base_of(scenario) if deployment == ALONE else scenario
            p50 = found.value(deployment, where, rec, "p50_ms")
            p99 = found.value(deployment, where, rec, "p99_ms")
            if not math.isnan(p50):
                bars.append(drawing.Bar(deployment, p50, p99))
        panels.append(drawing.Panel(title, bars))
    return drawing.bars("Recogniser IR-SE-64, batch 1: milliseconds a face, p50 and p99", panels)
