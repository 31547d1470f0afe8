"""What a worker has to say: one JSON line an event on stderr, which the server reads and
logs under the worker's name, at the line's level."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from facelane_server import limits
from facelane_server.domain import FacelaneError


def log_event(event: str, *, level: str = "info", **fields: Any) -> None:
    """``event`` is a constant; values go into ``fields``."""
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"event": event, "level": level, **fields}) + "\n")
        sys.stderr.flush()


def log_exception(event: str, error: BaseException) -> None:
    """An error with its traceback."""
    lines = "".join(traceback.format_exception(error))
    log_event(
        event,
        level="error",
        error=type(error).__name__,
        traceback=lines[-limits.MAX_WORKER_TRACEBACK_CHARS :],
    )


def brief(error: BaseException) -> str:
    """The kind of an error, for the server's log; details go to the worker's stderr."""
    if isinstance(error, FacelaneError):
        return error.message
    return f"{type(error).__name__}; the worker's log has the traceback"


def name_thread(name: str) -> None:
    """What ``ps`` and ``top -H`` show (15 characters)."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(
            f"fl-{name}"[:15], encoding="utf-8"
        )
