"""The monitor against a scripted NVML; with the real one where there is a card."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from tests.waiting import auntil

from facelane_server import config, monitor
from facelane_server.monitor import (
    DeviceReading,
    Monitor,
    Nvml,
    NvmlMissingError,
    ProcessReading,
    memory_message,
    memory_warned,
)

GIB = 2**30
QUICK = config.Monitor(interval_s=0.005)


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class Card:
    used: int = 10 * GIB
    total: int = 80 * GIB
    name: str | bytes = "Card"
    unsupported: frozenset[str] = frozenset()
    reasons: int = 0
    mode: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    mps: list[tuple[int, int | None]] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """(pid, time in µs, percent)."""


class Library:
    """The part of ``pynvml`` that is used, answering from ``cards``."""

    NVMLError = NVMLError
    NVML_ERROR_UNINITIALIZED = 1
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_COMPUTEMODE_DEFAULT = 0
    NVML_COMPUTEMODE_PROHIBITED = 2
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3

    def __init__(self, *cards: Card) -> None:
        self.cards = cards
        self.opened = 0
        self.closed = 0
        self.lost = False
        self.reads = 0
        self.hang = threading.Event()
        self.hang.set()

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        assert self.hang.wait(20)
        if self.lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        self.reads += 1
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return f"GPU-{self.cards.index(card)}"

    def nvmlDeviceGetName(self, card: Card) -> str | bytes:
        return card.name

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        return SimpleNamespace(used=card.used, total=card.total)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The calls that a device may not support."""
        answers: dict[str, Callable[..., Any]] = {
            "nvmlDeviceGetUtilizationRates": lambda _c: SimpleNamespace(gpu=50, memory=20),
            "nvmlDeviceGetPowerUsage": lambda _c: 250_000,
            "nvmlDeviceGetTemperature": lambda _c, _sensor: 61,
            "nvmlDeviceGetTotalEccErrors": lambda _c, _kind, _counter: 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda c: c.reasons,
            "nvmlDeviceGetComputeRunningProcesses": lambda c: _processes(c.processes),
            "nvmlDeviceGetMPSComputeRunningProcesses": lambda c: _processes(c.mps),
            "nvmlDeviceGetProcessUtilization": self._utilization,
            "nvmlDeviceGetComputeMode": lambda c: c.mode,
        }
        if name not in answers:
            raise AttributeError(name)

        def call(card: Card, *more: Any) -> Any:
            if name in card.unsupported:
                raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
            return answers[name](card, *more)

        return call

    def _utilization(self, card: Card, since_us: int) -> list[Any]:
        new = [s for s in card.samples if s[1] > since_us]
        if not new:
            raise NVMLError(self.NVML_ERROR_NOT_FOUND)
        return [SimpleNamespace(pid=p, timeStamp=t, smUtil=u) for p, t, u in new]


def _processes(pairs: list[tuple[int, int | None]]) -> list[Any]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in pairs]


# -- reading ----------------------------------------------------------------------------------


def test_a_device_is_read_whole() -> None:
    card = Card(
        name=b"H100",
        reasons=0x4 | 0x40 | 0x1 | 0x2,
        processes=[(7, 2 * GIB), (9, None)],
        mps=[(8, GIB)],
        samples=[(7, 5, 30), (7, 6, 40), (8, 6, 10)],
    )
    nvml = Nvml(Library(card))
    [reading] = nvml.read()
    assert reading == DeviceReading(
        device="0",
        name="H100",
        uuid="GPU-0",
        memory_used_bytes=10 * GIB,
        memory_total_bytes=80 * GIB,
        utilization=0.5,
        memory_utilization=0.2,
        power_watts=250.0,
        temperature_celsius=61.0,
        ecc_errors=0,
        throttle_reasons=("power cap", "hardware thermal"),
        processes=(
            ProcessReading(7, 2 * GIB, 0.4),
            ProcessReading(8, GIB, 0.1),
            ProcessReading(9, None, None),
        ),
    )
    # Samples are asked for since the last call only.
    card.samples.append((8, 9, 90))
    [reading] = nvml.read()
    assert [p.utilization for p in reading.processes] == [None, 0.9, None]
    assert nvml.driver_version() == "580.1"


def test_what_a_device_does_not_tell_is_none() -> None:
    optional = frozenset(
        {
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetTemperature",
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetMPSComputeRunningProcesses",
            "nvmlDeviceGetProcessUtilization",
        }
    )
    [reading] = Nvml(Library(Card(unsupported=optional))).read()
    assert reading == DeviceReading("0", "Card", "GPU-0", 10 * GIB, 80 * GIB)
    assert reading.memory_share == 0.125
    assert DeviceReading("0", "", "", 0, 0).memory_share == 0.0


def test_compute_modes() -> None:
    silent = Card(unsupported=frozenset({"nvmlDeviceGetComputeMode"}))
    library = Library(Card(), Card(mode=3), Card(mode=2), Card(mode=9), silent)
    modes = ("default", "exclusive", "prohibited", "unknown", "unknown")
    assert Nvml(library).compute_modes() == modes


# -- the warning --------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=40))
def test_the_warning_has_hysteresis(shares: list[float]) -> None:
    warned, changes = False, 0
    for share in shares:
        now = memory_warned(warned, share, warning=0.9, clear=0.85)
        if share > 0.9:
            assert now
        if share < 0.85:
            assert not now
        if 0.85 <= share <= 0.9:
            assert now == warned, "between the two nothing changes"
        changes += now != warned
        warned = now
    crossings = [s for s in shares if s > 0.9 or s < 0.85]
    assert changes <= len(list(itertools.groupby(crossings, key=lambda s: s > 0.9)))


