"""systemd's notify protocol (sd_notify(3)): ready, status, reload, stop, watchdog.

One datagram of ``KEY=value`` lines a message, to the socket that ``NOTIFY_SOCKET`` names
(a path, or ``@name`` for an abstract one). Without that variable every call does nothing,
so the server runs the same way in a terminal. A message is never worth a delay or a
crash: sending does not block, and a failure is ``False``, not an exception.

``Notifier.keep_alive`` feeds the watchdog only while a predicate holds. The server gives
it "real inferences succeed"; a front that runs over dead models is then restarted by
systemd after ``WatchdogSec``, which is what an operator wants of a watchdog.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

from facelane_server import limits

FEEDS_PER_INTERVAL: Final = 3
"""Looks within one ``WatchdogSec``: one late turn of the loop must not kill the server."""
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def socket_address(value: str) -> str | None:
    """The address to send to for a ``NOTIFY_SOCKET``; ``None`` = nobody to tell.

    A path must be absolute. Anything else (``vsock:`` of newer systemds) is for virtual
    machines and is left alone.
    """
    if value.startswith("@") and len(value) > 1:
        return "\0" + value[1:]
    return value if value.startswith("/") else None


def watchdog_seconds(environ: Mapping[str, str], pid: int) -> float | None:
    """The watchdog's full interval in seconds; ``None`` = no watchdog for this process."""
    usec = environ.get("WATCHDOG_USEC", "")
    # isdecimal alone accepts other scripts' digits.
    if not (usec.isascii() and usec.isdecimal()) or int(usec) == 0:
        return None
    meant = environ.get("WATCHDOG_PID", "")
    if meant and meant != str(pid):
        return None
    return int(usec) / 1e6


def message(**fields: str | int) -> bytes:
    """The datagram of some fields; names become upper case, values one line each."""
    lines = (f"{name.upper()}={' '.join(str(value).split())}" for name, value in fields.items())
    return "\n".join(lines).encode()


@dataclass(frozen=True, slots=True)
class Notifier:
    """What this process tells its service manager. ``address`` None = nothing."""

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """Take the variables out of the environment, so that no worker inherits them."""
        found = cls(
            socket_address(environ.get("NOTIFY_SOCKET", "")),
            watchdog_seconds(environ, os.getpid()),
        )
        for name in _VARIABLES:
            environ.pop(name, None)
        return found

    def send(self, **fields: str | int) -> bool:
        """Whether the message went out."""
        if self.address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message(**fields), self.address)
        except OSError:
            return False
        return True

    def ready(self, status: str = "ready") -> bool:
        """The service takes calls; also the end of a reload."""
        return self.send(ready=1, status=status[: limits.MAX_STATUS_CHARS])

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``. Never a name of a subject or a camera."""
        return self.send(status=text[: limits.MAX_STATUS_CHARS])

    def reloading(self, status: str = "reloading") -> bool:
        """A reload has begun; ``ready`` ends it. The time tells it from an older one."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self.send(reloading=1, monotonic_usec=now, status=status[: limits.MAX_STATUS_CHARS])

    def stopping(self, status: str = "stopping") -> bool:
        """The service drains and will exit."""
        return self.send(stopping=1, status=status[: limits.MAX_STATUS_CHARS])

    def extend_timeout(self, seconds: float) -> bool:
        """Start-up, reload or stop goes on: expect the next message within ``seconds``."""
        return self.send(extend_timeout_usec=int(seconds * 1e6))

    def feed(self) -> bool:
        """One sign of life for the watchdog."""
        return self.send(watchdog=1)

    async def keep_alive(self, is_alive: Callable[[], bool]) -> None:
        """Feed the watchdog while ``is_alive()`` holds, until cancelled.

        Returns at once where no watchdog is wanted. ``is_alive`` must not block; an
        exception in it starves the watchdog, as a truth that cannot be told should.
        """
        if self.address is None or self.watchdog_s is None:
            return
        while True:
            if is_alive():
                self.feed()
            await asyncio.sleep(self.watchdog_s / FEEDS_PER_INTERVAL)
