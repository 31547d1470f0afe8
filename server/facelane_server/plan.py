"""Does a configuration fit its cards? Asked before any model is loaded.

What a worker needs is estimated from its package: CUDA context + weights + activations of
the largest batch. ``memory_mib`` must hold that; what the workers of a device may take
together (their budgets, or where there is none their estimates) must not exceed the
device. The threads of a group share one context. A reload needs room for a second set
of workers for a moment; the plan does not reserve it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from facelane_server import config, limits
from facelane_server.domain import Stage
from facelane_server.models.api import CropSpec
from facelane_server.models.package import Package
from facelane_server.monitor import DeviceReading, Nvml, NvmlMissingError
from facelane_server.pools.host import Launchers
from facelane_server.pools.pool import Pool
from facelane_server.shards.dealing import dealt

MIB: Final = 1024 * 1024
CONTEXT_MIB: Final = 640
"""A CUDA context with the libraries' kernels; 500 to 650 on recent cards."""
NVML_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """``device`` as torch counts: ``cuda:N``."""

    device: str
    name: str
    total_mib: int
    used_mib: int


@dataclass(frozen=True, slots=True)
class Share:
    """What the workers of one pool take on one device; MiB, of each worker."""

    pool: str
    workers: int
    context_mib: float
    weights_mib: float
    activations_mib: float
    budget_mib: int
    measured_mib: int | None = None

    @property
    def need_mib(self) -> float:
        """Of one worker: measured where it was, else estimated."""
        if self.measured_mib is not None:
            return float(self.measured_mib)
        return self.context_mib + self.weights_mib + self.activations_mib

    @property
    def reserved_mib(self) -> float:
        """Of all its workers: what they may take."""
        return self.workers * (self.budget_mib or self.need_mib)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """``memory`` None: the device cannot be asked, so nothing was compared."""

    device: str
    memory: DeviceMemory | None
    shares: tuple[Share, ...]

    @property
    def reserved_mib(self) -> float:
        return sum(share.reserved_mib for share in self.shares)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``problems``: why the configuration is refused; ``remarks``: what an operator should
    know. Both are sentences."""

    devices: tuple[DevicePlan, ...]
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, one line a pool and a device."""
        found: list[str] = []
        for plan in self.devices:
            memory = plan.memory
            size = "memory unknown" if memory is None else f"{memory.total_mib} MiB"
            name = "" if memory is None else f" {memory.name}"
            found.append(f"{plan.device}{name}: {plan.reserved_mib:.0f} MiB of {size}")
            for share in plan.shares:
                parts = (
                    f"measured {share.measured_mib}"
                    if share.measured_mib is not None
                    else f"context {share.context_mib:.0f} + weights {share.weights_mib:.0f} "
                    f"+ activations {share.activations_mib:.0f} = {share.need_mib:.0f}"
                )
                budget = f"budget {share.budget_mib}" if share.budget_mib else "no budget"
                found.append(f"  {share.pool:<11} x{share.workers}  {parts} MiB, {budget}")
        found += [f"note: {remark}" for remark in self.remarks]
        found += [f"refused: {problem}" for problem in self.problems]
        return found or ["no pool uses a CUDA device"]


def visible(devices: Sequence[tuple[str, DeviceMemory]], chosen: str | None) -> list[DeviceMemory]:
    """The devices that CUDA shows, renumbered. ``devices``: UUID and memory of each, in
    NVML's order. ``chosen``: ``CUDA_VISIBLE_DEVICES``; None = all.

    As CUDA does, the list ends at the first entry that names no device.
    """
    picked: list[DeviceMemory] = []
    if chosen is None:
        picked = [memory for _, memory in devices]
    else:
        for entry in (part.strip() for part in chosen.split(",")):
            if entry.isdigit() and int(entry) < len(devices):
                picked.append(devices[int(entry)][1])
                continue
            found = [memory for uuid, memory in devices if entry and uuid.startswith(entry)]
            if len(found) != 1:
                break
            picked.append(found[0])
    return [replace(memory, device=f"cuda:{index}") for index, memory in enumerate(picked)]


