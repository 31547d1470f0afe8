"""Traces: a real server and the real SDK tell a collector where a frame's time went."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.running_server import THREAD_POOLS, RunningServer, free_port, toml
from tests.waiting import until

import facelane

pytest.importorskip("opentelemetry.sdk", reason="the extra [otel] is not installed")

from tests.fakes.collector import Collector, Span

FRAMES = 6


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[RunningServer]:
    """A server that exports traces, often: an environment says so."""
    folder = tmp_path_factory.mktemp("traced")
    extra = f'[tracing]\nendpoint = "{collector.endpoint}"\nframes_per_second = 1000\n'
    with RunningServer(
        folder, toml(folder, extra=extra), env={"OTEL_BSP_SCHEDULE_DELAY": "50"}
    ) as made:
        made.wait_serving()
        yield made


def faces_of(pixels: int) -> facelane.Picture:
    return wire.picture(pixels)


def test_a_traced_frame_is_one_trace_from_its_client_to_the_workers(
    traced: RunningServer, collector: Collector
) -> None:
    tracing = facelane.tracing.Tracing.to(collector.endpoint, ratio=1.0, service="door-camera")
    with traced.client() as client:
        client.enroll("erika-m", wire.picture(1), display_name="Erika Mustermann")
        client.tracing = tracing
        with client.analyze_stream(source_id="door", overload="lossless") as stream:
            for number in range(FRAMES):
                stream.send(faces_of(number + 1))
            stream.close_send()
            outcomes = list(stream)
        client.delete_subject("erika-m")
    tracing.close()
    assert any(face.identity.subject_id for o in outcomes if o.result for face in o.result.faces)
    assert [outcome.result is not None for outcome in outcomes] == [True] * FRAMES
    until(lambda: len(collector.spans("facelane.lane")) >= FRAMES, what="the lanes' spans")
    until(lambda: len(collector.spans("facelane.batch")) >= 1, what="the batches' spans")

    stages = {span.attributes["facelane.stage"] for span in collector.spans("facelane.worker")}
    assert stages == {"detector", "recognizer", "liveness"}
    frames = {span.trace_id: span for span in collector.spans("facelane.frame")}
    assert len(frames) == FRAMES, "a trace each"
    assert {span.service for span in frames.values()} == {"door-camera"}
    lanes = {span.trace_id: span for span in collector.spans("facelane.lane")}
    assert lanes.keys() == frames.keys()
    batches = {(span.trace_id, span.span_id): span for span in collector.spans("facelane.batch")}
    inside = [*collector.spans("facelane.queue"), *collector.spans("facelane.worker")]
    for trace, lane in lanes.items():
        assert lane.service == "facelane-server"
        assert lane.parent_id == frames[trace].span_id, "the client's span is over the lane's"
        assert lane.attributes["facelane.frame_id"] == frames[trace].attributes["facelane.frame_id"]
        assert lane.attributes["facelane.outcome"] == "RESULT"
        assert frames[trace].start_ns <= lane.start_ns <= lane.end_ns
        mine = [span for span in inside if span.trace_id == trace]
        assert all(span.parent_id == lane.span_id for span in mine)
        assert all(lane.start_ns <= s.start_ns <= s.end_ns <= lane.end_ns for s in mine)
        counted = Counter((span.name, span.attributes["facelane.stage"]) for span in mine)
        faces = lane.attributes["facelane.faces"]
        assert faces
        assert counted["facelane.queue", "detector"] == 1
        assert counted["facelane.worker", "detector"] == 1
        for worker in (span for span in mine if span.name == "facelane.worker"):
            [link] = worker.links
            batch = batches[link]
            assert batch.trace_id not in lanes, "a batch is of no frame alone"
            assert (trace, lane.span_id) in batch.links
            assert batch.attributes["facelane.worker"] == worker.attributes["facelane.worker"]
            assert batch.attributes["facelane.batch.size"] >= len(
                {trace for trace, _ in batch.links}
            )


def test_a_call_with_a_picture_is_one_trace_too(
    traced: RunningServer, collector: Collector
) -> None:
    tracing = facelane.tracing.Tracing.to(collector.endpoint, ratio=1.0, service="reception")
    broken = facelane.Picture.encoded(b"\xff\xd8\xff\xe0" + b"x" * 64)
    with traced.client() as client:
        client.tracing = tracing
        client.enroll("erika-m", wire.picture(1), display_name="Erika Mustermann")
        assert client.verify("erika-m", wire.picture(1)).verified
        [found] = client.identify(wire.picture(1))
        assert found.identity.subject_id == "erika-m"
        result = client.analyze_image(wire.picture(1))
        with pytest.raises(facelane.PictureError) as refused:
            client.analyze_image(broken)
        client.delete_subject("erika-m")
    tracing.close()
    methods = ["AnalyzeImage", "AnalyzeImage", "EnrollFace", "IdentifyFace", "VerifyFace"]
    until(lambda: len(collector.spans("facelane.picture")) >= 5, what="the pictures' spans")
    calls = {span.trace_id: span for span in collector.spans("facelane.call")}
    assert sorted(s.attributes["facelane.method"] for s in calls.values()) == methods
    inside = [*collector.spans("facelane.queue"), *collector.spans("facelane.worker")]
    batches = {(span.trace_id, span.span_id): span for span in collector.spans("facelane.batch")}
    pictures = collector.spans("facelane.picture")
    assert len(pictures) == 5
    for picture in pictures:
        call = calls[picture.trace_id]
        assert picture.service == "facelane-server"
        assert picture.parent_id == call.span_id
        for key in ("facelane.method", "facelane.outcome"):
            assert picture.attributes[key] == call.attributes[key]
        mine = [span for span in inside if span.trace_id == picture.trace_id]
        assert all(span.parent_id == picture.span_id for span in mine)
        assert all(picture.start_ns <= s.start_ns <= s.end_ns <= picture.end_ns for s in mine)
        workers = [span for span in mine if span.name == "facelane.worker"]
        if picture.failed:
            assert call.failed
            for span in (call, picture):
                assert span.attributes["facelane.reason"] == refused.value.reason
            continue
        assert picture.attributes["facelane.faces"] == len(result.faces) == 1
        stages = {span.attributes["facelane.stage"] for span in workers}
        asked = {"detector", "recognizer", "liveness"}
        if picture.attributes["facelane.method"] == "EnrollFace":
            asked.remove("liveness")
        assert stages == asked
        assert len(workers) == len(asked)
        for worker in workers:
            [link] = worker.links
            assert (picture.trace_id, picture.span_id) in batches[link].links
    assert [picture.failed for picture in pictures].count(True) == 1


async def test_the_asyncio_client_traces_its_calls(
    traced: RunningServer, collector: Collector
) -> None:
    tracing = facelane.tracing.Tracing.to(collector.endpoint, ratio=1.0, service="aio")
    async with facelane.aio.Client(traced.target) as client:
        client.tracing = tracing
        await client.analyze_image(wire.picture(1))
    await asyncio.to_thread(tracing.close)
    [call] = [span for span in collector.spans("facelane.call") if span.service == "aio"]
    assert call.attributes["facelane.outcome"] == "RESULT"


def test_nothing_of_a_face_is_exported(traced: RunningServer, collector: Collector) -> None:
    """Runs behind the tests above: what was exported there names nobody."""
    allowed = {
        "source_id", "stream_id", "frame_id", "frame_bytes", "overload", "outcome", "reason",
        "faces", "missing_stages", "stage", "attempts", "worker", "model", "batch.size",
        "method", "picture_bytes",
    }  # fmt: skip
    seen = {key for span in collector.spans() for key in span.attributes}
    assert {key.removeprefix("facelane.") for key in seen} <= allowed
    for raw in collector.raw:
        assert b"Erika" not in raw
        assert b"erika-m" not in raw
        assert len(raw) < 200_000, "no picture either"


def test_who_asks_for_no_trace_has_none(traced: RunningServer, collector: Collector) -> None:
    def lanes() -> int:
        return len(collector.spans("facelane.lane"))

    before = lanes()
    with traced.client() as client:
        assert answered(client) == FRAMES
    tracing = facelane.tracing.Tracing.to(collector.endpoint, ratio=1.0)
    with traced.client() as client:
        client.tracing = tracing
        with client.analyze_stream(source_id="last") as stream:
            stream.send(faces_of(1))
            stream.close_send()
            list(stream)
    tracing.close()
    # The last frame's trace came, and with it all that was to come before.
    until(lambda: lanes() > before, what="the last frame's span")
    assert lanes() == before + 1


def test_a_bad_picture_is_an_error_in_its_trace(
    traced: RunningServer, collector: Collector
) -> None:
    tracing = facelane.tracing.Tracing.to(collector.endpoint, ratio=1.0)
    with traced.client() as client:
        client.tracing = tracing
        with client.analyze_stream(source_id="broken") as stream:
            stream.send(facelane.Picture.encoded(b"\xff\xd8\xff\xe0" + b"x" * 64))
            stream.close_send()
            [outcome] = stream
    tracing.close()
    assert outcome.error is not None

    def of_it(name: str) -> list[Span]:
        return [s for s in collector.spans(name) if s.attributes["facelane.source_id"] == "broken"]

    until(lambda: of_it("facelane.lane"), what="the span of the error")
    for span in (*of_it("facelane.lane"), *of_it("facelane.frame")):
        assert span.failed
        assert span.attributes["facelane.reason"] == outcome.error.reason


def test_a_server_without_traces_takes_the_context(server: RunningServer) -> None:
    """The session's server exports none."""
    from opentelemetry.sdk.trace import TracerProvider

    with server.client() as client:
        client.tracing = facelane.tracing.Tracing(TracerProvider(shutdown_on_exit=False), ratio=1.0)
        assert answered(client) == FRAMES
        assert client.analyze_image(wire.picture(1)).faces


@pytest.mark.slow
def test_a_collector_that_is_away_costs_no_frame(start: Start) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    made = start(THREAD_POOLS, f'[tracing]\nendpoint = "{away}"\nratio = 1.0\n')
    with made.client() as client:
        assert answered(client) == FRAMES
    assert made.stop() == 0
    assert "Traceback" not in made.text()


def answered(client: facelane.Client) -> int:
    with client.analyze_stream(overload="lossless") as stream:
        for number in range(FRAMES):
            stream.send(faces_of(number + 1))
        stream.close_send()
        return len([outcome for outcome in stream if outcome.result])
