"""NATS JetStream: acknowledged by the stream, which drops what it has by message id."""

from __future__ import annotations

import contextlib
import re

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import StreamConfig

from facelane_events import config, trust
from facelane_events.delivery import RefusedError, UnavailableError
from facelane_events.message import Message

DUPLICATE_WINDOW_S = 600
"""The stream forgets message ids after so long."""
TOO_LARGE = 10054
"""JetStream's code for a message that is larger than its stream takes."""


def subject(prefix: str, event: Message) -> str:
    """``<prefix>.<source>.<kind>``, each part one token."""
    source = re.sub(r"[\s.*>]", "_", event.source_id) or "server"
    return f"{prefix}.{source}.{event.kind}"


def message_id(settings: config.Nats, event: Message) -> str:
    """The same for the same event of the same sink: two sinks of one stream say different things of
    it, and neither is the other's duplicate."""
    return f"{event.id}-{settings.name}"


class NatsSink:
    def __init__(self, settings: config.Nats) -> None:
        self._settings = settings
        self._client: Client | None = None

    async def open(self) -> None:
        settings = self._settings
        secured = bool(settings.tls_ca or settings.tls_fingerprint)
        try:
            self._client = await nats.connect(
                list(settings.servers),
                name="facelane-events",
                connect_timeout=max(1, int(settings.attempt_timeout)),
                # Deliveries try again by themselves, from the event on that was not taken.
                allow_reconnect=False,
                user_credentials=settings.credentials_file or None,
                tls=trust.context(settings.tls_ca, settings.tls_fingerprint) if secured else None,
                error_cb=_quiet,
            )
            stream = self._client.jetstream()
            try:
                await stream.stream_info(settings.stream)
            except nats.js.errors.NotFoundError:
                await stream.add_stream(
                    StreamConfig(
                        name=settings.stream,
                        subjects=[f"{settings.subject}.>"],
                        duplicate_window=DUPLICATE_WINDOW_S,
                    )
                )
        except (TimeoutError, nats.errors.Error, OSError) as error:
            await self.close()
            raise UnavailableError(type(error).__name__) from None

    async def send(self, event: Message) -> None:
        assert self._client is not None, "not open"
        try:
            await self._client.jetstream().publish(
                subject(self._settings.subject, event),
                event.body,
                timeout=self._settings.attempt_timeout,
                headers={"Nats-Msg-Id": message_id(self._settings, event)},
            )
        except nats.errors.MaxPayloadError:
            raise RefusedError("it is larger than the server takes") from None
        except (TimeoutError, nats.errors.Error, OSError) as error:
            if isinstance(error, nats.js.errors.APIError) and error.err_code == TOO_LARGE:
                raise RefusedError("it is larger than the stream takes") from None
            raise UnavailableError(type(error).__name__) from None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.close()


async def _quiet(_error: Exception) -> None:
    """The library's own log line; deliveries tell what failed."""
