"""The main job, the same for every way to host workers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from tests.e2e import wire
from tests.fakes.access_units import clip
from tests.running_server import RunningServer
from tests.waiting import until

import facelane


@pytest.fixture
def client(hosted: RunningServer) -> facelane.Client:
    with hosted.client() as made:
        yield made  # type: ignore[misc]


def test_a_picture(client: facelane.Client) -> None:
    result = client.analyze_image(wire.picture(size=(128, 96)), max_candidates=2)
    assert (result.width, result.height) == (128, 96)
    (face,) = result.faces
    assert face.track_id == 0
    assert face.recognized_now
    assert 0 <= face.box.x < 128
    assert len(face.landmarks) == 5
    assert face.liveness.verdict == "LIVE"
    assert {timing.stage for timing in result.timings} == {"detector", "recognizer", "liveness"}
    assert all(timing.service > 0 and timing.queue >= 0 for timing in result.timings)
    assert result.missing_stages == ()


def test_a_stream_of_video(client: facelane.Client) -> None:
    """In whatever a worker is confined by."""
    frames = [
        facelane.Frame(facelane.Picture.access_unit(unit), stream_offset=k / 25)
        for k, unit in enumerate(clip(count=12))
    ]
    outcomes = list(client.analyze(frames))
    assert [o.result.width for o in outcomes if o.result] == [320] * 12


def test_stages_that_were_not_asked_for(client: facelane.Client) -> None:
    result = client.analyze_image(wire.picture(), skip_recognition=True, skip_liveness=True)
    (face,) = result.faces
    assert face.identity.decision == "NOT_EVALUATED"
    assert face.ood_score is None
    assert face.liveness.verdict == "UNDECIDED"
    assert result.missing_stages == (), "they are not missing: nobody asked"


def test_a_stream_in_order_with_one_track(client: facelane.Client) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    frames = [
        facelane.Frame(wire.picture(3), stream_offset=k / 25, capture_time=now) for k in range(50)
    ]
    with client.analyze_stream(overload="lossless", source_id="core") as stream:
        assert stream.limits is not None
        assert stream.limits.window == 64
        for frame in frames:
            stream.send(
                frame.picture, stream_offset=frame.stream_offset, capture_time=frame.capture_time
            )
        stream.close_send()
        outcomes = list(stream)
    assert [o.frame_id for o in outcomes] == list(range(1, 51))
    assert [o.stream_offset for o in outcomes] == pytest.approx([k / 25 for k in range(50)])
    assert {o.capture_time for o in outcomes} == {now}
    faces = [face for o in outcomes if o.result for face in o.result.faces]
    assert len({face.track_id for face in faces}) == 1
    assert faces[0].track_id > 0
    summary = stream.summary
    assert (summary.received, summary.results, summary.faces, summary.tracks) == (50, 50, 50, 1)
    # Once per track, not once a frame.
    assert 1 <= sum(face.recognized_now for face in faces) < 25


def test_without_tracking_every_face_is_recognised(client: facelane.Client) -> None:
    outcomes = list(client.analyze([wire.picture()] * 10, disable_tracking=True))
    faces = [face for o in outcomes if o.result for face in o.result.faces]
    assert [face.recognized_now for face in faces] == [True] * 10
    assert {face.track_id for face in faces} == {0}


def test_from_enrolment_to_a_name_and_back(client: facelane.Client) -> None:
    mine, other = wire.picture(11), wire.picture(12)
    enrolled = client.enroll("ada", mine, display_name="Ada L.", request_id="core-1")
    assert enrolled.subject.template_count == 1
    assert enrolled.template.model_id.startswith("null-recognizer@")
    again = client.enroll("ada", mine, display_name="Ada L.", request_id="core-1")
    assert again.template.template_id == enrolled.template.template_id
    assert again.subject.template_count == 1

    (known,) = client.identify(mine)
    assert known.identity.decision == "MATCH"
    assert known.identity.subject_id == "ada"
    assert known.identity.similarity == pytest.approx(1.0, abs=1e-3)
    assert known.identity.threshold is not None
    assert known.identity.threshold <= known.identity.similarity
    (stranger,) = client.identify(other)
    assert (stranger.identity.decision, stranger.identity.subject_id) == ("UNKNOWN", "")
    assert client.verify("ada", mine).verified
    assert not client.verify("ada", other).verified

    named = list(client.analyze([mine] * 8))
    assert named[-1].result is not None
    assert named[-1].result.faces[0].identity.subject_id == "ada"

    elsewhere = client.analyze_image(mine, gallery="another")
    assert elsewhere.faces[0].identity.decision == "UNKNOWN"

    (template,) = client.list_templates("ada")
    client.delete_template(template.template_id)
    assert client.identify(mine)[0].identity.decision == "UNKNOWN"
    client.delete_subject("ada")
    with pytest.raises(facelane.NotFoundError):
        client.get_subject("ada")


def test_deleted_is_forgotten_at_once(client: facelane.Client) -> None:
    for round_ in range(5):
        client.enroll("brief", wire.picture(20 + round_))
        assert client.identify(wire.picture(20 + round_))[0].identity.subject_id == "brief"
        client.delete_subject("brief")
        assert client.identify(wire.picture(20 + round_))[0].identity.decision == "UNKNOWN"


def test_subjects(client: facelane.Client) -> None:
    made = client.create_subject("grace", display_name="Grace H.", labels={"team": "navy"})
    assert made.labels == {"team": "navy"}
    with pytest.raises(facelane.AlreadyExistsError):
        client.create_subject("grace")
    changed = client.update_subject("grace", display_name="Rear Admiral", etag=made.etag)
    assert changed.display_name == "Rear Admiral"
    assert changed.labels == {"team": "navy"}
    with pytest.raises(facelane.ConflictError) as conflict:
        client.update_subject("grace", display_name="Captain", etag=made.etag)
    assert conflict.value.reason == "ETAG_MISMATCH"
    for number in range(5):
        client.create_subject(f"s{number}", gallery="pages")
    listed = client.list_subjects(gallery="pages", page_size=2)
    assert [s.subject_id for s in listed] == [f"s{n}" for n in range(5)]
    client.delete_subject("grace")


def test_pools_tell_how_they_are_hosted(
    client: facelane.Client, hosted: RunningServer, request: pytest.FixtureRequest
) -> None:
    pools = client.pools()
    (isolation,) = {pool.isolation for pool in pools}
    pids = {worker.pid for pool in pools for worker in pool.workers}
    assert len(pids) == (1 if isolation == "thread" else 3)
    children = {child.pid for child in hosted.children()}
    assert pids.isdisjoint(children) == (isolation == "external")
    for name in ("", "facelane.v1.AnalysisService", "facelane.v1.GalleryService"):
        assert client.health(name) == "SERVING"


def test_a_model_is_reloaded(client: facelane.Client, hosted: RunningServer) -> None:
    before = {pool.pool: {worker.pid for worker in pool.workers} for pool in client.pools()}
    for name in before:
        answer = client.reload_model(name, timeout=100)
        assert answer.old_model_id == answer.new_model_id
        assert len(client.analyze_image(wire.picture()).faces) == 1
    assert client.health() == "SERVING"

    def replaced() -> bool:
        return all(
            before[pool.pool].isdisjoint({worker.pid for worker in pool.workers})
            for pool in client.pools()
        )

    if client.pools()[0].isolation != "thread":
        # The threads of one process stay; everybody else makes way for a fresh one, and is
        # listed until it has left.
        until(replaced, what="the old workers to leave")


def test_eight_streams_side_by_side(client: facelane.Client) -> None:
    streams = [client.analyze_stream(overload="lossless") for _ in range(8)]
    for stream in streams:
        stream.__enter__()
    for _ in range(10):
        for stream in streams:
            stream.send(wire.picture())
    for stream in streams:
        stream.close_send()
        assert sum(o.result is not None for o in stream) == 10
        stream.close()
