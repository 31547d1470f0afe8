"""Between slots and a model: a job's items are read, begun, and answered into the job's slot.

One class for each task. Whatever is wrong with an item is its own failure; a job that does
not keep to the protocol raises ``ProtocolError``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.ipc.arena import Arena, aligned
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import (
    DetectDone,
    DetectItem,
    EmbedDone,
    EmbedItem,
    EncodeDone,
    EncodeItem,
    Infer,
    Item,
    ItemDone,
    ItemFailed,
    LivenessDone,
    LivenessItem,
    Load,
    PictureHeld,
    VideoItem,
)
from facelane_server.models import api, canary
from facelane_server.models.api import U8
from facelane_server.wiping import Fleeting, wipe
from facelane_server.worker.search import GalleryLoader, Hits, Searcher

if TYPE_CHECKING:
    from facelane_server.worker.decoding.reading import Read, Reading
    from facelane_server.worker.decoding.video import VideoEngine

Finish = Callable[[], list[ItemDone]]


class Work:
    """Between slots and a model: reads a job's items, begins it, writes its answer."""

    def __init__(self, request: Arena, response: Arena) -> None:
        self._request = [np.frombuffer(request.slot(i), np.uint8) for i in range(request.slots)]
        self._views = [request.slot(i) for i in range(request.slots)]
        self._response = [np.frombuffer(response.slot(i), np.uint8) for i in range(response.slots)]

    reads_early = False
    """What is in a job is worth reading before the job has its turn."""

    def read(self, job: Infer) -> bool:
        """Whether it is being read now, before it has its turn; its slot is not written to until it
        is answered. Jobs are read and begun in one order. Raises ProtocolError."""
        del job
        return False

    def begin(
        self, job: Infer, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Finish, api.Pending[Any]]:
        """How to finish, and what that waits for. ``meanwhile``: called again and again while
        others decode what is in it, if they do."""
        raise NotImplementedError

    def spans(self, item: Item) -> list[tuple[int, int]]:
        """(offset, length) of an item's bytes."""
        raise NotImplementedError

    def rehearse(self) -> float:
        """Milliseconds of one synthetic item, the best of a few."""
        raise NotImplementedError

    def known(self) -> list[list[float]]:
        """The model's answers to the canary's pictures, as ``models.canary`` compares them. Asked
        for before the model is warmed up, so in full precision."""
        raise NotImplementedError

    def close_video(self, lane: int) -> None:
        """The lane's decoder is not needed any more; nothing of it is decoded (``settle``)."""

    @property
    def waited_s(self) -> float:
        """How long what is in the newest job that was read before its turn waited for those who
        read it, on average."""
        return 0.0

    def settle(self, lane: int | None = None) -> None:
        """Raises what went wrong with what nobody looks at, and waits for that of a lane: to be
        called before a job is begun, and before a lane is closed. Bounded."""

    @property
    def worn_out(self) -> bool:
        """Whether the process should end once its jobs are answered."""
        return False

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Size:
    """(width, height) of a picture as it is stored, and as it was decoded."""

    stored: tuple[int, int]
    decoded: tuple[int, int]


