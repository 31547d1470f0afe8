"""A process that is one shard of several: its end of the link to the keeper, and what it tells.

A server of one process has no seat, and nothing here runs in it.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from typing import Final, Protocol, Self

import msgspec
import structlog

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.edge.controls import Degradation
from facelane_server.edge.server import Edge
from facelane_server.edge.streams import StreamRegistry
from facelane_server.observability.metrics import Metrics
from facelane_server.shards.board import Board, Holdings, better
from facelane_server.shards.board import Seat as Place
from facelane_server.shards.link import Link, at_shard
from facelane_server.shards.messages import (
    ALL,
    PULSE_S,
    Answer,
    Answers,
    Ask,
    Began,
    Begin,
    Drain,
    End,
    Expose,
    Failure,
    Launch,
    Open,
    Overall,
    Pulse,
    Put,
    Question,
    ReloadConfig,
    Reply,
    Standing,
    ToShard,
)

log = structlog.get_logger(__name__)

ORPHAN_GRACE_S: Final = 0.5
"""Without its keeper a shard ends its streams within this time."""
ORPHAN_S: Final = 5.0
"""And is gone after this one, even if its loop hangs."""
BEGIN_S: Final = 30.0


class Served(Protocol):
    """What a seat asks of the server that it belongs to."""

    edge: Edge
    metrics: Metrics

    def can_infer(self) -> dict[Stage, bool]:
        """By stage."""

    def degradations(self) -> list[Degradation]:
        """Of this process alone."""

    def request_stop(self, grace_s: float | None = None) -> None:
        """Drain and end this process."""

    def take_over(self, fresh: config.Config) -> None:
        """Raises ``ConfigError``."""


class Seat:
    """Made by ``take``; ``attend`` runs until it is cancelled."""

    def __init__(
        self, launch: Launch, link: Link[ToShard], board: Board, settings: config.Config
    ) -> None:
        self.index, self.count = launch.index, launch.count
        self.mps_pipes = launch.mps_pipes
        self.settings = settings
        self.holdings = Holdings(board, launch.index)
        self.standings: tuple[Standing, ...] = ()
        self._link = link
        self._board = board
        self._opened = asyncio.Event()
        self._takes = False
        self._streams = 0
        self._full = False
        self._began = False
        self._asked: dict[int, asyncio.Future[tuple[Answer, ...]]] = {}
        self._next = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def take(cls, encoded: str) -> Self:
        """From the command line of a shard. Raises ``ConfigError`` for anything else."""
        try:
            launch = msgspec.json.decode(encoded, type=Launch)
            end = socket.socket(fileno=launch.link)
            board = Board(launch.board, launch.count)
        except (msgspec.MsgspecError, OSError, ValueError):
            raise config.ConfigError("a shard is started by `facelane-server run` alone") from None
        _end_with_keeper(launch.link)
        link = await at_shard(end)
        async with asyncio.timeout(BEGIN_S):
            first = await link.receive()
        if not isinstance(first, Begin):
            raise config.ConfigError("the keeper of this shard is gone")
        return cls(launch, link, board, first.settings)

    # -- what the server tells -------------------------------------------------------------

    def began(self, streams: StreamRegistry) -> None:
        """The store is open; of ``streams`` the others are told how many there are."""
        streams.on_number = self._count
        self._began = True
        self._link.send(Began())
        self._changed.set()

    async def allowed(self, stop: asyncio.Event) -> bool:
        """When connections may be taken; False when the server is to end before that."""
        waits = [asyncio.create_task(event.wait()) for event in (self._opened, stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        return self._opened.is_set() and not stop.is_set()

    def opened(self) -> None:
        """Connections are taken, if they may be."""
        self._takes = self._opened.is_set()
        self._tell_board()

    def draining(self) -> None:
        """No connection is taken any more."""
        self._takes = False
        self._tell_board()

    def changed(self) -> None:
        """Health, perhaps."""
        self._changed.set()

    def end_all(self, grace_s: float | None) -> None:
        """The whole server is to drain and end."""
        self._link.send(End(grace_s=grace_s))

    def _count(self, streams: int) -> None:
        self._streams = streams
        self._tell_board()

    def _tell_board(self) -> None:
        self._board.tell(self.index, streams=self._streams, takes=self._takes, full=self._full)

    # -- what the server asks ----------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Of what one shard tells for all: the first one that takes connections."""
        return next((one.shard for one in self.standings if one.takes), 0) == self.index

    def seats(self) -> list[Place]:
        return self._board.seats()

    def move(self) -> str | None:
        """Where a stream had better be opened: the target, empty = at the same address once more;
        None = here."""
        best = better(self._board.seats(), self.index)
        if best is None:
            return None
        listen = self.settings.listen
        if not listen.startswith("unix:"):
            return ""
        first = listen.removesuffix(f".{self.index}") if self.index else listen
        return first if best == 0 else f"{first}.{best}"

    async def ask(
        self, question: Question, *, shard: int = ALL, timeout_s: float = 5.0
    ) -> list[Answer]:
        """The answers of all shards, this one included, or of one. Those that are not there are
        left out."""
        self._next += 1
        number = self._next
        waiting: asyncio.Future[tuple[Answer, ...]] = asyncio.get_running_loop().create_future()
        self._asked[number] = waiting
        try:
            self._link.send(Ask(number=number, question=question, shard=shard, timeout_s=timeout_s))
            async with asyncio.timeout(timeout_s * self.count + PULSE_S):
                return list(await waiting)
        except TimeoutError:
            return []
        finally:
            del self._asked[number]

    # -- the link ------------------------------------------------------------------------------

    async def attend(self, served: Served) -> None:
        """Hears the keeper, and tells it how this shard fares, until cancelled."""
        pulsing = asyncio.create_task(self._pulse(served), name="shard-pulse")
        try:
            while (message := await self._link.receive()) is not None:
                self._heard(message, served)
            log.error("the keeper is gone: this shard ends")
            served.request_stop(ORPHAN_GRACE_S)
        finally:
            pulsing.cancel()
            for task in self._tasks:
                task.cancel()

    def _heard(self, message: ToShard, served: Served) -> None:
        match message:
            case Open():
                self._opened.set()
            case Overall():
                self.standings = message.shards
                served.edge.health.overall(message.health)
            case Drain():
                served.request_stop(message.grace_s)
            case Put():
                task = asyncio.create_task(self._answer(message, served))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Answers():
                waiting = self._asked.get(message.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message.answers)

    async def _answer(self, put: Put, served: Served) -> None:
        body, failure = b"", None
        try:
            match put.question:
                case Expose():
                    body = served.metrics.exposition()
                case ReloadConfig():
                    served.take_over(put.question.settings)
                case question:
                    body = await served.edge.answer(question)
        except FacelaneError as error:
            failure = Failure(
                reason=error.reason.value,
                message=error.message,
                retryable=error.retryable,
                metadata=dict(error.metadata),
            )
        except config.ConfigError as error:
            failure = Failure(reason=Reason.CONFIG_INVALID.value, message=str(error))
        except Exception as error:
            log.exception("a question of the keeper was not answered")
            failure = Failure(reason=Reason.INTERNAL.value, message=type(error).__name__)
        self._link.send(Reply(number=put.number, body=body, failure=failure))

    async def _pulse(self, served: Served) -> None:
        while True:
            able = served.can_infer()
            load = served.edge.load.load
            self._full = load is not None and load.thinned > 0
            self._tell_board()
            amiss = [f"{found.component} {found.cause}" for found in served.degradations()]
            self._link.send(
                Pulse(
                    ready=self._began and bool(able) and all(able.values()),
                    alive=able.get(Stage.DETECTOR, False),
                    health=served.edge.health.own,
                    amiss="; ".join(amiss),
                )
            )
            try:
                async with asyncio.timeout(PULSE_S):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()


def _end_with_keeper(link: int) -> None:
    """Sees to it that this process does not outlive its keeper, even if its loop hangs: end of file
    is for the loop, and this thread waits for what is left then."""
    watched = os.dup(link)

    def watch() -> None:
        poll = select.poll()
        poll.register(watched, 0)  # POLLHUP and POLLERR are always told
        while not poll.poll():
            continue
        time.sleep(ORPHAN_S)
        os._exit(1)

    threading.Thread(target=watch, name="keeper-watch", daemon=True).start()
