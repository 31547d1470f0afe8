"""How a client reaches its server: address, credentials, channel options.

What is not given comes from the environment: ``FACELANE_TARGET``, ``FACELANE_TOKEN`` or
``FACELANE_TOKEN_FILE``, and ``FACELANE_TLS_CA`` (a file; turns TLS on).
"""

from __future__ import annotations

import ipaddress
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from facelane.errors import ArgumentError, Reason

DEFAULT_TARGET: Final = "127.0.0.1:50151"
DEFAULT_TIMEOUT: Final = 10.0
MAX_MESSAGE_BYTES: Final = 64 << 20
"""Of one message, either way; above every limit that a server announces."""


class InsecureTokenWarning(UserWarning):
    """A token would travel in clear text to another machine."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the server. All parts are optional: without ``ca_file`` the system's roots.

    ``cert_file`` and ``key_file`` (PEM) go together and show who the client is.
    ``server_name`` is the name in the server's certificate where it differs from the target.
    """

    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            OSError: a file cannot be read.
            ArgumentError: a certificate without its key, or the other way round, or a file
                that is not PEM.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ArgumentError(
                Reason.ARGUMENT_INVALID, "cert_file and key_file go together: give both"
            )
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file),
            private_key=_read(self.key_file),
            certificate_chain=_read(self.cert_file),
        )


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    data = Path(path).read_bytes()
    if b"-----BEGIN " not in data:
        # gRPC would take it, and then reach nobody.
        raise ArgumentError(
            Reason.ARGUMENT_INVALID, f"{os.fspath(path)} is not PEM: it has no -----BEGIN line"
        )
    return data


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom: everything that a channel needs. The token is not in its repr."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]
    metadata: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return f"Endpoint({self.target!r}, tls={self.credentials is not None})"


def endpoint(target: str | None, token: str | None, tls: Tls | None) -> Endpoint:
    """The endpoint from what was given, completed from the environment."""
    address = target or os.environ.get("FACELANE_TARGET") or DEFAULT_TARGET
    if tls is None and (ca_file := os.environ.get("FACELANE_TLS_CA")):
        tls = Tls(ca_file=ca_file)
    secret = _checked(_token() if token is None else token)
    if secret and tls is None and not _is_local(address):
        warnings.warn(
            f"the token travels in clear text to {address}: give tls=Tls(...)",
            InsecureTokenWarning,
            stacklevel=4,
        )
    options = _OPTIONS
    if tls is not None and tls.server_name:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    return Endpoint(
        address,
        None if tls is None else tls.credentials(),
        options,
        (("authorization", f"Bearer {secret}"),) if secret else (),
    )


def _checked(secret: str) -> str:
    """A token that a header can carry; what gRPC says of others names nothing."""
    # The line end of the file that it was read from is no part of it.
    secret = secret.strip()
    if not all("!" <= character <= "~" for character in secret):
        raise ArgumentError(
            Reason.ARGUMENT_INVALID,
            "the token holds spaces, line ends or characters outside of ASCII: give the key alone",
        )
    return secret


def _token() -> str:
    if token := os.environ.get("FACELANE_TOKEN"):
        return token
    if path := os.environ.get("FACELANE_TOKEN_FILE"):
        return read_token(path)
    return ""


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file: its only line.

    Raises:
        OSError: the file cannot be read.
        ArgumentError: it is empty, has more than one line, or is no text.
    """
    lines = Path(path).read_text(errors="replace").split()
    if len(lines) != 1:
        raise ArgumentError(Reason.ARGUMENT_INVALID, f"{path} must hold one token and nothing else")
    return lines[0]


def _is_local(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.rsplit(":", 1)[0].removeprefix("dns:").strip("/[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _methods(service: str, *names: str) -> list[dict[str, str]]:
    return [{"service": f"facelane.v1.{service}", "method": name} for name in names]


# Calls that may be made twice without harm. EnrollFace is one by its request_id.
_IDEMPOTENT = [
    *_methods("AnalysisService", "AnalyzeImage"),
    *_methods(
        "GalleryService",
        "GetSubject",
        "ListSubjects",
        "ListTemplates",
        "EnrollFace",
        "VerifyFace",
        "IdentifyFace",
    ),
    *_methods("ServerService", "GetServerInfo", "ListPools"),
]

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": _IDEMPOTENT,
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", _SERVICE_CONFIG),
    # A retried picture must fit, or gRPC silently gives up on retrying it.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The stream's own back-off decides when to try again: gRPC's must not hide behind it
    # (by default it grows to two minutes).
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two clients of one process are two connections, as their owner expects.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.primary_user_agent", "facelane-python"),
)
