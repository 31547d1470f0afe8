"""Search in large galleries, as a recogniser's worker runs it: how near to the memory's bandwidth,
and is it exact?

A search has to read the templates once. The floor is the time in which this machine reads as many
bytes as the templates take at rest (float16), measured in the same run by one thread, as a worker
has it; beside it stands the floor of what is really read. Recall is against a search of everything
in float32: the same subjects in the same order, and the same cosines.

Templates are random unit vectors, two a subject, of which a tenth are near others; probes are
templates with noise. Time from a change to its being found: an added template, as it comes to a
worker behind a snapshot.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import Summary, percentile
from facelane_server.ipc.gallery_log import Added, GalleryLog
from facelane_server.ipc.messages import GallerySnapshot
from facelane_server.worker.search import Searcher

SIZES = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000}
BATCHES = (1, 32)
DIM = 512
TOP_K = 5
FLOOR_CPU, FLOOR_CUDA = 1.3, 1.5
MATCHED_MS = 250.0
_BLOCK = 50_000


async def run(settings: Settings) -> Report:
    report = Report("gallery", smoke=settings.smoke)
    device = settings.device
    on_card = device.startswith("cuda")
    bandwidth = _device_bandwidth(device) if on_card else _bandwidth(settings)
    what = "the card" if on_card else "one thread"
    report.note(f"{what} reads {bandwidth / 1e9:.1f} GB/s of memory")
    for name, rows in SIZES.items():
        if settings.wants(name):
            await _size(settings, report, name, settings.sized(rows, rows // 50), bandwidth)
    return report


def _best(work: Callable[[], object], times: int) -> float:
    """Seconds of the quickest of so many."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _bandwidth(settings: Settings) -> float:
    """Bytes a second that one thread reads; of a gigabyte, so that no cache helps."""
    data = np.ones(settings.sized(2**27, 2**22), np.int64)
    return data.nbytes / _best(data.max, 5)


def _device_bandwidth(device: str) -> float:
    import torch

    data = torch.ones(2**29, dtype=torch.int32, device=device)

    def read() -> None:
        data.max()
        torch.cuda.synchronize(device)

    read()
    return float(data.nbytes) / _best(read, 10)


def _templates(rows: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    rng = np.random.default_rng(7)
    matrix = np.empty((rows, DIM), np.float16)
    for first in range(0, rows, _BLOCK):
        block = rng.standard_normal((min(_BLOCK, rows - first), DIM), np.float32)
        near = len(block) // 10
        block[:near] = block[near : 2 * near] + 0.3 * block[:near]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        matrix[first : first + len(block)] = block
    return matrix


def _probes(matrix: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(8)
    chosen = matrix[rng.integers(0, len(matrix), count)].astype(np.float32)
    chosen += rng.standard_normal(chosen.shape, np.float32) * (1.2 / DIM**0.5)
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    return chosen


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _size(settings: Settings, report: Report, name: str, rows: int, bandwidth: float) -> None:
    settings.say(f"{name} templates")
    matrix = _templates(rows)
    subjects = (np.arange(rows, dtype=np.int32) // 2).astype(np.int32)
    fd = os.memfd_create("bench-gallery")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(matrix.data)
        file.write(subjects.data)
    begin, before = time.perf_counter(), _resident()
    searcher = Searcher(GallerySnapshot(1, rows, DIM, (("default", 0, rows),)), fd, settings.device)
    loaded = time.perf_counter() - begin
    on_card = settings.device.startswith("cuda")
    held = _resident() - before
    probes = _probes(matrix, max(BATCHES))
    floor = matrix.nbytes / bandwidth
    for batch in BATCHES:
        given = probes[:batch]
        searcher.search(given, "default", TOP_K)
        taken = []
        for _ in range(settings.sized(30 if rows <= 100_000 else 12, 2)):
            begin = time.perf_counter()
            searcher.search(given, "default", TOP_K)
            taken.append(time.perf_counter() - begin)
        summary = Summary.of(taken, sum(taken))
        best = percentile(taken, 0)
        report.add(
            Row(
                deployment="CUDA" if on_card else "CPU, one thread",
                scenario=f"{name} templates x {DIM}",
                batch=batch,
                p50_ms=summary.p50_ms,
                p99_ms=summary.p99_ms,
                throughput_per_s=batch / (summary.p50_ms / 1e3),
                memory_mib=held / 2**20,
                extra={
                    "best_ms": best * 1e3,
                    "floor_ms": floor * 1e3,
                    "over_floor": best / floor,
                    "load_s": loaded,
                },
            )
        )
        if batch == 1 and name == "1M":
            bound = FLOOR_CUDA if on_card else FLOOR_CPU
            report.aim(f"{name}, batch 1, time over the floor:", best / floor, bound, at_most=True)
    recall, off = _recall(matrix, probes, searcher)
    report.aim(f"{name}: recall against float32:", recall, 1.0, at_most=False)
    report.aim(f"{name}: greatest difference of a cosine:", off, 1e-5, at_most=True)
    report.aim(
        f"{name}: ms until an added template is found, in the worker:",
        _added(searcher, probes[0], rows) * 1e3,
        MATCHED_MS,
        at_most=True,
    )


def _recall(
    matrix: np.ndarray[Any, Any], probes: np.ndarray[Any, Any], searcher: Searcher
) -> tuple[float, float]:
    """The share of the best subjects that were found, in their order, and by how much a cosine
    was off."""
    best = np.empty((len(probes), len(matrix) // 2), np.float32)
    for first in range(0, len(matrix), _BLOCK):
        scores = probes @ matrix[first : first + _BLOCK].astype(np.float32).T
        best[:, first // 2 : (first + scores.shape[1]) // 2] = scores.reshape(
            len(probes), -1, 2
        ).max(axis=2)
    found = [hits for probe in probes for hits in searcher.search(probe[None], "default", TOP_K)]
    found += searcher.search(probes, "default", TOP_K)
    right, off = 0, 0.0
    for hits, row in zip(found, [*best, *best], strict=True):
        ideal = np.sort(row)[::-1][:TOP_K]
        for (subject, cosine), value in zip(hits, ideal, strict=True):
            # Two subjects that are equal in float32 may stand in either order.
            right += abs(float(row[subject]) - float(value)) <= 1e-6
            off = max(off, abs(cosine - float(row[subject])))
    return right / (len(found) * TOP_K), off


def _added(searcher: Searcher, probe: np.ndarray[Any, Any], rows: int) -> float:
    """Seconds from a change's arrival until a search has found what was added."""
    log = GalleryLog()
    log.append([Added("default", rows, bytearray(probe.astype(np.float16)))])
    begin = time.perf_counter()
    searcher.extend(2, log.reader, log.size)
    (hits,) = searcher.search(probe[None], "default", TOP_K)
    taken = time.perf_counter() - begin
    log.close()
    if hits[0][0] != rows:
        print("the added template was not found", file=sys.stderr)
        return float("nan")
    return taken
