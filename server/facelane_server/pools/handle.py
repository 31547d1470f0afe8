"""The hold on a worker's present process: an ``UnreadyHandle`` becomes a ``ReadyHandle`` or is
lost.

They are different types, and only a ``ReadyHandle`` can take a job, so that nothing can
be dispatched to a worker that has not loaded, warmed up and answered a first inference.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from facelane_server import limits
from facelane_server.ipc import messages
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.channel import ChannelError, ProtocolError, ServerChannel
from facelane_server.ipc.messages import (
    Cancel,
    CloseVideo,
    Drain,
    Drained,
    Fatal,
    FromWorker,
    GalleryDelta,
    GalleryLoaded,
    GallerySnapshot,
    Hello,
    Infer,
    InferDone,
    InferFailed,
    Load,
    Ping,
    Pong,
    Ready,
    Scrub,
    Warming,
)
from facelane_server.pools.groups import Decoders
from facelane_server.pools.host import Link
from facelane_server.pools.tasks import Job


class WorkerLostError(Exception):
    """The worker is of no use any more; ``reason`` is one constant word."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    @classmethod
    def last_words(cls, fatal: Fatal) -> WorkerLostError:
        known = fatal.reason in _LAST_WORDS
        return cls(fatal.reason if known else "INTERNAL", fatal.message)

    @classmethod
    def by(cls, error: ChannelError) -> WorkerLostError:
        return cls("PROTOCOL" if isinstance(error, ProtocolError) else "EXITED", str(error))


_INBOX: Final = 8
"""Messages of a worker that is not ready: Hello, Warming, Ready, Fatal, and some patience."""
_LAST_WORDS: Final = frozenset(
    {
        "LOAD_FAILED",
        "WARM_UP_FAILED",
        "DEVICE_POISONED",
        "OUT_OF_MEMORY",
        "WORN_OUT",
        "PROTOCOL",
        "INTERNAL",
    }
)


