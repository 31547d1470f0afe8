"""The machine: Python, driver, cards, torch, and the limits that are set to this process.

Torch is asked by a child process: this one never imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from facelane_server import __version__, config, limits
from facelane_server.doctor.report import Finding, Status
from facelane_server.monitor import Nvml, NvmlMissingError
from facelane_server.pools import mps

TORCH_TIMEOUT_S: Final = 120.0
MIN_OPEN_FILES: Final = 1_024
MIN_MEMORY_MIB: Final = 2_048
"""Front, three workers of the starter models, and the pictures on their way."""
REPORTED_PACKAGES: Final = ("grpcio", "msgspec", "numpy", "opencv-python-headless", "protobuf")

_TORCH: Final = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "available": cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda else [],
    "architectures": torch.cuda.get_arch_list() if cuda else [],
    "capabilities": ["sm_%d%d" % torch.cuda.get_device_capability(i)
        for i in range(torch.cuda.device_count())] if cuda else [],
}))
"""


def check_python() -> Finding:
    facts = {
        "facelane": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": {name: _version_of(name) for name in REPORTED_PACKAGES},
    }
    detail = (
        f"facelane {__version__}, Python {facts['python']}, Linux {facts['kernel']}, "
        f"{facts['cpus']} CPUs"
    )
    return Finding("system", Status.OK, detail, facts=facts)


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cuda_workers(settings: config.Config) -> int:
    """Worker processes that are meant for a GPU, by name."""
    return sum(
        pool.workers
        for pool in settings.stages.values()
        if any(device.startswith("cuda") for device in pool.devices)
    )


def check_driver(settings: config.Config) -> tuple[Finding, ...]:
    """The NVIDIA driver, its devices and their compute mode, by NVML."""
    wanted = _cuda_workers(settings)
    try:
        nvml = Nvml.load()
    except NvmlMissingError as error:
        if wanted:
            advice = (
                "install the NVIDIA driver (in a container: run it with --gpus all), or write "
                'devices = ["cpu"]'
            )
            return (Finding("driver", Status.FAIL, str(error), advice),)
        return (Finding("driver", Status.SKIP, f"no GPU: {error}"),)
    try:
        version, readings, modes = nvml.driver_version(), nvml.read(), nvml.compute_modes()
    except nvml.errors as error:
        advice = "look at dmesg for Xid errors; a reset or a reboot may be needed"
        return (Finding("driver", Status.FAIL, f"NVML: {error}", advice),)
    finally:
        nvml.close()
    driver = Finding(
        "driver",
        Status.OK,
        f"{version}, {len(readings)} device(s)",
        facts={"version": version, "devices": len(readings)},
    )
    return (driver, *map(_device_check, readings, modes, [wanted] * len(readings)))


def _device_check(reading: Any, mode: str, wanted: int) -> Finding:
    facts = {
        "name": reading.name,
        "memory_used_bytes": reading.memory_used_bytes,
        "memory_total_bytes": reading.memory_total_bytes,
        "compute_mode": mode,
        "ecc_errors": reading.ecc_errors,
        "throttle_reasons": list(reading.throttle_reasons),
    }
    detail = (
        f"{reading.name}, {reading.memory_used_bytes / 2**30:.1f} of "
        f"{reading.memory_total_bytes / 2**30:.1f} GiB in use, compute mode {mode}"
    )
    status, advice = Status.OK, ""
    if mode == "prohibited":
        status, advice = Status.FAIL, "allow computing: nvidia-smi -c DEFAULT"
    elif mode == "exclusive" and wanted > 1:
        status = Status.FAIL
        advice = (
            "one process only may use this card, and several workers are configured: "
            'nvidia-smi -c DEFAULT, or isolation = "mps"'
        )
    elif reading.ecc_errors:
        status = Status.WARN
        advice = f"{reading.ecc_errors} uncorrected memory errors: the card may need replacing"
    elif reading.throttle_reasons:
        status = Status.WARN
        advice = f"it is slowed down: {', '.join(reading.throttle_reasons)}"
    elif reading.memory_share > 0.9:
        status = Status.WARN
        advice = "other programs hold nearly all of its memory"
    return Finding(f"device {reading.device}", status, detail, advice, facts)