def make_plan(
    settings: config.Config,
    packages: Mapping[Stage, Package],
    devices: Sequence[DeviceMemory] | None,
    measured: Mapping[str, int] | None = None,
    *,
    shards: int = 1,
) -> MemoryPlan:
    """The plan of a configuration, which holds in each of so many ``shards``. Pure.

    ``devices``: those that CUDA shows; None = they cannot be asked. ``measured``: MiB of one
    worker, by pool, from a dry run.
    """
    known = {memory.device: memory for memory in devices or ()}
    shares: dict[str, list[Share]] = {}
    problems: list[str] = []
    remarks: list[str] = []
    for shard in range(shards):
        groups: set[tuple[str, str]] = set()
        for name, pool in settings.stages.items():
            package = packages[Stage(name)]
            if package.manifest.runtime == "null":
                continue
            given = dealt(pool.devices, shard, shards)
            for device, count in _placed(pool, given, bool(known)).items():
                if device == "cpu":
                    continue
                if devices is not None and device not in known:
                    there = ", ".join(known) or "none"
                    problems.append(
                        f"pools.{name}.devices: {device} does not exist; there are: {there}"
                    )
                    continue
                context = CONTEXT_MIB
                if pool.hosting.shares_process:
                    if (pool.group, device) in groups:
                        context = 0
                    groups.add((pool.group, device))
                memory = package.manifest.memory
                share = Share(
                    pool=name if shards == 1 else f"{shard}/{name}",
                    workers=count,
                    context_mib=context,
                    weights_mib=memory.weights_mib or _file_mib(package),
                    activations_mib=memory.activations_mib_per_item
                    * (pool.batch_max or limits.BATCH),
                    budget_mib=pool.memory_mib,
                    measured_mib=(measured or {}).get(name),
                )
                shares.setdefault(device, []).append(share)
                if 0 < pool.memory_mib < share.need_mib:
                    problems.append(
                        f"pools.{name}: a worker needs about {share.need_mib:.0f} MiB on {device}, "
                        f"but memory_mib is {pool.memory_mib}; raise it, or lower batch_max"
                    )
    plans = tuple(
        DevicePlan(device, known.get(device), tuple(found))
        for device, found in sorted(shares.items())
    )
    for plan in plans:
        if plan.memory is None:
            remarks.append(f"{plan.device}: NVML cannot be asked, so its memory is not compared")
        elif plan.reserved_mib > plan.memory.total_mib:
            problems.append(
                f"{plan.device} has {plan.memory.total_mib} MiB, but its workers may take "
                f"{plan.reserved_mib:.0f} MiB; lower memory_mib, workers or batch_max (or "
                "server.shards), or use another device"
            )
        elif plan.reserved_mib > plan.memory.total_mib - plan.memory.used_mib:
            remarks.append(
                f"{plan.device}: {plan.memory.used_mib} MiB are in use by others; together with "
                f"{plan.reserved_mib:.0f} MiB that is more than it has"
            )
    return MemoryPlan(plans, tuple(dict.fromkeys(problems)), tuple(remarks))


def process_budget_mib(settings: config.Config, stage: Stage) -> int:
    """What a worker process of a pool may take: its ``memory_mib``; for a thread group the sum
    over its threads, 0 (no budget) as soon as one of them has none."""
    pool = settings.stages[stage]
    if not pool.hosting.shares_process:
        return pool.memory_mib
    members = [
        p for p in settings.stages.values() if p.hosting.shares_process and p.group == pool.group
    ]
    if not all(p.memory_mib for p in members):
        return 0
    return sum(p.memory_mib * (p.workers + p.spares) for p in members)


def _placed(pool: config.Pool, devices: Sequence[str], has_cuda: bool) -> dict[str, int]:
    """Workers, spares included, by device: in turn, as the pool places them."""
    placed: dict[str, int] = {}
    for number in range(pool.workers + pool.spares):
        device = devices[number % len(devices)]
        if device == "auto":
            device = "cuda:0" if has_cuda else "cpu"
        placed[device] = placed.get(device, 0) + 1
    return placed


def _file_mib(package: Package) -> float:
    """Of a package that declares no estimate: its files, as they lie in memory."""
    total = 0
    for part in package.manifest.weights:
        path = package.weights_path(part)
        total += path.stat().st_size if path.is_file() else 0
    return total / MIB


# -- what it is made from ----------------------------------------------------------------


def read_devices(timeout_s: float = NVML_S) -> list[DeviceMemory] | None:
    """The devices that CUDA shows, by NVML; None where it cannot be asked, or tells of other
    devices: a MIG instance that ``CUDA_VISIBLE_DEVICES`` names is none of NVML's cards.

    In a thread that is given up when the driver hangs.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and "MIG-" in chosen:
        return None
    found: list[tuple[DeviceReading, ...]] = []

    def read() -> None:
        try:
            nvml = Nvml.load()
        except NvmlMissingError:
            return
        try:
            found.append(nvml.read())
        except nvml.errors:
            return
        finally:
            nvml.close()

    thread = threading.Thread(target=read, name="plan", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        return None
    devices = [
        (
            reading.uuid,
            DeviceMemory(
                f"cuda:{reading.device}",
                reading.name,
                reading.memory_total_bytes // MIB,
                reading.memory_used_bytes // MIB,
            ),
        )
        for reading in found[0]
    ]
    return visible(devices, chosen)


async def check(
    settings: config.Config, packages: Mapping[Stage, Package], *, shards: int = 1
) -> MemoryPlan:
    """The plan at the start of a server. Raises ConfigError when it is refused."""
    devices = await asyncio.to_thread(read_devices)
    plan = make_plan(settings, packages, devices, shards=shards)
    if plan.problems:
        raise config.ConfigError("; ".join(plan.problems))
    return plan


async def measure(
    settings: config.Config, packages: Mapping[Stage, Package], crops: tuple[CropSpec, ...]
) -> dict[str, int]:
    """MiB that one warm worker of each pool takes on its first device, one after the other.

    Pools whose worker does not become ready are left out.
    """
    found: dict[str, int] = {}
    for name, chosen in settings.stages.items():
        stage = Stage(name)
        if packages[stage].manifest.runtime == "null":
            continue
        alone = msgspec.structs.replace(
            chosen, workers=1, spares=0, isolation="process", memory_mib=0, restart_limit=1
        )
        with tempfile.TemporaryDirectory(prefix="facelane-") as scratch:
            launchers = Launchers(Path(scratch))
            pool = Pool(
                stage,
                alone,
                packages[stage],
                launchers.for_pool(name, alone),
                crops=crops if stage is Stage.DETECTOR else (),
            )
            await pool.start()
            try:
                if await pool.wait_ready(chosen.load_timeout_s):
                    [worker] = pool.info().workers
                    if worker.device.startswith("cuda"):
                        found[name] = worker.memory_mib
            finally:
                await pool.stop(1.0)
                await launchers.close()
    return found
