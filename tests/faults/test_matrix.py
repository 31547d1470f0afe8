"""Every fault under every traffic: the invariants hold.

``make test`` lets each fault meet all kinds of traffic at once; ``make test-all`` each kind
alone as well, with FACELANE_FAULT_SEEDS=N seeds (three).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
from tests.faults import cells
from tests.faults.faults import FAULTS

SEEDS = int(os.environ.get("FACELANE_FAULT_SEEDS", "3"))
MATRIX = [
    pytest.param(
        fault,
        load,
        seed,
        marks=() if (load, seed) == ("mixed", 0) else pytest.mark.slow(last=True),
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
