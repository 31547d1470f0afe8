"""``facelane-server doctor``: is this machine, with this config, fit to serve?

Each check looks at one thing, never raises, and says what to do where something is wrong.
A running server is not disturbed. Torch is imported by child
processes alone: the last check is a real inference by real workers, started as the server
starts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from facelane_server import __version__, config, limits
from facelane_server.app import ServedModels, state_dir
from facelane_server.domain import Encoding, FacelaneError, Picture, Stage
from facelane_server.edge.auth import Authenticator, read_keys
from facelane_server.edge.tls import Certificates, validity
from facelane_server.monitor import Nvml, NvmlMissingError
from facelane_server.pools import mps
from facelane_server.pools.host import Launchers
from facelane_server.pools.pool import Pool
from facelane_server.pools.tasks import (
    DetectRequest,
    EmbedRequest,
    LivenessRequest,
    Request,
    Task,
)
from facelane_server.store.gallery import Store

TORCH_TIMEOUT_S: Final = 120.0
INFERENCE_TIMEOUT_S: Final = 120.0
MIN_OPEN_FILES: Final = 1_024
MIN_MEMORY_MIB: Final = 2_048
"""Front, three workers of the starter models, and the pictures on their way."""
MIN_DISK_MIB: Final = 256
MIN_CERTIFICATE_DAYS: Final = 14
REPORTED_PACKAGES: Final = ("grpcio", "msgspec", "numpy", "opencv-python-headless", "protobuf")
SIDE: Final = 256

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


class Status(StrEnum):
    OK = "ok"
    SKIP = "skip"
    """Nothing to look at here."""
    WARN = "warn"
    """It works, but not as well or as safely as it could."""
    FAIL = "fail"
    """The server cannot serve like this."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``advice``: what to do; empty when all is well. ``facts``: for programs."""

    name: str
    status: Status
    detail: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst; a report of nothing but skipped checks is OK."""
        found = {check.status for check in self.checks}
        return next((s for s in (Status.FAIL, Status.WARN) if s in found), Status.OK)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "version": __version__,
            "status": self.status.value,
            "checks": [
                {
                    "name": check.name,
                    "status": check.status.value,
                    "detail": check.detail,
                    "advice": check.advice,
                    "facts": check.facts,
                }
                for check in self.checks
            ],
        }

    def as_text(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            lines.append(f"{check.status.value:<5}{check.name:<{width + 2}}{check.detail}")
            if check.advice:
                lines.append(f"{'':<{width + 7}}-> {check.advice}")
        lines.append("")
        lines.append(
            {
                Status.OK: "all is well",
                Status.WARN: "it will serve; see the warnings",
                Status.FAIL: "it cannot serve like this; see the failures",
            }[self.status]
        )
        return "\n".join(lines)


async def examine(
    path: Path | None,
    *,
    infer: bool = True,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """All checks, in order. ``path``: the config file. ``on_check`` hears each as it is done."""
    checks: list[Check] = []

    def add(*found: Check) -> None:
        for check in found:
            checks.append(check)
            if on_check is not None:
                on_check(check)

    add(check_python())
    settings, check = check_config(path)
    add(check)
    add(*check_driver(settings))
    torch = await check_torch(settings)
    add(torch)
    add(check_mps(settings))
    add(check_nvjpeg(settings))
    add(check_cgroup(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    add(*check_ulimits())
    add(check_listen(settings), check_metrics(settings))
    add(check_keys(settings), check_tls(settings))
    add(await asyncio.to_thread(check_gallery, settings))
    models, found = check_models(settings)
    add(*found)
    if infer and models is not None:
        for stage in models.packages:
            add(await check_inference(settings, models, stage))
    return Report(tuple(checks))


# -- the machine --------------------------------------------------------------------------------


def check_python() -> Check:
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
    return Check("system", Status.OK, detail, facts=facts)


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_config(path: Path | None) -> tuple[config.Config, Check]:
    """The config, or the defaults when it cannot be used."""
    try:
        settings = config.load(path)
    except config.ConfigError as error:
        advice = "the other checks use the defaults; `facelane-server check` reads it again"
        return config.Config(), Check("config", Status.FAIL, str(error), advice)
    where = str(path) if path is not None else "no file: defaults"
    return settings, Check("config", Status.OK, where)


def _cuda_workers(settings: config.Config) -> int:
    """Worker processes that are meant for a GPU, by name."""
    return sum(
        pool.workers
        for pool in settings.stages.values()
        if any(device.startswith("cuda") for device in pool.devices)
    )


def check_driver(settings: config.Config) -> tuple[Check, ...]:
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
            return (Check("driver", Status.FAIL, str(error), advice),)
        return (Check("driver", Status.SKIP, f"no GPU: {error}"),)
    try:
        version, readings, modes = nvml.driver_version(), nvml.read(), nvml.compute_modes()
    except nvml.errors as error:
        advice = "look at dmesg for Xid errors; a reset or a reboot may be needed"
        return (Check("driver", Status.FAIL, f"NVML: {error}", advice),)
    finally:
        nvml.close()
    driver = Check(
        "driver",
        Status.OK,
        f"{version}, {len(readings)} device(s)",
        facts={"version": version, "devices": len(readings)},
    )
    return (driver, *map(_device_check, readings, modes, [wanted] * len(readings)))


def _device_check(reading: Any, mode: str, wanted: int) -> Check:
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
    return Check(f"device {reading.device}", status, detail, advice, facts)


async def check_torch(
    settings: config.Config, executable: Sequence[str] = (sys.executable, "-c", _TORCH)
) -> Check:
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
        return Check("torch", Status.FAIL, f"no answer in {TORCH_TIMEOUT_S:.0f} s", advice)
    try:
        if process.returncode:
            raise ValueError
        facts = json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        advice = "pip install 'facelane[server]'; null and ONNX models work without it"
        return Check("torch", Status.FAIL, f"cannot be imported: {last[0][:200]}", advice)
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU only"
    detail = f"{facts['version']}, built for {built}"
    if facts["available"]:
        detail += f", sees {', '.join(facts['devices'])}"
        missing = [c for c in facts["capabilities"] if not _runs_on(c, facts["architectures"])]
        if missing:
            advice = f"this build has no code for {missing[0]}: install another torch build"
            return Check("torch", Status.FAIL, detail, advice, facts)
        return Check("torch", Status.OK, detail, facts=facts)
    if wanted:
        advice = (
            "install a torch build for CUDA from pytorch.org"
            if not facts["cuda"]
            else "the driver is missing, or older than this CUDA version needs"
        )
        return Check("torch", Status.FAIL, detail + "; cuda devices are configured", advice, facts)
    return Check("torch", Status.OK, detail, facts=facts)


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


def check_mps(settings: config.Config) -> Check:
    wanted = any(pool.isolation == "mps" for pool in settings.stages.values())
    found = mps.control_program(os.environ)
    if found is None:
        if wanted:
            advice = "install CUDA's MPS tools (nvidia-compute-utils), or isolation = 'process'"
            return Check("mps", Status.FAIL, f"{mps.CONTROL} is not installed", advice)
        return Check("mps", Status.SKIP, "not installed, not configured")
    return Check("mps", Status.OK, found + ("" if wanted else "; not configured"))


def check_nvjpeg(settings: config.Config) -> Check:
    """Whether frames can be decoded where a detector pool says. That nvJPEG works is seen
    by the pool's own inference."""
    wanted = settings.pools.detector.decode
    version = _version_of("torchvision")
    if wanted == "cpu":
        found = f"torchvision {version} is there" if version else "torchvision is not installed"
        return Check("nvjpeg", Status.SKIP, f"not configured; {found}")
    if version:
        return Check("nvjpeg", Status.OK, f"torchvision {version}", facts={"version": version})
    detail = f"the detector's decode is {wanted}, but torchvision is not installed"
    advice = "pip install 'facelane[nvjpeg]', or decode = 'cpu'"
    return Check("nvjpeg", Status.FAIL if wanted == "cuda" else Status.WARN, detail, advice)


