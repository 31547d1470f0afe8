"""How many cameras one card takes: simulated 25 fps JPEG cameras with 0 to 4 faces a frame
through the whole service, more and more of them, until the 99th percentile of the frames'
age exceeds 100 ms or a thousandth of them is dropped.

Parts: `streams:720p`, `streams:1080p`, which are the whole; and by name alone the same with
all workers under MPS (`streams:720p-mps`), with the frames decoded by the card
(`streams:720p-nvjpeg`), and both (`streams:720p-nvjpeg-mps`). Cameras that send video, decoded
by the card where it can: `streams:720p-h264`, `streams:1080p-h264`, `streams:1080p-h265`, and with
ten analyses a second each, the pictures in between being decoded and no more (`-10`). With null
models, which need no card: `streams:720p-null`, `streams:720p-h264-null`. All that with `--servers
N`: so many independent servers on the card, under one MPS daemon, the cameras dealt to them in
turn; or with `--shards N`: so many processes at one address. Says what was the limit. A part takes
about a minute and a half; when its time is up, the largest number that was good so far is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil

from bench import material
from bench.cameras import Job
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import percentile
from facelane_server.domain import Stage
from facelane_server.pools.mps import MpsDaemon

FPS: Final = 25.0
MAX_AGE_MS: Final = 100.0
MAX_DROPS: Final = 0.001
MAX_STREAMS: Final = 512
STREAMS_A_CLIENT: Final = 12
BUDGET_S: Final = 90.0
"""For one part; no trial is begun after it."""
START_S: Final = 100.0
"""For each shard: on a card they load and warm up beside each other, and slow each other down."""
FACES: Final = (0, 1, 2, 1, 4, 0, 3, 1)
SIZES: Final = {"720p": (1280, 720), "1080p": (1920, 1080)}
CODECS: Final = {"720p": ("h264",), "1080p": ("h264", "h265")}
FRAME_AGE_S: Final = 1.0
SETTLE_S: Final = 1.0
"""At the beginning of a trial, not counted: all tracks are new."""
OPENING_S: Final = 0.1
"""The same for each camera of video: a card opens their decoders one after the other, in 60 to
130 ms while it computes."""
OPENED_S: Final = 10.0
"""The same once they are open: what came meanwhile is worked off, and a server that was late then
takes all pictures again only when it has seen that it can."""
_SAMPLE_S: Final = 0.25


@dataclass(slots=True)
class Trial:
    """One number of cameras. Ages and latencies in seconds, shares of one core or card."""

    streams: int
    sent: int = 0
    answers: int = 0
    drops: int = 0
    errors: int = 0
    lost: int = 0
    held_back: int = 0
    degraded: int = 0
    not_wanted: int = 0
    """Pictures between those that were to be analysed."""
    faces: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why frames had no result; those that were not wanted among them."""
    ages: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Results a second of each camera."""
    opened_s: float = math.nan
    """Until the last camera had its first result; nan = one had none."""
    stages: dict[str, list[float]] = field(default_factory=dict)
    front_cpu: float = math.nan
    front_loop: float = math.nan
    """Of the busiest thread of a front (of several servers: the busiest's): its event loop, which
    is one core's at most."""
    client_cpu: float = math.nan
    workers_cpu: dict[str, float] = field(default_factory=dict)
    workers_loop: dict[str, float] = field(default_factory=dict)
    """Of the busiest thread of a stage's workers."""
    machine_cpu: float = math.nan
    """Of all cores together."""
    gpu: float = math.nan
    gpu_memory_mib: float = math.nan

    @property
    def age_p99_ms(self) -> float:
        return percentile(self.ages, 99) * 1e3

    @property
    def drop_share(self) -> float:
        """Frames of which nothing came: dropped, held back at the camera, or failed."""
        bad = self.drops + self.errors + self.lost + self.held_back
        return bad / max(1, self.answers + self.held_back + self.lost)

    @property
    def good(self) -> bool:
        return bool(self.ages) and self.age_p99_ms <= MAX_AGE_MS and self.drop_share < MAX_DROPS

    def limit(self) -> str:
        """What would have to be faster for more cameras, by what was busiest. Processes count
        with their busiest thread: no thread has more than a core."""
        if self.client_cpu > 0.9:
            return "the load client"
        candidates = {
            "the front's event loop": self.front_loop,
            "the card": self.gpu,
            "all cores together": self.machine_cpu,
        }
        candidates |= {f"{stage} workers' loop": v for stage, v in self.workers_loop.items()}
        known = {name: value for name, value in candidates.items() if not math.isnan(value)}
        name = max(known, key=lambda key: known[key], default="unknown")
        slowest = max(self.stages, key=lambda s: percentile(self.stages[s], 99), default="")
        return f"{name} at {known.get(name, 0) * 100:.0f} %; slowest stage: {slowest}"


async def run(settings: Settings) -> Report:
    report = Report("streams", smoke=settings.smoke)
    on_card = settings.device.startswith("cuda")
    listed: set[str] = set()
    for size, (width, height) in SIZES.items():
        named = {
            size: Way(),
            f"{size}-mps": Way("mps"),
            f"{size}-nvjpeg": Way(decode="cuda"),
            f"{size}-nvjpeg-mps": Way("mps", "cuda"),
            f"{size}-null": Way(null=True),
        }
        for codec in CODECS[size]:
            card = "cuda" if on_card else "cpu"
            named[f"{size}-{codec}"] = Way(decode=card, codec=codec)
            named[f"{size}-{codec}-mps"] = Way("mps", card, codec)
            named[f"{size}-{codec}-null"] = Way(decode=card, codec=codec, null=True)
            named[f"{size}-{codec}-10"] = Way(decode=card, codec=codec, analysis_fps=10.0)
        parts = {
            part: way
            for part, way in named.items()
            if part in settings.only or (not settings.only and way == Way())
        }
        if not on_card:
            parts = {p: way for p, way in parts.items() if way.isolation == "process"}
            parts = {p: way for p, way in parts.items() if way.codec or way.decode == "cpu"}
        if on_card and settings.servers > 1:
            parts = {p: replace(way, isolation="mps") for p, way in parts.items()}
        if not parts or (settings.smoke and size == "1080p"):
            continue
        frames = (
            material.frames_from(settings.frames)
            if settings.frames
            else material.make_frames(settings.sized(64, 8), width, height, FACES)
        )
        with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
            folder = Path(scratch) / "frames"
            folder.mkdir()
            for index, data in enumerate(frames):
                (folder / f"{index:06d}.jpg").write_bytes(data)
            for part, way in parts.items():
                sent = folder
                try:
                    if way.codec:
                        sent = Path(scratch) / way.codec
                        make_clip(settings, report, size, way.codec, sent)
                    models = (
                        material.null_models() if way.null else material.real_models(settings.cache)
                    )
                    listed.add(models.listed)
                    await _part(settings, report, models, part, way, sent)
                except material.MissingError:
                    raise
                except Exception as error:  # one part's failure must not lose the others
                    report.note(f"{part}: not measured: {type(error).__name__}: {error}")
        kb = sum(map(len, frames)) / len(frames) / 1e3
        report.note(f"{size}: {len(frames)} frames of {kb:.0f} kB on average, faces {FACES}")
    if not report.rows and not report.notes:
        raise material.MissingError(
            f"streams has no part {', '.join(settings.only)} on {settings.device}; "
            "python -m bench --help names them"
        )
    for one in sorted(listed):
        report.note(one)
    return report


@dataclass(frozen=True, slots=True)
class Way:
    """How the pools of a part are set up."""

    isolation: str = "process"
    decode: str = "cpu"
    codec: str = ""
    """Of cameras that send video."""
    analysis_fps: float = 0.0
    null: bool = False
    """Models that compute nothing."""


def make_clip(settings: Settings, report: Report, size: str, codec: str, folder: Path) -> None:
    """Access units of a scene with two faces that move, a key frame every second, once."""
    if folder.is_dir():
        return
    units = material.make_clip(settings.sized(100, 50), *SIZES[size], codec, FPS)
    folder.mkdir()
    for index, unit in enumerate(units):
        (folder / f"{index:06d}.{codec}").write_bytes(unit)
    rate = sum(map(len, units)) * 8 * FPS / len(units) / 1e6
    report.note(f"{size}-{codec}: {len(units)} access units, {rate:.1f} Mbit/s, two faces each")


def pools_for(settings: Settings, models: material.Models, way: Way) -> str:
    """Where decoding is the processor's work there are several detector workers: three for
    every eight cores, and each decodes a batch with two threads. The rest is for the front,
    the other workers and the cameras. Where the card decodes, two workers feed it; of several
    servers or shards on it, one each, which has larger batches."""
    many = settings.servers * max(1, settings.shards)
    cores = len(os.sched_getaffinity(0)) // many
    detectors = max(1, min(8, cores * 3 // 8)) if way.decode == "cpu" else 2
    if many > 1 and way.decode == "cuda":
        detectors = 1
    batch = 16 if many > 1 and way.decode == "cuda" else 8
    device = (
        f'devices = ["{settings.device}"]\nbatch_max = {batch}\nisolation = "{way.isolation}"\n'
    )
    return models.pools_toml(
        device,
        detector=(
            f'workers = {detectors}\nthreads = {2 if cores >= 8 else 1}\ndecode = "{way.decode}"'
        ),
        recognizer="stream_priority = -1" if settings.device != "cpu" else "",
    )


async def _part(
    settings: Settings,
    report: Report,
    models: material.Models,
    size: str,
    way: Way,
    frames: Path,
) -> None:
    seconds = settings.lasting(6.0, 2.0)
    opens = bool(way.codec) and way.decode == "cuda"
    rate = FPS if settings.device != "cpu" else 2.0
    tables = "[limits]\nmax_streams = 1024\n"
    pools = pools_for(settings, models, way)
    settings.say(f"{size}: starting")
    async with serving(settings, pools, tables, way) as services:
        settings.say(f"{size}: serving")
        until = time.monotonic() + BUDGET_S
        analysis_fps = way.analysis_fps
        card = int(settings.device.rpartition(":")[2]) if ":" in settings.device else 0
        await trial(services, frames, len(services), rate, 3.0)  # warm-up

        async def attempt(streams: int) -> Trial:
            settle_s = SETTLE_S + (OPENED_S + OPENING_S * streams if opens else 0.0)
            found = await trial(
                services, frames, streams, rate, settle_s + seconds, analysis_fps, settle_s, card
            )
            report.add(_row(found, size, rate, models.name))
            settings.say(
                f"{size}: {streams} cameras, p99 age {found.age_p99_ms:.0f} ms, "
                f"without a result {found.drop_share:.2%} {dict(found.reasons.most_common(3))}, "
                f"busiest {found.limit()}"
            )
            settings.keep(report)
            return found

        best: Trial | None = None
        worst: Trial | None = None
        for streams in settings.cameras:
            found = await attempt(streams)
            if not found.good:
                worst = found
                break
            best = found
        streams = settings.sized((32 if way.codec else 16) * len(services), 1)
        top = 0 if settings.cameras else settings.sized(MAX_STREAMS, 2)
        while streams <= top and time.monotonic() < until:
            found = await attempt(streams)
            if not found.good:
                worst = found
                break
            best = found
            streams *= 2
        # Between the last that was good (none: 0) and the first that was not, to 8 % or one.
        while worst is not None and not settings.cameras:
            low = best.streams if best else 0
            if worst.streams - low <= max(1, low // 12):
                break
            if time.monotonic() > until:
                report.note(
                    f"{size}: time was up before a number between {low} and {worst.streams} "
                    "could be tried"
                )
                break
            found = await attempt((low + worst.streams) // 2)
            best, worst = (found, worst) if found.good else (best, found)
    if best is None:
        report.note(f"{size}: not even {worst.streams if worst else 0} cameras keep the bounds")
    else:
        report.note(
            f"{size}: {best.streams} cameras at {rate:g} fps = {best.streams * rate:.0f} frames/s, "
            f"p99 age {best.age_p99_ms:.0f} ms, dropped {best.drop_share:.4%}; "
            f"the limit: {(worst or best).limit()}"
        )


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, pools: str, tables: str, way: Way
) -> AsyncIterator[list[Service]]:
    """The part's servers, all of them serving. Several under MPS share one daemon."""
    async with contextlib.AsyncExitStack() as stack:
        environ: dict[str, str] = {}
        if settings.servers > 1 and way.isolation == "mps":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="facelane-mps-"))
            daemon = await MpsDaemon.start(Path(folder))
            stack.push_async_callback(daemon.close)
            environ["CUDA_MPS_PIPE_DIRECTORY"] = str(daemon.pipe_directory)
        services = [
            Service(
                pools,
                tables=tables,
                start_s=START_S * max(1, settings.shards),
                environ=environ,
                shards=max(1, settings.shards),
            )
            for _ in range(settings.servers)
        ]
        for started in await asyncio.gather(
            *(stack.enter_async_context(service) for service in services), return_exceptions=True
        ):
            if isinstance(started, BaseException):
                raise started
        yield services


async def trial(
    services: Sequence[Service],
    frames: Path,
    streams: int,
    rate: float,
    seconds: float,
    analysis_fps: float = 0.0,
    settle_s: float = SETTLE_S,
    card: int = 0,
) -> Trial:
    """``streams`` cameras for some seconds, from as many client processes as they need: a
    multiple of the servers', and each sends to one of them."""
    clients = math.ceil(streams / STREAMS_A_CLIENT / len(services)) * len(services)
    clients = min(clients, streams)
    shares = [streams // clients + (i < streams % clients) for i in range(clients)]
    start_at = time.monotonic() + 2.0
    found = Trial(streams)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        processes = []
        try:
            for index, share in enumerate(shares):
                job = Job(
                    target=services[index % len(services)].target,
                    frames=str(frames),
                    streams=share,
                    rate_hz=rate,
                    seconds=seconds,
                    # Clients are not in step either.
                    start_at=start_at + index / clients / rate,
                    max_frame_age=FRAME_AGE_S,
                    analysis_fps=analysis_fps,
                    settle_s=settle_s,
                )
                path = Path(scratch) / f"{index}.json"
                path.write_text(json.dumps(asdict(job)))
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "bench.cameras", str(path)),
                        stdout=asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.PIPE,
                        limit=2**28,
                    )
                )
            watcher = asyncio.create_task(
                _watch(services, start_at + settle_s - 1.0, seconds - settle_s + 1.0, card)
            )
            outputs = await asyncio.wait_for(
                asyncio.gather(*(p.communicate() for p in processes)), seconds + 120
            )
        finally:
            for process in processes:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
    for name, value in (await watcher).items():
        setattr(found, name, value)
    for process, (_, said) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"a client ended with {process.returncode}: {''.join(last)}")
    parts = [json.loads(output) for output, _ in outputs]
    for part in parts:
        for name in (
            "sent",
            "answers",
            "drops",
            "errors",
            "lost",
            "held_back",
            "degraded",
            "not_wanted",
            "faces",
        ):
            setattr(found, name, getattr(found, name) + part[name])
        found.reasons.update(part["reasons"])
        found.ages += part["ages"]
        found.latencies += part["latencies"]
        found.rates += part["rates"]
        for stage, times in part["stages"].items():
            found.stages.setdefault(stage, []).extend(times)
    opened = [part["opened_s"] for part in parts]
    found.opened_s = max(opened) if None not in opened else math.nan
    found.client_cpu = max(part["cpu_share"] for part in parts)
    return found


