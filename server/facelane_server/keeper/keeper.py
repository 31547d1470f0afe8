"""The driver of ``roster``: processes, their links, timers, signals; and the switchboard by which a
shard asks the others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from facelane_server import config, folders, plan
from facelane_server.keeper import exposition
from facelane_server.keeper.child import Child
from facelane_server.keeper.port import Port
from facelane_server.keeper.roster import Do, Roster, What
from facelane_server.notify import Notifier
from facelane_server.observability.http import MetricsServer
from facelane_server.observability.logs import configure_logging
from facelane_server.pools import restart
from facelane_server.pools.mps import MpsDaemon
from facelane_server.pools.restart import Happening, Notice
from facelane_server.served import ServedModels
from facelane_server.shards.board import Board
from facelane_server.shards.dealing import settings_of
from facelane_server.shards.messages import (
    ALL,
    IN_TURN,
    Answer,
    Answers,
    Ask,
    Began,
    Begin,
    Drain,
    End,
    Expose,
    Open,
    Overall,
    Pulse,
    Question,
    ReloadConfig,
    ReloadModel,
    Reply,
)

log = structlog.get_logger(__name__)

TICK_S: Final = 1.0
EXPOSE_S: Final = 3.0
RELOAD_S: Final = 10.0
PORT_S: Final = 3.0
"""For shards whose keeper was killed to leave the port."""
MARGIN_S: Final = 10.0
"""For a shard that has drained to end its workers and write what it has to."""
GIVEN_UP: Final = frozenset({"EXIT_69", "EXIT_78", "EXIT_2"})
"""How a shard ends that cannot be started with this configuration, or on this machine."""


class Keeper:
    """One server of ``count`` shards. ``run`` is its life."""

    def __init__(self, settings: config.Config, path: Path | None, count: int) -> None:
        self._settings = settings
        self._path = path
        self._count = count
        grace_s = settings.server.drain_grace_s
        self._grace_s: float | None = None
        self._policy = restart.Policy(
            initial_s=0.1,
            # Whether its models can be loaded is the shard's own to say, and to try again.
            start_timeout_s=float("inf"),
            drain_timeout_s=grace_s + MARGIN_S,
        )
        self._roster = Roster(count, self._policy)
        self._children: dict[int, Child] = {}
        self._models: dict[str, str] = {}
        self._given: dict[int, dict[str, str]] = {}
        """By shard: the models that its settings were dealt with."""
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._told: Overall | None = None
        self._told_ready = False
        self._code = 0
        self._notifier = Notifier.from_environment()

    # -- life ------------------------------------------------------------------------------

    async def run(self) -> int:
        """Until SIGTERM or SIGINT, or until it cannot be begun; the exit code. Raises
        ``ConfigError`` and ``FacelaneError`` for what cannot be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload()))
        async with contextlib.AsyncExitStack() as stack:
            self._board = Board.make(self._count)
            stack.callback(self._board.close)
            self._runtime = stack.enter_context(folders.runtime_dir(self._settings))
            # What would keep a shard from starting keeps all of them.
            models = ServedModels.resolve(self._settings, calibrated=True)
            planned = await plan.check(self._settings, models.packages, shards=self._count)
            for line in planned.lines():
                log.info("memory plan", line=line)
            self._mps_pipes = await self._start_mps(stack)
            self._port = await _port(self._settings.listen)
            stack.callback(self._port.close)
            scraped = await MetricsServer.start(
                self._settings.metrics, self._exposition, self._serving
            )
            if scraped is not None:
                stack.push_async_callback(scraped.close)
            stack.push_async_callback(self._end_tasks)
            feeding = asyncio.create_task(self._notifier.keep_alive(lambda: self._roster.alive))
            self._tasks.add(feeding)
            log.info("keeper", shards=self._count, address=self._settings.listen)
            self._do(self._roster.start(time.monotonic()))
            ticked = time.monotonic()
            while not (self._roster.stopping and self._roster.gone and not self._children):
                now = time.monotonic()
                until = min(ticked + TICK_S, self._roster.next_due) - now
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(until, 0.0)):
                        await self._changed.wait()
                self._changed.clear()
                now = time.monotonic()
                self._do(self._roster.due(now))
                if now >= ticked + TICK_S:
                    elapsed, ticked = now - ticked, now
                    starved = [n for n, c in self._children.items() if c.was_starved(elapsed)]
                    self._do(self._roster.tick(now, starved))
                    self._tell_starting()
                self._tell()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
        log.info("ended", code=self._code)
        return self._code

    def request_stop(self, grace_s: float | None = None) -> None:
        """Drain all shards and end. Again is harmless."""
        if self._roster.stopping:
            return
        self._grace_s = grace_s
        self._notifier.stopping("draining")
        bound = self._settings.server.drain_grace_s if grace_s is None else grace_s
        self._notifier.extend_timeout(bound + MARGIN_S)
        log.info("draining", shards=len(self._children))
        self._do(self._roster.stop(time.monotonic()))
        self._changed.set()

    async def _start_mps(self, stack: contextlib.AsyncExitStack) -> str:
        """One daemon for all: the workers of two would take turns on the card."""
        if not any(pool.hosting.needs_mps for pool in self._settings.stages.values()):
            return ""
        daemon = await MpsDaemon.start(self._runtime / "mps")
        stack.push_async_callback(daemon.close)
        return str(daemon.pipe_directory)

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what the roster says ----------------------------------------------------------------

    def _do(self, what: Iterable[Do]) -> None:
        for one in what:
            child = self._children.get(one.shard)
            match one.what:
                case What.SPAWN:
                    self._begin(self._spawn(one.shard))
                case What.OPEN if child is not None:
                    child.link.send(Open())
                case What.DRAIN if child is not None:
                    child.link.send(Drain(grace_s=self._grace_s))
                case What.KILL if child is not None:
                    self._begin(self._kill(child))
            self._changed.set()

    async def _kill(self, child: Child) -> None:
        if self._roster.loss(child.index) == "HUNG":
            log.error("shard hangs", shard=child.index, pid=child.pid)
            await child.kill(words=True)
            return
        if self._roster.stopping and child.index not in self._roster.begun:
            # On its way up it has nothing to finish, but workers to end.
            child.signal(signal.SIGTERM)
            await asyncio.sleep(MARGIN_S)
        await child.kill(words=False)

    async def _spawn(self, index: int) -> None:
        # Not while a model is being changed: it would come up with the one before.
        async with self._turn:
            if self._roster.stopping:
                self._over(index, "STOPPED")
                return
            self._given[index] = dict(self._models)
            try:
                self._folder(index).mkdir(mode=0o700, exist_ok=True)
                child = await Child.start(
                    index, self._count, board=self._board.descriptor, mps_pipes=self._mps_pipes
                )
            except OSError as error:
                log.error("no process for a shard", shard=index, problem=error.strerror)
                self._over(index, "NO_PROCESS")
                return
            self._children[index] = child
            child.link.send(Begin(settings=self._dealt(index, self._settings)))
            self._do(self._roster.spawned(index, child.pid, time.monotonic()))
            if self._told is not None:
                child.link.send(self._told)
            if self._ending():  # meanwhile
                self._begin(self._kill(child))
        log.info("shard started", shard=index, pid=child.pid)
        try:
            await self._follow(child)
            # Its link is closed; so is it, or it is no use any more.
            try:
                async with asyncio.timeout(MARGIN_S):
                    how = await child.wait()
            except TimeoutError:
                await child.kill(words=False)
                how = await child.wait()
        except asyncio.CancelledError:
            child.signal(signal.SIGKILL)
            raise
        finally:
            child.close()
        del self._children[index]
        self._board.clear(index)
        told = log.info if self._roster.stopping else log.error
        told("shard gone", shard=index, pid=child.pid, how=how)
        if how in GIVEN_UP and self._roster.starting and not self._roster.stopping:
            self._code = int(how.removeprefix("EXIT_"))
            self.request_stop()
        self._over(index, how)

    def _ending(self) -> bool:
        return self._roster.stopping

    def _over(self, index: int, how: str) -> None:
        now = time.monotonic()
        self._do(self._roster.happened(index, Notice(Happening.LOSS, how), now))
        self._do(self._roster.happened(index, Notice(Happening.GONE), now))
        self._changed.set()

    def _folder(self, index: int) -> Path:
        return self._runtime / f"shard-{index}"

    def _dealt(self, index: int, settings: config.Config) -> config.Config:
        return settings_of(
            settings,
            index,
            self._count,
            runtime_dir=str(self._folder(index)),
            port=self._port.number,
            models=self._given[index],
        )

    # -- what shards say -----------------------------------------------------------------------

    async def _follow(self, child: Child) -> None:
        while (message := await child.link.receive()) is not None:
            now = time.monotonic()
            self._roster.heard(child.index)
            match message:
                case Began():
                    self._do(self._roster.began(child.index, now))
                case Pulse():
                    self._do(self._roster.pulsed(child.index, message, now))
                case Reply():
                    child.replied(message)
                case Ask():
                    self._begin(self._answer(child, message))
                case End():
                    self.request_stop(message.grace_s)
            self._changed.set()

    async def _answer(self, child: Child, ask: Ask) -> None:
        whom = self._roster.begun if ask.shard == ALL else [ask.shard]
        answers = await self.ask(ask.question, whom, ask.timeout_s)
        child.link.send(Answers(number=ask.number, answers=tuple(answers)))

    async def ask(self, question: Question, whom: Iterable[int], timeout_s: float) -> list[Answer]:
        """The answers of these shards, as far as there are such."""
        children = [self._children[index] for index in whom if index in self._children]
        if not isinstance(question, IN_TURN):
            return await asyncio.gather(*(child.ask(question, timeout_s) for child in children))
        answers: list[Answer] = []
        async with self._turn:
            for child in children:
                asked = question
                if isinstance(question, ReloadConfig):
                    asked = ReloadConfig(settings=self._dealt(child.index, question.settings))
                answer = await child.ask(asked, timeout_s)
                answers.append(answer)
                if isinstance(question, ReloadModel):
                    if answer.failure is not None:
                        break
                    if question.model:
                        self._models[question.pool] = question.model
        return answers

    # -- what others are told ------------------------------------------------------------------

    def _tell(self) -> None:
        """The shards of each other, systemd of all; what they know already is not repeated."""
        overall = self._roster.overall()
        if overall != self._told:
            self._told = overall
            for child in self._children.values():
                child.link.send(overall)
            self._notifier.status(self._status())
        if self._roster.ready and not self._told_ready and not self._roster.stopping:
            self._told_ready = True
            self._notifier.ready(self._status())
            log.info("serving", shards=self._count)

    def _tell_starting(self) -> None:
        if not self._told_ready and not self._roster.stopping:
            self._notifier.extend_timeout(30.0)

    def _status(self) -> str:
        return self._roster.status(sum(seat.streams for seat in self._board.seats()))

    def _serving(self, name: str) -> bool | None:
        return self._roster.health().get(name)

    async def _exposition(self) -> bytes:
        answers = await self.ask(Expose(), self._roster.begun, EXPOSE_S)
        texts = {one.shard: one.body.decode() for one in answers if one.failure is None}
        return await asyncio.to_thread(exposition.merged, texts, self._roster.standings())

    async def _reload(self) -> None:
        """SIGHUP: one shard after the other takes over what can be taken over."""
        if self._told_ready:
            self._notifier.reloading()
        try:
            fresh = config.load(self._path)
        except config.ConfigError as error:
            log.error("config not reloaded", problem=str(error))
        else:
            configure_logging(fresh.log)
            asked = ReloadConfig(settings=fresh)
            answers = await self.ask(asked, self._roster.begun, RELOAD_S)
            failed = [one.shard for one in answers if one.failure is not None]
            if failed:
                log.error("config not reloaded by all", shards=failed)
            else:
                # What shards that come back are given; the rest stays as all others have it.
                self._settings = msgspec.structs.replace(
                    self._settings, auth=fresh.auth, tls=fresh.tls, log=fresh.log
                )
                log.info("config reloaded", shards=len(answers))
        if self._told_ready:
            self._notifier.ready(self._status())


async def keep(settings: config.Config, path: Path | None, count: int) -> int:
    """Runs a server of so many shards; the exit code."""
    configure_logging(settings.log)
    return await Keeper(settings, path, count).run()


async def _port(listen: str) -> Port:
    """Waits a little: the shards of a keeper that was killed are about to end."""
    deadline = time.monotonic() + PORT_S
    while True:
        try:
            return Port.hold(listen)
        except config.AddressError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)
