"""How a client reaches its server: address, credentials, channel options.

What is not given comes from the environment: ``FACELANE_TARGET``, ``FACELANE_TOKEN`` or
``FACELANE_TOKEN_FILE``, and ``FACELANE_TLS_CA``, ``_CERT``, ``_KEY`` (files) and
``_SERVER_NAME``, each of which turns TLS on. Of gRPC's own variables ``https_proxy`` and its kin
hold for other machines alone: what stays on this one goes by no proxy.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc

from facelane.errors import ArgumentError, AuthenticationError, FacelaneError, Reason, from_rpc
from facelane.proxies import is_local, proxy_variable

Token: TypeAlias = str | Callable[[], str]
"""An access token, or a function that gives the present one. It is asked before the first call
and again when the server refuses what it gave last."""
AsyncToken: TypeAlias = str | Callable[[], str | Awaitable[str]]
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Options: TypeAlias = tuple[tuple[str, Any], ...]

DEFAULT_TIMEOUT: Final = 10.0
MAX_MESSAGE_BYTES: Final = 64 << 20
"""Of one message, either way; above every limit that a server announces."""
CALLS_PER_CHANNEL: Final = 64
"""That last: streams and watches. A server takes a hundred calls of one connection; what is more
would wait without a word."""


_TLS_VARIABLES: Final = ("CA", "CERT", "KEY", "SERVER_NAME")


class InsecureTokenWarning(UserWarning):
    """A token would travel in clear text to another machine."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the server. All parts are optional: without ``ca_file`` the system's roots.

    ``cert_file`` and ``key_file`` (PEM) go together and show who the client is.
    ``server_name`` is the name in the server's certificate where it differs from the target.
    To trust one certificate and no authority, give that certificate as ``ca_file``.
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
                that cannot be used: not PEM, damaged, another's key, one with a passphrase.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ArgumentError(
                Reason.ARGUMENT_INVALID, "cert_file and key_file go together: give both"
            )
        authority, key = _read(self.ca_file, _CERTIFICATE), _read(self.key_file, _KEY)
        chain = _read(self.cert_file, _CERTIFICATE)
        if self.ca_file is not None or chain is not None:
            self._try(key)
        return grpc.ssl_channel_credentials(authority, key, chain)

    def _try(self, key: bytes | None) -> None:
        """What gRPC would take, and then reach nobody. Raises ``ArgumentError``."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # how strong is for gRPC to judge
        trying, why = self.ca_file, "holds no usable certificate (damaged)"
        try:
            if trying is not None:
                context.load_verify_locations(trying)
            if self.cert_file is not None:
                trying, why = self.key_file, f"cannot be used with {os.fspath(self.cert_file)}"
                # Nobody is there to be asked for a passphrase.
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "-")
        except (ssl.SSLError, ValueError) as error:
            if b"ENCRYPTED" in (key or b"") and trying is self.key_file:
                why = "is protected by a passphrase: store it without one (openssl pkey), mode 0600"
            elif getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
                why = f"is not the key of the certificate in {os.fspath(self.cert_file or '')}"
            raise ArgumentError(
                Reason.ARGUMENT_INVALID, f"{os.fspath(trying or '')} {why}"
            ) from None


_CERTIFICATE: Final = (b"CERTIFICATE-----", "no certificate")
_KEY: Final = (b"PRIVATE KEY-----", "no private key")


def _read(path: str | os.PathLike[str] | None, wanted: tuple[bytes, str]) -> bytes | None:
    if path is None:
        return None
    # A byte order mark would hide the first line from gRPC.
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    marker, missing = wanted
    if b"-----BEGIN " not in data or marker not in data:
        is_pem = "" if b"-----BEGIN " in data else "is not PEM: it "
        raise ArgumentError(
            Reason.ARGUMENT_INVALID, f"{os.fspath(path)} {is_pem}has {missing} (-----BEGIN ...)"
        )
    return data


class Bearer:
    """The access token as calls carry it. It is in no repr and in no error."""

    def __init__(self, token: AsyncToken) -> None:
        self._token = token
        self.held: Metadata | None = None
        """What calls carry; ``None`` while the function has to be asked."""
        if isinstance(token, str):
            self.hold(token)

    def ask(self) -> str | Awaitable[str]:
        """The present token.

        Raises:
            AuthenticationError: the function failed, which may pass.
        """
        assert not isinstance(self._token, str)
        try:
            return self._token()
        except FacelaneError:
            raise
        except Exception as error:
            raise no_token(error) from error

    def hold(self, secret: str) -> Metadata:
        """Takes the token for the calls that follow."""
        if not isinstance(secret, str):
            raise ArgumentError(
                Reason.ARGUMENT_INVALID,
                f"the function that gives the token gave {type(secret).__name__}: give a string "
                "(facelane.aio takes awaitables too)",
            )
        secret = checked_token(secret)
        self.held = (("authorization", f"Bearer {secret}"),) if secret else ()
        return self.held

    def refused(self, shown: Metadata) -> bool:
        """The server does not know what it was shown: whether there may be another by now."""
        if isinstance(self._token, str):
            return False
        if self.held is shown:
            self.held = None
        return True


class _Watching(grpc.AuthMetadataPlugin):  # type: ignore[misc, unused-ignore]
    """The token for what gRPC asks of its own accord: a server's health. Calls carry theirs."""

    def __init__(self, bearer: Bearer) -> None:
        self._bearer = bearer

    def __call__(
        self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback
    ) -> None:
        health = context.service_url.endswith("/grpc.health.v1.Health")
        watching = health and context.method_name == "Watch"
        # While none is held the server says that it offers no health, and is used.
        callback((self._bearer.held or ()) if watching else (), None)


