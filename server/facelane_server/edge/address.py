"""The address that the server listens on: opened, or why it cannot be."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import grpc

from facelane_server import config
from facelane_server.edge.tls import Presented


def bind(server: grpc.aio.Server, listen: str, certificates: Presented | None) -> None:
    """Opens the port. Raises ``AddressError`` when it cannot be had now."""
    if listen.startswith("unix:"):
        path = _socket_path(listen)
        if path.is_socket():
            if _answers(path):
                raise config.AddressError(
                    f"server.listen: another server answers on {listen}; end it, or listen "
                    "elsewhere"
                )
            # What a killed server left behind.
            path.unlink()
    try:
        if certificates is not None:
            port = server.add_secure_port(listen, certificates.credentials())
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        # gRPC does not say why.
        why = _unusable(listen)
        raise config.AddressError(f"server.listen: cannot listen on {listen}: {why}")


def _socket_path(listen: str) -> Path:
    return Path(listen.removeprefix("unix:").removeprefix("//"))


def _unusable(listen: str) -> str:
    """Why an address cannot be listened on, and what to do."""
    if listen.startswith("unix:"):
        folder = _socket_path(listen).parent
        return (
            f"this user must be able to make a socket in {folder}, in a path of 107 bytes at most"
        )
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, _protocol, _name, address in found:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except socket.gaierror as error:
        return f"{error.strerror}; write an address of this machine"
    except PermissionError:
        return "ports below 1024 are for root; take another"
    except OSError as error:
        advice = {
            errno.EADDRINUSE: "another process has the port; end it, or take another",
            errno.EADDRNOTAVAIL: "this machine has no such address (now); see `ip address`",
        }.get(error.errno or 0, "take another")
        return f"{os.strerror(error.errno) if error.errno else 'unknown'}: {advice}"
    return "another process had the port a moment ago"


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
