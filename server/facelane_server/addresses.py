"""Addresses that servers listen on, and files that systemd lends to them: what can be told from
their text alone."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

LENT: Final = "/run/credentials/"
"""Where systemd lends secrets to services (LoadCredential=)."""


def lent_hint(path: str) -> str:
    """For messages about a file's content: where it is mended if it is a copy."""
    if not path.startswith(LENT):
        return ""
    name = path.rpartition("/")[2]
    return f" (systemd's copy; the unit's LoadCredential={name}:... names the original)"


def default_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """See ``config.Server.listen``; the SDK has the same rule."""
    if lent := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        return Path(lent) / "grpc.sock"
    if own := environ.get("XDG_RUNTIME_DIR"):
        return Path(own) / "facelane" / "grpc.sock"
    return Path(f"/tmp/facelane-{os.getuid()}/grpc.sock")  # noqa: S108 - its owner is checked


def is_local(listen: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if listen.startswith("unix:"):
        return True
    host = listen.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_host_port(listen: str) -> bool:
    """Whether it reads like ``host:port``."""
    host, _, port = listen.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65_535
