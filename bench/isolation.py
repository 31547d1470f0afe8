"""Models that share one card: what each way of keeping them apart costs.

Deployments: every model alone; threads of one process; a process each; processes under
MPS; under MPS with a share of the multiprocessors each. Scenarios: the pair (RTS
recogniser IR-SE-64 with random weights, and a detector), the trio (liveness too), and a
noisy neighbour (a paced recogniser beside a detector saturated with batches of 32). The
neighbour is measured with several shares of the card, and the one that keeps both its
bounds best is told as recommended.

Every model has a tenant: a process that owns its pool and asks it for work, so that what
is measured is the device, the worker's loop and the hop to it, and no tenant waits for
another's Python. `--device cpu --smoke` runs the same code without MPS. A part is a
deployment, `isolation:processes`, or `isolation:neighbour`, the shares alone; each begins
with the measurements alone that it is compared with. What fails or finds no more time is
noted, and the rest is still measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import drawing, material
from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import median, ratio
from bench.tenant import Command, Job
from facelane_server.domain import FacelaneError, Stage
from facelane_server.ipc.channel import socket_pair
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package
from facelane_server.pools.mps import MpsDaemon

PACE_HZ: Final = 60.0
NOISY_BATCH: Final = 32
BATCH: Final = {Stage.DETECTOR: NOISY_BATCH, Stage.RECOGNIZER: 1, Stage.LIVENESS: 1}
NOISY_P99: Final = 1.6
NOISY_THROUGHPUT: Final = 0.55
SHARES: Final = {Stage.RECOGNIZER: 100, Stage.DETECTOR: 50, Stage.LIVENESS: 40}
"""Percent of the multiprocessors: the one that must not wait may use all of them. Together
they may exceed 100: a share is a limit, and no reservation."""
NEIGHBOUR_SHARES: Final = (50, 64, 80)
"""Of the noisy neighbour. What it computes in a second goes with its share; what it leaves
free is what keeps the other from waiting."""
START_S: Final = 90.0
PROBE_S: Final = 20.0
BUDGET_S: Final = 300.0
"""For all deployments together; what is not measured then is told as such."""
SHORTEST_S: Final = 45.0
"""What a deployment takes: with less left it is not begun."""
ALONE, THREADS, PROCESSES, MPS, MPS_SHARES, NEIGHBOUR = (
    "alone",
    "threads",
    "processes",
    "mps",
    "mps with shares",
    "neighbour",
)
ARTICLE: Final = {"alone": 15.2, "processes": 16.8, "threads": 18.3, "containers": 17.1}
"""The article's own table, on its card: milliseconds a recognition."""
PAIR, TRIO, NOISY = "pair", "trio", "noisy neighbour"
PACED, SATURATED = "paced", "saturated"
_PIPES: Final = "CUDA_MPS_PIPE_DIRECTORY"
_LEAD_S: Final = 0.4
"""From a command to the common start of all tenants."""
_MARGIN_S: Final = 0.5
"""The neighbour is noisy so long before and after the paced measurement."""


class NotMeasuredError(Exception):
    """A deployment did not come to be, or broke; the message says how."""


# -- tenants -------------------------------------------------------------------------------


class Tenant:
    """A ``bench.tenant`` process. Owned by ``deployed``."""

    def __init__(self, stage: Stage, process: asyncio.subprocess.Process, log: Path) -> None:
        self.stage = stage
        self.process = process
        self.log = log

    async def answer(self, timeout_s: float) -> dict[str, Any]:
        """Its next line. Raises NotMeasuredError."""
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        except TimeoutError:
            raise NotMeasuredError(f"the {self.stage} tenant is silent; {self._words()}") from None
        found: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            raise NotMeasuredError(
                f"the {self.stage} tenant failed: {found['error']}; {self._words()}"
            )
        return found

    async def ask(self, command: Command) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(command)).encode() + b"\n")
        await self.process.stdin.drain()
        return await self.answer(command.start_at - time.monotonic() + command.seconds + 30.0)

    async def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 20.0)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    @property
    def in_full_precision(self) -> bool:
        """Whether its model failed the check of half precision and runs eagerly instead: its
        figures are then not those of the deployment."""
        return "disagrees with full precision" in self.log.read_text(errors="replace")

    def _words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


