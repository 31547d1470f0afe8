"""What a worker has to say: one JSON line an event on stderr, which the server reads and
logs under the worker's name, at the line's level."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from typing import Any, Final

_TRACEBACK_CHARS: Final = 6_000
"""The server cuts longer lines."""


def log_event(event: str, *, level: str = "info", **fields: Any) -> None:
    """``event`` is a constant; values go into ``fields``."""
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"event": event, "level": level, **fields}) + "\n")
        sys.stderr.flush()


def log_exception(event: str, error: BaseException) -> None:
    """An error with its traceback."""
    lines = "".join(traceback.format_exception(error))
    log_event(event, level="error", error=type(error).__name__, traceback=lines[-_TRACEBACK_CHARS:])