class DetectWork(Work):
    def __init__(self, model: api.Detector, load: Load, request: Arena, response: Arena) -> None:
        super().__init__(request, response)
        from facelane_server.worker.appearance import signatures
        from facelane_server.worker.decoding import headers, pictures, reading

        self._signatures = signatures

        self._model = model
        self._max_pixels = load.max_pixels
        self._max_side = load.canary_side
        self._needs_pixels = bool(getattr(model, "needs_pixels", True))
        pictures.silence_opencv(load.threads)
        self._decode = pictures.read
        self._examine = headers.examine
        self._record = sum(spec.size * spec.size * 3 for spec in model.crops)
        self._blank: U8 = np.zeros((1, 1, 3), np.uint8)
        engine, threads = _video_engine(load, model) if self._needs_pixels else (None, load.threads)
        self._reader = reading.Reader(
            engine,
            threads,
            max_pixels=load.max_pixels,
            timeout_s=load.job_timeout_ms / 1000,
        )
        self.reads_early = self._reader.reads_early
        self._readings: dict[int, Reading] = {}
        """Of jobs that have not had their turn."""

    def settle(self, lane: int | None = None) -> None:
        self._reader.settle(lane)

    @property
    def worn_out(self) -> bool:
        return self._reader.worn_out

    @property
    def waited_s(self) -> float:
        return self._reader.waited_s if self.reads_early else 0.0

    def spans(self, item: Item) -> list[tuple[int, int]]:
        if isinstance(item, VideoItem):
            return [(item.offset, sum(item.lengths))]
        if isinstance(item, EncodeItem):
            return [(item.offset, sum(side * side * 3 for side in item.sides))]
        assert isinstance(item, DetectItem)
        return [(item.offset, item.length)]

    def close_video(self, lane: int) -> None:
        self._reader.close(lane)

    def read(self, job: Infer) -> bool:
        if not self.reads_early or not all(isinstance(item, VideoItem) for item in job.items):
            return False
        self._check(job)
        self._readings[job.job_id] = self._reader.begin({}, self._footage(job))
        return True

    def _check(self, job: Infer) -> None:
        for item in job.items:
            if not isinstance(item, DetectItem | VideoItem | EncodeItem):
                raise ProtocolError("a detector takes pictures")
            for offset, length in self.spans(item):
                self._bytes(job.slot, offset, length)

    def _footage(self, job: Infer) -> dict[int, tuple[VideoItem, Sequence[bytes]]]:
        view = self._views[job.slot]
        return {
            i: (item, _access_units(view, item))
            for i, item in enumerate(job.items)
            if isinstance(item, VideoItem)
        }

    def _pictures(self, job: Infer, meanwhile: Callable[[], None] | None) -> dict[int, Read]:
        """By the number of the item."""
        view = self._views[job.slot]
        read: dict[int, Read] = {}
        reading = self._readings.pop(job.job_id, None)
        if reading is None:
            self._check(job)
            stills = {i: item for i, item in enumerate(job.items) if isinstance(item, DetectItem)}
            if self._model.decodes and stills:
                read.update(self._on_device(view, stills))
            others = {i: item for i, item in stills.items() if i not in read}
            if not self._needs_pixels:
                read.update({i: self._look_at(view, item) for i, item in others.items()})
                others = {}
            calls = {i: functools.partial(self._read, view, item) for i, item in others.items()}
            reading = self._reader.begin(calls, self._footage(job))
        read.update(self._reader.end(reading, meanwhile))
        return read

    def begin(
        self, job: Infer, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Finish, api.Pending[Any]]:
        items = job.items
        read = self._pictures(job, meanwhile)
        pictures: list[U8 | api.DevicePicture] = []
        max_faces: list[int] = []
        outcome: list[_Size | FacelaneError | PictureHeld | list[U8]] = []
        for i, item in enumerate(items):
            if isinstance(item, EncodeItem):
                outcome.append(self._encoded(job.slot, item))
                continue
            assert isinstance(item, DetectItem | VideoItem)
            found = read[i]
            if isinstance(found, FacelaneError | PictureHeld):
                outcome.append(found)
                continue
            if isinstance(found, tuple):
                pixels, stored = found
                decoded = (pixels.shape[1], pixels.shape[0]) if self._needs_pixels else stored
                pictures.append(pixels)
                outcome.append(_Size(stored, decoded))
            else:
                if isinstance(found, api.DevicePicture):
                    stored = (found.width, found.height)
                else:
                    stored = (found.shape[1], found.shape[0])
                pictures.append(found)
                outcome.append(_Size(stored, stored))
            max_faces.append(min(max(item.max_faces, 0), limits.MAX_FACES))
        if not pictures:
            pending: api.Pending[list[api.Detections]] = api.Immediate([])
        else:
            pending = self._model.begin(pictures, max_faces)

        def finish() -> list[ItemDone]:
            found = pending.finish()
            detected = zip(found, self._appearance(found), strict=True)
            done: list[ItemDone] = []
            end = 0
            for size in outcome:
                if isinstance(size, FacelaneError):
                    done.append(ItemFailed(size.reason, size.message))
                elif isinstance(size, PictureHeld):
                    done.append(size)
                elif isinstance(size, list):
                    written, end = self._write_jpegs(job.slot, end, size)
                    done.append(written)
                else:
                    answer, end = self._write(job.slot, end, size, *next(detected))
                    done.append(answer)
            return done

        return finish, pending

    def _encoded(self, slot: int, item: EncodeItem) -> list[U8] | FacelaneError:
        import cv2

        jpegs, at = [], item.offset
        for side in item.sides:
            pixels = self._bytes(slot, at, side * side * 3).reshape(side, side, 3)
            at += side * side * 3
            done, data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, 90))
            if not done or len(data) > side * side * 3:
                return FacelaneError(Reason.INTERNAL, "a picture could not be encoded")
            jpegs.append(data)
        return jpegs

    def _write_jpegs(self, slot: int, offset: int, jpegs: list[U8]) -> tuple[EncodeDone, int]:
        lengths = tuple(len(jpeg) for jpeg in jpegs)
        self._room(slot, offset, sum(lengths))[:] = np.concatenate(jpegs)
        return EncodeDone(offset, lengths), aligned(offset + sum(lengths))

    def _read(
        self, view: memoryview, item: DetectItem
    ) -> tuple[U8, tuple[int, int]] | FacelaneError:
        data = view[item.offset : item.offset + item.length]
        try:
            encoding = Encoding(item.encoding)
            return self._decode(
                # A copy: a decoding that was given up must not see the slot's next content.
                data if encoding.is_raw else memoryview(Fleeting(data)),
                encoding,
                width=item.width,
                height=item.height,
                stride=item.stride,
                max_pixels=item.max_pixels or self._max_pixels,
            )
        except FacelaneError as error:
            return error

    def _look_at(
        self, view: memoryview, item: DetectItem
    ) -> tuple[U8, tuple[int, int]] | FacelaneError:
        """The size alone, for a model that looks at no pixels."""
        encoding = Encoding(item.encoding)
        if encoding.is_raw:
            return self._blank, (item.width, item.height)
        data = view[item.offset : item.offset + item.length]
        try:
            header = self._examine(data, encoding, item.max_pixels or self._max_pixels)
        except FacelaneError as error:
            return error
        return self._blank, (header.width, header.height)

    def _on_device(
        self, view: memoryview, items: Mapping[int, DetectItem]
    ) -> dict[int, api.DevicePicture]:
        """Pictures that the model's device has decoded, by the number of the item. What is
        wrong with the others is found when they are read."""
        jpegs: dict[int, memoryview] = {}
        for i, item in items.items():
            data = view[item.offset : item.offset + item.length]
            if item.encoding != Encoding.JPEG.value:
                continue
            with contextlib.suppress(FacelaneError):
                if self._examine(data, Encoding.JPEG, item.max_pixels or self._max_pixels).plain:
                    jpegs[i] = data
        decoded = self._model.decode(list(jpegs.values())) if jpegs else []
        return {i: p for i, p in zip(jpegs, decoded, strict=True) if p is not None}

    def _write(
        self, slot: int, offset: int, size: _Size, faces: api.Detections, appearance: U8
    ) -> tuple[DetectDone, int]:
        count = len(faces.scores)
        room = self._room(slot, offset, count * limits.FACE_RECORD_BYTES)
        records = room.reshape(count, limits.FACE_RECORD_BYTES)
        table = records.view(np.float32)
        # In pixels of the picture as it is stored.
        scale = np.divide(size.stored, size.decoded, dtype=np.float32)
        table[:, 0:4] = (faces.boxes.reshape(count, 2, 2) * scale).reshape(count, 4)
        table[:, 4] = faces.scores
        table[:, 5:15] = (faces.landmarks.reshape(count, 5, 2) * scale).reshape(count, 10)
        records[:, 4 * limits.FACE_FLOATS :] = appearance
        crops_offset = aligned(offset + count * limits.FACE_RECORD_BYTES)
        crops = self._room(slot, crops_offset, count * self._record).reshape(count, self._record)
        column = 0
        for crop in faces.crops:
            flat = crop.reshape(count, -1) if count else crop.reshape(0, 0)
            crops[:, column : column + flat.shape[1]] = flat
            column += flat.shape[1]
        end = aligned(crops_offset + count * self._record)
        return DetectDone(*size.stored, count, offset, crops_offset), end

    def _appearance(self, found: Sequence[api.Detections]) -> list[U8]:
        """[N, SIGNATURE_BYTES] of each picture's faces, those of all pictures made together; of
        nothing where no aligned chips are cut, or nobody looks at pixels."""
        if not found:
            return []
        ends = np.cumsum([len(faces.scores) for faces in found])
        made = np.zeros((int(ends[-1]), limits.SIGNATURE_BYTES), np.uint8)
        aligned_at = next(
            (n for n, s in enumerate(self._model.crops) if isinstance(s, api.AlignedCrop)), None
        )
        if self._needs_pixels and aligned_at is not None and len(made):
            there = [faces.crops[aligned_at] for faces in found if len(faces.scores)]
            made = self._signatures(np.concatenate(there))
        return np.split(made, ends[:-1])

    def rehearse(self) -> float:
        picture = np.full((240, 320, 3), 96, np.uint8)
        return _best_ms(lambda: self._model.begin([picture], [1]).finish())

    def known(self) -> list[list[float]]:
        answers: list[list[float]] = []
        for picture in canary.pictures(self._max_side):
            looked_at = picture if self._needs_pixels else self._blank
            [faces] = self._model.begin([looked_at], [canary.MOST_FACES]).finish()
            rows = (faces.scores[:, None], faces.boxes, faces.landmarks.reshape(-1, 10))
            answers.append(np.concatenate(rows, 1).ravel().tolist())
        return answers