async def started(stage: Stage, job: Job, scratch: Path, descriptors: Sequence[int] = ()) -> Tenant:
    """A tenant process, not yet ready (its first answer says so)."""
    path, log = scratch / f"{stage}.json", scratch / f"{stage}.log"
    path.write_text(json.dumps(asdict(job)))
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.tenant", str(path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=words,
            pass_fds=tuple(descriptors),
        )
    return Tenant(stage, process, log)


@contextlib.asynccontextmanager
async def deployed(
    deployment: str,
    packages: Mapping[Stage, Package],
    stages: Sequence[Stage],
    device: str,
    special: Mapping[Stage, Mapping[str, Any]] | None = None,
) -> AsyncIterator[dict[Stage, Tenant]]:
    """Tenants of some stages, warm; ended on leaving. ``special``: settings of a stage's pool
    beyond those of the deployment. Raises NotMeasuredError."""
    isolation = {THREADS: "thread", MPS: "mps", MPS_SHARES: "mps"}.get(deployment, "process")
    async with contextlib.AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="facelane-bench-")))
        pipes = ""
        if isolation == "mps":
            try:
                daemon = await MpsDaemon.start(scratch / "mps")
            except FacelaneError as error:
                raise NotMeasuredError(error.message) from None
            stack.push_async_callback(daemon.close)
            pipes = str(daemon.pipe_directory)
            await _probe_mps(pipes)
        channels: dict[Stage, int] = {}
        pid = 0
        if isolation == "thread":
            group, channels = _thread_group(stages, scratch)
            stack.push_async_callback(_ended, group)
            for channel in channels.values():
                stack.callback(_close, channel)
            pid = group.pid
        tenants: dict[Stage, Tenant] = {}
        for stage in stages:
            settings = {
                "devices": [device],
                "isolation": isolation,
                "batch_max": BATCH[stage],
                "sm_share": SHARES[stage] if deployment == MPS_SHARES else 100,
                "load_timeout_s": START_S,
                "job_timeout_ms": 20_000,
                "canary_interval_s": 3_600.0,
                "stream_priority": -5 if stage is Stage.RECOGNIZER else 0,
            }
            settings |= (special or {}).get(stage, {})
            job = Job(
                stage=stage,
                package=str(packages[stage].folder),
                settings=settings,
                start_s=START_S,
                crops_of=[
                    str(packages[s].folder)
                    for s in (Stage.RECOGNIZER, Stage.LIVENESS)
                    if stage is Stage.DETECTOR
                ],
                mps_pipe_directory=pipes,
                channel=channels.get(stage, -1),
                pid=pid,
            )
            held = [channels[stage]] if stage in channels else []
            tenants[stage] = await started(stage, job, scratch, held)
            stack.push_async_callback(tenants[stage].close)
        await asyncio.gather(*(tenant.answer(START_S + 30.0) for tenant in tenants.values()))
        yield tenants


async def one_daemon(stack: contextlib.AsyncExitStack) -> None:
    """One MPS daemon for all tenants that are deployed until ``stack`` ends; they find it
    through the environment. Raises NotMeasuredError."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="facelane-bench-"))
    try:
        daemon = await MpsDaemon.start(Path(folder))
    except FacelaneError as error:
        raise NotMeasuredError(error.message) from None
    stack.push_async_callback(daemon.close)
    before = os.environ.get(_PIPES)
    os.environ[_PIPES] = str(daemon.pipe_directory)
    if before is None:
        stack.callback(os.environ.pop, _PIPES, None)
    else:
        stack.callback(os.environ.__setitem__, _PIPES, before)


async def all_or_none(
    *starting: Awaitable[dict[Stage, Tenant]],
) -> list[dict[Stage, Tenant]]:
    """Everything that is starting, once all of it is there or has failed; then the first
    failure is raised, and nobody is left behind in the middle of a start."""
    found = await asyncio.gather(*starting, return_exceptions=True)
    for tenants in found:
        if isinstance(tenants, BaseException):
            raise tenants
    return [tenants for tenants in found if not isinstance(tenants, BaseException)]


_PROBE: Final = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(0)  # it is found in other ways, or the workers will say so
device, context = ctypes.c_int(), ctypes.c_void_p()
code = (
    cuda.cuInit(0)
    or cuda.cuDeviceGet(ctypes.byref(device), 0)
    or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
)
print(code)
"""


