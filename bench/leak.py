"""A worker that leaks device memory beside two models that behave.

The liveness worker leaks 10 MiB a call, reaches its budget and is replaced by its spare,
while the recogniser and the detector go on at 60 Hz. Compared with the same load without
a leak: the neighbours' latency, and what was lost.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from bench import isolation
from bench.isolation import Tenant, deployed
from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import ratio
from bench.tenant import Command
from facelane_server.domain import Stage

LEAK_MIB: Final = 10
LEAK_HZ: Final = 10.0
BUDGET_MIB: Final = 1_400
SLOWER: Final = 1.2


async def run(settings: Settings) -> Report:
    report = Report("leak", smoke=settings.smoke)
    on_card = settings.device.startswith("cuda")
    packages = isolation.packages_for(settings)
    rate = isolation.PACE_HZ if on_card else 1.0
    seconds = settings.lasting(14.0, 6.0)
    budget = BUDGET_MIB if on_card else 600
    for name, extra in (
        ("no leak", {}),
        (
            f"leaks {LEAK_MIB} MiB a call",
            {"memory_mib": budget, "spares": 1, "options": {"fail.leak_mib": str(LEAK_MIB)}},
        ),
    ):
        special = {Stage.LIVENESS: extra}
        async with deployed(
            isolation.PROCESSES, packages, list(packages), settings.device, special
        ) as tenants:
            answers = await _all(tenants, rate, seconds)
        for stage, answer in answers.items():
            report.add(
                Row(
                    deployment=name,
                    scenario="neighbour" if stage is not Stage.LIVENESS else "leaking model",
                    model=packages[stage].name,
                    batch=1,
                    rate_hz=LEAK_HZ if stage is Stage.LIVENESS else rate,
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
            )
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


async def _all(
    tenants: dict[Stage, Tenant], rate: float, seconds: float
) -> dict[Stage, isolation.Answer]:
    for stage, tenant in tenants.items():  # clocks rise; the leak does not begin yet
        if stage is not Stage.LIVENESS:
            await tenant.ask(Command(time.monotonic() + 0.3, 0.5))
    at = time.monotonic() + 0.5
    commands = {
        stage: Command(at, seconds, LEAK_HZ if stage is Stage.LIVENESS else rate)
        for stage in tenants
    }
    answers = await asyncio.gather(*(tenants[s].ask(c) for s, c in commands.items()))
    return dict(zip(commands, answers, strict=True))
