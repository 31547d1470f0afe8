"""The address that the server listens on: opened, or why it cannot be."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from pathlib import Path

import grpc

from facelane_server import addresses, config
from facelane_server.edge.tls import Presented


def bind(
    server: grpc.aio.Server, listen: str, certificates: Presented | None, *, group: str = ""
) -> None:
    """Opens the port. A Unix socket is its user's alone, or its group's too; the kernel asks
    whoever connects. Raises ``AddressError`` when it cannot be had now."""
    path = _socket_path(listen) if listen.startswith("unix:") else None
    if path is not None:
        _own_folder(path.parent)
        if path.is_socket():
            if _answers(path):
                raise config.AddressError(
                    f"server.listen: another server answers on {listen}; end it, or listen "
                    "elsewhere"
                )
            # What a killed server left behind.
            path.unlink()
    before = os.umask(0o177)  # no moment in which others could connect
    try:
        if certificates is not None:
            port = server.add_secure_port(listen, certificates.credentials())
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    finally:
        os.umask(before)
    if port == 0:
        # gRPC does not say why.
        why = _unusable(listen)
        raise config.AddressError(f"server.listen: cannot listen on {listen}: {why}")

    if path is not None and group:
        try:
            shutil.chown(path, group=group)
        except (LookupError, OSError) as error:
            raise config.ConfigError(
                f"server.socket_group: {path} cannot be given to `{group}` ({error}): name a "
                "group that the server's user is in"
            ) from None
        path.chmod(0o660)


def _own_folder(folder: Path) -> None:
    """Makes the folder of a default socket; refuses one that somebody else has put there."""
    if folder != addresses.default_socket().parent:
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise config.AddressError(
            f"server.listen: {folder} cannot be made ({error.strerror}); set server.listen"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise config.AddressError(
            f"server.listen: {folder} belongs to somebody else; set server.listen"
        )


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
