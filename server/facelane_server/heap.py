"""The garbage collector of a process that must not stand still.

A full collection walks over every object that the process has, and what was made by starting up
(modules, classes, descriptors) is most of them: some 40 ms in which nobody is answered. So once
a server is up, what exists then is set aside for good (``settle``); what is made later is
collected in small steps as ever, and as a whole only when the process has little to do, or when
it has had to wait too long for that (``tend``).

Frozen objects are still freed when their last reference goes; only a cycle that was there at the
start and is let go of later stays behind, which is bounded by what there was.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Final

YOUNG: Final = 10_000
"""Objects made, less those freed, between two collections of the youngest: of frames that come
and go they are a handful each, and a collection of so many takes a fraction of a millisecond."""
MIDDLE: Final = 10
FULL: Final = 1_000
"""Collections of the middle generation before a full one that nobody asked for: a safety valve."""
LOOK_S: Final = 1.0
IDLE_SHARE: Final = 0.25
"""Less of one core than this, over ``LOOK_S``, is little to do."""
PATIENCE_S: Final = 60.0
"""The longest wait for little to do."""


def settle() -> None:
    """Once, when everything that stays has been made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, FULL)


async def tend(*, look_s: float = LOOK_S, patience_s: float = PATIENCE_S) -> None:
    """Collects the whole of the heap at the right moments, until it is cancelled."""
    collected = time.monotonic()
    while True:
        began, used = time.monotonic(), time.thread_time()
        await asyncio.sleep(look_s)
        now = time.monotonic()
        if gc.get_count()[2] == 0 and gc.get_count()[1] == 0:
            collected = now  # nothing has grown old enough to be looked for
            continue
        busy = (time.thread_time() - used) / max(now - began, 1e-9)
        if busy < IDLE_SHARE or now - collected >= patience_s:
            gc.collect()
            collected = time.monotonic()
