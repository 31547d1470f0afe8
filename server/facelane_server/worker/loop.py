"""The inference loop of one worker: one model, one channel, one thread.

Jobs are run in two phases so that work on the host overlaps with work on the device::

    read job 1   begin 1 (decode, copy, launch)
    read job 2   begin 2                          <- while 1 is on the device
                 finish 1 (wait for 1 alone), answer 1
    read job 3   begin 3
                 finish 2, answer 2 ...

A model that computes in ``begin`` (``api.Ready``: every CPU model) is answered before
the next job is begun, because nothing would be gained and the answer would wait.

Ping is answered by this loop and by nothing else: a loop that hangs in a device call
does not answer, and the server sees it.

What a failure ends: a broken picture its item; an unforeseen error its job; running out
of device memory its job (retryable), and the worker when it repeats; a sticky device
error the worker at once, because its context is lost.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.ipc import gallery_table, messages
from facelane_server.ipc.arena import Arena, aligned
from facelane_server.ipc.channel import ChannelClosed, ProtocolError, WorkerChannel, close_all
from facelane_server.ipc.messages import (
    Cancel,
    CropSpecMessage,
    DetectDone,
    DetectItem,
    Drain,
    Drained,
    EmbedDone,
    EmbedItem,
    Fatal,
    FromWorker,
    GalleryLoaded,
    GallerySnapshot,
    Hello,
    Infer,
    InferDone,
    InferFailed,
    Item,
    ItemDone,
    ItemFailed,
    LivenessDone,
    LivenessItem,
    Load,
    Ping,
    Pong,
    Ready,
    Warming,
)
from facelane_server.models import api
from facelane_server.models.api import U8, AlignedCrop, ContextCrop, CropSpec
from facelane_server.worker import exit_codes, failpoints
from facelane_server.worker.failpoints import Failpoints
from facelane_server.worker.journal import log_event, log_exception
from facelane_server.worker.search import Hits, Searcher, SnapshotError

if TYPE_CHECKING:
    from facelane_server.models.package import Package

_WAIT_S: Final = 60.0
_OOM_LIMIT: Final = 3
_OOM_WINDOW_S: Final = 60.0
_ERROR_LIMIT: Final = 3
"""Jobs in a row that end in an unforeseen error; then the process is not to be trusted."""
_RESIDENT_EVERY_S: Final = 0.1

_STARTING = threading.Lock()
"""The threads of a group load and warm up one after the other: neither torch's import nor
its search for the fastest algorithms bears company."""

Finish = Callable[[], list[ItemDone]]


class _Quit(Exception):  # noqa: N818 - ends the loop, is no error by itself
    """Leave the loop with this exit code; ``fatal`` goes to the server first."""

    def __init__(self, code: int, fatal: Fatal | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.fatal = fatal


@dataclass(slots=True)
class _Begun:
    job_id: int
    slot: int
    started_ns: int
    finish: Finish
    request_used: int


class Loop:
    """Serves one channel until the server drains it, closes it, or something breaks.

    ``stopping`` is asked when the channel wakes without a message: True = finish what
    was received and leave (SIGTERM). ``on_ready`` is called when the model is warm.
    """

    def __init__(
        self,
        channel: WorkerChannel,
        stopping: Callable[[], bool],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._stopping = stopping
        self._on_ready = on_ready
        self._jobs: deque[Infer] = deque()
        self._begun: deque[_Begun] = deque()
        self.drained = False
        """The server drained this loop; the channel is still good."""
        self._draining = False
        self._fail: Failpoints | None = None
        self._ooms: deque[float] = deque(maxlen=_OOM_LIMIT)
        self._errors = 0
        self._gallery = _GalleryLoader(channel)
        self._memory = _nothing

    def run(self) -> int:
        """The exit code that the process should end with."""
        try:
            try:
                self._send(Hello(messages.PROTOCOL, os.getpid(), platform.python_version()))
                load, descriptors = self._await_load()
                self._start(load, descriptors)
                self._serve()
                self._send(Drained())
                self.drained = True
            except ProtocolError as error:
                raise _Quit(exit_codes.PROTOCOL, Fatal("PROTOCOL", str(error))) from None
        except ChannelClosed:
            return exit_codes.OK
        except _Quit as leave:
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
                    raise _Quit(exit_codes.OK)
                continue
            message, descriptors = received
            if isinstance(message, Load) and len(descriptors) == 2:
                return message, descriptors
            close_all(descriptors)
            if isinstance(message, Cancel):
                continue  # for the model before, which was drained on this channel
            if isinstance(message, Drain):
                self._send(Drained())
                self.drained = True
                raise _Quit(exit_codes.OK)
            raise ProtocolError(f"expected Load with two arenas, got {type(message).__name__}")

    def _start(self, load: Load, descriptors: list[int]) -> None:
        """Map the arenas, load and warm the model, say Ready."""
        began = time.monotonic()
        name_thread(load.worker_id)
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
            model, model_id, device = self._load(load)
            loaded = time.monotonic()
            self._send(Warming((loaded - began) * 1000))
            try:
                if self._fail is not None:
                    self._fail.warming()
                model.warm_up()
                work = _work_for(model, load, request, response, self._gallery)
                latency_ms = work.rehearse()
            except Exception as error:
                raise self._not_loaded("WARM_UP_FAILED", error) from error
        self._work = work
        self._request = request
        self._model = model
        if self._fail is not None:
            self._fail.device = device
        self._batch_max = model.batch_max
        self._gallery.device = device
        self._gallery.model_id = model_id
        self._memory = _memory_meter(device)
        self._on_ready()
        self._send(
            Ready(
                model_id=model_id,
                load_ms=(loaded - began) * 1000,
                warm_ms=(time.monotonic() - loaded) * 1000,
                latency_ms=latency_ms,
                memory_mib=self._memory(),
                device_name=_device_name(device),
                embedding_dim=getattr(model, "embedding_dim", 0),
                batch_max=self._batch_max,
            )
        )

    def _load(self, load: Load) -> tuple[api.Model, str, str]:
        try:
            self._fail = failpoints.from_options(load.options)
            if self._fail is not None:
                self._fail.loading()
            return load_model(load)
        except FacelaneError as error:
            raise _Quit(exit_codes.LOAD_FAILED, Fatal("LOAD_FAILED", error.message)) from error
        except Exception as error:
            raise self._not_loaded("LOAD_FAILED", error) from error

    def _not_loaded(self, reason: str, error: Exception) -> _Quit:
        kind = classify(error)
        if kind == "sticky":
            return _Quit(exit_codes.DEVICE_POISONED, Fatal("DEVICE_POISONED", _brief(error)))
        log_exception("model not loaded", error)
        if kind == "memory":
            return _Quit(exit_codes.OUT_OF_MEMORY, Fatal("OUT_OF_MEMORY", _brief(error)))
        return _Quit(exit_codes.LOAD_FAILED, Fatal(reason, _brief(error)))

    # -- serve ------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            if self._begun:
                self._receive(0.0)
                if self._jobs and len(self._begun) < limits.JOBS_PER_WORKER:
                    self._begin(self._jobs.popleft())
                else:
                    self._finish(self._begun.popleft())
            elif self._jobs:
                self._begin(self._jobs.popleft())
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
            if len(descriptors) != (2 if isinstance(message, GallerySnapshot) else 0):
                close_all(descriptors)
                raise ProtocolError(f"{type(message).__name__} with {len(descriptors)} descriptors")
            if isinstance(message, Infer):
                self._jobs.append(message)
            elif isinstance(message, Ping):
                self._send(Pong(message.sequence, self._memory()))
            elif isinstance(message, Cancel):
                self._cancel(message.job_id)
            elif isinstance(message, Drain):
                self._draining = True
            elif isinstance(message, GallerySnapshot):
                self._gallery.offer(message, descriptors)
            else:
                raise ProtocolError(f"unexpected {type(message).__name__}")
            if len(self._jobs) > limits.JOBS_PER_WORKER:
                raise ProtocolError("too many jobs at once")
        if self._stopping():
            self._draining = True

    def _cancel(self, job_id: int) -> None:
        for job in self._jobs:
            if job.job_id == job_id:
                self._jobs.remove(job)
                self._send(InferFailed(job_id, Reason.CANCELLED, "cancelled before it began"))
                return

    def _begin(self, job: Infer) -> None:
        started_ns = time.monotonic_ns()
        if not 0 < len(job.items) <= self._batch_max:
            raise ProtocolError(f"a job of {len(job.items)} items, at most {self._batch_max}")
        if not 0 <= job.slot < self._request.slots:
            raise ProtocolError("a slot that does not exist")
        try:
            if self._fail is not None:
                self._fail.job(self._work.payloads(job))
            finish, ready = self._work.begin(job)
        except ProtocolError:
            raise
        except Exception as error:
            self._finish_begun()
            self._job_failed(job.job_id, error)
            return
        begun = _Begun(job.job_id, job.slot, started_ns, finish, 0)
        if ready:
            self._finish_begun()
            self._finish(begun)
        else:
            self._begun.append(begun)

    def _finish_begun(self) -> None:
        """Answers go out in the order of the jobs."""
        while self._begun:
            self._finish(self._begun.popleft())

    def _finish(self, begun: _Begun) -> None:
        try:
            items = begun.finish()
        except ProtocolError:
            raise
        except Exception as error:
            self._job_failed(begun.job_id, error)
            return
        self._errors = 0
        answer = InferDone(
            begun.job_id, items, time.monotonic_ns() - begun.started_ns, self._memory()
        )
        if self._fail is None:
            self._send(answer)
        else:
            self._channel.send_packet(self._fail.answer(messages.encode(answer)))

    def _job_failed(self, job_id: int, error: Exception) -> None:
        kind = classify(error)
        if kind == "sticky":
            # Every call on this context fails from now on, cleaning up included.
            with contextlib.suppress(ChannelClosed):
                self._send(Fatal("DEVICE_POISONED", _brief(error)))
            log_event("device poisoned", level="error", error=type(error).__name__)
            os._exit(exit_codes.DEVICE_POISONED)
        if kind == "memory":
            release_device_memory()
            self._send(
                InferFailed(
                    job_id,
                    Reason.OUT_OF_MEMORY,
                    "the device ran out of memory; lower batch_max or max_side, or give the "
                    "pool more memory_mib",
                    retryable=True,
                )
            )
            now = time.monotonic()
            self._ooms.append(now)
            if len(self._ooms) == _OOM_LIMIT and now - self._ooms[0] <= _OOM_WINDOW_S:
                raise _Quit(
                    exit_codes.OUT_OF_MEMORY,
                    Fatal("OUT_OF_MEMORY", f"{_OOM_LIMIT} times in {_OOM_WINDOW_S:.0f} s"),
                )
            return
        if isinstance(error, FacelaneError):
            self._send(InferFailed(job_id, error.reason, error.message, error.retryable))
            return
        log_exception("job failed", error)
        self._errors += 1
        self._send(
            InferFailed(
                job_id,
                Reason.INTERNAL,
                f"the model raised {type(error).__name__}; the server's log has the traceback",
            )
        )
        if self._errors >= _ERROR_LIMIT:
            raise _Quit(
                exit_codes.INTERNAL, Fatal("INTERNAL", f"{self._errors} jobs failed in a row")
            )


# -- one kind of work each ---------------------------------------------------------------


class _Work:
    """Between slots and a model: reads a job's items, begins it, writes its answer."""

    def __init__(self, request: Arena, response: Arena) -> None:
        self._request = [np.frombuffer(request.slot(i), np.uint8) for i in range(request.slots)]
        self._views = [request.slot(i) for i in range(request.slots)]
        self._response = [np.frombuffer(response.slot(i), np.uint8) for i in range(response.slots)]

    def begin(self, job: Infer) -> tuple[Finish, bool]:
        """How to finish, and whether the result is there already."""
        raise NotImplementedError

    def spans(self, item: Item) -> list[tuple[int, int]]:
        """(offset, length) of an item's bytes."""
        raise NotImplementedError

    def rehearse(self) -> float:
        """Milliseconds of one synthetic item, the best of a few."""
        raise NotImplementedError

    def payloads(self, job: Infer) -> list[memoryview]:
        view = self._views[job.slot]
        return [view[a : a + n] for item in job.items for a, n in self.spans(item)]

    def _room(self, slot: int, offset: int, size: int) -> U8:
        room = self._response[slot][offset : offset + size]
        if len(room) != size:
            raise FacelaneError(
                Reason.INTERNAL,
                "the answers exceed the response slot; lower batch_max or max_faces",
            )
        return room

    def _bytes(self, slot: int, offset: int, size: int) -> U8:
        part = self._request[slot][offset : offset + size]
        if offset < 0 or len(part) != size:
            raise ProtocolError("an item lies outside of its slot")
        return part


