"""Webhooks, signed as Standard Webhooks has it (https://www.standardwebhooks.com)."""

from __future__ import annotations

import asyncio
import binascii
from datetime import UTC, datetime
from typing import Any, Final

import urllib3
from standardwebhooks.webhooks import Webhook as Signer

import facelane
from facelane_events import config
from facelane_events.delivery import GoneError, RefusedError, UnavailableError
from facelane_events.message import Message

AGAIN: Final = frozenset({408, 421, 423, 425, 429, *range(500, 600)})
"""Statuses after which it may go better; other refusals are for good."""
GONE: Final = 410
MAX_ANSWER: Final = 64 * 1024
MAX_PAUSE_S: Final = 300.0


class WebhookSink:
    def __init__(self, settings: config.Webhook) -> None:
        self._settings = settings
        secret = config.secret(settings.secret_file)
        try:
            self._signer = Signer(secret) if secret else None
        except (binascii.Error, RuntimeError, ValueError):
            raise config.ConfigError(
                f"{settings.secret_file}: no secret of a webhook, which is whsec_ and base64"
            ) from None
        self._pool: urllib3.PoolManager | None = None

    async def open(self) -> None:
        settings = self._settings
        options: dict[str, Any] = {"ca_certs": settings.tls_ca} if settings.tls_ca else {}
        if settings.tls_fingerprint:
            # Nobody else can have the certificate with this sum, whatever it says.
            options |= {
                "assert_fingerprint": settings.tls_fingerprint.replace(":", ""),
                "assert_hostname": False,
                "cert_reqs": "CERT_NONE",
            }
        # In all: a thread outlives its attempt no longer than that.
        timeout = urllib3.Timeout(total=settings.attempt_timeout)
        self._pool = urllib3.PoolManager(maxsize=1, retries=False, timeout=timeout, **options)

    async def send(self, event: Message) -> None:
        assert self._pool is not None, "not open"
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"facelane-events/{facelane.__version__}",
            **self._settings.headers,
            "webhook-id": event.id,
        }
        # The time of this attempt, which the receiver compares with its clock.
        now = datetime.now(UTC)
        headers["webhook-timestamp"] = str(int(now.timestamp()))
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(event.id, now, event.body.decode())
        status, pause = await asyncio.to_thread(self._post, event.body, headers)
        if 200 <= status < 300:
            return
        if status == GONE:
            raise GoneError("it answered 410 Gone")
        if status in AGAIN:
            await asyncio.sleep(min(pause, self._settings.attempt_timeout / 2, MAX_PAUSE_S))
            raise UnavailableError(f"it answered {status}")
        raise RefusedError(f"it answered {status}")

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, float]:
        """The status, and how long the receiver asks to be left alone."""
        assert self._pool is not None
        try:
            answer = self._pool.request(
                "POST", self._settings.url, body=body, headers=headers,
                redirect=False, preload_content=False,
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
        if pool is not None:
            pool.clear()


def _why(error: Exception) -> str:
    """Without the address, in which there may be a secret."""
    return type(error).__name__
