"""Webhooks, signed as Standard Webhooks has it (https://www.standardwebhooks.com)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import socket
import urllib.parse
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final

import urllib3
from standardwebhooks.webhooks import Webhook as Signer
from urllib3.connection import HTTPConnection

import facelane
from facelane.proxies import http_proxy
from facelane_events import config
from facelane_events.delivery import GoneError, RefusedError, UnavailableError
from facelane_events.message import Message

AGAIN: Final = frozenset({408, 421, 423, 425, 429, *range(500, 600)})
"""Statuses after which it may go better; other refusals are for good."""
GONE: Final = 410
MAX_ANSWER: Final = 64 * 1024
MAX_PAUSE_S: Final = 300.0
CONNECT_S: Final = 10.0
"""Of an attempt, for each of the receiver's addresses."""


class WebhookSink:
    """Posts in a thread of its own, one at a time: no attempt that was given up overtakes the
    next, and none holds up another sink. What ends an attempt shuts its socket, since a time-out
    counts anew with every byte of a receiver that drips its answer."""

    def __init__(self, settings: config.Webhook) -> None:
        self._settings = settings
        self._signer = self._read_secret()
        self._thread = ThreadPoolExecutor(1, f"webhook {settings.name}")
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._connections: deque[HTTPConnection] = deque(maxlen=4)

    def _read_secret(self) -> Signer | None:
        """Raises ``ConfigError``."""
        path = self._settings.secret_file
        secret = config.secret(path)
        try:
            return Signer(secret) if secret else None
        except (binascii.Error, RuntimeError, ValueError):
            raise config.ConfigError(
                f"{path}: no secret of a webhook, which is whsec_ and base64"
            ) from None

    async def open(self) -> None:
        settings = self._settings
        try:
            # It may have been exchanged meanwhile.
            self._signer = self._read_secret()
        except config.ConfigError as error:
            raise UnavailableError(str(error)) from None
        options: dict[str, Any] = {"ca_certs": settings.tls_ca} if settings.tls_ca else {}
        if settings.tls_fingerprint:
            # Nobody else can have the certificate with this sum, whatever it says.
            options |= {
                "assert_fingerprint": settings.tls_fingerprint.replace(":", ""),
                "assert_hostname": False,
                "cert_reqs": "CERT_NONE",
            }
        most = settings.attempt_timeout
        timeout = urllib3.Timeout(total=most, connect=min(most, CONNECT_S))
        try:
            pool = _pool(settings, maxsize=1, retries=False, timeout=timeout, **options)
        except urllib3.exceptions.HTTPError as error:
            raise UnavailableError(_why(error)) from None
        made: Any = pool.ConnectionCls

        def remembered(**how: Any) -> Any:
            connection = made(**how)
            reach = connection.connect

            def connect() -> None:
                reach()
                if self._pool is not pool:
                    # Given up before there was a socket to be shut.
                    connection.close()
                    raise urllib3.exceptions.NewConnectionError(connection, "given up")

            connection.connect = connect
            self._connections.append(connection)
            return connection

        pool.ConnectionCls = remembered  # type: ignore[assignment]
        self._pool = pool

    async def send(self, event: Message) -> None:
        assert self._pool is not None, "not open"
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"facelane-events/{facelane.__version__}",
            **_authorization(self._settings),
            **self._settings.headers,
            "webhook-id": event.id,
        }
        # The time of this attempt, which the receiver compares with its clock.
        now = datetime.now(UTC)
        headers["webhook-timestamp"] = str(int(now.timestamp()))
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(event.id, now, event.body.decode())
        status, pause = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._post, self._pool, event.body, headers
        )
        if 200 <= status < 300:
            return
        if status == GONE:
            raise GoneError("it answered 410 Gone")
        if status in AGAIN:
            await asyncio.sleep(min(pause, self._settings.attempt_timeout / 2, MAX_PAUSE_S))
            raise UnavailableError(f"it answered {status}")
        raise RefusedError(f"it answered {status}")

    def _post(
        self, pool: urllib3.HTTPConnectionPool, body: bytes, headers: dict[str, str]
    ) -> tuple[int, float]:
        """The status, and how long the receiver asks to be left alone."""
        if pool is not self._pool:
            raise UnavailableError("it was given up before it was sent")
        address = urllib3.util.parse_url(self._settings.url)
        target = address.request_uri
        if pool.proxy is not None and address.scheme == "http":
            target = address._replace(auth=None, fragment=None).url  # no tunnel
        try:
            answer = pool.urlopen(
                "POST", target, body=body, headers=headers, redirect=False,
                assert_same_host=False, preload_content=False,
            )  # fmt: skip
            try:
                answer.read(MAX_ANSWER)
                wait = answer.headers.get("Retry-After", "")
            finally:
                answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise UnavailableError(_why(error)) from None
        return answer.status, float(wait) if wait.isascii() and wait.isdigit() else 0.0

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        for connection in list(self._connections):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
        if pool is not None:
            pool.close()


def _pool(settings: config.Webhook, **how: Any) -> urllib3.HTTPConnectionPool:
    proxy = http_proxy(settings.url) if settings.proxy else ""
    if not proxy:
        return urllib3.connection_from_url(settings.url, **how)
    written = urllib3.util.parse_url(proxy).auth
    headers = (
        urllib3.util.make_headers(proxy_basic_auth=urllib.parse.unquote(written))
        if written
        else None
    )
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **how).connection_from_url(
        settings.url
    )


def _authorization(settings: config.Webhook) -> dict[str, str]:
    """What an address with user and password asks for: the library passes over it."""
    written = urllib3.util.parse_url(settings.url).auth
    if not written or any(name.lower() == "authorization" for name in settings.headers):
        return {}
    user, _, password = written.partition(":")
    pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    secret = base64.b64encode(pair.encode()).decode()
    return {"Authorization": f"Basic {secret}"}


def _why(error: Exception) -> str:
    """Without the address, in which there may be a secret."""
    return type(error).__name__