class _DetectWork(_Work):
    def __init__(self, model: api.Detector, load: Load, request: Arena, response: Arena) -> None:
        super().__init__(request, response)
        from facelane_server.worker.decoding import headers, pictures

        self._check_bounds = headers.check_bounds

        self._model = model
        self._max_pixels = load.max_pixels
        self._needs_pixels = bool(getattr(model, "needs_pixels", True))
        pictures.silence_opencv(load.threads)
        self._decode = pictures.decode
        self._size = headers.picture_size
        self._record = sum(spec.size * spec.size * 3 for spec in model.crops)
        self._blank: U8 = np.zeros((1, 1, 3), np.uint8)
        # cv2 releases the GIL while it decodes.
        self._pool = ThreadPoolExecutor(load.threads, "decode") if load.threads > 1 else None

    def spans(self, item: Item) -> list[tuple[int, int]]:
        assert isinstance(item, DetectItem)
        return [(item.offset, item.length)]

    def begin(self, job: Infer) -> tuple[Finish, bool]:
        items = [item for item in job.items if isinstance(item, DetectItem)]
        if len(items) != len(job.items):
            raise ProtocolError("a detector takes pictures")
        view = self._views[job.slot]
        for item in items:
            self._bytes(job.slot, item.offset, item.length)

        def read(item: DetectItem) -> U8 | tuple[int, int] | FacelaneError:
            data = view[item.offset : item.offset + item.length]
            try:
                encoding = Encoding(item.encoding)
                if not self._needs_pixels:
                    if encoding.is_raw:
                        return item.width, item.height
                    return self._size(data, encoding)
                return self._decode(
                    data,
                    encoding,
                    width=item.width,
                    height=item.height,
                    stride=item.stride,
                    max_pixels=item.max_pixels or self._max_pixels,
                )
            except FacelaneError as error:
                return error

        on_device = self._on_device(view, items) if self._model.decodes else {}
        others = [item for i, item in enumerate(items) if i not in on_device]
        if self._pool is not None and len(others) > 1:
            read_others = iter(list(self._pool.map(read, others)))
        else:
            read_others = iter([read(item) for item in others])
        read_items = [on_device.get(i) or next(read_others) for i in range(len(items))]
        pictures: list[U8 | api.DevicePicture] = []
        max_faces: list[int] = []
        outcome: list[tuple[int, int] | FacelaneError] = []
        for item, picture in zip(items, read_items, strict=True):
            if isinstance(picture, FacelaneError):
                outcome.append(picture)
                continue
            if isinstance(picture, tuple):
                outcome.append(picture)
                picture = self._blank
            elif isinstance(picture, api.DevicePicture):
                outcome.append((picture.width, picture.height))
            else:
                outcome.append((picture.shape[1], picture.shape[0]))
            pictures.append(picture)
            max_faces.append(min(max(item.max_faces, 0), limits.MAX_FACES))
        if not pictures:
            pending: api.Pending[list[api.Detections]] = api.Ready([])
        else:
            pending = self._model.begin(pictures, max_faces)

        def finish() -> list[ItemDone]:
            found = iter(pending.finish())
            done: list[ItemDone] = []
            end = 0
            for size in outcome:
                if isinstance(size, FacelaneError):
                    done.append(ItemFailed(size.reason, size.message))
                else:
                    answer, end = self._write(job.slot, end, size, next(found))
                    done.append(answer)
            return done

        return finish, isinstance(pending, api.Ready)

    def _on_device(
        self, view: memoryview, items: Sequence[DetectItem]
    ) -> dict[int, api.DevicePicture]:
        """Pictures that the model's device has decoded, by the number of the item. What is
        wrong with the others is found when they are read."""
        jpegs: dict[int, memoryview] = {}
        for i, item in enumerate(items):
            data = view[item.offset : item.offset + item.length]
            if item.encoding != Encoding.JPEG.value:
                continue
            with contextlib.suppress(FacelaneError):
                size = self._size(data, Encoding.JPEG)
                self._check_bounds(*size, item.max_pixels or self._max_pixels)
                jpegs[i] = data
        decoded = self._model.decode(list(jpegs.values())) if jpegs else []
        return {i: p for i, p in zip(jpegs, decoded, strict=True) if p is not None}

    def _write(
        self, slot: int, offset: int, size: tuple[int, int], faces: api.Detections
    ) -> tuple[DetectDone, int]:
        count = len(faces.scores)
        width = limits.FACE_RECORD_FLOATS
        records = self._room(slot, offset, count * width * 4).view(np.float32)
        table = records.reshape(count, width)
        table[:, 0:4] = faces.boxes
        table[:, 4] = faces.scores
        table[:, 5:15] = faces.landmarks.reshape(count, 10)
        crops_offset = aligned(offset + count * width * 4)
        crops = self._room(slot, crops_offset, count * self._record).reshape(count, self._record)
        column = 0
        for crop in faces.crops:
            flat = crop.reshape(count, -1) if count else crop.reshape(0, 0)
            crops[:, column : column + flat.shape[1]] = flat
            column += flat.shape[1]
        end = aligned(crops_offset + count * self._record)
        return DetectDone(size[0], size[1], count, offset, crops_offset), end

    def rehearse(self) -> float:
        picture = np.full((240, 320, 3), 96, np.uint8)
        return _best_ms(lambda: self._model.begin([picture], [1]).finish())


