"""Between tasks and slots: writes a batch's items, reads its answers.

The server trusts no number that a worker sends. What cannot be in any message is refused
where it is decoded (``ipc.messages``); what cannot be an answer to *this* request, or lies
in the slot and is no number, is a ``ProtocolError`` here. Either way the worker is lost.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from facelane_server import limits
from facelane_server.domain import Box, Candidate, DetectedFace, FacelaneError, Reason, Stage
from facelane_server.ipc.arena import aligned
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import (
    DetectDone,
    DetectItem,
    EmbedDone,
    EmbedItem,
    EncodeDone,
    EncodeItem,
    Item,
    ItemDone,
    ItemFailed,
    LivenessDone,
    LivenessItem,
    PictureHeld,
    VideoItem,
)
from facelane_server.pools.groups import Decoders
from facelane_server.pools.tasks import (
    Answer,
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    EmbedRequest,
    EncodeAnswer,
    EncodeRequest,
    LivenessAnswer,
    LivenessRequest,
    Request,
    VideoRequest,
)
from facelane_server.wiping import Fleeting

SubjectResolver = Callable[[int, int], tuple[str, str] | None]
"""(snapshot version, subject index) → (gallery id, subject id); None for a subject that was
deleted since the snapshot was made: it is no candidate any more."""

_FACE: Final = struct.Struct(f"={limits.FACE_FLOATS}f{limits.SIGNATURE_BYTES}s")
_FARTHEST: Final = 4.0 * limits.MAX_SIDE
"""Pixels; faces at the border have landmarks outside of the picture."""
_ONE: Final = 1.001
_DETECTIONS: Final = (DetectRequest, VideoRequest)
_NORM_SLACK: Final = 0.05
_REASONS: Final = {
    reason.value: reason
    for reason in (
        Reason.PICTURE_EMPTY,
        Reason.PICTURE_CORRUPT,
        Reason.PICTURE_TOO_SMALL,
        Reason.PICTURE_TOO_LARGE,
        Reason.PICTURE_TOO_COSTLY,
        Reason.ENCODING_UNSUPPORTED,
        Reason.ENCODING_MISMATCH,
        Reason.RAW_LAYOUT_INVALID,
        Reason.VIDEO_UNSUPPORTED,
        Reason.PARAMETER_SETS_MISSING,
        Reason.DEADLINE_EXCEEDED,
        Reason.OUT_OF_MEMORY,
        Reason.CANCELLED,
    )
}
"""What a worker may say of an item or a job; anything else is INTERNAL."""


def _reason(said: str) -> Reason:
    return _REASONS.get(said, Reason.INTERNAL)


class Codec:
    """Items and answers of one stage.

    ``crop_sizes``: sides of the crops that a detector cuts, or that a recogniser (one)
    or a liveness model takes. ``embedding_dim``: of a recogniser.
    """

    def __init__(
        self,
        stage: Stage,
        crop_sizes: Sequence[int],
        *,
        embedding_dim: int = 0,
        resolve: SubjectResolver | None = None,
    ) -> None:
        self._stage = stage
        self._crop_bytes = [size * size * 3 for size in crop_sizes]
        self._record = sum(self._crop_bytes)
        self._dim = embedding_dim
        self._embed_cost = aligned(self._record), aligned(embedding_dim * 4)
        self._liveness_cost = sum(map(aligned, self._crop_bytes)), 0
        self._responses: dict[int, int] = {}
        """By the most faces."""
        self._resolve = resolve

    def cost(self, request: Request, decoders: Decoders | None = None) -> tuple[int, int]:
        """(request bytes, response bytes) that one item takes at most in the slots; of video, for
        the worker with these ``decoders``.

        Raises FacelaneError for a request that this stage cannot serve.
        """
        if self._stage is not Stage.DETECTOR:
            return self._cost_of_crops(request)
        if isinstance(request, DetectRequest):
            return aligned(max(len(request.picture.data), 1)), self._response(request.max_faces)
        if isinstance(request, VideoRequest):
            wanted = request.wanted
            span = None if decoders is None else decoders.span(wanted)
            first, last = (0, wanted.last) if span is None else (span.first, span.last)
            size = wanted.group.bytes_between(first, last)
            return aligned(max(size, 1)), self._response(request.max_faces)
        if isinstance(request, EncodeRequest):
            size = aligned(sum(map(len, request.pictures)))
            return size, size  # noise makes larger JPEGs; they have no room, and fail
        raise self._wrong_kind()

    def _cost_of_crops(self, request: Request) -> tuple[int, int]:
        if isinstance(request, EmbedRequest) and self._stage is Stage.RECOGNIZER:
            if len(request.chip) == self._record:
                return self._embed_cost
            raise self._wrong_size()
        if isinstance(request, LivenessRequest) and self._stage is Stage.LIVENESS:
            if [len(crop) for crop in request.crops] == self._crop_bytes:
                return self._liveness_cost
            raise self._wrong_size()
        raise self._wrong_kind()

    def _response(self, max_faces: int) -> int:
        faces = min(max_faces, limits.MAX_FACES)
        found = self._responses.get(faces)
        if found is None:
            found = aligned(faces * _FACE.size) + aligned(faces * self._record)
            self._responses[faces] = found
        return found

    def write(
        self, requests: Sequence[Request], slot: memoryview, decoders: Decoders | None = None
    ) -> tuple[list[Item], int]:
        """Lay a batch into a request slot; its items, and the bytes used. ``decoders``: of the
        worker that is to have it."""
        items: list[Item] = []
        end = 0
        for request in requests:
            if isinstance(request, DetectRequest):
                picture = request.picture
                size = len(picture.data)
                slot[end : end + size] = picture.data
                items.append(
                    DetectItem(
                        end,
                        size,
                        picture.encoding,
                        picture.width,
                        picture.height,
                        picture.stride,
                        request.max_faces,
                        request.max_pixels,
                    )
                )
                end = aligned(end + size)
            elif isinstance(request, VideoRequest):
                assert decoders is not None
                item, end = _write_video(request, slot, end, decoders)
                items.append(item)
            elif isinstance(request, EncodeRequest):
                items.append(EncodeItem(end, request.sides))
                for picture_bytes in request.pictures:
                    slot[end : end + len(picture_bytes)] = picture_bytes
                    end += len(picture_bytes)
                end = aligned(end)
            elif isinstance(request, EmbedRequest):
                size = len(request.chip)
                slot[end : end + size] = request.chip
                items.append(EmbedItem(end, request.gallery_id, request.top_k, request.want_vector))
                end = aligned(end + size)
            else:
                offsets: list[int] = []
                for crop in request.crops:
                    slot[end : end + len(crop)] = crop
                    offsets.append(end)
                    end = aligned(end + len(crop))
                items.append(LivenessItem(tuple(offsets)))
        return items, end

    def read(
        self, request: Request, done: ItemDone, slot: memoryview
    ) -> tuple[Answer | PictureHeld | FacelaneError, int]:
        """One item's answer (or its own error), and where it ends in the response slot.

        Raises ProtocolError when the answer cannot be one to this request.
        """
        if isinstance(done, DetectDone) and isinstance(request, _DETECTIONS):
            return self._faces(request, done, slot)
        if isinstance(done, EmbedDone) and isinstance(request, EmbedRequest):
            return self._embedding(request, done, slot)
        if isinstance(done, LivenessDone) and isinstance(request, LivenessRequest):
            return LivenessAnswer(min(done.score, 1.0)), 0
        if isinstance(done, ItemFailed):
            reason = _reason(done.reason)
            # There was no time for it; that was not its own doing.
            late = reason is Reason.DEADLINE_EXCEEDED
            return FacelaneError(reason, done.message, retryable=late), 0
        if isinstance(done, PictureHeld) and isinstance(request, VideoRequest):
            if done.position >= len(request.wanted.group):
                raise ProtocolError("access units decoded that were not sent")
            return done, 0
        if isinstance(done, EncodeDone) and isinstance(request, EncodeRequest):
            return _jpegs(request, done, slot)
        raise ProtocolError("an answer of another kind than its request")

    def _faces(
        self, request: DetectRequest | VideoRequest, done: DetectDone, slot: memoryview
    ) -> tuple[Answer, int]:
        count, offset, crops_at = done.count, done.offset, done.crops_offset
        if done.width * done.height > limits.MAX_SHRUNK_PIXELS:
            raise ProtocolError("a picture larger than any that was to be decoded")
        end = crops_at + count * self._record
        records_end = offset + count * _FACE.size
        if not (
            0 <= count <= max(request.max_faces, 0)
            and offset >= 0
            and records_end <= crops_at
            and end <= len(slot)
        ):
            raise ProtocolError("faces outside of the response slot")
        faces: list[DetectedFace] = []
        for values in _FACE.iter_unpack(slot[offset:records_end]):
            crops: list[bytes] = []
            for size in self._crop_bytes:
                crops.append(bytes(slot[crops_at : crops_at + size]))
                crops_at += size
            numbers = values[: limits.FACE_FLOATS]
            total = sum(numbers)
            if math.isnan(total) or not -_FARTHEST <= min(numbers) <= max(numbers) <= _FARTHEST:
                raise ProtocolError("a face where none can be")  # nor NaN
            x, y, width, height, score = values[:5]
            points = values[5 : limits.FACE_FLOATS]
            if width < 0 or height < 0 or not 0 <= score <= _ONE:
                raise ProtocolError("a face that is none")
            faces.append(
                DetectedFace(
                    Box(x, y, width, height),
                    min(score, 1.0),
                    tuple(zip(points[0::2], points[1::2], strict=True)),
                    tuple(crops),
                    values[-1],
                )
            )
        return DetectAnswer(done.width, done.height, tuple(faces)), end

    def _embedding(
        self, request: EmbedRequest, done: EmbedDone, slot: memoryview
    ) -> tuple[Answer, int]:
        vector: bytes | bytearray = b""
        end = 0
        if request.want_vector:
            start, end = done.vector_offset, done.vector_offset + self._dim * 4
            if start < 0 or end > len(slot):
                raise ProtocolError("an embedding outside of the response slot")
            vector = Fleeting(slot[start:end])
            with np.errstate(over="ignore", invalid="ignore"):  # of nonsense, which is no warning
                norm = float(np.linalg.norm(np.frombuffer(vector, np.float32)))
            if not abs(norm - 1.0) <= _NORM_SLACK:  # nor NaN
                raise ProtocolError("an embedding that is no unit vector")
        ood = min(done.ood, 1.0)
        if not done.candidates:
            return EmbedAnswer(ood, (), vector), end
        if len(done.candidates) > request.top_k:
            raise ProtocolError("more candidates than were asked for")
        if len({index for index, _ in done.candidates}) < len(done.candidates):
            raise ProtocolError("a candidate twice")
        if self._resolve is None:
            raise ProtocolError("candidates without a gallery")
        candidates: list[Candidate] = []
        for index, similarity in done.candidates:
            key = self._resolve(done.snapshot, index)
            if key is None:
                continue
            if key[0] != request.gallery_id:
                raise ProtocolError("a candidate of another gallery")
            candidates.append(Candidate(key[1], max(-1.0, min(similarity, 1.0))))
        candidates.sort(key=lambda candidate: -candidate.similarity)
        return EmbedAnswer(ood, tuple(candidates), vector), end

    def _wrong_kind(self) -> FacelaneError:
        return FacelaneError(Reason.INTERNAL, f"the {self._stage} pool does not take this request")

    def _wrong_size(self) -> FacelaneError:
        return FacelaneError(
            Reason.INTERNAL, f"the crops are not those that the {self._stage} model takes"
        )


def _jpegs(request: EncodeRequest, done: EncodeDone, slot: memoryview) -> tuple[Answer, int]:
    end = done.offset + sum(done.lengths)
    if len(done.lengths) != len(request.pictures) or end > len(slot):
        raise ProtocolError("pictures outside of the response slot")
    jpegs, at = [], done.offset
    for length in done.lengths:
        jpeg = bytes(slot[at : at + length])
        if not jpeg.startswith(b"\xff\xd8"):
            raise ProtocolError("a picture that is no JPEG")
        jpegs.append(jpeg)
        at += length
    return EncodeAnswer(tuple(jpegs)), end


def _write_video(
    request: VideoRequest, slot: memoryview, end: int, decoders: Decoders
) -> tuple[VideoItem, int]:
    """Raises ValueError for a picture that cannot be decoded any more."""
    wanted = request.wanted
    span = decoders.span(wanted)
    units = None if span is None else wanted.group.units(span.first, span.last)
    if span is None or units is None:
        raise ValueError("its group of pictures is not kept")
    offset = end
    for unit in units:
        slot[end : end + len(unit)] = unit
        end += len(unit)
    decoders.sent(wanted, span)
    item = VideoItem(
        wanted.lane,
        offset,
        tuple([len(unit) for unit in units]),
        wanted.group.encoding,
        span.first,
        span.last,
        wanted.picture,
        begins=span.begins,
        drain=span.drains,
        ahead=request.ahead,
        max_faces=request.max_faces,
        max_pixels=request.max_pixels,
    )
    return item, aligned(end)


def failure_of(done: Any, attempts: int) -> FacelaneError:
    """The error of a job that failed whole (``InferFailed``)."""
    return FacelaneError(
        _reason(done.reason),
        done.message,
        retryable=done.retryable,
        metadata={"attempts": str(attempts)},
    )