def no_token(error: Exception) -> AuthenticationError:
    """The user's function gave no token; its text may hold anything, its kind does not."""
    return AuthenticationError(
        Reason.UNAUTHENTICATED,
        f"the function that gives the token failed ({type(error).__name__})",
        retryable=True,
    )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom: everything that a channel needs."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: Options
    bearer: Bearer
    proxy: str
    """The environment's variable that names the proxy on the way there, empty for none."""
    barred: bool = False
    """Nothing was said of where, and the installed service's socket is not for this user."""

    def __repr__(self) -> str:
        return f"Endpoint({self.target!r}, tls={self.credentials is not None})"

    def channel(self, way: Any) -> Any:
        """A channel of ``way``: ``grpc`` or ``grpc.aio``."""
        return self._channel(way, self.target, self.options)

    def moved_channel(self, way: Any, moved: str) -> Any:
        """One for a stream alone that the server has sent to another of its processes. ``moved``:
        where, which is followed from socket to socket alone; empty = the same address again."""
        sockets = moved.startswith("unix:") and self.target.startswith("unix:")
        return self._channel(way, moved if sockets else self.target, self.options)

    def _channel(self, way: Any, target: str, options: Options) -> Any:
        if self.credentials is None:
            return way.insecure_channel(target, options=options)
        return way.secure_channel(target, self.credentials, options=options)

    def failure(self, error: grpc.RpcError) -> FacelaneError:
        """A failed call's error, which names the proxy that may be at fault."""
        told = from_rpc(error)
        # gRPC raises the call itself. With the frames that it went through it would hold itself,
        # and be destroyed by the interpreter at its end: see ``facelane.ending``.
        error.__traceback__ = None
        if self.proxy and told.reason == Reason.UNREACHABLE:
            told.message += (
                f"; the way leads by the proxy that {self.proxy} names: list the server in "
                "no_proxy, or give proxy=False (--no-proxy)"
            )
        if self.barred and told.reason == Reason.UNREACHABLE:
            told.message += (
                f"; a service listens at {INSTALLED}, which is for root and the members of the "
                "socket's group (facelane-clients): use sudo, or join it"
            )
        return told