def check_cgroup(root: Path, membership: Path) -> Check:
    """Memory, CPU and process limits of this cgroup and those above it (version 2)."""
    folder = _own_cgroup(root, membership)
    if folder is None:
        return Check("cgroup", Status.SKIP, "no cgroup v2 here")
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
    return Check("cgroup", status, ", ".join(said), advice, facts)


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


def check_ulimits() -> tuple[Check, ...]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if 0 <= files < MIN_OPEN_FILES:
        advice = f"LimitNOFILE={MIN_OPEN_FILES} in the unit, or ulimit -n: every stream is one"
        first = Check("open files", Status.WARN, f"limit {files}", advice, {"limit": files})
    else:
        said = "unlimited" if files < 0 else str(files)
        first = Check("open files", Status.OK, f"limit {said}", facts={"limit": files})
    if core:
        advice = "LimitCORE=0 in the unit, or ulimit -c 0: a dump holds faces and embeddings"
        second = Check("core dumps", Status.WARN, "switched on", advice)
    else:
        second = Check("core dumps", Status.OK, "switched off")
    return first, second


# -- the installation -----------------------------------------------------------------------------


def check_listen(settings: config.Config) -> Check:
    """Whether the address is free; a server that runs already is no fault."""
    listen = settings.server.listen
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:").removeprefix("//"))
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Check("listen", Status.OK, listen)
        advice = f"make {path.parent} and let this user write to it"
        return Check("listen", Status.FAIL, f"{listen}: its folder cannot be written to", advice)
    return _port_check("listen", "server.listen", listen)


