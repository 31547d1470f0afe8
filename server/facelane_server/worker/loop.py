"""The inference loop of one worker: one model, one channel, one thread.

Jobs are run in two phases so that work on the host overlaps with work on the device::

    read job 1   begin 1 (decode, copy, launch)
    read job 2   begin 2                          <- while 1 is on the device
                 finish 1 (wait for 1 alone), answer 1
    read job 3   begin 3
                 finish 2, answer 2 ...

Where a card decodes what is in a job, it is read as soon as it has come, beside those before it:
that takes milliseconds of waiting, however few pictures it is. While there is nothing to do but to
wait for it, what the device has computed is answered, and what comes is taken in.

A model that computes in ``begin`` (``api.Immediate``: every CPU model) is answered before
the next job is begun, because nothing would be gained and the answer would wait.

Ping is answered by this loop and by nothing else: a loop that hangs in a device call
does not answer, and the server sees it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.ipc import messages
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.channel import ChannelClosed, ProtocolError, WorkerChannel, close_all
from facelane_server.ipc.messages import (
    Cancel,
    CloseVideo,
    Drain,
    Drained,
    Fatal,
    FromWorker,
    GalleryDelta,
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
    VideoItem,
    Warming,
)
from facelane_server.models import api
from facelane_server.wiping import Scrubbing
from facelane_server.worker import device, exit_codes, failpoints
from facelane_server.worker.failpoints import Failpoints
from facelane_server.worker.faults import JobFaults, Quit, ending
from facelane_server.worker.journal import log_event, name_thread
from facelane_server.worker.networks.load import load_model
from facelane_server.worker.search import GalleryLoader
from facelane_server.worker.work import Finish, work_for

_WAIT_S: Final = 60.0
_LAUNCHED: Final = 2
"""Jobs that are with the device at once: it computes one, the next is behind it."""
_LOOK_S: Final = 0.0002
"""How often the loop looks after the device while it listens."""
_DESCRIPTORS: Final = {GallerySnapshot: 2, GalleryDelta: 1}

_STARTING = threading.Lock()
"""The threads of a group load and warm up one after the other: neither torch's import nor
its search for the fastest algorithms bears company."""


SCRUBBING: Final = Scrubbing()
"""Of the process, whose memory it is, however many models are in it."""


@dataclass(slots=True)
class _Begun:
    job_id: int
    finish: Finish
    pending: api.Pending[Any]
    waited_us: int


class Loop:
    """Serves one channel until the server drains it, closes it, or something breaks.

    ``stopping`` is asked when the channel wakes without a message: True = finish what
    was received and leave (SIGTERM). ``on_ready`` is called when the model is warm.
    ``sandbox``: what holds, as ``Ready`` says it.
    """

    def __init__(
        self,
        channel: WorkerChannel,
        stopping: Callable[[], bool],
        on_ready: Callable[[], None] = lambda: None,
        sandbox: str = "off",
    ) -> None:
        self._channel = channel
        self._stopping = stopping
        self._on_ready = on_ready
        self._sandbox = sandbox
        self._jobs: deque[Infer | CloseVideo] = deque()
        """Not begun; and lanes of video that end once those before them are. None of them first."""
        self._read: set[int] = set()
        """Of the jobs not begun those that are being read."""
        self._beginning = False
        self._begun: deque[_Begun] = deque()
        self.drained = False
        """The server drained this loop; the channel is still good."""
        self._draining = False
        self._fail: Failpoints | None = None
        self._faults = JobFaults()
        self._gallery = GalleryLoader(channel)
        self._memory: Callable[[], int] = int

    def run(self) -> int:
        """The exit code that the process should end with."""
        try:
            try:
                self._send(Hello(messages.PROTOCOL, platform.python_version()))
                load, descriptors = self._await_load()
                self._start(load, descriptors)
                self._serve()
                self._send(Drained())
                self.drained = True
            except ProtocolError as error:
                raise Quit(exit_codes.PROTOCOL, Fatal("PROTOCOL", str(error))) from None
        except ChannelClosed:
            return exit_codes.OK
        except Quit as leave:
            if leave.fatal is not None:
                with contextlib.suppress(ChannelClosed):
                    self._send(leave.fatal)
            return leave.code
        return exit_codes.OK

    def _send(self, message: FromWorker) -> None:
        self._channel.send(message)

    # -- start ------------------------------------------------------------------------

    def _await_load(self) -> tuple[Load, list[int]]:
        while True:
            received = self._channel.receive(_WAIT_S)
            if received is None:
                if self._stopping():
                    raise Quit(exit_codes.OK)
                continue
            message, descriptors = received
            if isinstance(message, Load) and len(descriptors) == 2:
                return message, descriptors
            close_all(descriptors)
            if isinstance(message, Cancel | CloseVideo | Scrub):
                continue  # for the model before, which was drained on this channel
            if isinstance(message, Drain):
                self._send(Drained())
                self.drained = True
                raise Quit(exit_codes.OK)
            raise ProtocolError(f"expected Load with two arenas, got {type(message).__name__}")

    def _start(self, load: Load, descriptors: list[int]) -> None:
        """Map the arenas, load and warm the model, say Ready."""
        began = time.monotonic()
        name_thread(load.worker_id)
        SCRUBBING.begin()
        try:
            request = Arena(descriptors[0], load.slots, load.request_slot_bytes, writable=False)
        except (OSError, ValueError) as error:
            close_all(descriptors[1:])
            raise ProtocolError(f"request arena: {error}") from None
        try:
            response = Arena(descriptors[1], load.slots, load.response_slot_bytes, writable=True)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"response arena: {error}") from None
        with _STARTING:
            model, model_id, on = self._load(load)
            loaded = time.monotonic()
            self._send(Warming((loaded - began) * 1000))
            try:
                if self._fail is not None:
                    self._fail.warming()
                work = work_for(model, load, request, response, self._gallery)
                known = work.known()
                model.warm_up()
                latency_ms = work.rehearse()
            except Exception as error:
                raise ending(error, otherwise=(exit_codes.LOAD_FAILED, "WARM_UP_FAILED")) from error
        self._work = work
        self._request = request
        self._model = model
        if self._fail is not None:
            self._fail.device = on
        self._batch_max = model.batch_max
        self._gallery.device = on
        self._gallery.model_id = model_id
        self._memory = device.memory_meter(on)
        # What is there now stays: looking for garbage, as every scrub does, passes it over.
        gc.freeze()
        self._on_ready()
        self._send(
            Ready(
                model_id=model_id,
                load_ms=(loaded - began) * 1000,
                warm_ms=(time.monotonic() - loaded) * 1000,
                latency_ms=latency_ms,
                memory_mib=self._memory(),
                device_name=device.device_name(on),
                embedding_dim=getattr(model, "embedding_dim", 0),
                batch_max=self._batch_max,
                sandbox=self._sandbox,
                known=known,
            )
        )

    def _load(self, load: Load) -> tuple[api.Model, str, str]:
        try:
            self._fail = failpoints.from_options(load.options)
            if self._fail is not None:
                self._fail.loading()
            return load_model(load)
        except FacelaneError as error:
            raise Quit(exit_codes.LOAD_FAILED, Fatal("LOAD_FAILED", error.message)) from error
        except Exception as error:
            raise ending(error, otherwise=(exit_codes.LOAD_FAILED, "LOAD_FAILED")) from error

    # -- serve ------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            if self._begun:
                self._receive(0.0)
                if self._jobs and len(self._begun) < _LAUNCHED:
                    self._begin_next()
                elif self._work.reads_early and not self._begun[0].pending.poll():
                    self._receive(_LOOK_S)  # a job that comes now need not wait to be read
                else:
                    self._finish(self._begun.popleft())
            elif self._jobs:
                self._begin_next()
            elif self._draining:
                self._gallery.close()
                self._model.close()
                return
            else:
                self._receive(_WAIT_S)

    def _receive(self, timeout_s: float) -> None:
        """Take in every message that has come; wait for the first one at most so long."""
        while (received := self._channel.receive(timeout_s)) is not None:
            message, descriptors = received
            timeout_s = 0.0
            if len(descriptors) != _DESCRIPTORS.get(type(message), 0):
                close_all(descriptors)
                raise ProtocolError(f"{type(message).__name__} with {len(descriptors)} descriptors")
            if isinstance(message, Infer):
                self._jobs.append(message)
            elif isinstance(message, Ping):
                self._send(Pong(message.sequence, self._memory()))
            elif isinstance(message, Cancel):
                self._cancel(message.job_id)
            elif isinstance(message, CloseVideo):
                self._jobs.append(message)
            elif isinstance(message, Scrub):
                SCRUBBING.note()
            elif isinstance(message, Drain):
                self._draining = True
            elif isinstance(message, GallerySnapshot):
                self._gallery.offer(message, descriptors)
            elif isinstance(message, GalleryDelta):
                self._gallery.extend(message, descriptors[0])
            else:
                raise ProtocolError(f"unexpected {type(message).__name__}")
            if not self._beginning:
                self._close_ended()
            if sum(isinstance(job, Infer) for job in self._jobs) > self._request.slots:
                raise ProtocolError("too many jobs at once")
        self._read_early()
        if self._stopping():
            self._draining = True

    def _read_early(self) -> None:
        """Jobs that wait for their turn, in their order: as far as nothing is in the way."""
        if not self._work.reads_early or self._fail is not None:
            return
        for job in self._jobs:
            if isinstance(job, CloseVideo):
                return
            if job.job_id not in self._read:
                self._check(job)
                if not self._work.read(job):
                    return
                self._read.add(job.job_id)

    def _cancel(self, job_id: int) -> None:
        for job in self._jobs:
            if isinstance(job, Infer) and job.job_id == job_id and job_id not in self._read:
                self._jobs.remove(job)
                self._send(InferFailed(job_id, Reason.CANCELLED, "cancelled before it began"))
                return

    def _begin_next(self) -> None:
        job = self._jobs.popleft()
        assert isinstance(job, Infer)
        self._read.discard(job.job_id)
        self._beginning = True
        self._begin(job)
        self._beginning = False
        self._close_ended()

    def _close_ended(self) -> None:
        """Lanes that ended behind a job keep their decoders for it, or it would open new ones that
        nobody closes."""
        while self._jobs and isinstance(ended := self._jobs[0], CloseVideo):
            self._jobs.popleft()
            self._settle(ended.lane)
            self._work.close_video(ended.lane)

    def _check(self, job: Infer) -> None:
        wanted = sum(not (isinstance(item, VideoItem) and item.ahead) for item in job.items)
        if not 0 < wanted <= self._batch_max or len(job.items) > limits.MAX_BATCH:
            raise ProtocolError(f"a job of {len(job.items)} items, at most {self._batch_max}")
        if not 0 <= job.slot < self._request.slots:
            raise ProtocolError("a slot that does not exist")

    def _begin(self, job: Infer) -> None:
        self._check(job)
        self._settle()
        try:
            if self._fail is not None:
                self._fail.job(self._work.payloads(job))
            meanwhile = self._meanwhile if self._begun or self._work.reads_early else None
            finish, pending = self._work.begin(job, meanwhile)
        except (ProtocolError, ChannelClosed, Quit):
            raise
        except Exception as error:
            self._finish_begun()
            self._job_failed(job.job_id, error)
            return
        begun = _Begun(job.job_id, finish, pending, round(1e6 * self._work.waited_s))
        if isinstance(pending, api.Immediate):
            self._finish_begun()
            self._finish(begun)
        else:
            self._begun.append(begun)

    def _finish_begun(self) -> None:
        """Answers go out in the order of the jobs."""
        while self._begun:
            self._finish(self._begun.popleft())

    def _meanwhile(self) -> None:
        """While the pictures of a job are waited for, those before it are answered, and what comes
        is taken in."""
        while self._begun and self._begun[0].pending.poll():
            self._finish(self._begun.popleft(), another=True)
        self._receive(0.0)

    def _finish(self, begun: _Begun, *, another: bool = False) -> None:
        """``another``: one more is being begun, and will be answered before this worker ends."""
        try:
            items = begun.finish()
        except ProtocolError:
            raise
        except Exception as error:
            self._job_failed(begun.job_id, error)
            return
        self._faults.succeeded()
        if self._fail is not None:
            items = self._fail.said(items)
        answer = InferDone(begun.job_id, items, self._memory(), begun.waited_us)
        if self._fail is None:
            self._send(answer)
        else:
            self._channel.send_packet(self._fail.answer(messages.encode(answer)))
        if self._work.worn_out and not another:
            self._finish_begun()
            message = "pictures that were given up are still being decoded"
            raise Quit(exit_codes.WORN_OUT, Fatal("WORN_OUT", message))

    def _settle(self, lane: int | None = None) -> None:
        """What went wrong with what nobody looks at is nobody's answer."""
        try:
            self._work.settle(lane)
        except Exception as error:
            self._job_failed(None, error)

    def _job_failed(self, job_id: int | None, error: Exception) -> None:
        """``job_id``: None = of no job."""
        answer, leave = self._faults.failed(job_id or 0, error)
        if leave is not None and leave.at_once:
            assert leave.fatal is not None
            with contextlib.suppress(ChannelClosed):
                self._send(leave.fatal)
            log_event("device poisoned", level="error", error=type(error).__name__)
            os._exit(leave.code)
        if answer is not None:
            if answer.reason == Reason.OUT_OF_MEMORY:
                device.free_cache()
            if job_id is not None:
                self._send(answer)
        if leave is not None:
            raise leave