class _EmbedWork(_Work):
    def __init__(
        self, model: api.Recognizer, request: Arena, response: Arena, gallery: _GalleryLoader
    ) -> None:
        super().__init__(request, response)
        self._model = model
        self._gallery = gallery
        self._size = model.crop.size
        self._chip = self._size * self._size * 3

    def spans(self, item: Item) -> list[tuple[int, int]]:
        assert isinstance(item, EmbedItem)
        return [(item.offset, self._chip)]

    def begin(self, job: Infer) -> tuple[Finish, bool]:
        items = [item for item in job.items if isinstance(item, EmbedItem)]
        if len(items) != len(job.items):
            raise ProtocolError("a recognizer takes chips")
        chips = self._stack(job.slot, [item.offset for item in items])
        pending = self._model.begin(chips)
        searcher = self._gallery.current

        def finish() -> list[ItemDone]:
            found = pending.finish()
            vectors = np.ascontiguousarray(found.vectors, np.float32)
            hits = _search(searcher, vectors, items)
            done: list[ItemDone] = []
            end = 0
            for i, item in enumerate(items):
                where = -1
                if item.want_vector:
                    where, size = end, vectors.shape[1] * 4
                    self._room(job.slot, where, size).view(np.float32)[:] = vectors[i]
                    end = aligned(where + size)
                version = searcher.version if searcher is not None and item.gallery else 0
                done.append(EmbedDone(float(found.ood[i]), hits[i], version, where))
            return done

        return finish, isinstance(pending, api.Ready)

    def _stack(self, slot: int, offsets: Sequence[int]) -> U8:
        chips = np.stack([self._bytes(slot, offset, self._chip) for offset in offsets])
        return chips.reshape(len(offsets), self._size, self._size, 3)

    def rehearse(self) -> float:
        chip = np.full((1, self._size, self._size, 3), 96, np.uint8)
        return _best_ms(lambda: self._model.begin(chip).finish())