async def check_torch(
    settings: config.Config, executable: Sequence[str] = (sys.executable, "-c", _TORCH)
) -> Finding:
    """What torch was built for and sees, asked of a child process."""
    wanted = _cuda_workers(settings)
    process = await asyncio.create_subprocess_exec(
        *executable,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TORCH_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        advice = "a hung driver does this: look at dmesg; is the disk very slow?"
        return Finding("torch", Status.FAIL, f"no answer in {TORCH_TIMEOUT_S:.0f} s", advice)
    try:
        if process.returncode:
            raise ValueError
        facts = json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        advice = "pip install 'facelane[server]'; null and ONNX models work without it"
        return Finding("torch", Status.FAIL, f"cannot be imported: {last[0][:200]}", advice)
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU only"
    detail = f"{facts['version']}, built for {built}"
    if facts["available"]:
        detail += f", sees {', '.join(facts['devices'])}"
        missing = [c for c in facts["capabilities"] if not _runs_on(c, facts["architectures"])]
        if missing:
            advice = f"this build has no code for {missing[0]}: install another torch build"
            return Finding("torch", Status.FAIL, detail, advice, facts)
        return Finding("torch", Status.OK, detail, facts=facts)
    if wanted:
        advice = (
            "install a torch build for CUDA from pytorch.org"
            if not facts["cuda"]
            else "the driver is missing, or older than this CUDA version needs"
        )
        detail += "; cuda devices are configured"
        return Finding("torch", Status.FAIL, detail, advice, facts)
    return Finding("torch", Status.OK, detail, facts=facts)


def _runs_on(capability: str, architectures: Sequence[str]) -> bool:
    """Code for sm_XY runs on sm_XZ with Z >= Y; PTX (compute_XY) on anything newer."""
    number = int(capability.removeprefix("sm_"))
    for name in architectures:
        kind, _, digits = name.rpartition("_")
        if not digits.isdigit():
            continue
        have = int(digits)
        if kind == "sm" and have // 10 == number // 10 and have <= number:
            return True
        if kind == "compute" and have <= number:
            return True
    return False


def check_mps(settings: config.Config) -> Finding:
    wanted = any(pool.hosting.needs_mps for pool in settings.stages.values())
    found = mps.control_program(os.environ)
    if found is None:
        if wanted:
            advice = "install CUDA's MPS tools (nvidia-compute-utils), or isolation = 'process'"
            return Finding("mps", Status.FAIL, f"{mps.CONTROL} is not installed", advice)
        return Finding("mps", Status.SKIP, "not installed, not configured")
    return Finding("mps", Status.OK, found + ("" if wanted else "; not configured"))


def check_nvjpeg(settings: config.Config) -> Finding:
    """Whether frames can be decoded where a detector pool says. That nvJPEG works is seen
    by the pool's own inference."""
    wanted = settings.pools.detector.decode
    version = _version_of("torchvision")
    if wanted == "cpu":
        found = f"torchvision {version} is there" if version else "torchvision is not installed"
        return Finding("nvjpeg", Status.SKIP, f"not configured; {found}")
    if version:
        return Finding("nvjpeg", Status.OK, f"torchvision {version}", facts={"version": version})
    detail = f"the detector's decode is {wanted}, but torchvision is not installed"
    advice = "pip install 'facelane[nvjpeg]', or decode = 'cpu'"
    return Finding("nvjpeg", Status.FAIL if wanted == "cuda" else Status.WARN, detail, advice)


def check_cgroup(root: Path, membership: Path) -> Finding:
    """Memory, CPU and process limits of this cgroup and those above it (version 2)."""
    folder = _own_cgroup(root, membership)
    if folder is None:
        return Finding("cgroup", Status.SKIP, "no cgroup v2 here")
    memory, cpus, pids = (_tightest(root, folder, read) for read in (_memory, _cpus, _pids))
    facts = {"memory_bytes": memory, "cpus": cpus, "pids": pids}
    said = [
        f"memory {memory / 2**30:.1f} GiB" if memory is not None else "memory unlimited",
        f"{cpus:g} CPUs" if cpus is not None else "CPUs unlimited",
        f"{pids:g} processes" if pids is not None else "processes unlimited",
    ]
    status, advice = Status.OK, ""
    if memory is not None and memory < MIN_MEMORY_MIB * limits.MIB:
        status = Status.WARN
        advice = f"give it {MIN_MEMORY_MIB} MiB or more: workers are killed beyond the limit"
    elif pids is not None and pids < 256:
        status, advice = Status.WARN, "raise TasksMax to 256 or more: every thread counts"
    killed = _oom_kills(folder)
    if killed:
        facts["oom_kills"] = killed
        status = Status.WARN
        advice = f"the kernel has killed {killed} process(es) here for memory: raise MemoryMax"
    return Finding("cgroup", status, ", ".join(said), advice, facts)


def _own_cgroup(root: Path, membership: Path) -> Path | None:
    try:
        for line in membership.read_text().splitlines():
            number, _, rest = line.partition(":")
            if number == "0":
                folder = root / rest.partition(":")[2].strip("/")
                # Inside of a container the path may be that of the host.
                return folder if folder.is_dir() else root
    except OSError:
        pass
    return None


def _tightest(root: Path, folder: Path, read: Callable[[Path], float | None]) -> float | None:
    found = []
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):
            value = read(folder)
            if value is not None:
                found.append(value)
        if folder == root or root not in folder.parents:
            return min(found, default=None)
        folder = folder.parent


def _memory(folder: Path) -> float | None:
    text = (folder / "memory.max").read_text().strip()
    return None if text == "max" else float(text)


def _cpus(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else float(quota) / float(period)


def _pids(folder: Path) -> float | None:
    text = (folder / "pids.max").read_text().strip()
    return None if text == "max" else float(text)


def _oom_kills(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.events").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def check_ulimits() -> tuple[Finding, ...]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if 0 <= files < MIN_OPEN_FILES:
        advice = f"LimitNOFILE={MIN_OPEN_FILES} in the unit, or ulimit -n: every stream is one"
        first = Finding("open files", Status.WARN, f"limit {files}", advice, {"limit": files})
    else:
        said = "unlimited" if files < 0 else str(files)
        first = Finding("open files", Status.OK, f"limit {said}", facts={"limit": files})
    if core:
        advice = "LimitCORE=0 in the unit, or ulimit -c 0: a dump holds faces and embeddings"
        second = Finding("core dumps", Status.WARN, "switched on", advice)
    else:
        second = Finding("core dumps", Status.OK, "switched off")
    return first, second