def _video_engine(load: Load, model: api.Detector) -> tuple[VideoEngine, int]:
    """Who decodes video, and by how many threads."""
    from facelane_server.worker.decoding.cpu_video import CpuEngine
    from facelane_server.worker.networks.detector import NetworkDetector

    engine = CpuEngine(load.threads)
    there = model.device_pictures if isinstance(model, NetworkDetector) else None
    if there is None or load.decode == "cpu":
        return engine, load.threads
    from facelane_server.worker.decoding.nvdec import THREADS, NvdecEngine, engine_for

    found = engine_for(there, engine)
    return found, max(load.threads, THREADS if isinstance(found, NvdecEngine) else 0)


def _access_units(view: memoryview, item: VideoItem) -> list[bytes]:
    """Copies: a decoding that was given up must not see the slot's next content."""
    units, at = [], item.offset
    for length in item.lengths:
        units.append(bytes(view[at : at + length]))
        at += length
    return units


class EmbedWork(Work):
    def __init__(
        self, model: api.Recognizer, request: Arena, response: Arena, gallery: GalleryLoader
    ) -> None:
        super().__init__(request, response)
        self._model = model
        self._gallery = gallery
        self._size = model.crop.size
        self._chip = self._size * self._size * 3

    def spans(self, item: Item) -> list[tuple[int, int]]:
        assert isinstance(item, EmbedItem)
        return [(item.offset, self._chip)]

    def begin(
        self, job: Infer, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Finish, api.Pending[Any]]:
        del meanwhile
        items = [item for item in job.items if isinstance(item, EmbedItem)]
        if len(items) != len(job.items):
            raise ProtocolError("a recognizer takes chips")
        chips = self._stack(job.slot, [item.offset for item in items])
        pending = self._model.begin(chips)
        searcher = self._gallery.current

        def finish() -> list[ItemDone]:
            found = pending.finish()
            vectors = np.ascontiguousarray(found.vectors, np.float32)
            try:
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
            finally:
                # Of whoever is enrolled or deleted later, nothing stays here.
                vectors.fill(0)
                found.vectors.fill(0)

        return finish, pending

    def _stack(self, slot: int, offsets: Sequence[int]) -> U8:
        chips = np.stack([self._bytes(slot, offset, self._chip) for offset in offsets])
        return chips.reshape(len(offsets), self._size, self._size, 3)

    def rehearse(self) -> float:
        chip = np.full((1, self._size, self._size, 3), 96, np.uint8)
        return _best_ms(lambda: self._model.begin(chip).finish())

    def known(self) -> list[list[float]]:
        found = self._model.begin(canary.face(self._size)[None]).finish()
        return [[*found.vectors[0].tolist(), float(found.ood[0])]]


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
        probes = vectors[rows]
        try:
            for i, found in zip(rows, searcher.search(probes, gallery, top_k), strict=True):
                hits[i] = found[: items[i].top_k]
        finally:
            wipe(probes)
    return hits