def _search(searcher: Searcher | None, vectors: api.F32, items: Sequence[EmbedItem]) -> list[Hits]:
    """Hits of every item, items of one gallery searched together."""
    hits: list[Hits] = [()] * len(items)
    if searcher is None:
        return hits
    wanted: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if item.gallery:
            wanted.setdefault(item.gallery, []).append(i)
    for gallery, rows in wanted.items():
        top_k = max(items[i].top_k for i in rows)
        for i, found in zip(rows, searcher.search(vectors[rows], gallery, top_k), strict=True):
            hits[i] = found[: items[i].top_k]
    return hits


class _LivenessWork(_Work):
    def __init__(self, model: api.LivenessModel, request: Arena, response: Arena) -> None:
        super().__init__(request, response)
        self._model = model
        self._sizes = [spec.size for spec in model.crops]

    def spans(self, item: Item) -> list[tuple[int, int]]:
        assert isinstance(item, LivenessItem)
        return [(a, s * s * 3) for a, s in zip(item.offsets, self._sizes, strict=True)]

    def begin(self, job: Infer) -> tuple[Finish, bool]:
        items = [item for item in job.items if isinstance(item, LivenessItem)]
        if len(items) != len(job.items) or any(len(i.offsets) != len(self._sizes) for i in items):
            raise ProtocolError("a liveness model takes its context crops")
        crops = [
            np.stack(
                [self._bytes(job.slot, item.offsets[k], size * size * 3) for item in items]
            ).reshape(len(items), size, size, 3)
            for k, size in enumerate(self._sizes)
        ]
        pending = self._model.begin(crops)

        def finish() -> list[ItemDone]:
            return [LivenessDone(float(score)) for score in pending.finish()]

        return finish, isinstance(pending, api.Ready)

    def rehearse(self) -> float:
        crops = [np.full((1, size, size, 3), 96, np.uint8) for size in self._sizes]
        return _best_ms(lambda: self._model.begin(crops).finish())


