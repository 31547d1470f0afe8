"""What a worker has to say: one JSON line an event on stderr, which the server reads and
logs under the worker's name."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def log_event(event: str, **fields: Any) -> None:
    """``event`` is a constant; values go into ``fields``."""
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stderr.flush()