def check_metrics(settings: config.Config) -> Check:
    """Whether the address of the metrics is free. They need no key, wherever they listen."""
    listen = settings.metrics.listen
    if not listen:
        return Check("metrics", Status.SKIP, "switched off")
    check = _port_check("metrics", "metrics.listen", listen)
    if check.status is Status.OK and not config.is_local(listen):
        return Check("metrics", Status.OK, f"{check.detail}; whoever reaches it may read them")
    return check


def _port_check(name: str, key: str, listen: str) -> Check:
    host, _, port = listen.rpartition(":")
    try:
        info = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(info[0], info[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(info[4])
    except OSError as error:
        advice = f"a server that runs already has it; otherwise set {key} to a free one"
        return Check(name, Status.WARN, f"{listen}: {error.strerror}", advice)
    return Check(name, Status.OK, f"{listen} is free")


_LENT: Final = "systemd lends it to the running service alone: not looked at"


def check_keys(settings: config.Config) -> Check:
    """Who may call. Without keys, whoever reaches the address."""
    file = settings.auth.keys_file
    if file in settings.lent_by_systemd:
        return Check("keys", Status.SKIP, f"{file}: {_LENT}")
    try:
        required = Authenticator.of(settings).required
    except config.ConfigError as error:
        return Check("keys", Status.FAIL, str(error), "`facelane-server keys new NAME --file FILE`")
    if required:
        return Check("keys", Status.OK, f"{file}: {len(read_keys(Path(file)))} key(s)")
    if config.is_local(settings.server.listen):
        return Check("keys", Status.OK, "none needed: reachable from this machine alone")
    advice = "whoever reaches the address may enrol, delete and drain: set auth.mode and keys_file"
    return Check("keys", Status.WARN, "switched off", advice)


def check_tls(settings: config.Config) -> Check:
    """The certificate, its key, and its dates."""
    section = settings.tls
    if not section.cert_file:
        if config.is_local(settings.server.listen):
            return Check("tls", Status.SKIP, "not configured, not needed")
        advice = "pictures and keys cross the network unencrypted: set tls.cert_file and key_file"
        return Check("tls", Status.WARN, "not configured", advice)
    if {section.cert_file, section.key_file, section.client_ca_file} & set(
        settings.lent_by_systemd
    ):
        return Check("tls", Status.SKIP, f"{section.cert_file}: {_LENT}")
    try:
        Certificates.read(section)
    except config.ConfigError as error:
        return Check("tls", Status.FAIL, str(error))
    problem, ends = validity(section)
    if problem:
        return Check("tls", Status.FAIL, f"the certificate in {section.cert_file} {problem}")
    detail = section.cert_file + (f": valid until {ends:%Y-%m-%d}" if ends else "")
    if ends and ends - datetime.now(UTC) < timedelta(days=MIN_CERTIFICATE_DAYS):
        return Check("tls", Status.WARN, detail, "renew it: clients refuse it afterwards")
    if Path(section.key_file).stat().st_mode & 0o007:
        advice = f"chmod 600 {section.key_file}"
        return Check("tls", Status.WARN, f"{section.key_file} can be read by others", advice)
    return Check("tls", Status.OK, detail)


def check_gallery(settings: config.Config) -> Check:
    """The gallery's file is whole, and its disk has room. Blocks: run it in a thread."""
    try:
        chosen = settings.gallery.path
        path = Path(chosen).expanduser() if chosen else state_dir(settings) / "gallery.db"
        if not path.exists():
            folder = next(p for p in path.parents if p.exists())
            if not os.access(folder, os.W_OK):
                advice = "set gallery.path or state_dir to a folder that this user may write to"
                return Check("gallery", Status.FAIL, f"{folder} cannot be written to", advice)
            return _with_disk(Check("gallery", Status.OK, f"{path}: will be made"), folder)
        store = Store(path)
        try:
            wrong = store.check()
            subjects, templates = store.counts()
        finally:
            store.close()
    except FacelaneError as error:
        if "another server" in error.message:
            return Check("gallery", Status.SKIP, "in use by a server that runs")
        return Check("gallery", Status.FAIL, error.message)
    except config.ConfigError as error:
        return Check("gallery", Status.FAIL, str(error))
    except OSError as error:
        advice = "look as the server's own user (sudo -u), or set gallery.path"
        detail = f"{path} cannot be looked at: {error.strerror}"
        return Check("gallery", Status.FAIL, detail, advice)
    if wrong:
        return Check("gallery", Status.FAIL, f"{path}: {wrong}", "restore a backup of the file")
    check = Check(
        "gallery",
        Status.OK,
        f"{path}: {subjects} subjects, {templates} templates",
        facts={"subjects": subjects, "templates": templates},
    )
    return _with_disk(check, path.parent)


def _with_disk(check: Check, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free // limits.MIB
    if free >= MIN_DISK_MIB:
        return check
    detail = f"{check.detail}; {free} MiB free on its disk"
    return Check(check.name, Status.WARN, detail, "free some space: enrolments will fail")


def check_models(settings: config.Config) -> tuple[ServedModels | None, tuple[Check, ...]]:
    """The packages that the config names, their manifests and the hashes of their weights."""
    try:
        models = ServedModels.resolve(settings)
    except (FacelaneError, config.ConfigError) as error:
        advice = "`facelane-server models list` shows what there is"
        return None, (Check("models", Status.FAIL, str(error), advice),)
    checks = []
    sound = True
    for stage, package in models.packages.items():
        name = f"model {stage.value}"
        try:
            for part in package.manifest.weights:
                package.read_weights(part)
        except (FacelaneError, OSError) as error:
            sound = False
            checks.append(
                Check(name, Status.FAIL, str(error), "copy or import the package once more")
            )
            continue
        if package.random_weights:
            advice = "for benchmarks only: it recognises nobody"
            checks.append(Check(name, Status.WARN, f"{package.model_id}: random", advice))
        else:
            checks.append(Check(name, Status.OK, package.model_id))
    return models if sound else None, tuple(checks)


async def check_inference(settings: config.Config, models: ServedModels, stage: Stage) -> Check:
    """One worker of the stage, as the server starts it, and one real inference."""
    name = f"inference {stage.value}"
    chosen = settings.stages[stage.value]
    if chosen.isolation in ("external", "mps"):
        return Check(name, Status.SKIP, f"isolation is {chosen.isolation}: it needs the server")
    pool_settings = _replace(chosen, workers=1, spares=0, isolation="process")
    package = models.packages[stage]
    with tempfile.TemporaryDirectory(prefix="facelane-doctor-") as folder:
        launchers = Launchers(Path(folder))
        pool = Pool(
            stage,
            pool_settings,
            package,
            launchers.for_pool(stage.value, pool_settings),
            crops=models.crops if stage is Stage.DETECTOR else (),
        )
        try:
            return await _infer(name, pool, _request(stage, package))
        finally:
            await pool.stop(2.0)
            await launchers.close()


def _replace(pool: config.Pool, **changes: Any) -> config.Pool:
    import msgspec

    return msgspec.structs.replace(pool, **changes)


def _request(stage: Stage, package: Any) -> Request:
    """An even grey picture."""
    if stage is Stage.DETECTOR:
        picture = Picture(Encoding.BGR24, b"\x60" * (SIDE * SIDE * 3), SIDE, SIDE, SIDE * 3)
        return DetectRequest(picture, max_faces=1, max_pixels=limits.MAX_PIXELS)
    crops = tuple(b"\x60" * (spec.size * spec.size * 3) for spec in package.crops)
    return EmbedRequest(crops[0]) if stage is Stage.RECOGNIZER else LivenessRequest(crops)


async def _infer(name: str, pool: Pool, request: Request) -> Check:
    began = time.monotonic()
    await pool.start()
    if not await _ready(lambda: pool.available, lambda: pool.info().losses >= 2):
        worker = pool.info().workers[0]
        why = worker.last_loss or f"it is {worker.life.name.lower()}"
        advice = "the worker's own message is above; `facelane-server models verify` loads it alone"
        return Check(name, Status.FAIL, f"no worker was ready: {why}", advice)
    started = time.monotonic() - began
    deadline_ns = time.monotonic_ns() + int(INFERENCE_TIMEOUT_S * 1e9)
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    task: Task[Any] = Task(request, 1, 1, deadline_ns, future)
    pool.submit(task)
    try:
        async with asyncio.timeout(INFERENCE_TIMEOUT_S + 5):
            await future
    except FacelaneError as error:
        return Check(name, Status.FAIL, f"{error.reason.value}: {error.message}")
    except TimeoutError:
        return Check(name, Status.FAIL, f"no answer in {INFERENCE_TIMEOUT_S:.0f} s")
    took_ms = (task.finished_ns - task.dispatched_ns) / 1e6
    worker = pool.info().workers[0]
    memory = f", {worker.memory_mib} MiB" if worker.memory_mib else ""
    return Check(
        name,
        Status.OK,
        f"{worker.device}: ready in {started:.1f} s, answered in {took_ms:.1f} ms{memory}",
        facts={
            "device": worker.device,
            "start_s": round(started, 3),
            "answer_ms": round(took_ms, 3),
            "memory_mib": worker.memory_mib,
        },
    )


async def _ready(available: Callable[[], bool], hopeless: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + INFERENCE_TIMEOUT_S
    while time.monotonic() < deadline and not hopeless():
        if available():
            return True
        await asyncio.sleep(0.02)
    return available()
