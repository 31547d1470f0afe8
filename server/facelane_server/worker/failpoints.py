"""Named faults that a worker commits on request: for fault tests, and for them alone.

They are switched on by ``options`` of a pool (``fail.<name> = "<value>"``); without any,
the worker holds no ``Failpoints`` at all and pays nothing. Jobs are counted from 1 in
each process; the warm-up is no job, the canary is one.

========================= ==========================================================
``fail.load``             loading raises an error (the package is broken)
``fail.hang_load``        loading never ends
``fail.slow_load_ms``     loading takes so much longer
``fail.crash_load``       the process kills itself (SIGSEGV) while loading
``fail.crash_warm_up``    ... while warming up
``fail.hang_on_job``      job N never ends
``fail.crash_on_job``     job N kills the process (SIGSEGV)
``fail.exit_on_job``      job N ends the process with exit code 0
``fail.slow_ms``          every job takes so much longer
``fail.oom_on_job``       job N (and every later one) runs out of device memory; on CUDA
                          by an allocation beyond it
``fail.oom_once_on_job``  job N alone runs out of device memory
``fail.sticky_on_job``    job N meets a sticky CUDA error; on CUDA by an illegal access
``fail.garbage_on_job``   job N is answered with bytes that are no message
``fail.truncated_on_job`` job N is answered with half of its packet
``fail.error_on_job``     job N raises an error that nobody foresaw
``fail.wrong_from_job``   job N and every later one is answered wrongly: what could be,
                          but is not what the model says
``fail.leak_mib``         every job leaks so many MiB, of the device's memory on CUDA
``fail.poison``           an item that contains ``POISON`` kills the process (SIGSEGV)
``fail.from_file``        a file of further ``name = "value"`` lines (TOML), read when a
                          process starts; absent or empty = none (faults that change)
``fail.only_file``        the faults above count only while this file is absent; the
                          first process to commit one creates it (faults that heal)
========================= ==========================================================
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from msgspec.structs import replace

from facelane_server.ipc.messages import DetectDone, EmbedDone, ItemDone, LivenessDone

PREFIX: Final = "fail."
POISON: Final = b"facelane-poison-marker"
"""Bytes that crash a worker with ``fail.poison``."""

NAMES: Final = frozenset({
    "load", "hang_load", "slow_load_ms", "crash_load", "crash_warm_up", "hang_on_job",
    "crash_on_job", "exit_on_job", "slow_ms", "oom_on_job", "oom_once_on_job",
    "sticky_on_job", "garbage_on_job", "truncated_on_job", "error_on_job", "leak_mib",
    "wrong_from_job", "poison", "only_file", "from_file",
})  # fmt: skip


class InjectedOutOfMemoryError(MemoryError):
    """Stands for the device's own out-of-memory error."""


class InjectedStickyError(Exception):
    """Stands for a CUDA error that poisons the context; its text reads like CUDA's."""


class InjectedError(Exception):
    """An error that the loop does not foresee."""


