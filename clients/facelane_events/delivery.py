"""One sink's deliveries: its own subscription, so that no sink waits for another.

The server keeps the history, and each sink asks for its own part of it: a sink that is slow, or
away for hours, costs nothing here but its position. At least once, in the order of the server;
an event that comes twice has the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

import structlog

import facelane
import facelane.aio
from facelane.types import Reconnect
from facelane_events.config import Sink as SinkSettings
from facelane_events.message import Message, history_lost, message, wanted
from facelane_events.position import DeadLetters, Position

log = structlog.get_logger(__name__)

FIRST_RETRY_S: Final = 0.5
SKIPPED_SAVE: Final = 100
"""Events that the filters hold back move the position at every so many."""


class UnavailableError(Exception):
    """It may go better later: tried again until it does."""


class RefusedError(Exception):
    """This event is not taken, ever: a dead letter."""


class GoneError(Exception):
    """The receiver wants nothing any more: the sink ends."""


class Sink(Protocol):
    """A way out. ``open`` and ``send`` raise ``UnavailableError``, ``RefusedError`` or
    ``GoneError``; after ``UnavailableError`` it is closed and opened again."""

    async def open(self) -> None: ...
    async def send(self, event: Message) -> None: ...
    async def close(self) -> None: ...


@dataclass
class Tally:
    """Of one sink since the start."""

    delivered: int = 0
    held_back: int = 0
    """By its filters."""
    dead_letters: int = 0
    attempts_failed: int = 0
    history_lost: int = 0
    waiting: bool = False
    """For the receiver."""
    ended: str = ""
    """Why it takes no more."""


class Delivery:
    """Drives one sink until it is cancelled, or the receiver is gone."""

    def __init__(
        self,
        settings: SinkSettings,
        sink: Sink,
        position: Position,
        dead: DeadLetters,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.settings = settings
        self.tally = Tally()
        self._sink = sink
        self._position = position
        self._dead = dead
        self._clock = clock
        self._open = False

    async def run(self, client: facelane.aio.Client) -> None:
        """Raises FacelaneError where the server refuses for good, OSError where the position
        cannot be kept."""
        try:
            # A receiver that shows who is there is told at once, not with the first event.
            with contextlib.suppress(UnavailableError, TimeoutError, OSError):
                async with asyncio.timeout(self.settings.attempt_timeout):
                    await self._sink.open()
                    self._open = True
            while True:
                try:
                    await self._follow(client, self._position.token)
                except facelane.FacelaneError as error:
                    if error.reason != facelane.Reason.HISTORY_LOST:
                        raise
                    self.tally.history_lost += 1
                    log.error("the server no longer has the events of a while", sink=self.name)
                    await self._deliver(history_lost(datetime.now(UTC)))
                    self._position.save("")
        except GoneError as error:
            self.tally.ended = str(error)
            log.error("a receiver is gone for good: its sink ends", sink=self.name, why=str(error))
        finally:
            await self._close()

    @property
    def name(self) -> str:
        return self.settings.name

    async def _follow(self, client: facelane.aio.Client, token: str) -> None:
        skipped = 0
        _leave_if_told()  # the receiver was opened before
        # Kinds are asked for at the server; the other filters are ours.
        watching = client.watch_events(token, self.settings.kinds, reconnect=Reconnect())
        async with watching as events:
            if events.resume_token != self._position.token:
                # What happens from here on is not lost, whatever becomes of this process.
                self._position.save(events.resume_token)
            async for event in events:
                if wanted(self.settings, event, self._clock()):
                    await self._deliver(message(self.settings, event))
                else:
                    self.tally.held_back += 1
                    skipped += 1
                    if skipped % SKIPPED_SAVE:
                        continue
                self._position.save(event.resume_token)
                _leave_if_told()

    async def _deliver(self, event: Message) -> None:
        """Returns when the receiver has it, or never will."""
        wait = FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(self.settings.attempt_timeout):
                    if not self._open:
                        await self._sink.open()
                        self._open = True
                    await self._sink.send(event)
            except RefusedError as error:
                self._bury(event, str(error))
                break
            except (UnavailableError, TimeoutError, OSError) as error:
                self.tally.attempts_failed += 1
                if not self.tally.waiting:
                    self.tally.waiting = True
                    why = str(error) or "no answer in time"
                    log.warning("a receiver is not there; trying again", sink=self.name, why=why)
                await self._close()
            else:
                self.tally.delivered += 1
                break
            _leave_if_told()
            await asyncio.sleep(wait * (0.5 + random.random() / 2))
            wait = min(2 * wait, self.settings.retry_max)
        if self.tally.waiting:
            self.tally.waiting = False
            log.info("a receiver is back", sink=self.name)

    def _bury(self, event: Message, why: str) -> None:
        self.tally.dead_letters += 1
        kept = False
        try:
            kept = self._dead.add(event.id, why, event.body)
        except OSError as error:
            why = f"{why}; and the file takes nothing: {error.strerror}"
        log.error("an event was refused", sink=self.name, event_id=event.id, why=why, kept=kept)

    async def _close(self) -> None:
        self._open = False
        with contextlib.suppress(TimeoutError, OSError, UnavailableError):
            async with asyncio.timeout(self.settings.attempt_timeout):
                await self._sink.close()


def _leave_if_told() -> None:
    """Raises CancelledError where a library has swallowed it: ``asyncio.wait_for`` of Python 3.11
    does when what it waits for arrives at the moment at which it is cancelled."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