async def _watch(
    services: Sequence[Service], begin: float, seconds: float, card: int
) -> dict[str, Any]:
    """Shares of processor and of the ``card``-th card in the middle of a trial."""
    await asyncio.sleep(max(0.0, begin + 1.0 - time.monotonic()))
    fronts = [front for service in services for front in service.fronts()]
    workers = [worker for service in services for worker in service.workers()]

    def used() -> list[dict[int, float]]:
        """Seconds of each process, by thread."""
        spent: list[dict[int, float]] = []
        for process in (*fronts, *workers):
            try:
                spent.append({t.id: t.user_time + t.system_time for t in process.threads()})
            except psutil.Error:  # it ended; the answers tell whether that mattered
                spent.append({})
        return spent

    first, at = used(), time.monotonic()
    psutil.cpu_percent()  # from here on
    gpu: list[float] = []
    memory = math.nan
    while time.monotonic() < begin + seconds:
        share, memory = _gpu(card)
        gpu.append(share)
        await asyncio.sleep(_SAMPLE_S)
    elapsed = time.monotonic() - at
    machine_cpu = psutil.cpu_percent() / 100
    threads = [
        [(seconds - before.get(thread, 0.0)) / elapsed for thread, seconds in after.items()]
        for before, after in zip(first, used(), strict=True)
    ]
    by_stage: dict[str, float] = {}
    loops: dict[str, float] = {}
    for process, shares in zip(workers, threads[len(fronts) :], strict=True):
        # A worker's stage is in its process title.
        try:
            name = process.name()
        except psutil.Error:
            continue
        stage = next((str(s) for s in Stage if str(s)[:8] in name), None)
        if stage is None:
            continue  # what somebody's library has begun
        by_stage[stage] = max(by_stage.get(stage, 0.0), sum(shares))
        loops[stage] = max(loops.get(stage, 0.0), *shares, 0.0)
    known = [share for share in gpu if not math.isnan(share)]
    return {
        "front_cpu": max(sum(shares) for shares in threads[: len(fronts)]),
        "front_loop": max(max(t, default=math.nan) for t in threads[: len(fronts)]),
        "workers_cpu": by_stage,
        "workers_loop": loops,
        "machine_cpu": machine_cpu,
        "gpu": sum(known) / len(known) if known else math.nan,
        "gpu_memory_mib": memory,
    }


