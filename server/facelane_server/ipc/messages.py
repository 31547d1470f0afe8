"""All messages between the server and a worker. Charter: this file and no other.

Two closed unions of tagged structs, encoded with msgpack, one message a packet of a
SOCK_SEQPACKET socket. Pixels, crops, faces and embeddings never travel here: they lie
in the slots of two memfd arenas, and messages hold offsets into the job's slot.

::

    server                                   worker
      |  <- Hello ------------------------------|   first message, protocol version
      |  -- Load (+ fds: request, response) --> |   arenas by SCM_RIGHTS
      |  <- Ready ------------------------------|   model loaded, warmed, measured
      |  -- GallerySnapshot (+ fds) ----------> |   recognisers only; newest wins
      |  -- GalleryDelta (+ fd) --------------> |   what came after it; newest wins
      |  <- GalleryLoaded ----------------------|
      |  -- Infer(job, slot) -----------------> |   as many in flight as there are slots
      |  <- InferDone | InferFailed ------------|   in the order of Infer
      |  -- Ping -> / <- Pong -----------------|   answered by the inference loop itself
      |  -- Cancel ---------------------------> |   best effort: skips a job not begun
      |  -- CloseVideo -----------------------> |   a lane of video ended, or has moved
      |  -- Scrub ----------------------------> |   somebody was deleted
      |  -- Drain -> / <- Drained ------------- |   then the worker exits 0
      |  <- Fatal ------------------------------|   last words: why the worker ends

A change of a field's meaning raises ``PROTOCOL``; ``array_like`` keeps packets small,
so fields are only ever appended.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from facelane_server import limits

PROTOCOL: Final = 6

# What a worker says is checked while it is decoded: whatever lies outside of these, NaN
# included, is no message, and the worker is lost. Scores may exceed 1 by a rounding error.
Side = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=limits.RESPONSE_SLOT_BYTES)]
Score = Annotated[float, msgspec.Meta(ge=0.0, le=1.001)]
Cosine = Annotated[float, msgspec.Meta(ge=-1.001, le=1.001)]
Millis = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
MiB = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Known = Annotated[list[float], msgspec.Meta(max_length=limits.MAX_EMBEDDING_DIM + 1)]
Word = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_ITEM_MESSAGE_BYTES)]


class Packed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of the items inside of messages."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of the messages; the tag is the class's name."""


# -- items of a job -------------------------------------------------------------------


class DetectItem(Packed, frozen=True, tag="D"):
    """A picture at ``[offset, offset + length)`` of the request slot."""

    offset: int
    length: int
    encoding: str
    width: int = 0
    height: int = 0
    stride: int = 0
    max_faces: int = 16
    max_pixels: int = 0


class VideoItem(Packed, frozen=True, tag="V"):
    """One picture of a lane's video. Access units number ``first`` to ``last`` of a group of
    pictures (0 = its key frame) lie one behind the other from ``offset`` on, as long as
    ``lengths`` says; none where the decoder has had them all. ``begins``: with the group's key
    frame, and nothing of what was before is needed. ``picture``: the one wanted, counted in the
    order of showing. ``drain``: nothing follows, so what the decoder holds back comes out.
    ``ahead``: nobody wants it after all, it is decoded for those that follow, once the job is
    answered; the answer is PictureHeld."""

    lane: int
    offset: int
    lengths: tuple[int, ...]
    encoding: str
    first: int
    last: int
    picture: int
    begins: bool = False
    drain: bool = False
    ahead: bool = False
    max_faces: int = 16
    max_pixels: int = 0


class EmbedItem(Packed, frozen=True, tag="E"):
    """An aligned chip at ``offset`` of the request slot (size x size x 3 uint8 BGR).

    ``gallery``: the gallery to search, empty = none. ``top_k`` distinct subjects come
    back. ``want_vector``: put the embedding (float32) into the response slot.
    """

    offset: int
    gallery: str = ""
    top_k: int = 2
    want_vector: bool = False


class LivenessItem(Packed, frozen=True, tag="L"):
    """Context crops at ``offsets`` of the request slot, in the order of the model's specs."""

    offsets: tuple[int, ...]


