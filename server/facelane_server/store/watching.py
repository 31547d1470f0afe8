"""One thread that tells those who follow a store when something may have been committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from facelane_server.store.database import Database

_WAIT_S: Final = 1.0
"""Those who follow are woken so often even when nothing was told."""
_LOOK_S: Final = 0.1
"""``close`` is heeded within this."""


class StoreWatch:
    """``close`` before the store is closed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: list[Callable[[], None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """It is called in the watch's thread, and returns at once."""
        self._callbacks.append(callback)

    def close(self) -> None:
        """Idempotent; waits for the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                due = time.monotonic() + _WAIT_S
                while not self._ended.is_set() and time.monotonic() < due:
                    if self._database.wait_for_change(_LOOK_S):
                        break
                for callback in tuple(self._callbacks):
                    callback()
        finally:
            self._database.end_waiting()
