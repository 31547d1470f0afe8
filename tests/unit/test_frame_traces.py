"""Traces of frames over scripted pools: every frame that was begun ends, whatever became of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.fakes.scripted_pool import ScriptedPools, faces

from facelane_server import tracking
from facelane_server.domain import (
    Encoding,
    FacelaneError,
    Frame,
    Overload,
    Picture,
    Reason,
)
from facelane_server.lanes import Lane, LaneOptions, SilentObserver
from facelane_server.pipeline import Origin, Plan
from facelane_server.sampling import Tracing
from facelane_server.traces import Traces, watching

export = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter",
    reason="the extra [otel] is not installed",
)

CONTEXT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def turns() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


class Traced:
    """A lane whose frames are traced, and the spans that ended."""

    def __init__(self, **options: Any) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        self._spans = export.InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        settings = Tracing(endpoint="http://collector:4317", frames_per_second=1000)
        self.traces = Traces(settings, provider.get_tracer("test"))
        self.pools = ScriptedPools()
        self.lane = Lane(
            1,
            "stream",
            LaneOptions(**options),
            self.pools.pipeline,
            window=8,
            window_bytes=10_000,
            tracking_params=tracking.Params(),
            observer=watching(self.traces, SilentObserver()),
        )

    def offer(self, frame_id: int, context: str = CONTEXT) -> None:
        frame = Frame(frame_id, Picture(Encoding.JPEG, bytes(10)), frame_id, None)
        self.traces.offer(self.lane, frame, None, context)

    async def ended(self) -> list[tuple[str, str, str]]:
        """Names, outcomes and reasons."""
        await turns()
        found = self._spans.get_finished_spans()
        assert not self.traces._frames
        assert not self.traces._batches
        told = [dict(span.attributes or {}) for span in found]
        return [
            (span.name, str(said.get("facelane.outcome", "")), str(said.get("facelane.reason", "")))
            for span, said in zip(found, told, strict=True)
            if span.name == "facelane.lane"
        ]


async def test_a_result() -> None:
    one = Traced(overload=Overload.LOSSLESS)
    one.offer(1)
    one.pools.detector.answer(faces(1))
    await turns()
    one.pools.answer_second("ada")
    assert await one.ended() == [("facelane.lane", "RESULT", "")]


async def test_one_that_is_superseded() -> None:
    one = Traced()
    one.offer(1)
    one.offer(2)
    one.pools.detector.answer(faces(0))
    assert await one.ended() == [
        ("facelane.lane", "DROP", "SUPERSEDED"),
        ("facelane.lane", "RESULT", ""),
    ]


async def test_an_error() -> None:
    one = Traced(overload=Overload.LOSSLESS)
    one.offer(1)
    one.pools.detector.answer(FacelaneError(Reason.PICTURE_CORRUPT, "no picture"))
    assert await one.ended() == [("facelane.lane", "ERROR", "PICTURE_CORRUPT")]


async def test_a_stream_that_goes_away() -> None:
    one = Traced(overload=Overload.LOSSLESS)
    for number in range(3):
        one.offer(number + 1)
    one.lane.abort()
    assert await one.ended() == [("facelane.lane", "DROP", "STREAM_CLOSED")] * 3


class TracedPicture(Traced):
    """A picture of a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.call = asyncio.ensure_future(self._analysed())

    async def _analysed(self) -> None:
        origin = Origin(1, 1, 1 << 62)
        with self.traces.picture("AnalyzeImage", CONTEXT) as timings:
            assert timings is not None
            reading = await self.pools.pipeline.analyse(
                Picture(Encoding.JPEG, bytes(10)), Plan(), origin, timings
            )
            timings.result = reading.result

    def spans(self) -> list[tuple[str, Any, Any]]:
        assert not self.traces._pictures
        told = [(span, dict(span.attributes or {})) for span in self._spans.get_finished_spans()]
        return [
            (span.name, said.get("facelane.stage"), said.get("facelane.reason"))
            for span, said in told
        ]


async def test_a_picture_with_an_answer() -> None:
    one = TracedPicture()
    await turns()
    one.pools.detector.answer(faces(1))
    await turns()
    one.pools.answer_second("ada")
    await one.call
    await turns()
    assert one.spans()[-1] == ("facelane.picture", None, None)
    assert {stage for _, stage, _ in one.spans()[:-1]} == {"detector", "recognizer", "liveness"}


async def test_a_picture_that_fails() -> None:
    one = TracedPicture()
    await turns()
    one.pools.detector.answer(FacelaneError(Reason.PICTURE_CORRUPT, "no picture"))
    with pytest.raises(FacelaneError):
        await one.call
    await turns()
    assert one.spans()[-1] == ("facelane.picture", None, "PICTURE_CORRUPT")
    assert ("facelane.queue", "detector", None) in one.spans()


async def test_a_picture_whose_caller_goes_away() -> None:
    one = TracedPicture()
    await turns()
    one.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one.call
    await turns()
    assert one.spans()[-1] == ("facelane.picture", None, "CANCELLED")


async def test_pictures_without_a_context_have_their_share() -> None:
    one = Traced()
    with one.traces.picture("AnalyzeImage", "") as timings:
        assert timings is None


async def test_a_frame_id_that_goes_back_leaves_nothing_behind() -> None:
    one = Traced(overload=Overload.LOSSLESS)
    one.offer(5)
    for number in (5, 3):
        with pytest.raises(FacelaneError):
            one.offer(number)
    assert list(one.traces._frames) == [(1, 5)]
    one.lane.abort()
    assert ("facelane.lane", "DROP", "STREAM_CLOSED") in await one.ended()


@pytest.mark.parametrize("context", ["", CONTEXT[:-1] + "0", "nonsense"])
async def test_without_a_sampled_context_there_is_no_trace(context: str) -> None:
    one = Traced(overload=Overload.LOSSLESS)
    one.offer(1, context)
    one.pools.detector.answer(faces(0))
    assert await one.ended() == []
