"""A recogniser worker is killed under load. How long until answers are good again, what was
lost meanwhile, did the rest feel it, and did health tell the truth?

Part ``service``: the whole service, eight paced streams, with and without a spare. Part
``peers``: the recogniser alone behind facelane (null models around it) and behind other
servers, each in an environment of its own: the same network, pace and script.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import facelane
import facelane.aio
from bench import load, material, peers
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import percentile, ratio
from facelane_server.domain import Stage

STREAMS = 8
RATE_HZ = 2.0
"""Of each stream; less on a machine that could not take it with ease."""
CALM_SHARE = 0.4
"""Of what the machine can take: a loss is looked at, not an overload."""
KILLS = 8
"""Of the whole service: a percentile of what a second holds says nothing."""
BEFORE_S = 5.0
AFTER_S = 7.0
PEER_AFTER_S = 30.0
HEALTH_STEP_S = 0.02
LOAD_SLACK_S = 0.5
SPARE_GAP_S = 0.05
TRUTH_S = 0.1
OTHERS_P99 = 1.2
POOL = "facelane.pool.recognizer"


async def run(settings: Settings) -> Report:
    report = Report("recovery", smoke=settings.smoke)
    if settings.wants("service"):
        models = material.real_models(settings.cache)
        load_s = _load_seconds(models.packages[Stage.RECOGNIZER].folder)
        report.add(
            Row(
                deployment="a fresh process",
                scenario="loads the recogniser and answers once",
                model=models.packages[Stage.RECOGNIZER].name,
                extra={"first_good_s": load_s},
            )
        )
        for spares in (0, 1):
            await _service(settings, report, models, spares, load_s)
        report.note(models.listed)
    if settings.wants("peers"):
        await _peers(settings, report)
    return report


def _load_seconds(folder: Path) -> float:
    """From starting an interpreter to the model's first answer."""
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from facelane_server.models.api import DeviceOptions\n"
        "from facelane_server.worker.networks.load import load\n"
        "from facelane_server.models.package import read_package\n"
        "model = load(read_package(Path(sys.argv[1])), DeviceOptions(), batch_max=8)\n"
        "model.warm_up()\n"
        "model.begin(np.zeros((1, model.crop.size, model.crop.size, 3), np.uint8)).finish()\n"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=300)
    return time.monotonic() - begin


# -- watching ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Good:
    """A good answer: when its request was due, and when it came."""

    due: float
    at: float


@dataclass(frozen=True, slots=True)
class Outage:
    """``first_good_s``: until the first good answer to a request of after the kill; None =
    none came. ``gap_s``: the longest time around the kill without a good answer."""

    killed: float
    first_good_s: float | None
    gap_s: float
    end: float


@dataclass(frozen=True, slots=True)
class Told:
    """What health said of an outage. Seconds since the kill; None = it never said so."""

    not_serving_after_s: float | None
    serving_again_s: float | None
    said_serving: float
    """The share of the outage, but for its first moment, in which it said "serving"."""


@dataclass(slots=True)
class HealthLog:
    """What a server said of itself, sampled. Times are ``time.monotonic`` seconds."""

    samples: list[tuple[float, bool]] = field(default_factory=list)

    async def watch(self, ask: Callable[[], Awaitable[bool]]) -> None:
        while True:
            asked = time.monotonic()
            answer = await ask()
            self.samples.append((time.monotonic(), answer))
            await asyncio.sleep(max(0.0, HEALTH_STEP_S - (time.monotonic() - asked)))

    def first(self, serving: bool, since: float) -> float | None:
        """Seconds from ``since`` to the first answer of that kind; None = it never came."""
        return next((at - since for at, s in self.samples if at >= since and s is serving), None)

    def claimed(self, begin: float, end: float) -> float:
        """The share of the time between two moments for which it said "serving"; an answer
        speaks for the time since the one before it, so a late answer weighs more."""
        told = total = 0.0
        for (before, _), (at, serving) in itertools.pairwise(self.samples):
            span = min(at, end) - max(before, begin)
            if span > 0:
                total += span
                told += span * serving
        return told / total if total else math.nan

    def told(self, outage: Outage) -> Told:
        lost = self.first(serving=False, since=outage.killed)
        again = None if lost is None else self.first(serving=True, since=outage.killed + lost)
        return Told(
            lost,
            None if lost is None or again is None else lost + again,
            self.claimed(outage.killed + TRUTH_S, outage.end),
        )