class EncodeItem(Packed, frozen=True, tag="J"):
    """Pictures of BGR, square, of ``sides``, one behind the other from ``offset`` on, to be encoded
    as JPEG: by detectors, who know how."""

    offset: int
    sides: tuple[int, ...]


class EncodeDone(Packed, frozen=True, tag="j"):
    """JPEGs of ``lengths``, one behind the other from ``offset`` of the response slot on."""

    offset: Offset
    lengths: Annotated[tuple[Offset, ...], msgspec.Meta(max_length=limits.MAX_ENCODED)]


class DetectDone(Packed, frozen=True, tag="d"):
    """``count`` faces at ``offset`` of the response slot: first ``count`` records of
    ``limits.FACE_FLOATS`` float32 and ``limits.SIGNATURE_BYTES`` bytes, then, at
    ``crops_offset``, ``count`` crop records (the crops of one face, one behind the other, in
    the order of Load.crops)."""

    width: Side
    height: Side
    count: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_FACES)]
    offset: Offset
    crops_offset: Offset


class PictureHeld(Packed, frozen=True, tag="h"):
    """Video: there is no picture yet. ``position``: the newest access unit of the group that was
    decoded; -1 = the decoder is not where the item goes on, and has to begin anew. ``held``: all
    were decoded, and the decoder holds so many pictures back; 0 = the others must have their turn,
    send the rest again. ``waits``: nothing of the item was taken in, an earlier picture comes
    first; send it again. ``opening``: nothing is decoded, the decoder is being opened."""

    position: Annotated[int, msgspec.Meta(ge=-1, le=limits.MAX_GROUP_UNITS)]
    held: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_REORDER)] = 0
    waits: bool = False
    opening: bool = False


class EmbedDone(Packed, frozen=True, tag="e"):
    """``candidates``: (subject index in the snapshot's table, cosine), best first, one a
    subject. ``snapshot``: the version searched, 0 = none. ``vector_offset`` -1 = not asked."""

    ood: Score
    candidates: tuple[tuple[Number, Cosine], ...] = ()
    snapshot: Number = 0
    vector_offset: Annotated[int, msgspec.Meta(ge=-1, le=limits.RESPONSE_SLOT_BYTES)] = -1


class LivenessDone(Packed, frozen=True, tag="l"):
    score: Score


class ItemFailed(Packed, frozen=True, tag="x"):
    """This item alone failed (a broken picture); the rest of its batch did not.

    PICTURE_TOO_COSTLY: decoding it would take, or took, more than a picture may. That is the
    picture's doing: it is never tried again, and who sends such pictures can be told by it."""

    reason: Word
    message: Text


Item = DetectItem | VideoItem | EncodeItem | EmbedItem | LivenessItem
ItemDone = DetectDone | PictureHeld | EncodeDone | EmbedDone | LivenessDone | ItemFailed


# -- to the worker --------------------------------------------------------------------


class CropSpecMessage(Packed, frozen=True):
    """``scale`` 0 = aligned chip (ArcFace template), else context crop."""

    size: int
    scale: float = 0.0


class Load(Message, frozen=True):
    """Load the model package in folder ``package`` and warm it up.

    With two descriptors: the request and the response arena, each
    ``slots * slot bytes`` long. ``options`` are architecture-independent extras for
    fault tests and benchmarks (for example ``fail_load``); empty in production.
    ``job_timeout_ms``: when a job counts as hung; pictures are given up well before.
    ``canary_side``: of a detector's canary pictures.
    """

    worker_id: str
    stage: str
    package: str
    device: str
    batch_max: int
    slots: int
    request_slot_bytes: int
    response_slot_bytes: int
    crops: tuple[CropSpecMessage, ...] = ()
    precision: str = "auto"
    graphs: bool = True
    threads: int = 1
    stream_priority: int = 0
    memory_mib: int = 0
    max_side: int = 0
    max_pixels: int = 0
    decode: str = "cpu"
    options: dict[str, str] = {}
    job_timeout_ms: int = 5_000
    canary_side: int = 0


class Infer(Message, frozen=True):
    """Job ``job_id`` in ``slot``; ``items`` are all of one kind."""

    job_id: int
    slot: int
    items: list[Item]


class Cancel(Message, frozen=True):
    job_id: int


