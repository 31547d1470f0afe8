"""Every fault under every traffic: the invariants hold.

``make test`` lets one fault of each kind meet all traffics at once: what an end, a hang, an error,
a crowd, a lid and a disk do to streams. What each of the faults does to a pool is shown by
``tests/process/test_pool_life.py``; all of them under all traffics, each alone as well, with
FACELANE_FAULT_SEEDS=N seeds (three), by the slow tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
from tests.faults import cells
from tests.faults.faults import FAULTS

SEEDS = int(os.environ.get("FACELANE_FAULT_SEEDS", "3"))
FIRST = frozenset(
    {
        "crash_in_job",
        "frozen",
        "full_disk",
        "hang_in_job",
        "out_of_memory",
        "vanishing_clients",
    }
)


def marks(fault: str, load: str, seed: int) -> tuple[pytest.MarkDecorator, ...]:
    if (load, seed) != ("mixed", 0):
        return (pytest.mark.slow(last=True),)
    return () if fault in FIRST else (pytest.mark.slow,)


MATRIX = [
    pytest.param(
        fault,
        load,
        seed,
        marks=marks(fault, load, seed),
        id=f"{fault}-{load}-{seed}",
    )
    for seed in range(SEEDS)
    for load in cells.TRAFFIC
    for fault in FAULTS
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cells.Site]:
    with cells.site(tmp_path_factory.mktemp("faults")) as made:
        yield made
        grown = psutil.Process(made.server.process.pid).memory_info().rss - made.memory
        assert grown < cells.MEMORY_GROWTH


@pytest.mark.parametrize(("fault", "load", "seed"), MATRIX)
async def test_invariants_hold(site: cells.Site, fault: str, load: str, seed: int) -> None:
    position = len(site.server.text())
    broken = await cells.run(site, FAULTS[fault], load, seed)
    written = site.server.text()[position:]
    # The errors that a worker was told to raise are in the log with their tracebacks.
    broken += [
        f"an error that nobody foresaw is in the log: {line[-3000:]}"
        for line in written.splitlines()
        if "Traceback" in line and "failpoint" not in line
    ]
    assert not broken, "\n".join([*broken, "", written[-6000:]])
