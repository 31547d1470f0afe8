"""systemd's notify protocol: the service is ready, alive, stopping.

One datagram each to the socket that ``NOTIFY_SOCKET`` names; without it, nothing.
"""

from __future__ import annotations

import os
import socket


def watchdog_interval() -> float | None:
    """Seconds between two signs of life (half of what systemd allows); ``None`` = none wanted."""
    pid = os.environ.get("WATCHDOG_PID")
    micros = os.environ.get("WATCHDOG_USEC", "")
    if (pid and pid != str(os.getpid())) or not micros.isdigit() or int(micros) <= 0:
        return None
    return int(micros) / 2e6


def notify(*assignments: str) -> bool:
    """Tell systemd, for instance ``READY=1``. False where nobody listens.

    Never raises and never waits: a full or absent socket is no reason to stop a camera.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
    except OSError:
        return False
    return True
