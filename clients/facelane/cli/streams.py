"""Standard streams that can always be written to, whoever started us.

A service manager may close them, a terminal may speak Latin-1, and names may hold anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


def steady() -> None:
    """Makes stdout and stderr fit to be written to: a closed one leads nowhere, and what an
    encoding does not have is replaced on it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next socket or file would get its number, and with it what is meant for people.
            os.open(os.devnull, os.O_RDWR)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def settle() -> bool:
    """Writes out what is left; false where it had nowhere to go, as on a full disk. Python would
    try once more at its end, and fail aloud."""
    settled = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            settled = False
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
    return settled


class Unfailing(io.StringIO):
    """A log that cannot be written (its reader has gone, the disk is full) is lost, and takes
    nothing else along."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def tell(text: str) -> None:
    """A line on stderr, whether or not anybody can hear it."""
    print(text, file=Unfailing(sys.stderr), flush=True)


def speaks_unicode() -> bool:
    """Whether stdout can hold any character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name as text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")