def outage(good: Sequence[Good], killed: float, until: float) -> Outage:
    """The hole that a kill made in the good answers."""
    after = min((g.at for g in good if g.due >= killed), default=None)
    times = sorted(g.at for g in good)
    last = max((t for t in times if t <= killed), default=killed)
    around = [last, *(t for t in times if t > killed), until]
    # The last interval only says when the measurement ended.
    ends = around[:-1] if after is not None else around
    gap = max((b - a for a, b in itertools.pairwise(ends)), default=0.0)
    return Outage(killed, None if after is None else after - killed, gap, after or until)


# -- facelane ---------------------------------------------------------------------------


async def _victim(client: facelane.aio.Client) -> int:
    """The recogniser worker that does the work: a spare has hardly used the processor."""
    pools = {pool.pool: pool for pool in await client.pools()}
    pids = [w.pid for w in pools["recognizer"].workers if w.pid]
    return max(pids, key=lambda pid: psutil.Process(pid).cpu_times().user)


async def _killed_under_load(
    service: Service,
    frames: Sequence[bytes],
    rate_hz: float,
    *,
    before: float,
    after: float,
    kills: int = 1,
) -> tuple[load.Measured, HealthLog, list[float]]:
    """Eight paced streams; the recogniser's worker is killed after ``before`` seconds, and
    again every ``before + after`` seconds. Also the moments of the kills."""
    health = HealthLog()
    async with facelane.aio.Client(service.target, timeout=1.0) as client:

        async def ask() -> bool:
            try:
                return await client.health(POOL) == "SERVING"
            except facelane.FacelaneError:
                return False

        watcher = asyncio.create_task(health.watch(ask))
        running = asyncio.create_task(
            load.paced(
                service.target,
                frames,
                streams=STREAMS,
                rate_hz=rate_hz,
                seconds=kills * (before + after),
                disable_tracking=True,
            )
        )
        killed: list[float] = []
        begin = time.monotonic()
        try:
            for number in range(kills):
                due = begin + before + (before + after) * number
                await asyncio.sleep(due - time.monotonic())
                victim = await _victim(client)
                killed.append(time.monotonic())
                os.kill(victim, signal.SIGKILL)
            measured = await running
        finally:
            running.cancel()
            watcher.cancel()
            await asyncio.gather(running, watcher, return_exceptions=True)
    return measured, health, killed


def _row(
    name: str,
    scenario: str,
    model: str,
    found: Sequence[Outage],
    health: HealthLog,
    **extra: Any,
) -> Row:
    """``found``: one outage or several, of which the worst is told."""
    told = [health.told(outage) for outage in found]
    return Row(
        deployment=name,
        scenario=scenario,
        model=model,
        rate_hz=RATE_HZ,
        extra={
            "kills": len(found),
            "recovered": all(o.first_good_s is not None for o in found),
            "first_good_s": _worst(o.first_good_s for o in found),
            "gap_s": _worst(o.gap_s for o in found),
            "not_serving_after_s": _worst(t.not_serving_after_s for t in told),
            "serving_again_s": _worst(t.serving_again_s for t in told),
            "said_serving_in_outage": _worst(t.said_serving for t in told),
            **extra,
        },
    )


def _worst(figures: Iterable[float | None]) -> float | None:
    """The largest; None if one never came."""
    found = list(figures)
    return None if None in found else max(f for f in found if f is not None)


