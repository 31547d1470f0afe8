"""What the GPUs are doing, by NVML: memory, load, power, heat, faults, and whose they are.

NVML calls block, and hang when a driver does. So they are made by one daemon thread, which
nothing ever waits for: a thread that does not come back makes the readings old, which is
told once, and the server goes on. Without a driver, or without ``nvidia-ml-py``, the
monitor says so once and stays silent.

The conflict warning: a card whose memory is in use beyond ``monitor.memory_warning`` is
about to make models fail that share it. The warning holds until the use is below
``monitor.memory_warning_clear``, so that it does not flicker.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from facelane_server import config, limits

T = TypeVar("T")

log = structlog.get_logger(__name__)

STALL_S: Final = 10.0
"""NVML answers within milliseconds; after this time it hangs."""
REOPEN_S: Final = 30.0
"""After an error the library is closed and opened again, so that a reset card is found."""

THROTTLE_REASONS: Final[Mapping[int, str]] = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x020: "software thermal",
    0x040: "hardware thermal",
    0x080: "power brake",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of nvmlClocksEventReasons that mean less speed than asked for; idle clocks, user
settings and synchronised boost are none."""


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """``memory_bytes`` and ``utilization`` ([0, 1] of the multiprocessors) are ``None`` where
    the driver does not tell, for instance across PID namespaces."""

    pid: int
    memory_bytes: int | None
    utilization: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One GPU. ``device`` is its number as NVML counts. Shares are in [0, 1]; ``None`` = the
    device does not tell. ``ecc_errors``: uncorrected, since the driver was loaded."""

    device: str
    name: str
    uuid: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None = None
    memory_utilization: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    ecc_errors: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    processes: tuple[ProcessReading, ...] = ()

    @property
    def memory_share(self) -> float:
        total = self.memory_total_bytes
        return self.memory_used_bytes / total if total > 0 else 0.0


def memory_warned(warned: bool, share: float, *, warning: float, clear: float) -> bool:
    """Whether the conflict warning holds, given whether it held before. Pure.

    It begins above ``warning`` and ends below ``clear``; clear <= warning.
    """
    return share >= clear if warned else share > warning


def memory_message(reading: DeviceReading, workers: Mapping[int, str], *, warned: bool) -> str:
    """One line for the operator. ``workers``: worker ids by pid."""
    where = f"device {reading.device} ({reading.name})"
    use = (
        f"{reading.memory_share:.0%} of {reading.memory_total_bytes / 2**30:.1f} GiB memory in use"
    )
    if not warned:
        return f"{where}: {use}; the warning is over"
    shares = []
    foreign = 0
    for process in sorted(reading.processes, key=lambda p: -(p.memory_bytes or 0)):
        memory = process.memory_bytes or 0
        if process.pid in workers:
            shares.append(f"{workers[process.pid]} {memory / 2**20:.0f} MiB")
        else:
            foreign += memory
    if foreign:
        shares.append(f"processes of others {foreign / 2**20:.0f} MiB")
    held = f" ({', '.join(shares)})" if shares else ""
    return (
        f"{where}: {use}{held}; models that share it may run out of memory: lower memory_mib or "
        "batch_max, or move a pool to another device"
    )


# -- the library ------------------------------------------------------------------------------


class Nvml:
    """NVML, opened. Not for several threads."""

    def __init__(self, library: Any) -> None:
        """``library``: the module ``pynvml``. Raises its ``NVMLError``."""
        self._library = library
        library.nvmlInit()
        self._seen_us: dict[str, int] = {}

    @classmethod
    def load(cls) -> Nvml:
        """Raises ``NvmlMissingError`` when there is no driver or no nvidia-ml-py."""
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            raise NvmlMissingError(
                "nvidia-ml-py is not installed; pip install 'facelane[nvidia]'"
            ) from None
        try:
            return cls(library)
        except library.NVMLError as error:
            raise NvmlMissingError(str(error)) from None

    def close(self) -> None:
        with contextlib.suppress(self._library.NVMLError):
            self._library.nvmlShutdown()

    @property
    def errors(self) -> type[Exception]:
        """What ``read`` raises when a device is lost."""
        error: type[Exception] = self._library.NVMLError
        return error

    def driver_version(self) -> str:
        return _text(self._library.nvmlSystemGetDriverVersion())

    def compute_modes(self) -> tuple[str, ...]:
        """Of each device: default, exclusive (one process), prohibited, or unknown."""
        nvml = self._library
        names = {
            nvml.NVML_COMPUTEMODE_DEFAULT: "default",
            nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive",
            nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
        }
        modes = []
        for index in range(min(nvml.nvmlDeviceGetCount(), limits.MAX_DEVICES)):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            mode = self._optional(lambda handle=handle: nvml.nvmlDeviceGetComputeMode(handle))  # type: ignore[misc]
            modes.append("unknown" if mode is None else names.get(mode, "unknown"))
        return tuple(modes)

    def read(self) -> tuple[DeviceReading, ...]:
        """All devices; a few milliseconds each."""
        count = min(self._library.nvmlDeviceGetCount(), limits.MAX_DEVICES)
        return tuple(self._read(index) for index in range(count))

    def _read(self, index: int) -> DeviceReading:
        nvml = self._library
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        load = self._optional(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = self._optional(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        reasons = self._optional(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        return DeviceReading(
            device=str(index),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=uuid,
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            utilization=None if load is None else load.gpu / 100,
            memory_utilization=None if load is None else load.memory / 100,
            power_watts=None if power is None else power / 1000,
            temperature_celsius=self._optional(
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            ),
            ecc_errors=self._optional(
                lambda: int(
                    nvml.nvmlDeviceGetTotalEccErrors(
                        handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                    )
                )
            ),
            throttle_reasons=tuple(
                name for bit, name in THROTTLE_REASONS.items() if (reasons or 0) & bit
            ),
            processes=self._processes(handle, uuid),
        )

    def _processes(self, handle: Any, uuid: str) -> tuple[ProcessReading, ...]:
        nvml = self._library
        memory: dict[int, int | None] = {}
        # A process under MPS is only in the second list.
        for listing in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        ):
            for process in self._optional(lambda call=listing: call(handle)) or ():  # type: ignore[misc]
                memory[process.pid] = process.usedGpuMemory
        load = self._load(handle, uuid)
        return tuple(
            ProcessReading(pid, memory.get(pid), load.get(pid))
            for pid in sorted(memory)[: limits.MAX_DEVICE_PROCESSES]
        )

    def _load(self, handle: Any, uuid: str) -> dict[int, float]:
        """The share of the multiprocessors by pid, since the last call."""
        since = self._seen_us.get(uuid, 0)
        samples = self._optional(
            lambda: self._library.nvmlDeviceGetProcessUtilization(handle, since)
        )
        load: dict[int, float] = {}
        for sample in samples or ():
            self._seen_us[uuid] = max(self._seen_us.get(uuid, 0), sample.timeStamp)
            load[sample.pid] = max(load.get(sample.pid, 0.0), sample.smUtil / 100)
        return load

    def _optional(self, call: Callable[[], T]) -> T | None:
        """``None`` for what this device, or this driver, does not tell."""
        nvml = self._library
        try:
            return call()
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_UNINITIALIZED):
                raise
            return None


class NvmlMissingError(Exception):
    """There is nothing to monitor; the message says why."""


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


# -- the monitor --------------------------------------------------------------------------------


class Monitor:
    """Reads all devices every ``interval_s`` and tells of the conflict warning.

    ``on_memory`` is called on the event loop: a device's warning began or ended, with a line for
    the operator.
    """

    def __init__(
        self,
        section: config.Monitor,
        *,
        workers: Callable[[], Mapping[int, str]] = dict,
        on_memory: Callable[[DeviceReading, bool, str], None] | None = None,
        load: Callable[[], Nvml] = Nvml.load,
    ) -> None:
        """``workers``: ids of the worker processes by pid, asked for on the event loop."""
        self._section = section
        self._workers = workers
        self._on_memory = on_memory
        self._load = load
        self._readings: tuple[DeviceReading, ...] = ()
        self._warned: set[str] = set()
        self._last = 0.0
        self._stalled = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def readings(self) -> tuple[DeviceReading, ...]:
        """The newest; empty without NVML, and while it hangs or has failed."""
        return self._readings

    def start(self) -> None:
        """Begins to read; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._last = time.monotonic()
        # A daemon: a hung driver must not keep the process from ending.
        self._thread = threading.Thread(target=self._read_on, name="monitor", daemon=True)
        self._thread.start()
        self._arm()

    def close(self) -> None:
        """Stops; idempotent. Waits for the thread no longer than a reading takes."""
        self._loop = None
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join(timeout=0.5)

    # in the thread

    def _read_on(self) -> None:
        was_there = False
        while not self._stop.is_set():
            try:
                nvml = self._load()
            except NvmlMissingError as error:
                if not was_there:
                    self._tell(self._missing, str(error))
                    return
                # A card that is being reset, or a driver that is being exchanged.
                self._tell(self._failed, str(error))
                self._stop.wait(REOPEN_S)
                continue
            was_there = True
            try:
                while not self._stop.is_set():
                    self._tell(self._take, nvml.read())
                    self._stop.wait(self._section.interval_s)
            except nvml.errors as error:
                self._tell(self._failed, str(error))
            finally:
                nvml.close()
            self._stop.wait(REOPEN_S)

    def _tell(self, call: Callable[[T], None], value: T) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(call, value)

    # on the loop

    def _arm(self) -> None:
        if self._loop is not None:
            self._timer = self._loop.call_later(STALL_S / 4, self._check)

    def _check(self) -> None:
        allowed = STALL_S + self._section.interval_s
        if not self._stalled and time.monotonic() - self._last > allowed:
            self._stalled = True
            self._readings = ()
            log.warning("NVML does not answer; GPU readings are missing", after_s=allowed)
        self._arm()

    def _missing(self, why: str) -> None:
        log.info("no GPU monitoring; the rest works", cause=why)
        if self._timer is not None:
            self._timer.cancel()
        self._loop = None

    def _failed(self, why: str) -> None:
        # The thread answers, so this is no stall; it reads again after REOPEN_S.
        self._last = time.monotonic() + REOPEN_S
        self._readings = ()
        log.warning("NVML failed; opening it again", cause=why, retry_s=REOPEN_S)

    def _take(self, readings: tuple[DeviceReading, ...]) -> None:
        if self._loop is None:
            return  # closed while this was on its way
        self._last = time.monotonic()
        if self._stalled:
            self._stalled = False
            log.info("NVML answers again")
        self._readings = readings
        for reading in readings:
            self._judge(reading)

    def _judge(self, reading: DeviceReading) -> None:
        before = reading.uuid in self._warned
        now = memory_warned(
            before,
            reading.memory_share,
            warning=self._section.memory_warning,
            clear=self._section.memory_warning_clear,
        )
        if now == before:
            return
        if now:
            self._warned.add(reading.uuid)
            log.warning(
                "GPU memory conflict", device=reading.device, share=round(reading.memory_share, 3)
            )
        else:
            self._warned.discard(reading.uuid)
            log.info(
                "GPU memory conflict over",
                device=reading.device,
                share=round(reading.memory_share, 3),
            )
        if self._on_memory is not None:
            self._on_memory(reading, now, memory_message(reading, self._workers(), warned=now))