class UnreadyHandle:
    """A worker that was launched. Owns the channel and the arenas until ``ready``."""

    def __init__(self, link: Link, worker_id: str, load: Load) -> None:
        self.link = link
        self.worker_id = worker_id
        self._load = load
        self._inbox: deque[FromWorker] = deque()
        self._error: WorkerLostError | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._request: Arena | None = None
        self._response: Arena | None = None
        self._channel = ServerChannel(
            link.sock, self._on_message, self._on_lost, asyncio.get_running_loop()
        )
        self._handed_over = False

    async def ready(self, progress: Callable[[str], None]) -> ReadyHandle:
        """Load and warm the model; ``progress`` hears HELLO and WARMING. The caller bounds
        the time. Raises WorkerLostError; then call ``close``."""
        hello = await self._next(Hello)
        assert isinstance(hello, Hello)
        if hello.protocol != messages.PROTOCOL:
            raise WorkerLostError("PROTOCOL", "the worker is of another version")
        progress("HELLO")
        load = self._load
        self._request = Arena.create("facelane-request", load.slots, load.request_slot_bytes)
        self._response = Arena.create("facelane-response", load.slots, load.response_slot_bytes)
        try:
            self._channel.send(load, [self._request.fileno(), self._response.fileno()])
        except ChannelError as error:
            raise self._error or WorkerLostError("EXITED", str(error)) from None
        await self._next(Warming)
        progress("WARMING")
        facts = await self._next(Ready)
        assert isinstance(facts, Ready)
        self._handed_over = True
        return ReadyHandle(
            self.link, self.worker_id, facts, self._channel, self._request, self._response
        )

    def close(self) -> None:
        """Close what a ReadyHandle has not taken over. Safe to call twice."""
        if self._handed_over:
            return
        self._channel.close()
        for arena in (self._request, self._response):
            if arena is not None:
                arena.close()

    async def _next(self, kind: type[FromWorker]) -> FromWorker:
        while not self._inbox:
            if self._error is not None:
                raise self._error
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        message = self._inbox.popleft()
        if isinstance(message, Fatal):
            raise WorkerLostError.last_words(message)
        if not isinstance(message, kind):
            raise WorkerLostError("PROTOCOL", f"unexpected {type(message).__name__}")
        return message

    def _on_message(self, message: FromWorker) -> None:
        if len(self._inbox) >= _INBOX:
            self._error = WorkerLostError("PROTOCOL", "it says more than there is to say")
            self._channel.close()
        else:
            self._inbox.append(message)
        self._wake()

    def _on_lost(self, error: ChannelError) -> None:
        self._error = self._error or WorkerLostError.by(error)
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class ReadyHandle:
    """A worker that takes jobs. Owns the channel and the arenas.

    Set the ``on_…`` callbacks before the first job. A slot is free again when its job was
    answered, or never: a lost worker's arenas go with it.
    """

    def __init__(
        self,
        link: Link,
        worker_id: str,
        facts: Ready,
        channel: ServerChannel,
        request: Arena,
        response: Arena,
    ) -> None:
        self.link = link
        self.worker_id = worker_id
        self.facts = facts
        self.batch_max = facts.batch_max
        self.overlaps = facts.device_name.startswith("cuda")
        """It begins a job before the one before it has ended."""
        self.service_ns = facts.latency_ms * 1e6
        """Running mean of a job's time."""
        self.jobs: deque[Job] = deque()
        """In flight, in the order sent."""
        self.decoders = Decoders()
        self.memory_mib = facts.memory_mib
        self.gallery_version = 0
        self.gallery_base = 0
        """The version of the last snapshot that was sent."""
        self.gallery_sent_ns = 0
        """When the oldest snapshot that it has not answered was sent."""
        self.ping_sent_ns = 0
        """When the ping that is not answered yet was sent; 0 = none."""
        self.canary_ns = 0
        """When the last canary was sent; ``canary_due``: one goes as soon as there is a place."""
        self.canary_due = False
        self.canaries = 0
        self.on_answer: Callable[[ReadyHandle, Job, InferDone | InferFailed], None] = _unset
        self.on_gallery: Callable[[ReadyHandle], None] = _unset
        self.on_drained: Callable[[ReadyHandle], None] = _unset
        self.on_lost: Callable[[ReadyHandle, WorkerLostError], None] = _unset
        self._channel = channel
        self._request = request
        self._response = response
        self.places = request.slots
        """Jobs that it has at most in flight."""
        self._free = list(range(request.slots))
        self._pings = 0
        self._gallery_sent = 0
        self.closed = False
        channel.on_message = self._on_message
        channel.on_lost = self._on_lost

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def request_slot(self) -> tuple[int, memoryview]:
        """A free slot, to be filled and then passed to ``send``."""
        return self._free[-1], self._request.slot(self._free[-1])

    def response(self, job: Job) -> memoryview:
        return self._response.slot(job.slot)

    def send(self, job: Job, items: list[messages.Item]) -> None:
        """Raises ChannelClosed; the worker is then lost and its owner says so."""
        assert self._free
        assert self._free[-1] == job.slot
        self._channel.send(Infer(job.job_id, job.slot, items))
        self._free.pop()
        self.jobs.append(job)

    def done(self, job: Job, response_used: int) -> None:
        """The answer to a job was read: its slot is free."""
        self._request.clear(job.slot, job.request_used)
        self._response.clear(job.slot, response_used)
        self._free.append(job.slot)

    def cancel(self, job: Job) -> None:
        """Best effort: the worker may have begun it."""
        with contextlib.suppress(ChannelError):
            self._channel.send(Cancel(job.job_id))

    def close_video(self, lane: int) -> None:
        """The lane's decoder is not needed here any more."""
        if lane in self.decoders:
            self.decoders.closed(lane)
            with contextlib.suppress(ChannelError):  # end of file tells
                self._channel.send(CloseVideo(lane))

    def scrub(self) -> None:
        """Somebody was deleted: nothing of them is to be left in the worker's free memory."""
        with contextlib.suppress(ChannelError):  # end of file tells
            self._channel.send(Scrub())

    def take_over(self, lanes: Sequence[int], everyone: Sequence[ReadyHandle | None]) -> None:
        """These lanes are given to this worker: of video, no other decodes them from now on, and
        those that it decoded longest ago go where there would be too many."""
        given = [lane for lane in lanes if lane in self.decoders] if len(self.decoders) else []
        if not given:
            return
        for other in everyone:
            if other is not None and other is not self:
                for lane in given:
                    other.close_video(lane)
        for lane in self.decoders.beyond(limits.MAX_DECODERS, given):
            self.close_video(lane)

    def ping(self, now_ns: int) -> None:
        self._pings += 1
        self.ping_sent_ns = now_ns
        with contextlib.suppress(ChannelError):  # end of file tells
            self._channel.send(Ping(self._pings))

    def wait_anew(self, now_ns: int) -> None:
        """For the pong and the snapshot that are awaited, if any: as if sent now."""
        if self.ping_sent_ns:
            self.ping_sent_ns = now_ns
        self.gallery_sent_ns = now_ns

    def publish(
        self, gallery: GallerySnapshot | GalleryDelta, descriptors: list[int], now_ns: int
    ) -> None:
        """A snapshot without its table, which is in the second descriptor (see
        ``gallery_table``), or a delta of the last one that was sent, with its log. Raises
        ChannelClosed."""
        if self.gallery_sent_ns == 0 or self.gallery_version == self._gallery_sent:
            self.gallery_sent_ns = now_ns
        if isinstance(gallery, GallerySnapshot):
            self.gallery_base = gallery.version
        self._gallery_sent = gallery.version
        self._channel.send(gallery, descriptors)

    def receive_last(self) -> None:
        """``send`` failed: hear the worker's last words, if it left any."""
        self._channel.receive_last()

    def drain(self) -> None:
        with contextlib.suppress(ChannelError):
            self._channel.send(Drain())

    def close(self) -> None:
        """Safe to call twice."""
        if not self.closed:
            self.closed = True
            self._channel.close()
            self._request.close()
            self._response.close()

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, (InferDone, InferFailed)):
            if not self.jobs or self.jobs[0].job_id != message.job_id:
                cancelled = isinstance(message, InferFailed) and self._remove(message.job_id)
                if cancelled:
                    self.on_answer(self, cancelled, message)
                else:
                    self._breach("an answer to no job, or out of order")
                return
            if isinstance(message, InferDone):
                self.memory_mib = message.memory_mib
            self.on_answer(self, self.jobs.popleft(), message)
        elif isinstance(message, Pong):
            if message.sequence != self._pings or not self.ping_sent_ns:
                self._breach("a pong to no ping")
                return
            self.ping_sent_ns = 0
            self.memory_mib = message.memory_mib
        elif isinstance(message, GalleryLoaded):
            if not self.gallery_version < message.version <= self._gallery_sent:
                self._breach("a gallery that it was not sent")
                return
            self.gallery_version = message.version
            self.on_gallery(self)
        elif isinstance(message, Drained):
            self._channel.close()
            self.on_drained(self)
        elif isinstance(message, Fatal):
            self._channel.close()
            self.on_lost(self, WorkerLostError.last_words(message))
        else:
            self._breach(f"unexpected {type(message).__name__}")

    def _remove(self, job_id: int) -> Job | None:
        for job in self.jobs:
            if job.job_id == job_id and job.abandoned:
                self.jobs.remove(job)
                return job
        return None

    def _breach(self, detail: str) -> None:
        self._channel.close()
        self.on_lost(self, WorkerLostError("PROTOCOL", detail))

    def _on_lost(self, error: ChannelError) -> None:
        self.on_lost(self, WorkerLostError.by(error))


def _unset(*_: Any) -> None:
    raise AssertionError("a callback was not set")
