"""The command ``facelane-console``."""

from __future__ import annotations

import argparse
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import facelane
from facelane.cli.streams import settle, steady, tell

if TYPE_CHECKING:
    from facelane_console.app import Site

MAX_CONNECTIONS: Final = 1024
"""Of browsers and of whoever else knocks; more are answered with 503."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="facelane-console",
        description="A web page for a facelane server: cameras live, events, people, the system.",
        epilog="exit codes: 0 told to stop; 2 wrong usage, or a certificate that cannot be used; 3 "
        "nothing can listen there now",
    )
    made.add_argument("--version", action="version", version=facelane.__version__)
    made.add_argument(
        "--target", default=os.environ.get("FACELANE_TARGET"),
        help="the server, host:port or unix:/path (default: $FACELANE_TARGET, else this user's)",
    )  # fmt: skip
    made.add_argument("--tls-ca", help="PEM of the authority of the server's certificate")
    made.add_argument(
        "--listen", default="127.0.0.1:9160", metavar="HOST:PORT",
        help="where browsers find the page (default: %(default)s); off loopback TLS is needed",
    )  # fmt: skip
    made.add_argument("--cert", type=Path, help="PEM certificate chain for browsers")
    made.add_argument("--key", type=Path, help="PEM private key")
    made.add_argument(
        "--behind-tls", action="store_true",
        help="browsers reach the page by a proxy on this machine that speaks TLS with them",
    )  # fmt: skip
    made.add_argument(
        "--name", action="append", default=[], metavar="HOST",
        help="a name by which browsers may call the page, where it is not the address; repeatable",
    )  # fmt: skip
    return made


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class UsageError(Exception):
    """What the command was given cannot be; the message says what to write instead."""


def build(arguments: argparse.Namespace) -> tuple[Site, str, int]:
    """The console, and where it listens. Raises ``UsageError``."""
    host, _, port = arguments.listen.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise UsageError(f"--listen {arguments.listen}: write HOST:PORT")
    if bool(arguments.cert) != bool(arguments.key):
        raise UsageError("--cert and --key go together")
    if not (is_loopback(host) or arguments.cert):
        raise UsageError(
            f"--listen {arguments.listen}: other machines reach it, and keys and pictures would "
            "cross the network unencrypted; give --cert and --key, or listen on 127.0.0.1 behind "
            "a proxy with TLS"
        )
    if arguments.behind_tls and arguments.cert:
        raise UsageError("--behind-tls is for a proxy that speaks TLS: leave --cert and --key out")
    _check_files(arguments)
    # Its words alone (manual page, completion) take no web server.
    from facelane_console.app import Site

    # Whoever logs in acts with the key that he shows, and never with one of the console's own.
    for name in ("FACELANE_TOKEN", "FACELANE_TOKEN_FILE"):
        os.environ.pop(name, None)
    tls = facelane.Tls(ca_file=arguments.tls_ca) if arguments.tls_ca else None

    def connect(key: str) -> facelane.aio.Client:
        return facelane.aio.Client(arguments.target, token=key or None, tls=tls)

    names = {host.strip("[]").lower(), *(name.lower() for name in arguments.name)}
    if is_loopback(host):
        names |= {"localhost", "127.0.0.1", "::1"}
    secured = bool(arguments.cert) or arguments.behind_tls
    return Site(connect, hosts=frozenset(names), tls=secured), host, int(port)


def _check_files(arguments: argparse.Namespace) -> None:
    """Whether those that are named can be used: later nobody would hear of it. Raises
    ``UsageError``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if arguments.cert:
            # Nobody is there to be asked for a password.
            context.load_cert_chain(arguments.cert, arguments.key, password=lambda: "-")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--cert {arguments.cert}, --key {arguments.key}: {error.strerror or error}; give a "
            "PEM certificate and the key that belongs to it, which this user can read"
        ) from None
    try:
        if arguments.tls_ca:
            context.load_verify_locations(arguments.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--tls-ca {arguments.tls_ca}: {error.strerror or error}; give the PEM certificate of "
            "the authority that has signed the server's"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    steady()
    try:
        return _main(argv)
    finally:
        settle()


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    try:
        console, host, port = build(arguments)
    except UsageError as error:
        tell(f"facelane-console: {error}")
        return 2
    import uvicorn

    from facelane_console.patience import Patient

    scheme = "https" if arguments.cert else "http"
    tell(f"facelane-console: {scheme}://{host}:{port}/")
    uvicorn.run(
        console.app,
        host=host.strip("[]"),
        port=port,
        ssl_certfile=arguments.cert,
        ssl_keyfile=arguments.key,
        log_level="warning",
        http=Patient,
        server_header=False,
        ws_max_size=1 << 16,
        # Pictures are compressed already: to try it again costs more than all else here.
        ws_per_message_deflate=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
        # A proxy's word for who calls is not taken.
        proxy_headers=False,
    )
    return 0
