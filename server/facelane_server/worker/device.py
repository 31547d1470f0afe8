"""The device that a worker computes on: its memory budget, its name.

Importing this needs no torch: a worker of null models never loads it. Functions that
touch CUDA import it themselves, and NVML only if there is one.

A CUDA context lives in a process, so the budgets of the models that are threads of one
process add up.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import DeviceOptions
from facelane_server.worker.journal import log_event

MIB: Final = 1024 * 1024
CONTEXT_MIB_UNMEASURED: Final = 640
"""What a CUDA context with cuDNN is taken to cost where NVML cannot tell."""
METER_EVERY_S: Final = 0.5
_RESIDENT_EVERY_S: Final = 0.1


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def device_index(device: str) -> int:
    """N of ``cuda:N``; raises FacelaneError(CONFIG_INVALID) on anything else."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise FacelaneError(
            Reason.CONFIG_INVALID, f"device {device} is not known; write cpu or cuda:N"
        )
    return int(index)


def open_device(options: DeviceOptions) -> None:
    """Once for each model, before its weights: the CPU's threads, or the CUDA context and
    this model's share of its memory cap.

    Raises FacelaneError(CONFIG_INVALID) when there is no such device, or the budget
    does not even hold the context.
    """
    import torch

    if not is_cuda(options.device):
        if options.device != "cpu":
            device_index(options.device)
        torch.set_num_threads(options.threads)
        return
    index = device_index(options.device)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise FacelaneError(
            Reason.CONFIG_INVALID,
            f"device {options.device} does not exist here ({torch.cuda.device_count()} CUDA "
            "devices); choose another, or cpu",
        )
    torch.cuda.set_device(index)
    # Full precision means full precision: it is the reference that half is checked against.
    torch.backends.cudnn.allow_tf32 = False
    torch.zeros(1, device=f"cuda:{index}")
    _budgets.add(index, options.memory_mib)
    _budgets.enforce(index)


def settle_memory(options: DeviceOptions) -> None:
    """After warm-up: the cap again, with the context's cost as it is now.

    Raises FacelaneError(OUT_OF_MEMORY) when the process already holds more than its budget.
    """
    if is_cuda(options.device):
        _budgets.enforce(device_index(options.device), settled=True)


def memory_mib(device: str) -> int:
    """Device memory of this process in MiB, its context included; 0 on a CPU."""
    if not is_cuda(device):
        return 0
    import torch

    index = device_index(device)
    measured = _nvml_process_mib(index)
    if measured is not None:
        return measured
    return CONTEXT_MIB_UNMEASURED + torch.cuda.memory_reserved(index) // MIB


class Meter:
    """``memory_mib`` of this process, measured now and then by a thread of its own: NVML can
    take milliseconds, and nothing of that may fall into an inference. The thread ends with
    the process."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._mib = memory_mib(device)
        threading.Thread(target=self._measure_on, name="memory", daemon=True).start()

    def read(self) -> int:
        """MiB, at most ``METER_EVERY_S`` old."""
        return self._mib

    def _measure_on(self) -> None:
        pause = threading.Event()
        while not pause.wait(METER_EVERY_S):
            try:
                self._mib = memory_mib(self._device)
            except RuntimeError:  # the context is lost; the inference loop finds out
                return


def memory_meter(device: str) -> Callable[[], int]:
    """MiB that this process holds: on the device for CUDA, resident on a CPU. Measured now
    and then, because every answer carries it."""
    if is_cuda(device):
        return Meter(device).read
    state = [0.0, 0]

    def read() -> int:
        now = time.monotonic()
        if now >= state[0]:
            state[0], state[1] = now + _RESIDENT_EVERY_S, _resident_mib()
        return int(state[1])

    return read


def _resident_mib() -> int:
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB


def device_name(device: str) -> str:
    """For people: ``cuda:0 NVIDIA H100 80GB HBM3``, or ``cpu``."""
    if not is_cuda(device):
        return device
    import torch

    return f"{device} {torch.cuda.get_device_name(device_index(device))}"


def free_cache() -> None:
    """Give the allocator's unused blocks back to the device, after an out-of-memory."""
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing where CUDA was never used


class _Budgets:
    """Memory budgets of this process, by device. Zero of any model = no cap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: dict[int, list[int]] = {}

    def add(self, index: int, memory_mib: int) -> None:
        with self._lock:
            self._shares.setdefault(index, []).append(memory_mib)

    def enforce(self, index: int, *, settled: bool = False) -> None:
        with self._lock:
            shares = self._shares.get(index, [])
            if not shares or 0 in shares:
                return
            budget = sum(shares)
        import torch

        reserved = torch.cuda.memory_reserved(index) // MIB
        measured = _nvml_process_mib(index)
        context = CONTEXT_MIB_UNMEASURED if measured is None else max(measured - reserved, 0)
        total = torch.cuda.get_device_properties(index).total_memory // MIB
        left = budget - context
        if left <= 0 or (settled and reserved > left):
            raise FacelaneError(
                Reason.OUT_OF_MEMORY if settled else Reason.CONFIG_INVALID,
                f"memory_mib is {budget}, but the CUDA context alone takes {context} MiB and the "
                f"model {reserved} MiB; raise the pool's memory_mib",
                metadata={"memory_mib": str(budget), "context_mib": str(context)},
            )
        torch.cuda.set_per_process_memory_fraction(min(left / total, 1.0), index)
        log_event(
            "device memory capped",
            budget_mib=budget,
            context_mib=context,
            reserved_mib=reserved,
            measured=measured is not None,
        )


_budgets = _Budgets()


_nvml_lock = threading.Lock()
_nvml_handles: dict[int, Any] = {}


def _nvml_process_mib(index: int) -> int | None:
    """Memory of this process on a device by NVML; None where NVML cannot tell (no
    driver library, or a container whose process ids the driver does not know)."""
    try:
        import pynvml

        handle = _nvml_handle(index)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        # Clients of an MPS server are listed apart.
        processes = [*processes, *pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)]
    except Exception:  # NVML is a luxury here, and raises types of its own
        return None
    for process in processes:
        if process.pid == os.getpid() and process.usedGpuMemory:
            return int(process.usedGpuMemory // MIB)
    return None


def _nvml_handle(index: int) -> Any:
    """NVML is opened once for the life of the process: opening it takes long."""
    with _nvml_lock:
        if index not in _nvml_handles:
            import pynvml
            import torch

            if not _nvml_handles:
                pynvml.nvmlInit()
            # By UUID: torch's numbers obey CUDA_VISIBLE_DEVICES, NVML's do not.
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            _nvml_handles[index] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return _nvml_handles[index]