class Channels:
    """Which connection each call of a client that lasts goes by: the client's own, ``None``, and
    others as those before are full."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._calls: dict[Any, int] = {None: 0}

    def take(self, way: Any, moved: str | None = None) -> Any:
        """For one call, until ``leave``. ``way``: ``grpc`` or ``grpc.aio``; ``moved``: as in
        ``Endpoint.moved_channel``, ``None`` = nowhere."""
        if moved is not None:
            return self._endpoint.moved_channel(way, moved)
        with self._lock:
            free = [one for one, n in self._calls.items() if n < CALLS_PER_CHANNEL]
            channel = free[0] if free else self._endpoint.channel(way)
            self._calls[channel] = self._calls.get(channel, 0) + 1
        return channel

    def leave(self, channel: Any) -> bool:
        """Whether the channel is to be closed."""
        with self._lock:
            left = self._calls.get(channel, 1) - 1
            if left or channel is None:
                self._calls[channel] = left
                return False
            self._calls.pop(channel, None)
        return True


INSTALLED = Path("/run/facelane/grpc.sock")
"""Where the installed service listens."""


def _named(variable: str, environ: Mapping[str, str] = os.environ) -> str:
    """An address or a path: what editors of Windows leave at its end is no part of it."""
    return environ.get(variable, "").strip()


def default_target(environ: Mapping[str, str] = os.environ) -> str:
    """Where a server listens of which nothing else is said: ``FACELANE_TARGET``, else the socket
    of the installed service where this user may use it, else that of a server which this user has
    started."""
    if told := _named("FACELANE_TARGET", environ):
        return told
    if os.access(INSTALLED, os.W_OK):
        return f"unix:{INSTALLED}"
    if own := environ.get("XDG_RUNTIME_DIR"):
        return f"unix:{own}/facelane/grpc.sock"
    folder = Path(f"/tmp/facelane-{os.getuid()}")  # noqa: S108 - its owner is looked at
    if folder.exists() and folder.lstat().st_uid not in (os.getuid(), 0):
        raise ArgumentError(
            Reason.ARGUMENT_INVALID, f"{folder} belongs to somebody else: give a target"
        )
    return f"unix:{folder}/grpc.sock"


def endpoint(
    target: str | None, token: AsyncToken | None, tls: Tls | None, *, proxy: bool = True
) -> Endpoint:
    """The endpoint from what was given, completed from the environment."""
    address = target or default_target()
    anywhere = not target and "FACELANE_TARGET" not in os.environ
    barred = anywhere and os.path.exists(INSTALLED) and not os.access(INSTALLED, os.W_OK)
    if tls is None:
        given = {name: _named(f"FACELANE_TLS_{name}") or None for name in _TLS_VARIABLES}
        if any(given.values()):
            tls = Tls(given["CA"], given["CERT"], given["KEY"], given["SERVER_NAME"])
    bearer = _from_environment() if token is None else Bearer(token)
    local = is_local(address)
    if bearer.held != () and tls is None and not local:
        warnings.warn(
            f"the token travels in clear text to {address}: give tls=Tls(...)",
            InsecureTokenWarning,
            stacklevel=4,
        )
    several = address.startswith("dns:") or "," in address
    options = (*_OPTIONS, ("grpc.service_config", _SEVERAL if several else _SERVICE_CONFIG))
    variable = "" if local or not proxy else proxy_variable(address)
    if not variable:
        # gRPC asks the environment even for its own machine.
        options = (*options, ("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    credentials = None if tls is None else tls.credentials()
    if credentials is not None and several:
        # A connection watches its server's health by itself, outside of all calls.
        watching = grpc.metadata_call_credentials(_Watching(bearer), name="facelane-health")
        credentials = grpc.composite_channel_credentials(credentials, watching)
    return Endpoint(address, credentials, options, bearer, variable, barred)


def checked_token(secret: str) -> str:
    """A token that a header can carry; what gRPC says of others names nothing."""
    # The line end of the file that it was read from is no part of it.
    secret = secret.strip()
    if not all("!" <= character <= "~" for character in secret):
        raise ArgumentError(
            Reason.ARGUMENT_INVALID,
            "the token holds spaces, line ends or characters outside of ASCII: give the key alone",
        )
    return secret


def _from_environment() -> Bearer:
    if token := os.environ.get("FACELANE_TOKEN"):
        return Bearer(token)
    if path := _named("FACELANE_TOKEN_FILE"):
        # Read again when the server refuses it: keys are exchanged while programs run.
        bearer = Bearer(functools.partial(read_token, path))
        bearer.hold(read_token(path))
        return bearer
    return Bearer("")


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file: its only line.

    Raises:
        OSError: the file cannot be read.
        ArgumentError: it is empty, has more than one line, or is no text.
    """
    data = Path(path).read_bytes()
    # As editors of Windows save it.
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    lines = data.decode("utf-16" if wide else "utf-8-sig", "replace").split()
    if len(lines) != 1:
        raise ArgumentError(Reason.ARGUMENT_INVALID, f"{path} must hold one token and nothing else")
    return lines[0]


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

_RETRIES = {
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
_SERVICE_CONFIG = json.dumps(_RETRIES)
_SEVERAL = json.dumps(
    _RETRIES
    | {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "facelane.v1.AnalysisService"},
    }
)
"""For a name or a list of several servers: each call, a stream is one, goes to the next of them
that can be reached and says that it can analyse. By itself gRPC keeps to the first."""

_OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
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
    # Two channels of one process are two connections: two clients, as their owner expects, and
    # a stream that was sent to another process of the server, which the same one never leads to.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.primary_user_agent", "facelane-python"),
)