async def _probe_mps(pipes: str) -> None:
    """See that the daemon takes clients, before workers wait for it in vain. Raises
    NotMeasuredError."""

    def probe() -> str:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipes},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PROBE_S,
            check=False,
        )
        return done.stdout.strip()

    try:
        code = await asyncio.to_thread(probe)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"MPS let no client in within {PROBE_S:g} s") from None
    if code not in ("", "0"):
        raise NotMeasuredError(f"MPS let no client in: CUDA error {code}")


def _thread_group(
    stages: Sequence[Stage], scratch: Path
) -> tuple[subprocess.Popen[bytes], dict[Stage, int]]:
    """One worker process with a thread a stage; the channels' other ends, as descriptors."""
    pairs = {stage: socket_pair() for stage in stages}
    theirs = [worker.fileno() for _, worker in pairs.values()]
    try:
        with (scratch / "group.log").open("wb") as words:
            group = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "facelane_server.worker"),
                    *(f"--channel={fd}" for fd in theirs),
                ],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
            )
    finally:
        for _, worker in pairs.values():
            worker.close()
    return group, {stage: server.detach() for stage, (server, _) in pairs.items()}


async def _ended(process: subprocess.Popen[bytes]) -> None:
    try:
        await asyncio.to_thread(process.wait, 10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait, 10.0)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


# -- the benchmark -------------------------------------------------------------------------


Answer = dict[str, Any]


