"""A worker may say anything: it is lost for it, and nobody who waits is."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.pool_bench import Bench, bench

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Picture, Reason, Stage
from facelane_server.ipc import messages
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import (
    PROTOCOL,
    DetectDone,
    EmbedDone,
    Fatal,
    GalleryLoaded,
    Hello,
    InferDone,
    InferFailed,
    ItemFailed,
    LivenessDone,
    Pong,
    Ready,
    Warming,
)
from facelane_server.pools.report import PoolState
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import (
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    EmbedRequest,
    LivenessAnswer,
    LivenessRequest,
    Request,
)

NUMBERS = st.sampled_from(
    [0, 1, -1, 16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]
) | st.integers(-10, 5_000)
FLOATS = st.sampled_from([0.0, 1.0, 0.5, -1.0, 2.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
TEXTS = st.sampled_from(["", "INTERNAL", "UNAUTHENTICATED", "\0", "x" * 10_000]) | st.text()
DONE = st.one_of(
    st.builds(DetectDone, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(
        EmbedDone,
        FLOATS,
        st.lists(st.tuples(NUMBERS, FLOATS), max_size=4).map(tuple),
        NUMBERS,
        NUMBERS,
    ),
    st.builds(LivenessDone, FLOATS),
    st.builds(ItemFailed, TEXTS, TEXTS),
)
ANYTHING = st.one_of(
    st.builds(Hello, NUMBERS),
    st.builds(Warming, FLOATS),
    st.builds(Ready, TEXTS, FLOATS, FLOATS, FLOATS, NUMBERS, TEXTS, NUMBERS, NUMBERS),
    st.builds(GalleryLoaded, NUMBERS),
    st.builds(InferDone, NUMBERS, st.lists(DONE, max_size=4), NUMBERS),
    st.builds(InferFailed, NUMBERS, TEXTS, TEXTS, st.booleans()),
    st.builds(Pong, NUMBERS, NUMBERS),
    st.builds(Fatal, TEXTS, TEXTS),
)

SIDE = 8
SLOT = 16 * 1024
DIM = 4
PICTURE = DetectRequest(Picture(Encoding.JPEG, b"x"), 4, 1_000_000)
CODECS: dict[Stage, tuple[Codec, Request]] = {
    Stage.DETECTOR: (Codec(Stage.DETECTOR, [SIDE]), PICTURE),
    Stage.RECOGNIZER: (
        Codec(
            Stage.RECOGNIZER,
            [SIDE],
            embedding_dim=DIM,
            resolve=lambda _, index: ("staff", f"subject{index}") if index < 100 else None,
        ),
        EmbedRequest(b"", "staff", 2, want_vector=True),
    ),
    Stage.LIVENESS: (Codec(Stage.LIVENESS, [SIDE]), LivenessRequest(())),
}


def is_sound(answer: object) -> bool:
    """What every part of the server behind the pools relies on."""
    if isinstance(answer, FacelaneError):
        return len(answer.message) <= limits.MAX_ITEM_MESSAGE_BYTES
    if isinstance(answer, LivenessAnswer):
        return 0 <= answer.score <= 1
    if isinstance(answer, EmbedAnswer):
        vector = np.frombuffer(answer.vector, np.float32)
        similarities = [c.similarity for c in answer.candidates]
        return (
            0 <= answer.ood_score <= 1
            and abs(float(np.linalg.norm(vector)) - 1) < 0.1
            and all(-1 <= s <= 1 for s in similarities)
            and similarities == sorted(similarities, reverse=True)
            and len({c.subject_id for c in answer.candidates}) == len(similarities) <= 2
        )
    assert isinstance(answer, DetectAnswer)
    return (
        1 <= answer.width <= limits.MAX_SIDE
        and 1 <= answer.height <= limits.MAX_SIDE
        and len(answer.faces) <= PICTURE.max_faces
        and all(
            0 <= face.score <= 1
            and face.box.width >= 0
            and face.box.height >= 0
            and all(
                math.isfinite(v) for v in (face.box.x, face.box.y, face.box.width, face.box.height)
            )
            and all(math.isfinite(v) for point in face.landmarks for v in point)
            for face in answer.faces
        )
    )


def floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"={len(values)}f", *values)


def understood(stage: Stage, done: Any, slot: memoryview) -> tuple[object, int]:
    """An answer's way from the packet to the pool."""
    codec, request = CODECS[stage]
    decoded = messages.decode_from_worker(messages.encode(InferDone(1, [done])))
    assert isinstance(decoded, InferDone)
    return codec.read(request, decoded.items[0], slot)