async def _service(
    settings: Settings, report: Report, models: material.Models, spares: int, load_s: float
) -> None:
    frames = (
        material.frames_from(settings.frames)
        if settings.frames
        else material.make_frames(settings.sized(48, 6), 640, 480, [1])
    )
    before = settings.lasting(BEFORE_S, 2.0)
    after = settings.lasting(AFTER_S, 6.0)
    # Its budget of losses is not what is measured here.
    pools = models.pools_toml(recognizer=f"spares = {spares}\nrestart_window_s = {before}")
    settings.say(f"the whole service, spares: {spares}")
    async with Service(pools) as service:
        await load.saturate(service.target, frames, streams=1, total=16, disable_tracking=True)
        full = await load.saturate(
            service.target, frames, streams=4, window=4, total=64, disable_tracking=True
        )
        rate = min(RATE_HZ, CALM_SHARE * full.summary().throughput_per_s / STREAMS)
        measured, health, killed = await _killed_under_load(
            service,
            frames,
            rate,
            before=before,
            after=after,
            kills=settings.sized(KILLS, 1),
        )
    good = [Good(a.at - a.latency, a.at) for a in measured.results if not a.missing]
    degraded = [a for a in measured.results if a.missing]
    found = []
    spans: dict[str, list[tuple[float, float]]] = {"before": [], "during": [], "after": []}
    for moment in killed:
        end = moment + after
        around = [g for g in good if moment - before <= g.at < end]
        found.append(outage(around, moment, end))
        # A spare's successor starts as well, and may be felt.
        over = max(found[-1].end, moment + load_s + LOAD_SLACK_S)
        spans["before"].append((moment - before + 1.0, moment))
        spans["during"].append((moment, over))
        spans["after"].append((over, end))
    others = {}
    for stage in ("detector", "liveness"):
        for span, parts in spans.items():
            times = [
                a.stages[stage]
                for a in measured.results
                if stage in a.stages and any(begin <= a.at < end for begin, end in parts)
            ]
            others[f"{stage}_p99_ms_{span}"] = percentile(times, 99) * 1e3
    # How much later than usual the latest answer around a kill came.
    usual = measured.summary().p50_ms / 1e3
    late = [
        max((g.at - g.due for g in good if k - 1.0 / rate <= g.due < k + 1.0), default=math.nan)
        for k in killed
    ]
    name = f"facelane, {spares} spare{'s' * (spares != 1)}"
    row = report.add(
        _row(
            name,
            f"three models, {STREAMS} streams",
            models.name,
            found,
            health,
            **measured.counts(),
            degraded=len(degraded),
            late_s=max(late) - usual,
            **others,
        )
    )
    row.rate_hz = rate
    row.p50_ms = measured.summary().p50_ms
    row.p99_ms = measured.summary().p99_ms
    report.aim(f"{name}: frames without an outcome:", measured.lost, 0, at_most=True)
    if spares:
        # Or one frame, at this pace.
        bound = max(SPARE_GAP_S, 1.0 / (STREAMS * rate))
        report.aim(f"{name}: later than usual, s:", row.extra["late_s"], bound, at_most=True)
    else:
        report.aim(
            f"{name}: first good result, s:",
            math.nan if row.extra["first_good_s"] is None else row.extra["first_good_s"],
            load_s + LOAD_SLACK_S,
            at_most=True,
        )
        told = row.extra["not_serving_after_s"]
        report.aim(
            f"{name}: NOT_SERVING after, s:",
            math.nan if told is None else told,
            TRUTH_S,
            at_most=True,
        )
    for stage in ("detector", "liveness"):
        report.aim(
            f"{name}: p99 of {stage} during / before:",
            ratio(others[f"{stage}_p99_ms_during"], others[f"{stage}_p99_ms_before"]),
            OTHERS_P99,
            at_most=True,
        )


# -- the recogniser alone, here and elsewhere ----------------------------------------------


