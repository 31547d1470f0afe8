"""When the memory of a server and of its workers is scrubbed (``wiping`` says how).

Beside the event loop, which a worker has none of: there ``wiping.Scrubbing`` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from facelane_server import wiping

log = structlog.get_logger(__name__)

PAUSE_S: Final = 0.3


class Scrubber:
    """Scrubs soon after something was deleted, and tells others to. Used on the event loop."""

    def __init__(self, others: Callable[[], None] = lambda: None) -> None:
        self._others = others
        self._due = 0
        self._task: asyncio.Task[None] | None = None

    def note(self) -> None:
        """Something was deleted: within a second nothing of it is left in free memory. Many of them
        together cost hardly more than one."""
        self._due = 2  # a call that has just ended is still referred to for a moment
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="scrubber")

    async def _run(self) -> None:
        while self._due:
            self._due -= 1
            await asyncio.sleep(PAUSE_S)
            try:
                self._others()
                try:
                    await asyncio.to_thread(wiping.scrub)
                except RuntimeError:  # there is no room for a thread
                    wiping.scrub()
            except Exception:
                # Of this deletion more may be left than should be; of the next one nothing is.
                log.exception("memory was not scrubbed")
        self._task = None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