def _work_for(
    model: api.Model, load: Load, request: Arena, response: Arena, gallery: _GalleryLoader
) -> _Work:
    if isinstance(model, api.Detector):
        return _DetectWork(model, load, request, response)
    if isinstance(model, api.Recognizer):
        return _EmbedWork(model, request, response, gallery)
    if isinstance(model, api.LivenessModel):
        return _LivenessWork(model, request, response)
    raise TypeError(f"{type(model).__name__} is no model of a known task")


def _best_ms(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best * 1000


# -- the gallery ------------------------------------------------------------------------


class _GalleryLoader:
    """Builds searchers in a thread of its own, so that inference goes on meanwhile.

    At most one snapshot is being built and one waits; a newer one takes the place of
    the one that waits. ``current`` is replaced whole. After ``close`` nothing is said any
    more: in a thread group the channel is the next model's by then.
    """

    def __init__(self, channel: WorkerChannel) -> None:
        self.current: Searcher | None = None
        self.device = "cpu"
        self.model_id = ""
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: tuple[GallerySnapshot, list[int]] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def offer(self, snapshot: GallerySnapshot, descriptors: list[int]) -> None:
        """Takes the descriptors (matrix, table) over."""
        with self._lock:
            if self._waiting is not None:
                close_all(self._waiting[1])
            self._waiting = (snapshot, descriptors)
            if self._thread is None:
                self._thread = threading.Thread(target=self._build, name="gallery", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._waiting is not None:
                close_all(self._waiting[1])
                self._waiting = None

    def _build(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                snapshot, (fd, table_fd) = self._waiting
                self._waiting = None
            if snapshot.model_id not in ("", self.model_id):
                # Of the model before or after this one: nothing may be compared with it.
                os.close(table_fd)
                snapshot = GallerySnapshot(snapshot.version, 0, snapshot.dim, ())
            else:
                try:
                    snapshot = gallery_table.attach(snapshot, table_fd)
                except ValueError as error:
                    self._give_up(SnapshotError(str(error)))
            try:
                searcher = Searcher(snapshot, fd, self.device)
                if self.current is None or searcher.version > self.current.version:
                    self.current = searcher
                with self._lock:
                    if not self._closed:
                        self._channel.send(GalleryLoaded(snapshot.version))
            except ChannelClosed:
                return
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> NoReturn:
        """A recogniser without the present gallery would name people wrongly."""
        log_exception("gallery snapshot not loaded", error)
        kind = classify(error)
        code, reason = {
            "memory": (exit_codes.OUT_OF_MEMORY, "OUT_OF_MEMORY"),
            "sticky": (exit_codes.DEVICE_POISONED, "DEVICE_POISONED"),
        }.get(kind, (exit_codes.PROTOCOL, "PROTOCOL"))
        if not isinstance(error, SnapshotError) and kind == "other":
            code, reason = exit_codes.INTERNAL, "INTERNAL"
        with contextlib.suppress(ChannelClosed):
            self._channel.send(Fatal(reason, "the gallery snapshot could not be loaded"))
        os._exit(code)


# -- the model and its device ----------------------------------------------------------


def load_model(load: Load) -> tuple[api.Model, str, str]:
    """(model, model id, device) of a Load message. Torch is imported only by models that
    need it. Raises FacelaneError(MODEL_INVALID) and whatever the runtime raises."""
    from facelane_server.models.package import read_package
    from facelane_server.worker.networks.load import load as load_package

    package = read_package(Path(load.package))
    device = load.device
    if package.manifest.runtime == "null":
        device = "cpu"
    elif device == "auto":
        device = _auto_device()
    options = api.DeviceOptions(
        device=device,
        precision=load.precision,
        graphs=load.graphs,
        threads=load.threads,
        stream_priority=load.stream_priority,
        memory_mib=load.memory_mib if device.startswith("cuda") else 0,
        decode=load.decode,
        suppress=load.options.get("nms") == "device",
    )
    model = load_package(
        package,
        options,
        batch_max=load.batch_max or batch_for(package, device),
        crops=tuple(_crop_spec(spec) for spec in load.crops),
        max_side=load.max_side,
        extra={k: v for k, v in load.options.items() if not k.startswith(failpoints.PREFIX)},
    )
    return model, package.model_id, device


def batch_for(package: Package, device: str) -> int:
    """Where batches pay. A CPU computes their items one after the other: a detector gains
    nothing (its working set leaves the cache), small networks gain a quarter, and a picture
    that cannot wait waits for all that came with it."""
    if package.manifest.runtime == "null" or device.startswith("cuda"):
        return limits.BATCH
    return 1 if package.manifest.task is Stage.DETECTOR else limits.BATCH // 2


def _crop_spec(spec: CropSpecMessage) -> CropSpec:
    return ContextCrop(spec.scale, spec.size) if spec.scale else AlignedCrop(spec.size)


def _auto_device() -> str:
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return "cpu"
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def classify(error: BaseException) -> str:
    """``sticky`` (the device context is lost), ``memory`` (device memory ran out) or
    ``other``."""
    if isinstance(error, failpoints.InjectedStickyError):
        return "sticky"
    if isinstance(error, (failpoints.InjectedOutOfMemoryError, MemoryError)):
        return "memory"
    if "torch" not in sys.modules:
        return "other"
    from facelane_server.worker import device

    fault = device.classify(error)
    if fault is device.Fault.POISONED:
        return "sticky"
    return "memory" if fault is device.Fault.OUT_OF_MEMORY else "other"


def release_device_memory() -> None:
    """Hand the allocator's cache back to the device."""
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing where CUDA was never used


def _nothing() -> int:
    return 0


def _memory_meter(device: str) -> Callable[[], int]:
    """MiB that this process holds: on the device for CUDA, resident on a CPU. Measured
    now and then, because every answer carries it."""
    if device.startswith("cuda"):
        from facelane_server.worker.device import Meter

        return Meter(device).read
    state = [0.0, 0]

    def read() -> int:
        now = time.monotonic()
        if now >= state[0]:
            state[0], state[1] = now + _RESIDENT_EVERY_S, _resident_mib()
        return int(state[1])

    return read


def _resident_mib() -> int:
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // limits.MIB


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    from facelane_server.worker.device import device_name

    return f"{device} {device_name(device)}"


# -- words for the log -------------------------------------------------------------------


def _brief(error: BaseException) -> str:
    """The kind of an error, for the server's log; details go to the worker's stderr."""
    if isinstance(error, FacelaneError):
        return error.message
    return f"{type(error).__name__}; the worker's log has the traceback"


def name_thread(name: str) -> None:
    """What ``ps`` and ``top -H`` show (15 characters)."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(
            f"fl-{name}"[:15], encoding="utf-8"
        )