class LivenessWork(Work):
    def __init__(self, model: api.LivenessModel, request: Arena, response: Arena) -> None:
        super().__init__(request, response)
        self._model = model
        self._sizes = [spec.size for spec in model.crops]

    def spans(self, item: Item) -> list[tuple[int, int]]:
        assert isinstance(item, LivenessItem)
        return [(a, s * s * 3) for a, s in zip(item.offsets, self._sizes, strict=True)]

    def begin(
        self, job: Infer, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Finish, api.Pending[Any]]:
        del meanwhile
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

        return finish, pending

    def rehearse(self) -> float:
        crops = [np.full((1, size, size, 3), 96, np.uint8) for size in self._sizes]
        return _best_ms(lambda: self._model.begin(crops).finish())

    def known(self) -> list[list[float]]:
        found = self._model.begin([canary.face(size)[None] for size in self._sizes]).finish()
        return [[float(found[0])]]


def work_for(
    model: api.Model, load: Load, request: Arena, response: Arena, gallery: GalleryLoader
) -> Work:
    if isinstance(model, api.Detector):
        return DetectWork(model, load, request, response)
    if isinstance(model, api.Recognizer):
        return EmbedWork(model, request, response, gallery)
    if isinstance(model, api.LivenessModel):
        return LivenessWork(model, request, response)
    raise TypeError(f"{type(model).__name__} is no model of a known task")


def _best_ms(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best * 1000
