"""Waiting in tests: poll with a deadline, never sleep and hope."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

STEP_S = 0.01
WAIT_S = 100.0
"""Where the test does not say: long, because it is only waited out by a test that fails."""


def until(condition: Callable[[], T], timeout: float = WAIT_S, what: str = "") -> T:
    """The first truthy answer of ``condition``; AssertionError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(STEP_S)


async def auntil(
    condition: Callable[[], T | Awaitable[T]], timeout: float = WAIT_S, what: str = ""
) -> T:
    """``until`` for coroutines; ``condition`` may be either."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value  # type: ignore[return-value]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        await asyncio.sleep(STEP_S)