def test_exactly_the_threshold_is_no_warning() -> None:
    assert not memory_warned(False, 0.9, warning=0.9, clear=0.85)
    assert memory_warned(True, 0.85, warning=0.9, clear=0.85)


def test_the_message_names_whose_memory_it_is() -> None:
    reading = DeviceReading(
        "0",
        "Card",
        "u",
        75 * GIB,
        80 * GIB,
        processes=(
            ProcessReading(7, 555 << 20),
            ProcessReading(8, 220 << 20),
            ProcessReading(99, 3 * GIB),
            ProcessReading(100, None),
        ),
    )
    message = memory_message(reading, {7: "recognizer#0", 8: "detector#0"}, warned=True)
    assert message.startswith("device 0 (Card): 94% of 80.0 GiB")
    assert "recognizer#0 555 MiB, detector#0 220 MiB, processes of others 3072 MiB" in message
    assert "memory_mib" in message
    assert "over" in memory_message(reading, {}, warned=False)


# -- the thread -----------------------------------------------------------------------------------


@dataclass
class Heard:
    memory: list[tuple[bool, str]] = field(default_factory=list)


def listening(library: Library, section: config.Monitor = QUICK) -> tuple[Monitor, Heard]:
    heard = Heard()
    made = Monitor(
        section,
        workers=lambda: {7: "recognizer#0"},
        on_memory=lambda _reading, warned, message: heard.memory.append((warned, message)),
        load=lambda: Nvml(library),
    )
    return made, heard


async def test_readings_and_the_warning_reach_the_loop() -> None:
    card = Card(used=10 * GIB, processes=[(7, GIB)])
    library = Library(card)
    watching, heard = listening(library)
    watching.start()
    try:
        await auntil(lambda: library.reads >= 3)
        assert heard.memory == []
        card.used = 79 * GIB
        await auntil(lambda: heard.memory)
        seen = library.reads
        await auntil(lambda: library.reads >= seen + 5)
        assert [warned for warned, _ in heard.memory] == [True], "told once, not at every reading"
        assert "recognizer#0" in heard.memory[0][1]
        card.used = 60 * GIB
        await auntil(lambda: len(heard.memory) == 2)
        assert heard.memory[1][0] is False
        assert watching.readings[0].memory_used_bytes == 60 * GIB
    finally:
        watching.close()
    assert library.closed == library.opened == 1
    count = library.reads
    await asyncio.sleep(0)
    assert library.reads == count
    watching.close()


async def test_without_nvml_it_says_so_once_and_ends() -> None:
    def missing() -> Nvml:
        raise NvmlMissingError("NVML Shared Library Not Found")

    with structlog.testing.capture_logs() as logged:
        watching = Monitor(QUICK, load=missing)
        watching.start()
        await auntil(lambda: logged)
        assert watching._thread is not None
        await auntil(lambda: not watching._thread.is_alive())
        watching.close()
    assert [(line["event"], line["log_level"]) for line in logged] == [
        ("no GPU monitoring; the rest works", "info")
    ]
    assert watching.readings == ()


async def test_a_lost_device_is_told_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "REOPEN_S", 0.01)
    library = Library(Card())
    watching, _heard = listening(library)
    with structlog.testing.capture_logs() as logged:
        watching.start()
        try:
            await auntil(lambda: watching.readings)
            library.lost = True
            await auntil(lambda: any(line["log_level"] == "warning" for line in logged))
            await auntil(lambda: watching.readings == ())
            library.lost = False
            await auntil(lambda: watching.readings)
        finally:
            watching.close()
    assert library.opened >= 2
    assert library.closed == library.opened


async def test_a_driver_that_is_exchanged_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "REOPEN_S", 0.01)
    library = Library(Card())
    refused = 0

    def load() -> Nvml:
        nonlocal refused
        if library.lost:
            refused += 1
            raise NvmlMissingError("Driver Not Loaded")
        return Nvml(library)

    watching = Monitor(QUICK, load=load)
    watching.start()
    try:
        await auntil(lambda: watching.readings)
        library.lost = True
        await auntil(lambda: refused >= 2)
        assert watching.readings == ()
        library.lost = False
        await auntil(lambda: watching.readings)
    finally:
        watching.close()


async def test_a_hung_driver_makes_readings_old_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitor, "STALL_S", 0.05)
    library = Library(Card())
    watching, _heard = listening(library)
    with structlog.testing.capture_logs() as logged:
        watching.start()
        try:
            await auntil(lambda: watching.readings)
            library.hang.clear()
            await auntil(lambda: watching.readings == ())
            assert [line for line in logged if "does not answer" in line["event"]]
            library.hang.set()
            await auntil(lambda: [line for line in logged if "answers again" in line["event"]])
            await auntil(lambda: watching.readings)
            library.hang.clear()
            loop = asyncio.get_running_loop()
            before = loop.time()
        finally:
            watching.close()
        assert loop.time() - before < 5
    library.hang.set()
    assert watching._thread is not None
    await auntil(lambda: not watching._thread.is_alive())


def test_the_real_library_without_a_driver() -> None:
    pytest.importorskip("pynvml")
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a card here")
    with pytest.raises(NvmlMissingError, match=r"\w"):
        Nvml.load()


@pytest.mark.gpu
def test_the_real_library_with_a_card() -> None:
    nvml = Nvml.load()
    try:
        for _ in range(2):
            readings = nvml.read()
    finally:
        nvml.close()
    assert readings
    for reading in readings:
        assert reading.name
        assert reading.uuid
        assert 0 < reading.memory_used_bytes <= reading.memory_total_bytes
        assert reading.temperature_celsius is None or 0 < reading.temperature_celsius < 120