@settings(max_examples=150)
@given(
    st.sampled_from(list(Stage)),
    DONE,
    st.lists(st.floats(width=32) | st.sampled_from([0.0, 1.0, 0.5]), min_size=32, max_size=32).map(
        floats
    ),
)
def test_an_answer_is_sound_or_a_breach(stage: Stage, done: Any, filling: bytes) -> None:
    """Past the decoder and the codec nothing is left that could surprise anybody."""
    slot = memoryview(bytearray((filling * (SLOT // len(filling)))[:SLOT]))
    try:
        answer, end = understood(stage, done, slot)
    except (msgspec.DecodeError, ProtocolError):
        return
    assert is_sound(answer)
    assert 0 <= end <= SLOT


@pytest.mark.parametrize(
    "done",
    [
        DetectDone(-1, 10, 0, 0, 0),
        DetectDone(2**40, 10, 0, 0, 0),
        DetectDone(0, 10, 0, 0, 0),
        DetectDone(16_000, 16_000, 0, 0, 0),
        DetectDone(10, 10, 5, 0, 4096),
        DetectDone(10, 10, 1, 0, 0),
        DetectDone(10, 10, 1, SLOT - 8, SLOT),
        LivenessDone(1.0),
    ],
)
def test_what_a_detector_cannot_say(done: Any) -> None:
    with pytest.raises((msgspec.DecodeError, ProtocolError)):
        understood(Stage.DETECTOR, done, memoryview(bytearray(SLOT)))


@pytest.mark.parametrize("spoiled", range(15))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_a_number_in_the_slot_that_is_none(spoiled: int, value: float) -> None:
    codec, request = CODECS[Stage.DETECTOR]
    record = [10.0, 10.0, 20.0, 20.0, 0.9, *[15.0] * 10]
    slot = bytearray(SLOT)
    slot[:60] = floats(record)  # and an empty signature
    done = DetectDone(100, 100, 1, 0, limits.FACE_RECORD_BYTES)
    answer, _ = codec.read(request, done, memoryview(slot))
    assert isinstance(answer, DetectAnswer)
    assert is_sound(answer)
    record[spoiled] = value
    slot[:60] = floats(record)  # and an empty signature
    with pytest.raises(ProtocolError):
        codec.read(request, done, memoryview(slot))


@pytest.mark.parametrize(
    "candidates",
    [((1, 0.9), (1, 0.8)), ((1, 0.9), (2, 0.8), (3, 0.7))],
    ids=["twice", "more than asked for"],
)
def test_candidates_that_cannot_be(candidates: tuple[tuple[int, float], ...]) -> None:
    codec, request = CODECS[Stage.RECOGNIZER]
    slot = bytearray(SLOT)
    slot[:16] = floats([1.0, 0.0, 0.0, 0.0])
    with pytest.raises(ProtocolError):
        codec.read(request, EmbedDone(0.9, candidates, 1, 0), memoryview(slot))
    in_any_order = ((1, 0.5), (2, 0.9))
    answer, _ = codec.read(request, EmbedDone(0.9, in_any_order, 1, 0), memoryview(slot))
    assert is_sound(answer)


@pytest.mark.parametrize("vector", [[math.nan, 0, 0, 0], [0, 0, 0, 0], [9, 0, 0, 0]])
def test_an_embedding_that_is_none(vector: list[float]) -> None:
    """It would become a template."""
    codec, request = CODECS[Stage.RECOGNIZER]
    slot = bytearray(SLOT)
    slot[:16] = floats(vector)
    with pytest.raises(ProtocolError):
        codec.read(request, EmbedDone(0.9, (), 0, 0), memoryview(slot))


def test_a_worker_cannot_speak_for_the_server() -> None:
    codec, request = CODECS[Stage.DETECTOR]
    for said in ("UNAUTHENTICATED", "TOO_MANY_BAD_PICTURES", "nonsense", ""):
        answer, _ = codec.read(request, ItemFailed(said, "m"), memoryview(b""))
        assert isinstance(answer, FacelaneError)
        assert answer.reason is Reason.INTERNAL


def test_a_picture_that_there_was_no_time_for_may_come_again() -> None:
    codec, request = CODECS[Stage.DETECTOR]
    answer, _ = codec.read(request, ItemFailed("DEADLINE_EXCEEDED", "m"), memoryview(b""))
    assert isinstance(answer, FacelaneError)
    assert (answer.reason, answer.retryable) == (Reason.DEADLINE_EXCEEDED, True)
    answer, _ = codec.read(request, ItemFailed("PICTURE_TOO_COSTLY", "m"), memoryview(b""))
    assert isinstance(answer, FacelaneError)
    assert (answer.reason, answer.retryable) == (Reason.PICTURE_TOO_COSTLY, False)


# -- through a pool -------------------------------------------------------------------------


async def outlive(b: Bench, tasks: list[Any]) -> None:
    """Honest workers come back, and every task ends."""
    for _ in range(60):
        await b.clock.advance(400)
        for worker in b.workers:
            if worker.channel is not None and worker.load is None:
                await worker.become_ready()
            while worker.channel is not None and worker.jobs:
                await b.answer(worker)
        await b.turn()
        if b.pool.state is PoolState.SERVING and all(t.future.done() for t in tasks):
            return
    raise AssertionError(b.pool.info())


@settings(max_examples=60)
@given(st.lists(ANYTHING, min_size=1, max_size=6), st.booleans())
def test_whatever_a_worker_says_every_task_has_an_outcome(said: list[Any], busy: bool) -> None:
    async def scenario() -> None:
        async with bench(restart_limit=100, batch_max=2, memory_mib=1000) as b:
            await b.ready()
            tasks = [b.submit(lane, age_ms=60_000) for lane in range(3)] if busy else []
            await b.turn()
            for message in said:
                worker = b.workers[0]
                if worker.channel is not None:
                    worker.say(message)
                    await b.turn()
            await outlive(b, tasks)
            assert all(is_sound(t.future.exception() or t.future.result()) for t in tasks)
            assert b.pool.info().budget_mib == 1000
            for worker in b.pool.info().workers:
                assert 0 <= worker.memory_mib <= 1 << 24
                assert worker.last_loss.isupper() or not worker.last_loss

    asyncio.run(scenario())


@settings(max_examples=60)
@given(st.lists(ANYTHING, min_size=1, max_size=12))
def test_whatever_a_worker_says_before_it_is_ready(said: list[Any]) -> None:
    async def scenario() -> None:
        async with bench(restart_limit=100, load_timeout_s=5.0) as b:
            await b.start()
            worker = b.workers[0]
            worker.say(Hello(PROTOCOL))
            await b.turn()
            for message in said:
                if worker.channel is not None:
                    worker.say(message)
                    await b.turn()
            worker.die(0)
            await b.turn()
            await outlive(b, [])

    asyncio.run(scenario())


async def test_a_flood_before_ready_is_bounded() -> None:
    async with bench() as b:
        await b.start()
        b.workers[0].say(*[Hello(PROTOCOL)] * 50)
        await b.turn()
        assert b.pool.info().workers[0].last_loss == "PROTOCOL"


@pytest.mark.parametrize("said", [GalleryLoaded(7), Pong(0), Pong(1)])
async def test_news_of_what_was_not_asked_is_a_breach(said: Any) -> None:
    async with bench() as b:
        await b.ready()
        b.workers[0].say(said)
        await b.turn()
        assert b.pool.info().workers[0].last_loss == "PROTOCOL"
