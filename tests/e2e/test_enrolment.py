"""Whom the gallery refuses, at the wire."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.portraits import HOPPER
from tests.running_server import THREAD_POOLS, RunningServer
from tests.waiting import until

import facelane

THREAD = 'isolation = "thread"'


def test_no_face(start: Start, tmp_path: Path) -> None:
    server = start(wire.pools(wire.null_detector(tmp_path, 0), every=THREAD))
    with server.client() as client:
        for call in (
            lambda: client.enroll("nobody", wire.picture()),
            lambda: client.enroll("nobody", wire.picture(), allow_multiple_faces=True),
        ):
            with pytest.raises(facelane.EnrollmentRefusedError) as refused:
                call()
            assert refused.value.reason == "NO_FACE"
            assert "EXIF" in refused.value.message
        client.create_subject("somebody")
        with pytest.raises(facelane.RefusedError) as refused:
            client.verify("somebody", wire.picture())
        assert refused.value.reason == "NO_FACE"
        assert "EXIF" in refused.value.message
        assert client.identify(wire.picture()) == []
        assert client.analyze_image(wire.picture()).faces == ()
        assert [s.subject_id for s in client.list_subjects()] == ["somebody"]


def test_two_faces(start: Start, tmp_path: Path) -> None:
    server = start(wire.pools(wire.null_detector(tmp_path, 2), every=THREAD))
    with server.client() as client:
        with pytest.raises(facelane.EnrollmentRefusedError) as refused:
            client.enroll("who", wire.picture())
        assert refused.value.reason == "MULTIPLE_FACES"
        assert refused.value.metadata["faces"] == "2"
        assert list(client.list_subjects()) == []
        client.enroll("who", wire.picture(), allow_multiple_faces=True)
        faces = client.identify(wire.picture())
        assert [f.identity.subject_id for f in faces].count("who") == 1
        with pytest.raises(facelane.RefusedError) as refused:
            client.verify("who", wire.picture())
        assert refused.value.reason == "MULTIPLE_FACES"


SHIPPED = "[pools]\nliveness = false\n" + "".join(
    f'[pools.{stage}]\nmodel = "facelane-{stage}"\n{THREAD}\n'
    for stage in ("detector", "recognizer")
)


@pytest.mark.slow
def test_a_smeared_face_is_refused_and_the_sharp_one_is_not(start: Start) -> None:
    portrait = cv2.imread(str(HOPPER))

    def shaken(pixels: int) -> facelane.Picture:
        picture = cv2.filter2D(portrait, -1, np.eye(pixels, dtype=np.float32) / pixels)
        return facelane.Picture.encoded(cv2.imencode(".png", picture)[1].tobytes())

    server = start(SHIPPED)
    with server.client() as client:
        with pytest.raises(facelane.EnrollmentRefusedError) as refused:
            # Sharp enough to be found, and not to be recognised by.
            client.enroll("who", shaken(21), allow_multiple_faces=True, skip_liveness=True)
        assert refused.value.reason == "OOD_REJECTED"
        assert float(refused.value.metadata["ood_score"]) < 0.2
        assert list(client.list_subjects()) == []
        client.enroll("who", shaken(1), allow_multiple_faces=True, skip_liveness=True)


def test_a_score_at_its_threshold_passes_and_the_gallery_is_full(start: Start) -> None:
    server = start(
        THREAD_POOLS,
        extra="[identity]\nood_threshold = 1.0\nlive_threshold = 1.0\nspoof_threshold = 1.0\n"
        "[gallery]\nmax_templates = 2",
    )
    with server.client() as client:
        # The null models trust every face fully.
        made = client.enroll("sure", wire.picture(), require_live=True)
        assert made.face.liveness.verdict == "LIVE"
        assert made.warnings == ()
        client.delete_subject("sure")
        client.enroll("a", wire.picture(1))
        client.enroll("b", wire.picture(2))
        with pytest.raises(facelane.OverloadedError) as full:
            client.enroll("c", wire.picture(3))
        assert full.value.reason == "GALLERY_FULL"
        client.delete_subject("a")
        client.enroll("c", wire.picture(3))


def test_a_deleted_subject_is_named_no_more_in_streams_that_are_open(
    server: RunningServer,
) -> None:
    with server.client() as client:
        client.enroll("gone", wire.picture(), gallery="leavers")
        # Media time stands nearly still: the track is not due to be recognised again.
        with client.analyze_stream(overload="lossless", gallery="leavers") as stream:

            def decision(number: int) -> str:
                stream.send(wire.picture(), stream_offset=number * 0.01)
                result = stream.recv().result
                assert result is not None
                return result.faces[0].identity.decision

            assert [decision(n) for n in range(1, 4)] == ["MATCH"] * 3
            client.delete_subject("gone", gallery="leavers")
            assert decision(4) == "NOT_EVALUATED"
            assert decision(5) == "UNKNOWN"


def test_without_a_recogniser_there_is_no_gallery(start: Start) -> None:
    server = start(THREAD_POOLS, edit=lambda text: _without(text, "recognizer"))
    with server.client() as client:
        assert client.health("facelane.v1.GalleryService") == "NOT_SERVING"
        assert client.health() == "SERVING"
        result = client.analyze_image(wire.picture())
        assert result.missing_stages == ("recognizer",)
        assert result.faces[0].identity.decision == "NOT_EVALUATED"
        for call in (
            lambda: client.enroll("a", wire.picture()),
            lambda: client.identify(wire.picture()),
        ):
            with pytest.raises(facelane.UnavailableError) as refused:
                call()
            assert refused.value.reason == "POOL_UNAVAILABLE"
            assert "[pools.recognizer]" in str(refused.value)
        outcomes = list(client.analyze([wire.picture()] * 3))
        assert all(o.result and o.result.missing_stages == ("recognizer",) for o in outcomes)


def test_without_liveness_nobody_is_called_live(start: Start) -> None:
    server = start(THREAD_POOLS, edit=lambda text: _without(text, "liveness"))
    with server.client() as client:
        assert client.enroll("a", wire.picture()).face.liveness.verdict == "UNDECIDED"
        (face,) = client.identify(wire.picture())
        assert (face.identity.subject_id, face.liveness.verdict) == ("a", "UNDECIDED")


def _without(text: str, stage: str) -> str:
    """The config with a stage switched off."""
    head, _, rest = text.partition(f"[pools.{stage}]")
    _, _, tail = rest.partition("\n[")
    kept = f"{head}\n[{tail}" if tail else head
    return kept.replace("[pools.detector]", f"[pools]\n{stage} = false\n[pools.detector]")


@pytest.mark.slow
def test_a_gallery_outlives_its_recogniser_where_chips_are_kept(
    start: Start, tmp_path: Path
) -> None:
    manifest = Path("server/facelane_server/models/builtin/null-recognizer/model.toml")
    text = (Path(__file__).parents[2] / manifest).read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.toml").write_text(text.replace('"1.0.0"', '"2.0.0"'))
    server = start(extra="[gallery]\nkeep_chips = true\n")

    def name() -> str:
        with server.client() as client:
            (face,) = client.identify(wire.picture(5))
            return face.identity.subject_id

    with server.client() as client:
        client.enroll("ada", wire.picture(5))
        done = client.reload_model("recognizer", str(other))
        assert (done.templates_not_searched, done.remembered) == (0, False)
        assert name() == "ada"
        (template,) = client.list_templates("ada")
        assert template.model_id == done.new_model_id
    server.stop()
    # With the model of its config again: taken over once more, and by itself.
    with RunningServer(server.folder, server.config.read_text()) as again:
        again.wait_serving()
        server = again
        until(lambda: name() == "ada", what="the renewal")