def _gpu(card: int) -> tuple[float, float]:
    """(share of time in which a kernel ran, MiB in use); nan without a card."""
    try:
        import pynvml
    except ImportError:
        return math.nan, math.nan
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(card)
        share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return share, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 2**20
    except pynvml.NVMLError:
        return math.nan, math.nan


def _row(found: Trial, size: str, rate: float, model: str) -> Row:
    stages = {
        f"{stage}_p99_ms": percentile(times, 99) * 1e3
        for stage, times in sorted(found.stages.items())
    }
    return Row(
        deployment=f"{found.streams} cameras",
        scenario=size,
        model=model,
        rate_hz=rate,
        p50_ms=percentile(found.latencies, 50) * 1e3,
        p99_ms=percentile(found.latencies, 99) * 1e3,
        throughput_per_s=len(found.ages) / max(1e-9, found.answers) * found.streams * rate,
        memory_mib=found.gpu_memory_mib,
        extra={
            "age_p99_ms": found.age_p99_ms,
            "not_answered": found.drop_share,
            "not_wanted": found.not_wanted,
            "reasons": " ".join(f"{r}:{n}" for r, n in found.reasons.most_common(4)),
            "degraded": found.degraded,
            "kept": found.good,
            "opened_s": found.opened_s,
            "gpu": found.gpu,
            "machine_cpu": found.machine_cpu,
            "front_cpu": found.front_cpu,
            "front_loop": found.front_loop,
            "client_cpu": found.client_cpu,
            **{f"{stage}_cpu": share for stage, share in sorted(found.workers_cpu.items())},
            **{f"{stage}_loop": share for stage, share in sorted(found.workers_loop.items())},
            **stages,
        },
    )
