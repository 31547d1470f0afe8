"""One sink's deliveries: its own subscription, so that no sink waits for another.

The server keeps the history, and each sink asks for its own part of it: a sink that is slow, or
away for hours, costs nothing here but its position. At least once, in the order of the server;
an event that comes twice has the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol, runtime_checkable

import structlog

import facelane
import facelane.aio
from facelane.types import Reconnect
from facelane_events.config import Sink as SinkSettings
from facelane_events.message import Message, history_lost, message, wanted
from facelane_events.position import DeadLetters, Position

log = structlog.get_logger(__name__)

FIRST_RETRY_S: Final = 0.5
STEADY_S: Final = 10.0
"""A receiver that was there for so long is tried again at once when it is gone."""
SKIPPED_SAVE: Final = 100
"""Events that the filters hold back move the position at every so many."""
NOTED_S: Final = 30.0
"""While nothing is delivered, how far the watch has come is kept every so many seconds: a server
forgets what is old, and a position in it would be lost although nothing was missed."""


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


@runtime_checkable
class Standing(Sink, Protocol):
    """A way out that shows who is there: it is kept open, whether there are events or not."""

    async def broken(self) -> None:
        """Returns when what was opened is no more."""


@runtime_checkable
class Buffered(Sink, Protocol):
    """A way out that holds what it was sent: a machine that loses its power would lose it."""

    async def settle(self) -> None:
        """Returns when all that was sent lies where it stays."""


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
        local: Callable[[datetime | None], datetime] = lambda moment: (
            moment or datetime.now(UTC)
        ).astimezone(),
    ) -> None:
        self.settings = settings
        self.tally = Tally()
        self._sink = sink
        self._position = position
        self._dead = dead
        self._local = local
        self._open = False
        self._openings = 0
        self._idle = False
        """Everything that was told is delivered."""
        self._unsettled = False
        """What was delivered is not known to be on the disk."""
        self._attempts = asyncio.Lock()

    async def run(self, client: facelane.aio.Client) -> None:
        """Raises FacelaneError where the server refuses for good, OSError where the position
        cannot be kept."""
        standing: asyncio.Task[None] | None = None
        try:
            # A receiver that shows who is there is told at once, not with the first event.
            with contextlib.suppress(Exception):
                await self._opened()
            if isinstance(self._sink, Standing):
                standing = asyncio.create_task(self._stand(self._sink), name=f"{self.name} stands")
            while True:
                try:
                    await self._follow(client, self._position.token)
                except facelane.FacelaneError as error:
                    if error.reason != facelane.Reason.HISTORY_LOST:
                        raise
                    self.tally.history_lost += 1
                    log.error("the server no longer has the events of a while", sink=self.name)
                    await self._deliver(history_lost(datetime.now(UTC)))
                    # What it still has is behind this position, where it says so.
                    self._position.save(error.metadata.get("resume_token", ""))
        except GoneError as error:
            self.tally.ended = str(error)
            log.error("a receiver is gone for good: its sink ends", sink=self.name, why=str(error))
        finally:
            if standing is not None:
                standing.cancel()
                await asyncio.wait([standing], timeout=self.settings.attempt_timeout)
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
            noting = asyncio.create_task(self._note(events), name=f"{self.name} notes")
            try:
                self._idle = True
                async for event in events:
                    self._idle = False
                    # When it happened decides, not when a receiver that was away gets it.
                    if wanted(self.settings, event, self._local(event.event_time)):
                        await self._deliver(message(self.settings, event))
                        await self._reached(event.resume_token)
                    else:
                        self.tally.held_back += 1
                        skipped += 1
                        if skipped % SKIPPED_SAVE == 0:
                            await self._reached(event.resume_token)
                    self._idle = True
                    _leave_if_told()
            finally:
                self._idle = False
                noting.cancel()

    async def _reached(self, token: str) -> None:
        """Everything up to here is delivered."""
        # First what was delivered, then that it was: what may still be lost is told again.
        if not self._position.due or await self._settles():
            self._position.save(token)

    async def _settles(self) -> bool:
        """Whether all that was sent lies where it stays."""
        if not isinstance(self._sink, Buffered):
            return True
        try:
            async with asyncio.timeout(self.settings.attempt_timeout):
                await self._sink.settle()
        except Exception as error:
            if not self._unsettled:
                why = type(error).__name__
                log.warning("what was delivered may be lost", sink=self.name, why=why)
            self._unsettled = True
            return False
        self._unsettled = False
        return True

    async def _note(self, events: facelane.aio.EventStream) -> None:
        while True:
            await asyncio.sleep(NOTED_S)
            token = events.resume_token
            if not self._idle or token == self._position.token or not await self._settles():
                continue
            if self._idle and events.resume_token == token:  # still
                # One that cannot be kept is told of by the next delivery.
                with contextlib.suppress(OSError):
                    self._position.save(token)

    async def _stand(self, sink: Standing) -> None:
        """Opens the receiver again whenever it is gone, also where there is nothing to deliver."""
        wait = FIRST_RETRY_S
        while True:
            begun, openings = time.monotonic(), self._openings
            if self._open:
                with contextlib.suppress(Exception):
                    await sink.broken()
            async with self._attempts:
                if self._openings == openings:  # no delivery was quicker
                    await self._close()
                    try:
                        await self._opened()
                    except Exception as error:
                        self._failed(error)
                    else:
                        self._back()
            if time.monotonic() - begun > STEADY_S:
                wait = FIRST_RETRY_S
            await asyncio.sleep(wait * (0.5 + random.random() / 2))
            wait = min(2 * wait, self.settings.retry_max)

    async def _opened(self) -> None:
        async with asyncio.timeout(self.settings.attempt_timeout):
            await self._sink.open()
        self._open = True
        self._openings += 1

    async def _deliver(self, event: Message) -> None:
        """Returns when the receiver has it, or never will."""
        wait = FIRST_RETRY_S
        while True:
            async with self._attempts:
                try:
                    async with asyncio.timeout(self.settings.attempt_timeout):
                        if not self._open:
                            await self._sink.open()
                            self._open = True
                            self._openings += 1
                        await self._sink.send(event)
                except GoneError:
                    raise
                except RefusedError as error:
                    self._bury(event, str(error))
                    break
                except Exception as error:
                    # Whatever a library throws: it is this sink's, and the others go on.
                    self._failed(error)
                    await self._close()
                else:
                    self.tally.delivered += 1
                    break
            _leave_if_told()
            await asyncio.sleep(wait * (0.5 + random.random() / 2))
            wait = min(2 * wait, self.settings.retry_max)
        self._back()

    def _failed(self, error: Exception) -> None:
        self.tally.attempts_failed += 1
        if self.tally.waiting:
            return
        self.tally.waiting = True
        known = isinstance(error, (UnavailableError, TimeoutError, OSError))
        # The text of others may repeat what was sent.
        why = (str(error) or "no answer in time") if known else type(error).__name__
        log.warning("a receiver is not there; trying again", sink=self.name, why=why)

    def _back(self) -> None:
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
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self.settings.attempt_timeout):
                await self._sink.close()


def _leave_if_told() -> None:
    """Raises CancelledError where a library has swallowed it: ``asyncio.wait_for`` of Python 3.11
    does when what it waits for arrives at the moment at which it is cancelled."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
