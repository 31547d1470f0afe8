"""Pictures of events through the models that ship: they show whom the event names, and nobody else
sees them, nor longer than they may be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from tests.portraits import HOPPER
from tests.running_server import RunningServer, toml
from tests.waiting import until
from typer.testing import CliRunner

import facelane
from facelane_server import auditing
from facelane_server.models.catalog import SHIPPED

pytestmark = pytest.mark.skipif(
    not (SHIPPED[0] / "facelane-recognizer").is_dir(), reason="no starter models in this tree"
)

POOLS = """
[pools.detector]
model = "facelane-detector"
isolation = "thread"
[pools.recognizer]
isolation = "thread"
"""
EXTRA = """
[events]
pictures = "all"
unknown_after_s = 0.2
[galleries.strangers]
pictures = "unknown"
[sources.ward]
private = true
[pools]
liveness = false
"""


def portrait() -> np.ndarray:
    return cv2.imread(str(HOPPER))


def jpeg(pixels: np.ndarray) -> facelane.Picture:
    return facelane.Picture.encoded(cv2.imencode(".jpg", pixels)[1].tobytes())


@dataclass(frozen=True)
class Stage:
    server: RunningServer
    client: facelane.Client

    def play(self, frames: int = 12, **options: object) -> list[facelane.Event]:
        """Grace Hopper before a camera; what is told of it."""
        pictures = [portrait() for _ in range(frames)]
        for number, picture in enumerate(pictures):
            picture[:8, :8] = number  # no two are the same
        with self.client.watch_events() as events:
            frames_ = [
                facelane.Frame(jpeg(picture), stream_offset=number * 0.1)
                for number, picture in enumerate(pictures)
            ]
            for _ in self.client.analyze(frames_, **options):  # type: ignore[arg-type]
                pass
            told = []
            for event in events:
                told.append(event)
                if event.kind is facelane.EventKind.STREAM_CLOSED:
                    return told
        raise AssertionError("the stream's end was not told")

    def pictured(self, events: list[facelane.Event]) -> list[facelane.Event]:
        return [event for event in events if event.track is not None and event.track.has_picture]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("pictures")
    with RunningServer(folder, toml(folder, POOLS, EXTRA)) as server:
        server.wait_serving(120)
        with server.client() as client:
            client.enroll("grace", jpeg(portrait()))
            yield Stage(server, client)


def test_the_picture_shows_whom_the_event_names(stage: Stage) -> None:
    events = stage.play()
    [first, *_] = stage.pictured(events)
    assert first.kind is facelane.EventKind.SUBJECT_SEEN
    assert first.track is not None
    assert first.identity.subject_id == "grace"
    assert first.track.best_similarity is not None
    assert first.track.best_ood_score is not None
    assert first.track.looks >= 1
    kept = stage.client.event_picture(first.sequence)
    shown = cv2.imdecode(np.frombuffer(kept.picture, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (224, 224, 3)
    # The recogniser itself says who that is.
    [face] = stage.client.identify(facelane.Picture.encoded(kept.picture))
    assert face.identity.subject_id == "grace"
    assert cv2.imdecode(np.frombuffer(kept.chip, np.uint8), 1).shape == (112, 112, 3)
    # And no one finds it on the disk.
    state = stage.server.folder / "state"
    lying = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert kept.picture[:200] not in lying
    # The history has it too, the newest first, page by page.
    page, older = stage.client.list_events(page_size=2)
    assert [event.sequence for event in page] == [events[-1].sequence, events[-1].sequence - 1]
    page, _ = stage.client.list_events(before=older, kinds=["SUBJECT_SEEN"], page_size=256)
    assert first.sequence in [event.sequence for event in page]
    assert {event.kind for event in page} == {facelane.EventKind.SUBJECT_SEEN}
    assert kept.chip[:200] not in lying
    assert "PICTURE_SEEN" in audit_of(stage)


def test_of_somebody_whom_nobody_knows(stage: Stage) -> None:
    [event] = stage.pictured(stage.play(gallery="strangers"))
    assert event.kind is facelane.EventKind.UNKNOWN_SEEN
    assert stage.client.event_picture(event.sequence).picture


def test_none_where_none_is_wanted(stage: Stage) -> None:
    for options in ({"source_id": "ward"}, {"private": True}):
        events = stage.play(**options)
        assert any(event.kind is facelane.EventKind.SUBJECT_SEEN for event in events)
        assert stage.pictured(events) == []
    seen = next(event for event in events if event.kind is facelane.EventKind.SUBJECT_SEEN)
    for sequence, reason in ((seen.sequence, "PICTURE_NOT_FOUND"), (1 << 60, "EVENT_NOT_FOUND")):
        with pytest.raises(facelane.NotFoundError) as error:
            stage.client.event_picture(sequence)
        assert error.value.reason == reason


def test_gone_with_whom_it_shows(stage: Stage) -> None:
    [event, *_] = stage.pictured(stage.play())
    assert stage.client.event_picture(event.sequence).picture
    with contextlib.suppress(facelane.FacelaneError):
        stage.client.delete_subject("grace")
    with pytest.raises(facelane.NotFoundError) as error:
        stage.client.event_picture(event.sequence)
    assert error.value.reason == "PICTURE_NOT_FOUND"
    stage.client.enroll("grace", jpeg(portrait()))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gone_after_retention_by_number_and_by_age(tmp_path: Path) -> None:
    def served(kept: str) -> RunningServer:
        events = f'[events]\npictures = "all"\nunknown_after_s = 0.2\n{kept}\n'
        server = RunningServer(
            tmp_path, toml(tmp_path, POOLS, events + "[pools]\nliveness = false\n")
        )
        server.wait_serving(120)
        return server

    def kept(client: facelane.Client, event: facelane.Event) -> bool:
        try:
            return bool(client.event_picture(event.sequence).picture)
        except facelane.NotFoundError as error:
            return error.reason != "PICTURE_NOT_FOUND"

    with served("") as server, server.client() as client:
        stage = Stage(server, client)
        older, newer = [stage.pictured(stage.play())[0] for _ in range(2)]
        assert kept(client, older)
        assert kept(client, newer)
    with served("pictures_keep = 1") as server, server.client() as client:
        until(lambda: not kept(client, older), 60, "the oldest is deleted")
        assert kept(client, newer)
    with served("pictures_keep_days = 0.000001") as server, server.client() as client:
        until(lambda: not kept(client, newer), 60, "what is too old is deleted")
        # The event itself is told of as before, without one.
        page, _ = client.list_events(page_size=256, kinds=[newer.kind])
        [event] = [one for one in page if one.sequence == newer.sequence]
        assert event.identity == newer.identity


@pytest.mark.slow
def test_a_wrong_name_is_corrected_and_the_correction_taken_back(stage: Stage) -> None:
    client = stage.client
    [event, *_] = stage.pictured(stage.play())
    assert event.identity.subject_id == "grace"
    said = client.correct_identity(event.sequence, is_not=True)
    assert (said.subject_id, said.is_not) == ("grace", True)
    assert client.list_corrections("grace") == [said]
    assert client.get_subject("grace").template_count == 1, "it is no template of hers"
    # Whoever looks like that is not Grace any more, and may be enrolled as who it is.
    picture = facelane.Picture.encoded(client.event_picture(event.sequence).picture)
    [face] = client.identify(picture)
    assert face.identity.decision is facelane.Decision.UNKNOWN
    assert not client.verify("grace", picture).verified
    her = client.correct_identity(event.sequence, subject_id="amazing", create_subject=True)
    assert not her.is_not
    [face] = client.identify(picture)
    assert face.identity.subject_id == "amazing"
    # Both can be taken back, and an enrolment is no correction.
    client.undo_correction(her.correction_id)
    client.undo_correction(said.correction_id)
    [face] = client.identify(picture)
    assert face.identity.subject_id == "grace"
    [template] = client.list_templates("grace")
    for wrong in (template.template_id, said.correction_id):
        with pytest.raises(facelane.NotFoundError):
            client.undo_correction(wrong)
    client.delete_subject("amazing")
    with pytest.raises(facelane.NotFoundError):
        client.correct_identity(1 << 60, is_not=True)
    with pytest.raises(facelane.ArgumentError):
        client.correct_identity(event.sequence)


def audit_of(stage: Stage) -> str:
    command = ["list", "-n", "10000", "--json", "--config", str(stage.server.config)]

    def written() -> str:
        listed = CliRunner().invoke(auditing.app, command)
        assert listed.exit_code == 0, listed.stderr
        return listed.stdout if "PICTURE_SEEN" in listed.stdout else ""

    return until(written)
