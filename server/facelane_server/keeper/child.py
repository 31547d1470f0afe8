"""A shard's process and the link to it, as the keeper holds them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import Final, Self

import msgspec

from facelane_server import limits
from facelane_server.shards.link import Link, at_keeper
from facelane_server.shards.messages import (
    Answer,
    Failure,
    Launch,
    Put,
    Question,
    Reply,
    ToKeeper,
)

STARVED_SHARE: Final = 0.5
"""Of the time, spent waiting for a processor."""
WORDS_S: Final = 1.0
"""After SIGABRT, for a shard that hangs to say where."""


class Child:
    """Made by ``start``. Its end is the end of ``wait``; the owner then calls ``close``."""

    def __init__(
        self, index: int, process: asyncio.subprocess.Process, link: Link[ToKeeper]
    ) -> None:
        self.index = index
        self.link = link
        self._process = process
        self._asked: dict[int, asyncio.Future[Reply]] = {}
        self._next = 0
        self._waited_ns = 0

    @classmethod
    async def start(cls, index: int, count: int, *, board: int, mps_pipes: str) -> Self:
        """Raises ``OSError`` where no process can be had."""
        ours, theirs = socket.socketpair()
        with theirs:
            launch = Launch(
                index=index, count=count, link=theirs.fileno(), board=board, mps_pipes=mps_pipes
            )
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "facelane_server",
                    "shard",
                    msgspec.json.encode(launch).decode(),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), board),
                )
            except BaseException:
                ours.close()
                raise
        return cls(index, process, await at_keeper(ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """Until the process is gone: how it ended, in one word."""
        code = await self._process.wait()
        if code < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-code).name
        return f"EXIT_{abs(code)}"

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def was_starved(self, elapsed_s: float) -> bool:
        """Whether its first thread, which runs its loop, has wanted a processor for most of the
        time since the last call and had none. As Linux counts it; elsewhere never."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat")
        try:
            waited_ns = int(path.read_bytes().split()[1])
        except (OSError, ValueError, IndexError):
            return False
        before, self._waited_ns = self._waited_ns, waited_ns
        return waited_ns - before > elapsed_s * STARVED_SHARE * 1e9

    async def kill(self, *, words: bool) -> None:
        """At once; ``words``: after its stacks are in the log."""
        if words:
            self.signal(signal.SIGABRT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WORDS_S):
                    await self._process.wait()
                    return
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Whoever waits for an answer is told that there is none."""
        self.link.close()
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.cancel()

    async def ask(self, question: Question, timeout_s: float) -> Answer:
        if len(self._asked) >= limits.MAX_LINK_QUESTIONS:
            return self._silent("too much is asked of the server at one time")
        self._next += 1
        number = self._next
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked[number] = waiting
        try:
            self.link.send(Put(number=number, question=question))
            done, _ = await asyncio.wait((waiting,), timeout=timeout_s)
            if not done or waiting.cancelled():
                return self._silent(f"shard {self.index} was lost, or does not answer")
            reply = waiting.result()
            return Answer(shard=self.index, body=reply.body, failure=reply.failure)
        finally:
            del self._asked[number]

    def replied(self, reply: Reply) -> None:
        waiting = self._asked.get(reply.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _silent(self, why: str) -> Answer:
        failure = Failure(reason="NO_ANSWER", message=f"{why}; try again", retryable=True)
        return Answer(shard=self.index, failure=failure)