class CloseVideo(Message, frozen=True):
    """The lane's decoder is not needed here any more, once the jobs sent before are begun."""

    lane: int


class Scrub(Message, frozen=True):
    """Somebody was deleted: what is free of the worker's memory is filled with zeros, beside its
    jobs."""


class Ping(Message, frozen=True):
    sequence: int


class Drain(Message, frozen=True):
    """Finish what was sent, answer Drained, exit 0."""


class GallerySnapshot(Message, frozen=True):
    """With two descriptors. The first: ``rows`` x ``dim`` float16 unit vectors, C order, then
    ``rows`` int32 subject indices; rows are sorted by gallery, then by subject. The second:
    the table of galleries (``gallery_table``), ``table_bytes`` long.

    ``galleries``: (gallery id, first row, one past the last row); empty in transit.
    ``model_id``: whose
    templates these are; a worker of another model holds them as an empty gallery, so that
    nothing is compared across models while a reload swaps them. Empty = any model.
    """

    version: int
    rows: int
    dim: int
    galleries: tuple[tuple[str, int, int], ...]
    model_id: str = ""
    table_bytes: int = 0


class GalleryDelta(Message, frozen=True):
    """With the log of the snapshot of version ``base`` (``gallery_log``), read up to ``log_bytes``:
    all that came after it, up to ``version``."""

    version: int
    base: int
    log_bytes: int


ToWorker = (
    Load | Infer | Cancel | CloseVideo | Scrub | Ping | Drain | GallerySnapshot | GalleryDelta
)


# -- from the worker ------------------------------------------------------------------


class Hello(Message, frozen=True):
    protocol: Number
    python: Word = ""


class Warming(Message, frozen=True):
    """The weights are loaded; warm-up begins. ``load_ms`` since Load."""

    load_ms: Millis


class Ready(Message, frozen=True):
    """``memory_mib`` on the device by NVML or the allocator, context included; resident on
    a CPU. ``latency_ms``: one item, measured after warm-up. ``embedding_dim``: of
    recognisers, else 0. ``batch_max``: the largest job that it takes. ``sandbox``: what the
    worker's process is confined by. ``known``: what its model has for an answer to each of the
    canary's pictures, in full precision (``models.canary``); empty = it does not say."""

    model_id: Word
    load_ms: Millis
    warm_ms: Millis
    latency_ms: Millis
    memory_mib: MiB = 0
    device_name: Word = ""
    embedding_dim: Number = 0
    batch_max: Number = limits.BATCH
    sandbox: Word = "off"
    known: Annotated[list[Known], msgspec.Meta(max_length=limits.MAX_CANARIES)] = msgspec.field(
        default_factory=list
    )


class GalleryLoaded(Message, frozen=True):
    version: Number


class InferDone(Message, frozen=True):
    """``waited_us``: how long its video waited for those who decode, on average; 0 where it is not
    read before its turn."""

    job_id: Number
    items: Annotated[list[ItemDone], msgspec.Meta(max_length=limits.MAX_BATCH)]
    memory_mib: MiB = 0
    waited_us: Number = 0


class InferFailed(Message, frozen=True):
    """The whole job failed. ``retryable``: on another worker it may succeed."""

    job_id: Number
    reason: Word
    message: Text
    retryable: bool = False


class Pong(Message, frozen=True):
    sequence: Number
    memory_mib: MiB = 0


class Drained(Message, frozen=True):
    pass


class Fatal(Message, frozen=True):
    """The worker ends now. ``reason``: LOAD_FAILED, WARM_UP_FAILED, DEVICE_POISONED,
    OUT_OF_MEMORY, WORN_OUT, PROTOCOL, INTERNAL."""

    reason: Word
    message: Text


FromWorker = (
    Hello | Warming | Ready | GalleryLoaded | InferDone | InferFailed | Pong | Drained | Fatal
)

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    return _encoder.encode(message)


def decode_to_worker(packet: bytes | memoryview) -> ToWorker:
    """Raises ``msgspec.DecodeError`` (``ValidationError`` included) on anything else."""
    return _to_worker.decode(packet)


def decode_from_worker(packet: bytes | memoryview) -> FromWorker:
    """Raises ``msgspec.DecodeError`` (``ValidationError`` included) on anything else."""
    return _from_worker.decode(packet)
