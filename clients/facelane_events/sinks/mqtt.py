"""MQTT: every event, what is so now as retained topics, and Home Assistant's discovery; or every
event as ONVIF has it."""

from __future__ import annotations

import json
import ssl
from contextlib import AsyncExitStack, suppress
from typing import Final

import aiomqtt

from facelane_events import config
from facelane_events.delivery import UnavailableError
from facelane_events.message import Message
from facelane_events.sinks import onvif
from facelane_events.sinks.doubt import Doubtful
from facelane_events.sinks.homeassistant import States, discovery, topic

DOUBTFUL_BYTES: Final = 64 * 1024
"""A broker acknowledges before it has written: what it loses in a crash is the last of it."""


class MqttSink:
    def __init__(self, settings: config.Mqtt) -> None:
        self._settings = settings
        self._password = config.secret(settings.password_file)
        self._stack = AsyncExitStack()
        self._client: aiomqtt.Client | None = None
        self._states: dict[str, States] = {}
        self._announced: dict[str, frozenset[str]] = {}
        """By source, the parts for its zones and lines."""
        self._retained: dict[str, bytes] = {}
        self._changed: tuple[str, dict[str, str]] = ("", {})
        """Of the event that is under way: one that is tried again changes nothing again."""
        self._doubtful: Doubtful[onvif.Told] = Doubtful(DOUBTFUL_BYTES)

    async def open(self) -> None:
        settings = self._settings
        will = aiomqtt.Will(self._status, b"offline", qos=1, retain=True)
        context = None
        try:
            if settings.tls:
                context = ssl.create_default_context(cafile=settings.tls_ca or None)
            client = aiomqtt.Client(
                settings.host,
                settings.port,
                username=settings.username or None,
                password=self._password or None,
                identifier=f"facelane-events-{settings.name}",
                will=will,
                tls_context=context,
                timeout=settings.attempt_timeout,
            )
            self._client = await self._stack.enter_async_context(client)
            await self._publish(self._status, b"online", retain=True)
            while (told := self._doubtful.next()) is not None:
                await self._publish(told.topic, told.body, retain=told.retain)
                self._doubtful.sent_again()
            # Another broker, perhaps, or one that has forgotten.
            self._announced.clear()
            for where, value in self._retained.items():
                await self._publish(where, value, retain=True)
        except (aiomqtt.MqttError, OSError) as error:
            raise UnavailableError(str(error)) from None

    @property
    def _status(self) -> str:
        return f"{self._settings.prefix}/status/{self._settings.name}"

    async def send(self, event: Message) -> None:
        well = False
        try:
            await self._tell(event)
            well = True
        except (aiomqtt.MqttError, OSError) as error:
            raise UnavailableError(str(error)) from None
        finally:
            if not well:
                self._doubtful.broke()

    async def _tell(self, event: Message) -> None:
        settings = self._settings
        source = event.source_id
        if settings.payload == "onvif":
            for told in onvif.messages(settings.prefix, event):
                await self._event(told)
            return
        states, changed = self._states.setdefault(source, States()), {}
        if event.event is not None and source:
            if self._changed[0] != event.id:
                self._changed = event.id, states.after(event.event)
            changed = self._changed[1]
        if settings.homeassistant and source and self._announced.get(source) != states.rules:
            where, device = discovery(
                source, settings.prefix, settings.discovery_prefix, self._status, states.rules
            )
            await self._publish(where, json.dumps(device).encode(), retain=True)
            self._announced[source] = states.rules
        where = topic(settings.prefix, source or "server", "event")
        await self._event(onvif.Told(where, event.body))
        for name, value in changed.items():
            where = topic(settings.prefix, source, name)
            self._retained[where] = value.encode()
            await self._publish(where, value.encode(), retain=True)

    async def _event(self, told: onvif.Told) -> None:
        await self._publish(told.topic, told.body, retain=told.retain)
        self._doubtful.sent(told, len(told.topic) + len(told.body))

    async def _publish(self, where: str, body: bytes, *, retain: bool = False) -> None:
        """Returns when the broker has it."""
        assert self._client is not None, "not open"
        await self._client.publish(where, body, qos=1, retain=retain)

    async def close(self) -> None:
        self._client = None
        with suppress(aiomqtt.MqttError, OSError):
            await self._stack.aclose()
        self._stack = AsyncExitStack()
