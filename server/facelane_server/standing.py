"""Tasks that run for as long as their server does: one that fails begins again, and does not end
unnoticed what it was there for (an audit log that nobody writes, people whom nobody deletes)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

AGAIN_S: Final = 1.0

log = structlog.get_logger(__name__)

Work = Callable[[], Coroutine[Any, Any, None]]


def beside(stack: contextlib.AsyncExitStack, work: Work, name: str) -> None:
    """Runs until the stack is left, or it returns."""
    stack.push_async_callback(cancelled, begun(work, name))


def begun(work: Work, name: str) -> asyncio.Task[None]:
    """The same, for who ends it himself."""
    return asyncio.create_task(_steadily(work, name), name=name)


async def _steadily(work: Work, name: str) -> None:
    while True:
        try:
            return await work()
        except Exception:
            # Constant words: what failed may have been about somebody.
            log.exception("what runs beside the server has failed, and begins again", task=name)
        await asyncio.sleep(AGAIN_S)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Ends a task, and waits for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
