"""Frames by the hundred thousand under random faults, and an outcome for each of them.

    python -m tests.faults.soak --frames 100000 --seed 1

Prints what happened as JSON and ends with 1 if an invariant broke. Takes about five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from tests.faults import cells, traffic
from tests.faults.faults import FAULTS
from tests.waiting import auntil

STREAMS = 8
FRAMES_A_STREAM = 2_000
STREAM_S = 300.0


async def soak(site: cells.Site, frames: int, seed: int) -> dict[str, object]:
    """Runs until so many frames were sent; the account."""
    rng = random.Random(seed)
    stop = asyncio.Event()
    total = Counter[str]()
    drops, errors, committed = Counter[str](), Counter[str](), Counter[str]()
    broken: list[str] = []
    longest = 0.0

    def close(books: traffic.Books) -> None:
        nonlocal longest
        total["streams"] += 1
        total["sent"] += books.sent
        total["results"] += books.results
        total["without_outcome"] += books.sent - books.outcomes
        drops.update(books.drops)
        errors.update(books.errors)
        longest = max(longest, books.longest_gap_s)
        broken.extend(f"{books.name}: {what}" for what in books.broken)
        if books.ended:
            broken.append(f"{books.name}: ended by {books.ended}")

    async def camera(number: int) -> None:
        """Streams one after the other, some of each kind."""
        while not stop.is_set():
            pattern = traffic.Pattern(
                policy=rng.choice((1, 2)),
                pace_s=rng.choice((0.005, 0.01)),
                tracking=rng.random() < 0.8,
                jumps=rng.random() < 0.3,
                limit=rng.randrange(1, FRAMES_A_STREAM),
            )
            async with cells.connection(site.server) as channel:
                books = await traffic.stream(
                    channel, pattern, stop, rng.randrange(10**9), f"#{number}", STREAM_S
                )
            close(books)
            if total["sent"] >= frames:
                stop.set()

    async def pictures(cell: cells.Cell) -> None:
        while not cell.stop.is_set():
            await cell.picture()
            await asyncio.sleep(0.05)  # the pace

    async def trouble() -> None:
        while not stop.is_set():
            fault = FAULTS[rng.choice(sorted(FAULTS))]
            stage = rng.choice(fault.stages) if fault.stages else ""
            async with cells.connection(site.server) as channel:
                cell = cells.Cell(site.server, channel, stage, rng)
                # A fault may wait for work, and the last stream may end before it got any.
                work = asyncio.create_task(pictures(cell))
                try:
                    await fault.act(cell)
                finally:
                    cell.stop.set()
                    await work
                await auntil(cell.whole, cells.RECOVERY_S, f"recovery from {fault.name}")
                for books in cell.extra:
                    close(books)
                broken.extend(cell.broken)
            committed[fault.name] += 1
            await asyncio.sleep(rng.uniform(0.0, 0.5))

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(camera(number))
        group.create_task(trouble())
    took = time.monotonic() - began
    after = cells.Footprint.of(site.server)
    if not after.within(site.footprint):
        broken.append(f"left behind: {site.footprint} became {after}")
    return {
        "seed": seed,
        "seconds": round(took, 1),
        "frames_a_second": round(total["sent"] / took, 1),
        **total,
        "drops": dict(drops),
        "errors": dict(errors),
        "longest_gap_s": round(longest, 2),
        "faults": sum(committed.values()),
        "faults_by_name": dict(sorted(committed.items())),
        "memory_growth_mib": (
            psutil.Process(site.server.process.pid).memory_info().rss - site.memory
        )
        >> 20,
        "broken": broken,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pools", choices=cells.POOLS, default="plain", help="how hosted")
    chosen = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="facelane-soak-") as folder,
        cells.site(Path(folder), chosen.pools) as site,
    ):
        account = asyncio.run(soak(site, chosen.frames, chosen.seed))
    account["pools"] = chosen.pools
    print(json.dumps(account, indent=2))
    return 1 if account["broken"] or account["without_outcome"] else 0


if __name__ == "__main__":
    sys.exit(main())
