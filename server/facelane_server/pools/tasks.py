"""What the pipeline hands to a pool, and what comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from facelane_server.domain import Candidate, DetectedFace, Picture
from facelane_server.pools.groups import Wanted


class DetectRequest(msgspec.Struct, frozen=True, gc=False):
    picture: Picture
    max_faces: int
    max_pixels: int


class VideoRequest(msgspec.Struct, frozen=True):
    """One picture of a lane's video. ``ahead``: nobody looks at it, later ones need it."""

    wanted: Wanted
    max_faces: int
    max_pixels: int
    ahead: bool = False


class EncodeRequest(msgspec.Struct, frozen=True, gc=False):
    """Square pictures, BGR, side x side x 3 uint8, to be JPEGs; the detector pool's. ``sides``: of
    each."""

    pictures: tuple[bytes, ...]
    sides: tuple[int, ...]


class EmbedRequest(msgspec.Struct, frozen=True, gc=False):
    """``chip``: size x size x 3 uint8 BGR. ``gallery_id`` empty = do not search."""

    chip: bytes
    gallery_id: str = ""
    top_k: int = 2
    want_vector: bool = False


class LivenessRequest(msgspec.Struct, frozen=True, gc=False):
    crops: tuple[bytes, ...]


class DetectAnswer(msgspec.Struct, frozen=True, gc=False):
    width: int
    height: int
    faces: tuple[DetectedFace, ...]


class Undecoded(msgspec.Struct, frozen=True, gc=False):
    """Of video there is no picture. ``held``: the decoder holds so many back, more access units
    bring them out; 0 = none comes before the next key frame."""

    held: int = 0


class EncodeAnswer(msgspec.Struct, frozen=True, gc=False):
    """JPEGs, in the order of the request."""

    jpegs: tuple[bytes, ...]


class EmbedAnswer(msgspec.Struct, frozen=True, gc=False):
    """``candidates``: best first, one a subject. ``vector``: float32 bytes, if asked for."""

    ood_score: float
    candidates: tuple[Candidate, ...] = ()
    vector: bytes | bytearray = b""


class LivenessAnswer(msgspec.Struct, frozen=True, gc=False):
    score: float


@dataclass(frozen=True, slots=True)
class Sender:
    """Who asks, for fairness and for blame. ``key``: name of the caller's key, empty = unknown;
    ``weight``: that key's share, the operator's to choose. ``live``: a stream, else a single
    picture. ``patient``: a stream that waits for its turn however long that is, as a file does.
    ``source``: the stream's source id, empty = it has none."""

    key: str = ""
    weight: int = 1
    live: bool = True
    patient: bool = False
    source: str = ""


ANYBODY: Final = Sender()

Request = DetectRequest | VideoRequest | EncodeRequest | EmbedRequest | LivenessRequest
Answer = DetectAnswer | Undecoded | EncodeAnswer | EmbedAnswer | LivenessAnswer

A = TypeVar("A", bound=Answer)


@dataclass(slots=True, eq=False)
class Task(Generic[A]):
    """One item of work. The pool resolves ``future`` exactly once: with the answer, or
    with a ``FacelaneError`` (DEADLINE_EXCEEDED, POOL_UNAVAILABLE, POOL_OVERLOADED,
    WORKER_LOST, POISONED, OUT_OF_MEMORY, CANCELLED, or the picture's own fault).

    ``lane``: fairness is between the lanes of a ``sender``, ``weight`` its share. Times are
    ``time.monotonic_ns``; ``dispatched_ns`` is 0 until a worker has it.
    """

    request: Request
    lane: int
    weight: int
    deadline_ns: int
    future: asyncio.Future[A]
    submitted_ns: int = 0
    dispatched_ns: int = 0
    finished_ns: int = 0
    attempts: int = 0
    """Workers that ended, or failed whole, over it."""
    model: str = ""
    """Of the worker that has it, or had it last; empty until one has."""
    slices: int = 0
    """Jobs that decoded a part of what it takes."""
    opening: bool = False
    """Of video: its decoder was still being opened when a worker had it last."""
    behind_ns: int = 0
    """Since when its decoder, which had all before, has more to do for it than a turn's; 0 = it has
    not."""
    sender: Sender = ANYBODY
    canary: bool = False
    """The pool's own: nobody asked for it."""

    @property
    def ahead(self) -> bool:
        """Of video that is only decoded: nobody waits for it, nor is told of it."""
        return isinstance(self.request, VideoRequest) and self.request.ahead


AnyTask = Task[Any]


@dataclass(slots=True, eq=False)
class Job:
    """A batch in one slot of one worker."""

    job_id: int
    slot: int
    tasks: list[AnyTask]
    request_used: int = 0
    started_ns: int = 0
    """When it became the worker's first job."""
    abandoned: bool = False
    """Nobody waits for it any more, and the worker was told."""

    @property
    def size(self) -> int:
        """Tasks that are to be answered."""
        return sum(not task.ahead for task in self.tasks)