class Failpoints:
    """The active faults of one worker."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)
        self._job = 0
        self._wrong = False
        self._leaked: list[object] = []
        self.device = "cpu"
        self._marker = Path(values["only_file"]) if "only_file" in values else None

    def loading(self) -> None:
        """Before the model is loaded."""
        if "slow_load_ms" in self._values:
            time.sleep(float(self._values["slow_load_ms"]) / 1000)
        if "load" in self._values and self._fires():
            raise InjectedError("failpoint fail.load")
        if "hang_load" in self._values and self._fires():
            _hang()
        if "crash_load" in self._values and self._fires():
            _crash()

    def warming(self) -> None:
        """Before the model is warmed up."""
        if "crash_warm_up" in self._values and self._fires():
            _crash()

    def job(self, payloads: list[memoryview]) -> None:
        """At the start of a job, ``payloads`` being its items' bytes."""
        self._job += 1
        if "slow_ms" in self._values:
            time.sleep(float(self._values["slow_ms"]) / 1000)
        if "leak_mib" in self._values:
            self._leaked.append(self._allocate(int(float(self._values["leak_mib"]) * (1 << 20))))
        if "poison" in self._values and any(POISON in bytes(item) for item in payloads):
            _crash()
        if self._at("hang_on_job"):
            _hang()
        if self._at("crash_on_job"):
            _crash()
        if self._at("exit_on_job"):
            os._exit(0)
        if self._at("oom_once_on_job") or (
            "oom_on_job" in self._values and self._job >= int(self._values["oom_on_job"])
        ):
            self._run_out_of_memory()
        if self._at("sticky_on_job"):
            self._poison_context()
        if self._at("error_on_job"):
            raise InjectedError("failpoint fail.error_on_job")

    def _allocate(self, size: int) -> object:
        if self.device.startswith("cuda"):
            import torch

            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        block = bytearray(size)
        block[::4096] = b"\1" * len(block[::4096])
        return block

    def _run_out_of_memory(self) -> NoReturn:
        if self.device.startswith("cuda"):
            import torch

            torch.empty(1 << 46, dtype=torch.uint8, device=self.device)
        raise InjectedOutOfMemoryError("failpoint: out of memory")

    def _poison_context(self) -> NoReturn:
        if self.device.startswith("cuda"):
            import torch

            # A sparse matrix whose column lies far behind the matrix that it is multiplied
            # with: the kernel follows it to an address that nobody owns.
            column = torch.tensor([1 << 30], device=self.device)
            sparse = torch.sparse_csr_tensor(
                torch.tensor([0, 1], device=self.device),
                column,
                torch.ones(1, device=self.device),
                size=(1, 4),
                check_invariants=False,
            )
            _ = sparse @ torch.ones(4, 64, device=self.device)
            torch.cuda.synchronize(self.device)
            # Not on this version: an index that a kernel itself refuses.
            torch.zeros(4, device=self.device)[column].cpu()
        raise InjectedStickyError("CUDA error: an illegal memory access (failpoint)")

    def said(self, items: list[ItemDone]) -> list[ItemDone]:
        """The answers of the present job."""
        self._wrong = self._wrong or self._at("wrong_from_job")
        return [_wrong(item) for item in items] if self._wrong else items

    def answer(self, packet: bytes) -> bytes:
        """What to send instead of ``packet``, the answer to the present job."""
        if self._at("garbage_on_job"):
            return b"\xc1 this is no message"
        if self._at("truncated_on_job"):
            return packet[: max(1, len(packet) // 2)]
        return packet

    def _at(self, name: str) -> bool:
        return name in self._values and self._job == int(self._values[name]) and self._fires()

    def _fires(self) -> bool:
        if self._marker is None:
            return True
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def from_options(options: Mapping[str, str]) -> Failpoints | None:
    """The faults that ``options`` name, or None. Raises ValueError for an unknown one."""
    values = {key.removeprefix(PREFIX): v for key, v in options.items() if key.startswith(PREFIX)}
    if "from_file" in values:
        # The file wins, so that it can also re-aim what the options name.
        path = Path(values.pop("from_file"))
        listed = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        values |= {name: str(value) for name, value in listed.items()}
    if not values:
        return None
    unknown = sorted(set(values) - NAMES)
    if unknown:
        raise ValueError(f"unknown failpoint {PREFIX}{unknown[0]}")
    return Failpoints(values)


def _wrong(item: ItemDone) -> ItemDone:
    if isinstance(item, DetectDone):
        return replace(item, count=0)
    if isinstance(item, EmbedDone):
        return replace(item, ood=(item.ood + 0.5) % 1.0)
    if isinstance(item, LivenessDone):
        return replace(item, score=(item.score + 0.5) % 1.0)
    return item


def _crash() -> None:
    sys.stderr.flush()
    with contextlib.suppress(ValueError):  # a thread of a group cannot; it dies all the same
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def _hang() -> None:
    while True:
        time.sleep(3600)
