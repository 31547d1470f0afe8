"""A worker that leaks device memory beside two models that behave.

The liveness worker leaks 10 MiB a call, reaches its budget and is replaced by its spare,
while the recogniser and the detector go on at 60 Hz. Compared with the same load without
a leak: the neighbours' latency, and what was lost. Each is a process; `leak:mps`: under
MPS, with shares.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import Any, Final

from bench import isolation
from bench.isolation import Tenant, deployed
from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import ratio
from bench.tenant import Command
from facelane_server.domain import Stage

LEAK_MIB: Final = 10
LEAK_HZ: Final = 10.0
BUDGET_MIB: Final = 1_600
SLOWER: Final = 1.2
MPS_PART: Final = "mps"


async def run(settings: Settings) -> Report:
    report = Report("leak", smoke=settings.smoke)
    on_card = settings.device.startswith("cuda")
    mps = on_card and settings.only == (MPS_PART,)
    packages = isolation.packages_for(settings)
    rate = isolation.PACE_HZ if on_card else 1.0
    leak = {
        "memory_mib": BUDGET_MIB if on_card else 600,
        "spares": 1,
        "options": {"fail.leak_mib": str(LEAK_MIB)},
    }
    async with contextlib.AsyncExitStack() as stack:
        if mps:
            await isolation.one_daemon(stack)

        def tenants(stages: list[Stage], **extra: Any) -> Awaitable[dict[Stage, Tenant]]:
            deployment = isolation.MPS_SHARES if mps else isolation.PROCESSES
            special = {Stage.LIVENESS: extra}
            return stack.enter_async_context(
                deployed(deployment, packages, stages, settings.device, special)
            )

        neighbours, *others = await isolation.all_or_none(
            tenants([Stage.RECOGNIZER, Stage.DETECTOR]),
            tenants([Stage.LIVENESS]),
            tenants([Stage.LIVENESS], **leak),
        )
        for tenant in neighbours.values():
            await tenant.ask(Command(time.monotonic() + 0.3, 0.5))  # clocks rise
        for name, other, seconds in (
            ("no leak", others[0], settings.lasting(10.0, 2.0)),
            (f"leaks {LEAK_MIB} MiB a call", others[1], settings.lasting(15.0, 6.0)),
        ):
            settings.say(name)
            answers = await _all({**neighbours, **other}, rate, seconds)
            for stage, answer in answers.items():
                report.add(_row(name, stage, packages[stage].name, rate, answer))
                settings.say(f"{stage}: p99 {answer['p99_ms']:.2f} ms")
            settings.keep(report)
    if mps:
        report.note("all of them under MPS, with shares of the card")
    calm, leaking = report.rows[:3], report.rows[3:]
    for before, after in zip(calm, leaking, strict=True):
        after.overhead_p50 = ratio(after.p50_ms or 0.0, before.p50_ms or 0.0)
        after.overhead_p99 = ratio(after.p99_ms or 0.0, before.p99_ms or 0.0)
        if after.scenario == "neighbour":
            report.aim(
                f"p99 of {after.model} beside the leak, against without:",
                after.overhead_p99,
                SLOWER,
                at_most=True,
            )
    report.aim("lost:", sum(row.extra["lost"] for row in leaking), 0, at_most=True)
    replaced = sum(row.extra["replaced"] for row in leaking)
    report.aim("replaced at the budget:", replaced, 1, at_most=False)
    return report


def _row(name: str, stage: Stage, model: str, rate: float, answer: isolation.Answer) -> Row:
    leaking = stage is Stage.LIVENESS
    return Row(
        deployment=name,
        scenario="leaking model" if leaking else "neighbour",
        model=model,
        batch=1,
        rate_hz=LEAK_HZ if leaking else rate,
        p50_ms=answer["p50_ms"],
        p99_ms=answer["p99_ms"],
        throughput_per_s=answer["throughput_per_s"],
        memory_mib=answer["worker_memory_mib"],
        extra={
            "max_ms": answer["max_ms"],
            "lost": sum(answer["failed"].values()),
            "replaced": answer["restarts"],
        },
    )


async def _all(
    tenants: dict[Stage, Tenant], rate: float, seconds: float
) -> dict[Stage, isolation.Answer]:
    at = time.monotonic() + 0.5
    commands = {
        stage: Command(at, seconds, LEAK_HZ if stage is Stage.LIVENESS else rate)
        for stage in tenants
    }
    answers = await asyncio.gather(*(tenants[s].ask(c) for s, c in commands.items()))
    return dict(zip(commands, answers, strict=True))