@dataclass(slots=True)
class Found:
    """Answers of tenants by (deployment, scenario, stage)."""

    answers: dict[tuple[str, str, Stage], list[Answer]] = field(default_factory=dict)

    def add(self, deployment: str, scenario: str, stage: Stage, answer: Answer) -> None:
        self.answers.setdefault((deployment, scenario, stage), []).append(answer)

    def value(self, deployment: str, scenario: str, stage: Stage, name: str) -> float:
        """The median over the rounds; nan where it was not measured."""
        return median(
            [answer[name] for answer in self.answers.get((deployment, scenario, stage), [])]
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How often, and how long a measurement takes: ``seconds`` for those that have an aim,
    half of it for the others."""

    rate_hz: float
    seconds: float

    def paced(self, start_at: float, share: float = 1.0) -> Command:
        return Command(start_at, self.seconds * share, self.rate_hz)

    def saturated(self, start_at: float) -> Command:
        return Command(start_at, self.seconds * 0.4, 0.0, 1)

    def noise(self, start_at: float) -> Command:
        """A batch computes, the next one waits."""
        return Command(start_at, self.seconds + 2 * _MARGIN_S, 0.0, 2 * NOISY_BATCH)


async def run(settings: Settings) -> Report:
    report = Report("isolation", smoke=settings.smoke)
    on_card = settings.device.startswith("cuda")
    bench = _Bench(
        settings,
        packages_for(settings),
        Load(PACE_HZ if on_card else 2.0, settings.lasting(8.0, 1.5)),
        report,
    )
    parts = [PROCESSES, MPS_SHARES, NEIGHBOUR, MPS, THREADS] if on_card else [PROCESSES, THREADS]
    wanted = [part for part in parts if settings.wants(part.replace(" ", "-"))]
    if not on_card:
        bench.notes.append("mps: not run, it needs a CUDA device")
    if not wanted:
        raise material.MissingError(
            f"isolation has no such part on {settings.device}; there are: "
            + ", ".join(part.replace(" ", "-") for part in parts)
        )
    if wanted == [NEIGHBOUR]:
        await bench.attempt(ALONE, bench.pair_alone())
    else:
        together = PROCESSES in wanted
        await bench.attempt(PROCESSES if together else ALONE, bench.processes(together=together))
    for deployment in wanted:
        if deployment == NEIGHBOUR:
            # Measured already: the share of the deployment with shares.
            done = SHARES[Stage.DETECTOR] if MPS_SHARES in wanted else 0
            shares = [share for share in NEIGHBOUR_SHARES if share != done]
            await bench.attempt(NEIGHBOUR, bench.neighbours(shares))
        elif deployment != PROCESSES:
            await bench.attempt(deployment, bench.deployment(deployment))
    bench.conclude()
    return report


class _Bench:
    """Deployments one after the other; after each measurement the report is kept as far as it
    has come."""

    def __init__(
        self,
        settings: Settings,
        packages: Mapping[Stage, Package],
        load: Load,
        report: Report,
    ) -> None:
        self.found = Found()
        self.notes: list[str] = []
        self._settings = settings
        self._packages = packages
        self._load = load
        self._report = report
        self._until = time.monotonic() + BUDGET_S

    async def attempt(self, what: str, measuring: Coroutine[Any, Any, None]) -> None:
        """Measure. What fails or finds no time must not lose the others."""
        left = self._until - time.monotonic()
        if left < SHORTEST_S:
            measuring.close()
            self.notes.append(f"{what}: not measured, {max(0.0, left):.0f} s were left")
            return
        self._settings.say(f"{what}: starting")
        try:
            async with asyncio.timeout(left) as limit:
                await measuring
        except Exception as error:  # its failure must not lose the others
            self.notes.append(
                f"{what}: not all was measured, the time was up after {left:.0f} s"
                if limit.expired()
                else f"{what}: {type(error).__name__}: {error}"
            )
            self._settings.say(self.notes[-1][:600])
        self.conclude()

    def conclude(self) -> None:
        """Everything that is known now, into the report and the drawing."""
        report, found, rate = self._report, self.found, self._load.rate_hz
        report.rows.clear()
        report.notes.clear()
        _rows(report, found, self._packages, rate)
        if self._settings.device.startswith("cuda"):
            _aims(report, found)
        name = "isolation-smoke.svg" if self._settings.smoke else "isolation.svg"
        path = self._settings.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_draw(found, rate))
        for text in self.notes:
            report.note(text)
        report.note(f"drawn: {path}")
        report.note(
            "the article's table, its own card, ms a recognition: "
            + ", ".join(f"{name} {ms}" for name, ms in ARTICLE.items())
        )
        self._settings.keep(report)

    # -- deployments ----------------------------------------------------------------------

    async def processes(self, *, together: bool) -> None:
        """Each alone, then all together: a tenant that is asked nothing leaves the card to the
        others, so the recogniser is alone on it first, and later beside idle ones."""
        recognizer = Stage.RECOGNIZER
        others = [stage for stage in self._packages if stage is not recognizer]
        async with self._deployed(PROCESSES, [recognizer]) as tenants:
            await self._alone(tenants[recognizer])
            async with self._deployed(PROCESSES, others) as more:
                for tenant in more.values():
                    await self._alone(tenant)
                if together:
                    await self._together({**tenants, **more}, PROCESSES)

    async def pair_alone(self) -> None:
        """What the noisy neighbour is compared with, and nothing else."""
        for stage in (Stage.RECOGNIZER, Stage.DETECTOR):
            async with self._deployed(PROCESSES, [stage]) as tenants:
                await self._warmed(tenants[stage])
                await self._alone_for_noise(tenants[stage])

    async def deployment(self, deployment: str) -> None:
        async with self._deployed(deployment, list(self._packages)) as tenants:
            await self._together(tenants, deployment)

    async def neighbours(self, shares: Sequence[int]) -> None:
        """The noisy neighbour with each of these shares: one recogniser, and a detector for
        each, all clients of one daemon. Those that are asked nothing take nothing."""
        async with contextlib.AsyncExitStack() as stack:
            await one_daemon(stack)

            def tenants(stage: Stage, share: int) -> Any:
                special = {stage: {"sm_share": share}}
                return stack.enter_async_context(self._deployed(MPS_SHARES, [stage], special))

            started = await all_or_none(
                tenants(Stage.RECOGNIZER, SHARES[Stage.RECOGNIZER]),
                *(tenants(Stage.DETECTOR, share) for share in shares),
            )
            recognizer, *detectors = started
            for share, detector in zip(shares, detectors, strict=True):
                await self._warmed(detector[Stage.DETECTOR])
                await self._noisy({**recognizer, **detector}, neighbour_name(share))

    @contextlib.asynccontextmanager
    async def _deployed(
        self,
        deployment: str,
        stages: Sequence[Stage],
        special: Mapping[Stage, Mapping[str, Any]] | None = None,
    ) -> AsyncIterator[dict[Stage, Tenant]]:
        began = time.monotonic()
        device = self._settings.device
        async with deployed(deployment, self._packages, stages, device, special) as tenants:
            names = ", ".join(stages)
            self._settings.say(
                f"{deployment}: {names} ready after {time.monotonic() - began:.1f} s"
            )
            for stage, tenant in tenants.items():
                if tenant.in_full_precision:
                    self.notes.append(f"{deployment}: the {stage} ran eagerly in full precision")
            yield tenants

    # -- scenarios ------------------------------------------------------------------------

    async def _alone(self, tenant: Tenant) -> None:
        stage, load = tenant.stage, self._load
        await self._warmed(tenant)
        await self._all_of(ALONE, SATURATED, {tenant: load.saturated(_soon())})
        if stage is not Stage.RECOGNIZER:
            await self._all_of(ALONE, PACED, {tenant: load.paced(_soon(), 0.5)})
        if stage is not Stage.LIVENESS:
            await self._alone_for_noise(tenant)

    async def _warmed(self, tenant: Tenant) -> None:
        """Clocks rise."""
        await tenant.ask(Command(_soon(), 0.5, 0.0, 1))

    async def _alone_for_noise(self, tenant: Tenant) -> None:
        """The recogniser paced, the detector saturated, as long as beside each other."""
        stage, load = tenant.stage, self._load
        if stage is Stage.RECOGNIZER:
            await self._all_of(ALONE, PACED, {tenant: load.paced(_soon())})
            for answer in self.found.answers[ALONE, PACED, stage]:
                self.found.add(ALONE, NOISY, stage, answer)
        else:
            await self._all_of(ALONE, NOISY, {tenant: load.noise(_soon())})

    async def _together(self, tenants: Mapping[Stage, Tenant], deployment: str) -> None:
        load = self._load
        # First what has an aim.
        at = _soon()
        trio = list(tenants.values())
        await self._all_of(deployment, f"{TRIO}, {PACED}", {t: load.paced(at) for t in trio})
        await self._noisy(tenants, deployment)
        pair = [tenants[Stage.RECOGNIZER], tenants[Stage.DETECTOR]]
        at = _soon()
        await self._all_of(deployment, f"{PAIR}, {PACED}", {t: load.paced(at, 0.5) for t in pair})
        at = _soon()
        await self._all_of(
            deployment, f"{TRIO}, {SATURATED}", {t: load.saturated(at) for t in trio}
        )

    async def _noisy(self, tenants: Mapping[Stage, Tenant], deployment: str) -> None:
        load, at = self._load, _soon()
        await self._all_of(
            deployment,
            NOISY,
            {
                tenants[Stage.DETECTOR]: load.noise(at),
                tenants[Stage.RECOGNIZER]: load.paced(at + _MARGIN_S),
            },
        )

    async def _all_of(
        self, deployment: str, scenario: str, commands: Mapping[Tenant, Command]
    ) -> None:
        answers = await asyncio.gather(*(t.ask(c) for t, c in commands.items()))
        words = []
        for tenant, answer in zip(commands, answers, strict=True):
            self.found.add(deployment, scenario, tenant.stage, answer)
            words.append(
                f"{tenant.stage} {answer['p50_ms']:.2f} / {answer['p99_ms']:.2f} ms, "
                f"{answer['throughput_per_s']:.0f}/s"
            )
        self._settings.say(f"{deployment}, {scenario}: {'; '.join(words)}")
        self.conclude()


def _soon() -> float:
    return time.monotonic() + _LEAD_S


def noisy_ratios(found: Found, deployment: str) -> tuple[float, float]:
    """The paced recogniser's p99 and the neighbour's throughput, each against alone."""
    recognizer, detector = Stage.RECOGNIZER, Stage.DETECTOR
    return (
        ratio(
            found.value(deployment, NOISY, recognizer, "p99_ms"),
            found.value(ALONE, NOISY, recognizer, "p99_ms"),
        ),
        ratio(
            found.value(deployment, NOISY, detector, "throughput_per_s"),
            found.value(ALONE, NOISY, detector, "throughput_per_s"),
        ),
    )


def neighbour_name(share: int) -> str:
    """The deployment in which the neighbour has this share of the card."""
    return f"{MPS}, neighbour {share} %"


def recommended(found: Found) -> str:
    """Of the deployments with shares the one whose noisy neighbour keeps both bounds with the
    most to spare, or breaks them least; empty when none was measured."""
    spare = {}
    for deployment, scenario, _ in found.answers:
        if scenario == NOISY and deployment.startswith((MPS_SHARES, f"{MPS},")):
            slower, throughput = noisy_ratios(found, deployment)
            if not math.isnan(slower + throughput):
                spare[deployment] = min(NOISY_P99 / slower, throughput / NOISY_THROUGHPUT)
    return max(spare, key=lambda deployment: spare[deployment], default="")


def packages_for(settings: Settings) -> dict[Stage, Package]:
    real = material.real_models(settings.cache).packages
    return {
        Stage.DETECTOR: real[Stage.DETECTOR],
        Stage.RECOGNIZER: Catalog().resolve("rts-irse64-random"),
        Stage.LIVENESS: real[Stage.LIVENESS],
    }


def _base_of(scenario: str) -> str:
    """Which measurement alone a scenario is compared with."""
    if scenario == NOISY:
        return NOISY
    return SATURATED if scenario.endswith(SATURATED) else PACED


def _rows(report: Report, found: Found, packages: Mapping[Stage, Package], rate: float) -> None:
    for deployment, scenario, stage in found.answers:
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
                memory_mib=found.value(deployment, scenario, stage, "worker_memory_mib"),
                overhead_p50=ratio(value["p50_ms"], found.value(ALONE, base, stage, "p50_ms")),
                overhead_p99=ratio(value["p99_ms"], found.value(ALONE, base, stage, "p99_ms")),
                extra={
                    "max_ms": found.value(deployment, scenario, stage, "max_ms"),
                    "failed": sum(
                        sum(answer["failed"].values())
                        for answer in found.answers[deployment, scenario, stage]
                    ),
                    "sm_share": share_of(deployment, stage),
                },
                **value,
            )
        )


def share_of(deployment: str, stage: Stage) -> int | None:
    """Percent of the multiprocessors; None where nothing limits it."""
    if deployment == MPS_SHARES:
        return SHARES[stage]
    for share in NEIGHBOUR_SHARES:
        if deployment == neighbour_name(share):
            return share if stage is Stage.DETECTOR else SHARES[stage]
    return None


def _aims(report: Report, found: Found) -> None:
    rec = Stage.RECOGNIZER
    if (ALONE, PACED, rec) not in found.answers:
        return  # nothing to compare with, or not yet
    if (ALONE, SATURATED, rec) in found.answers:
        for name, bound in (("p50", 2.6), ("p99", 3.5)):
            value = found.value(ALONE, SATURATED, rec, f"{name}_ms")
            report.aim(f"recogniser alone, {name} ms:", value, bound, at_most=True)
    trio = f"{TRIO}, {PACED}"
    modes = [m for m in (PROCESSES, MPS, MPS_SHARES) if (m, trio, rec) in found.answers]
    for name, bound in (("p50_ms", 1.10), ("p99_ms", 1.25)) if modes else ():
        base = found.value(ALONE, PACED, rec, name)
        best = min((ratio(found.value(m, trio, rec, name), base), m) for m in modes)
        report.aim(
            f"trio beside, {name} against alone, best ({best[1]}):", best[0], bound, at_most=True
        )
    chosen = recommended(found)
    if not chosen:
        return
    slower, throughput = noisy_ratios(found, chosen)
    share = share_of(chosen, Stage.DETECTOR)
    report.note(f"recommended share of the card for the noisy neighbour: {share} % ({chosen})")
    report.aim(
        f"noisy neighbour, recogniser's p99 against alone ({chosen}):",
        slower,
        NOISY_P99,
        at_most=True,
    )
    report.aim(
        f"noisy neighbour's own throughput against alone ({chosen}):",
        throughput,
        NOISY_THROUGHPUT,
        at_most=False,
    )


def _draw(found: Found, rate: float) -> str:
    rec = Stage.RECOGNIZER
    deployments = dict.fromkeys((ALONE, *(deployment for deployment, _, _ in found.answers)))
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
