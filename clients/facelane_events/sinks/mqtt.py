"""MQTT: every event, what is so now as retained topics, and Home Assistant's discovery; or every
event as ONVIF has it."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections import OrderedDict
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import aiomqtt

from facelane_events import config, trust
from facelane_events.delivery import UnavailableError
from facelane_events.message import HISTORY_LOST, Message
from facelane_events.sinks import onvif
from facelane_events.sinks.doubt import Doubtful
from facelane_events.sinks.homeassistant import States, discovery, topic

DOUBTFUL_BYTES: Final = 64 * 1024
"""A broker acknowledges before it has written: what it loses in a crash is the last of it."""
MAX_SOURCES: Final = 4096
"""Whose states are known; of more, those that were heard of last."""
MAX_RETAINED: Final = 65_536
"""Topics that a broker which forgot them is told again; of more, those that changed last."""
AT_ONCE: Final = 10
"""Retained topics that are told again together: one after the other, those of some hundred cameras
would outlast any attempt."""


@dataclass
class _Source:
    """A camera."""

    states: States = field(default_factory=States)
    announced: frozenset[str] | None = None
    """The parts for its zones and lines that discovery has told of."""


class MqttSink:
    def __init__(self, settings: config.Mqtt) -> None:
        self._settings = settings
        config.secret(settings.password_file)
        self._stack = AsyncExitStack()
        self._client: aiomqtt.Client | None = None
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._retained: OrderedDict[str, bytes] = OrderedDict()
        self._due: dict[str, None] = {}
        """Topics of these that this broker may not have: what an attempt has told of them the next
        one need not."""
        self._zones = onvif.Zones()
        self._changed: tuple[str, list[onvif.Told]] = ("", [])
        """Of the event that is under way: one that is tried again changes nothing again."""
        self._doubtful: Doubtful[onvif.Told] = Doubtful(DOUBTFUL_BYTES)

    async def open(self) -> None:
        settings = self._settings
        will = aiomqtt.Will(self._status, b"offline", qos=1, retain=True)
        context = None
        try:
            if settings.tls:
                context = trust.context(settings.tls_ca, settings.tls_fingerprint)
            client = aiomqtt.Client(
                settings.host,
                settings.port,
                username=settings.username or None,
                # Read again: it may have been exchanged meanwhile.
                password=config.secret(settings.password_file) or None,
                # Of two with one name a broker lets in the last alone, again and again.
                identifier=f"facelane-events-{settings.name}-{socket.gethostname()}",
                will=will,
                tls_context=context,
                timeout=settings.attempt_timeout,
            )
            self._client = await self._stack.enter_async_context(client)
            await self._publish(self._status, b"online", retain=True)
            while (told := self._doubtful.next()) is not None:
                await self._publish(told.topic, told.body, retain=told.retain)
                self._doubtful.sent_again()
            await self._tell_again()
        except (aiomqtt.MqttError, OSError) as error:
            raise UnavailableError(str(error)) from None
        except config.ConfigError as error:
            raise UnavailableError(str(error)) from None

    async def _tell_again(self) -> None:
        """What is retained: another broker, perhaps, or one that has forgotten."""
        if not self._due:
            self._due = dict.fromkeys(self._retained)
        while self._due:
            some = list(itertools.islice(self._due, AT_ONCE))
            there = [(where, self._retained[where]) for where in some if where in self._retained]
            await asyncio.gather(*(self._publish(at, body, retain=True) for at, body in there))
            for where in some:
                del self._due[where]

    @property
    def _status(self) -> str:
        return f"{self._settings.prefix}/status/{self._settings.name}"

    async def broken(self) -> None:
        client = self._client
        if client is not None:
            # Nothing is subscribed to: this ends with the connection.
            with suppress(aiomqtt.MqttError):
                async for _ in client.messages:
                    pass

    async def send(self, event: Message) -> None:
        well = False
        try:
            if self._changed[0] != event.id:
                self._changed = event.id, self._told(event)
            for told in self._changed[1]:
                await self._tell(told)
            well = True
        except (aiomqtt.MqttError, OSError) as error:
            raise UnavailableError(str(error)) from None
        finally:
            if not well:
                self._doubtful.broke()

    def _told(self, event: Message) -> list[onvif.Told]:
        """What an event comes to; called once for each."""
        settings, source = self._settings, event.source_id
        if settings.payload == "onvif":
            return onvif.messages(settings.prefix, event, self._zones)
        found = [onvif.Told(topic(settings.prefix, source or "server", "event"), event.body)]
        changed: dict[str, dict[str, str]] = {}
        if event.kind == HISTORY_LOST:
            # Who has left meanwhile is not known: nobody is said to be there.
            changed = {name: known.states.emptied() for name, known in self._sources.items()}
        elif event.event is not None and source:
            known = self._source(source)
            changed = {source: known.states.after(event.event)}
            if settings.homeassistant and known.announced != known.states.rules:
                known.announced = known.states.rules
                where, device = discovery(
                    source, settings.prefix, settings.discovery_prefix, self._status,
                    known.announced,
                )  # fmt: skip
                found.insert(0, onvif.Told(where, json.dumps(device).encode(), retain=True))
        for name, values in changed.items():
            for part, value in values.items():
                where = topic(settings.prefix, name, part)
                found.append(onvif.Told(where, value.encode(), retain=True))
        return found

    def _source(self, name: str) -> _Source:
        known = self._sources.setdefault(name, _Source())
        self._sources.move_to_end(name)
        if len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        return known

    async def _tell(self, told: onvif.Told) -> None:
        if told.retain:
            self._retained.pop(told.topic, None)
            if told.body:
                self._retained[told.topic] = told.body
            if len(self._retained) > MAX_RETAINED:
                self._retained.popitem(last=False)
        await self._publish(told.topic, told.body, retain=told.retain)
        if not told.retain or self._settings.payload == "onvif":
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