def _exported(models: material.Models, cache: Path) -> Path:
    """The recogniser as an ONNX file that every server can run: chips [N, 3, 112, 112], RGB,
    (x - 127.5) / 127.5."""
    package = models.packages[Stage.RECOGNIZER]
    target = cache / "models" / f"{package.name}-{package.weights_digest[:12]}.onnx"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, warnings; from pathlib import Path; import torch\n"
        "from facelane_server.worker.networks.load import network_with_weights\n"
        "from facelane_server.models.package import read_package\n"
        "warnings.simplefilter('ignore')\n"
        "class Embedding(torch.nn.Module):\n"
        "    def __init__(self, inner):\n"
        "        super().__init__(); self.inner = inner\n"
        "    def forward(self, x):\n"
        "        y = self.inner(x)\n"
        "        return y[0] if isinstance(y, (tuple, list)) else y\n"
        "net = Embedding(network_with_weights(read_package(Path(sys.argv[1])))).eval()\n"
        "torch.onnx.export(net, torch.zeros(1, 3, 112, 112), sys.argv[2], dynamo=False,\n"
        "    input_names=['chips'], output_names=['embedding'], opset_version=17,\n"
        "    dynamic_axes={'chips': {0: 'n'}, 'embedding': {0: 'n'}})\n"
    )
    scratch = target.with_suffix(".part")
    done = subprocess.run(
        [sys.executable, "-c", code, str(package.folder), str(scratch)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise material.MissingError(f"no ONNX of the recogniser: {done.stderr.strip()[-400:]}")
    scratch.rename(target)
    return target


def _as_package(model: Path, cache: Path) -> Path:
    """The exported network as a model package, so that facelane runs it the same way."""
    folder = cache / "models" / f"{model.stem}-onnx"
    if not (folder / "model.toml").is_file():
        code = (
            "import sys; from pathlib import Path\n"
            "from facelane_server.modeltools.importer import import_model\n"
            "p = Path(sys.argv[2])\n"
            "import_model('onnx-recognizer', [Path(sys.argv[1])], p.parent, name=p.name)\n"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(model), str(folder)], check=True, timeout=300
        )
    return folder


async def _peers(settings: Settings, report: Report) -> None:
    models = material.real_models(settings.cache)
    model = _exported(models, settings.cache)
    before = settings.lasting(BEFORE_S, 2.0)
    null = material.null_models()
    package = _as_package(model, settings.cache)
    for spares in (0, 1):
        pools = "".join(
            f'[pools.{stage}]\nmodel = "null-{stage}"\n'
            for stage in null.packages
            if stage is not Stage.RECOGNIZER
        )
        settings.say(f"the recogniser alone, spares: {spares}")
        pools += f'[pools.recognizer]\nmodel = "{package}"\nspares = {spares}\n'
        async with Service(pools) as service:
            frames = material.frames_of_size(4, 20_000)
            await load.saturate(service.target, frames, streams=1, total=16, disable_tracking=True)
            measured, health, killed = await _killed_under_load(
                service, frames, RATE_HZ, before=before, after=settings.lasting(PEER_AFTER_S, 6.0)
            )
        good = [Good(a.at - a.latency, a.at) for a in measured.results if not a.missing]
        found = outage(good, killed[0], measured.end)
        row = report.add(
            _row(
                f"facelane, {spares} spare{'s' * (spares != 1)}",
                "the recogniser alone, ONNX Runtime",
                model.stem,
                [found],
                health,
                **measured.counts(),
                not_good=measured.sent - len(good),
            )
        )
        row.p50_ms, row.p99_ms = measured.summary().p50_ms, measured.summary().p99_ms
    for kind in peers.KINDS:
        if settings.only and kind.name not in settings.only and "peers" not in settings.only:
            continue
        settings.say(f"{kind.title} (its first run installs it)")
        try:
            python = await asyncio.to_thread(peers.environment, kind, settings.cache)
            row = await _peer(settings, kind, python, model, before)
        except peers.PeerError as error:
            row = Row(
                deployment=kind.title,
                scenario="the recogniser alone, ONNX Runtime",
                model=model.stem,
                extra={"not_run": str(error)},
            )
            report.note(f"{kind.title} not measured: {error}")
        report.add(row)


async def _peer(
    settings: Settings, kind: peers.Kind, python: Path, model: Path, before: float
) -> Row:
    health = HealthLog()
    good: list[Good] = []
    failed = sent = 0
    chip = os.urandom(peers.CHIP_BYTES)
    async with peers.Peer(kind, python, model) as peer:
        for _ in range(16):
            await peer.infer(chip)

        async def one(due: float) -> None:
            nonlocal failed
            if await peer.infer(chip):
                good.append(Good(due, time.monotonic()))
            else:
                failed += 1

        watcher = asyncio.create_task(health.watch(peer.healthy))
        period = 1.0 / (STREAMS * RATE_HZ)
        begin = time.monotonic()
        killed = end = 0.0
        requests: set[asyncio.Task[None]] = set()
        try:
            while True:
                due = begin + sent * period
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                now = time.monotonic()
                if not killed and now - begin >= before:
                    peer.kill_worker()
                    killed = time.monotonic()
                    end = killed + settings.lasting(PEER_AFTER_S, 6.0)
                if killed and now >= end:
                    break
                # Bounded: a request ends within its own timeout.
                task = asyncio.create_task(one(due))
                requests.add(task)
                task.add_done_callback(requests.discard)
                sent += 1
            await asyncio.gather(*requests)
        finally:
            watcher.cancel()
            for task in requests:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        exited = peer.process.poll() is not None
    found = outage(good, killed, end)
    row = _row(
        kind.title,
        "the recogniser alone, ONNX Runtime",
        model.stem,
        [found],
        health,
        frames=sent,
        results=len(good),
        errors=failed,
        lost=sent - len(good) - failed,
        not_good=sent - len(good),
        server_exited=exited,
    )
    quiet = [g.at - g.due for g in good if g.due < killed]
    row.p50_ms, row.p99_ms = percentile(quiet, 50) * 1e3, percentile(quiet, 99) * 1e3
    return row
