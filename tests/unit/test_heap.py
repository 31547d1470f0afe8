"""What is there at the start is set aside; garbage made later is found while there is little to
do, and at the latest after a while."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from tests.waiting import auntil

from facelane_server import heap


@pytest.fixture
def collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class _Knot:
    def __init__(self) -> None:
        self.itself = self


def _aged_garbage() -> weakref.ref[_Knot]:
    """A cycle that nobody holds and that only a full collection finds."""
    knot = _Knot()
    gc.collect(1)  # it grows old while it is held
    return weakref.ref(knot)


def test_what_exists_is_set_aside_and_the_rest_is_collected_in_small_steps(collector: None) -> None:
    heap.settle()
    assert gc.get_freeze_count() > 1_000
    assert gc.get_threshold() == (heap.YOUNG, heap.MIDDLE, heap.FULL)
    assert len(gc.get_objects()) < gc.get_freeze_count()


@pytest.mark.parametrize("patience_s", [0.0, 3600.0])
async def test_old_garbage_goes_while_the_loop_tends(collector: None, patience_s: float) -> None:
    heap.settle()
    gone = _aged_garbage()
    assert gone() is not None
    tending = asyncio.create_task(heap.tend(look_s=0.01, patience_s=patience_s))
    try:
        await auntil(lambda: gone() is None)
    finally:
        tending.cancel()
