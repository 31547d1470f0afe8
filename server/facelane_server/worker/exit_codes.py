"""Exit codes of a worker process, for the server's log and for systemd's ``Restart=``.

Codes 0 and 64-78 are chosen by the worker; a negative code in the server's log is the
signal that ended it.
"""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Drained, or the server is gone."""
USAGE: Final = 64
"""The command line is wrong. Trying again is of no use."""
CANNOT_ATTACH: Final = 69
"""``--attach``: nobody listens on the socket, or it was refused. Try again later."""
INTERNAL: Final = 70
"""An exception that nobody foresaw, in the worker's own code."""
OUT_OF_MEMORY: Final = 71
"""Device memory ran out repeatedly; a fresh process starts with empty memory."""
WORN_OUT: Final = 72
"""Several pictures were given up, and their decoding still runs on."""
DEVICE_POISONED: Final = 74
"""A sticky CUDA error: the context of this process is lost for good."""
PROTOCOL: Final = 76
"""The server sent what it must not."""
NOT_CONFINED: Final = 77
"""``sandbox = "required"``, and this machine cannot."""
LOAD_FAILED: Final = 78
"""The model package cannot be loaded or warmed up."""

NAMES: Final = {
    OK: "clean exit",
    USAGE: "wrong command line",
    CANNOT_ATTACH: "cannot attach",
    INTERNAL: "internal error",
    OUT_OF_MEMORY: "out of memory",
    WORN_OUT: "stuck in decoding",
    DEVICE_POISONED: "device poisoned",
    PROTOCOL: "protocol error",
    NOT_CONFINED: "no sandbox here",
    LOAD_FAILED: "model not loaded",
}
