"""What a benchmark leaves behind: one JSON file, one table, and what machine it ran on."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

SCHEMA: Final = 1
RESULTS: Final = Path(__file__).resolve().parent / "results"
WIDEST: Final = 13
"""Columns that still fit across a terminal."""
_PACKAGES: Final = (
    "facelane",
    "grpcio",
    "msgspec",
    "numpy",
    "nvidia-ml-py",
    "onnxruntime",
    "opencv-python-headless",
    "protobuf",
    "torch",
)


@dataclass(slots=True)
class Row:
    """One line of a result. What was not measured is ``None``, never a guess.

    ``rate_hz`` None = as fast as it goes. ``memory_mib``: NVML on a GPU, resident memory on
    a CPU. ``overhead_*``: ratio to the row that the benchmark names as its base. ``extra``:
    figures that only this benchmark has; they become keys of the row.
    """

    deployment: str
    scenario: str
    model: str = ""
    batch: int | None = None
    rate_hz: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    throughput_per_s: float | None = None
    memory_mib: float | None = None
    overhead_p50: float | None = None
    overhead_p99: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as it is stored; numbers to four significant digits, nan as null."""
        found = {name: _plain(getattr(self, name)) for name in COLUMNS}
        clash = found.keys() & self.extra.keys()
        assert not clash, f"extra figures must not be called {sorted(clash)}"
        return found | {name: _plain(value) for name, value in self.extra.items()}


COLUMNS: Final = (
    "deployment",
    "scenario",
    "model",
    "batch",
    "rate_hz",
    "p50_ms",
    "p99_ms",
    "throughput_per_s",
    "memory_mib",
    "overhead_p50",
    "overhead_p99",
)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.4g}")
    return value


@dataclass(slots=True)
class Report:
    """Rows of one benchmark, and sentences that say whether its aims were met."""

    bench: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    smoke: bool = False
    complete: bool = False
    """Nothing more comes; otherwise it was kept on the way."""
    part: str = ""
    """The part of the benchmark that this is; empty = the whole."""

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        """A sentence for the reader: what could not be measured, or what a figure means."""
        self.notes.append(text)

    def aim(self, what: str, value: float, bound: float, *, at_most: bool) -> bool:
        """Record a figure beside the bound it should keep. Gives whether it does."""
        kept = not math.isnan(value) and (value <= bound if at_most else value >= bound)
        sign = "<=" if at_most else ">="
        verdict = "kept" if kept else "MISSED"
        self.note(f"aim {verdict}: {what} {value:.4g} (should be {sign} {bound:g})")
        return kept

    def as_json(self, command: Sequence[str]) -> dict[str, Any]:
        now = dt.datetime.now(dt.UTC)
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "part": self.part,
            "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": machine(),
            "versions": versions(),
            "command": shlex.join(command),
            "smoke": self.smoke,
            "complete": self.complete,
            "rows": [row.as_json() for row in self.rows],
            "notes": self.notes,
        }

    def write(self, folder: Path, command: Sequence[str]) -> Path:
        """``<bench>-<machine>-<date>.json``, of a part ``<bench>-<part>-<machine>-<date>.json``;
        a second run of the day replaces the first."""
        folder.mkdir(parents=True, exist_ok=True)
        document = self.as_json(command)
        named = [self.bench, self.part, document["machine"]["name"], document["date"][:10]]
        path = folder / f"{'-'.join(filter(None, named))}.json"
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        return path

    def print(self, console: Console) -> None:
        rows = [row.as_json() for row in self.rows]
        shown, same = shown_columns(rows)
        title = f"{self.bench}{' (smoke run: figures mean nothing)' * self.smoke}"
        if len(shown) <= WIDEST:
            console.print(_across(title, shown, rows))
        else:
            # A table for every scenario, figures downwards.
            kinds: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                kinds.setdefault(row["scenario"], []).append(row)
            for group in kinds.values():
                used = [n for n in shown if any(row.get(n) not in (None, "") for row in group)]
                console.print(_downwards(title, used, group))
        if same:
            said = ", ".join(f"{name} {cell(value)}" for name, value in same.items())
            console.print(f"  in all rows: {said}", markup=False)
        for line in self.notes:
            console.print(f"  {line}", style="yellow" if "MISSED" in line else "", markup=False)


def _across(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Table:
    """A line for every row."""
    table = Table(title=title)
    for name in columns:
        text = name in ("deployment", "scenario", "model")
        table.add_column(name, justify="left" if text else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in columns))
    return table


def _downwards(title: str, figures: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A column for every row, for rows of many figures."""
    table = Table(title=title)
    table.add_column("")
    for row in rows:
        table.add_column(row["deployment"], justify="right")
    for name in figures:
        if name != "deployment":
            table.add_row(name, *(cell(row.get(name)) for row in rows))
    return table


def shown_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The columns of a table that say something, and those with one value in all rows."""
    shown = [
        name
        for name in _all_columns(rows)
        if any(row.get(name) not in (None, "", []) for row in rows)
        and not any(isinstance(row.get(name), list | dict) for row in rows)
    ]
    same = {
        name: rows[0][name]
        for name in shown
        if len(rows) > 1
        and name != "deployment"
        and all(row.get(name) == rows[0].get(name) for row in rows)
    }
    return [name for name in shown if name not in same], same


def _all_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(COLUMNS)
    for row in rows:
        found |= dict.fromkeys(row)
    return list(found)


def cell(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


# -- the machine ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Facts that figures depend on. ``name`` is short and fit for a file name."""
    gpus = _gpus()
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0))
    if gpus:
        name = f"{len(gpus)}x{gpus[0]['name']}" if len(gpus) > 1 else gpus[0]["name"]
    else:
        name = f"{cores}-core-{platform.machine()}"
    found: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    if gpus:
        found["gpus"] = gpus
    return found


@cache
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor()


@cache  # NVML takes its time, and a report is kept many times
def _gpus() -> list[dict[str, Any]]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory_mib": int(memory.total) // 2**20,
                    "driver": driver,
                }
            )
        return found
    finally:
        pynvml.nvmlShutdown()


def versions() -> dict[str, str]:
    """Of the interpreter and of the packages that matter for speed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> list[str]:
    """The command that can be typed again."""
    return ["python", "-m", "bench", *sys.argv[1:]]
