"""Real faces through the real server: with public models, and with those that ship."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
from tests.running_server import RunningServer, toml

import facelane
from facelane_server.models.catalog import SHIPPED

pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.timeout(240)]

PUBLIC = (
    ("yunet_n.pth",),
    ("mbf_512_fp32.onnx",),
    ("2.7_80x80_MiniFASNetV2.pth", "4_0_0_80x80_MiniFASNetV1SE.pth"),
)
WHO = {
    "alex_lacamoire1.jpg": {"alex_lacamoire"},
    "johnsnow_test1.jpg": {"kit_harington"},
    "kit_with_rose.jpg": {"kit_harington", "rose_leslie"},
    "obama1.jpg": {"obama"},
    "obama_and_biden.jpg": {"obama", "biden"},
    "two_people.jpg": {"obama", "biden"},
}
"""Who is enrolled and to be seen in each probe; whoever else is in it is a stranger."""
IN_THE_CLIP = {"lin_manuel_miranda", "obama"}


@dataclass(frozen=True)
class Served:
    """A server with real models, and the people that it let be enrolled."""

    server: RunningServer
    public: bool
    enrolled: frozenset[str]


def served_with(folder: Path, shared: Path, *, public: bool) -> Iterator[Served]:
    pools, extra = "", ""
    if public:
        into = folder / "models"
        for files in PUBLIC:
            sources = [str(shared / "models" / file) for file in files]
            subprocess.run(
                [sys.executable, "-m", "facelane_server", "models", "import", *sources,
                 "--into", str(into)],
                check=True, timeout=120, capture_output=True,
            )  # fmt: skip
        for package in into.iterdir():
            task = tomllib.loads((package / "model.toml").read_text())["task"]
            pools += f'[pools.{task}]\nmodel = "{package.name}"\n'
        extra = f'[models]\npath = ["{into}"]'
    with RunningServer(folder, toml(folder, pools, extra)) as server:
        server.wait_serving(120)
        enrolled, refused = set(), []
        with server.client(timeout=60) as client:
            for photo in sorted((shared / "media" / "gallery").glob("*/*")):
                try:
                    client.enroll(
                        photo.parent.name, facelane.Picture.from_file(photo), skip_liveness=True
                    )
                    enrolled.add(photo.parent.name)
                except facelane.EnrollmentRefusedError as refusal:
                    refused.append((photo.name, refusal.reason))
        assert not (public and refused), refused
        yield Served(server, public, frozenset(enrolled))


@pytest.fixture(scope="module", params=["public", "starter"])
def served(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    public = request.param == "public"
    if not public and not (SHIPPED[0] / "facelane-recognizer").is_dir():
        pytest.skip("no starter models in this tree")
    yield from served_with(tmp_path_factory.mktemp(request.param), shared, public=public)


@pytest.fixture
def client(served: Served) -> Iterator[facelane.Client]:
    with served.server.client(timeout=60) as made:
        yield made


def test_who_was_enrolled(served: Served, shared: Path) -> None:
    everybody = {folder.name for folder in (shared / "media" / "gallery").iterdir()}
    assert served.enrolled <= everybody
    # The shipped models may refuse a photo, with the reason; never most of them.
    assert len(served.enrolled) >= (len(everybody) if served.public else len(everybody) - 1)


@pytest.mark.parametrize("probe", sorted(WHO))
def test_probes(served: Served, client: facelane.Client, shared: Path, probe: str) -> None:
    faces = client.identify(facelane.Picture.from_file(shared / "media" / "probes" / probe))
    named = [face.identity.subject_id for face in faces if face.identity.matched]
    assert sorted(named) == sorted(WHO[probe] & served.enrolled), "each once, and nobody else"
    for face in faces:
        if not face.identity.matched:
            assert face.identity.decision in ("UNKNOWN", "REJECTED_OOD")
            assert face.identity.subject_id == ""


def test_strangers_are_nobody(client: facelane.Client, shared: Path) -> None:
    faces = client.identify(facelane.Picture.from_file(shared / "media" / "insightface_t1.jpg"))
    assert len(faces) == 6
    decisions = Counter(face.identity.decision.value for face in faces)
    assert set(decisions) <= {"UNKNOWN", "REJECTED_OOD"}
    assert decisions["UNKNOWN"] >= 4
    for face in faces:
        if face.identity.decision == "REJECTED_OOD":
            assert face.identity.candidates == ()
            assert face.ood_score is not None
            assert face.ood_score < 0.4


@pytest.mark.parametrize(("name", "live"), [("T1", True), ("F1", False), ("F2", False)])
def test_liveness(
    served: Served, client: facelane.Client, shared: Path, name: str, live: bool
) -> None:
    # imread turns the picture upright by its EXIF orientation; the server does not.
    upright = cv2.imread(str(shared / "media" / f"liveness_{name}.jpg"))
    ok, data = cv2.imencode(".jpg", upright, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert ok
    result = client.analyze_image(facelane.Picture.encoded(bytes(data)))
    face = max(result.faces, key=lambda f: f.box.width)
    assert (face.liveness.verdict == "LIVE") == live, face.liveness
    if served.public and not live:
        assert face.liveness.verdict == "SPOOF"


def test_a_clip_names_who_is_in_it_and_nobody_wrongly(
    served: Served, client: facelane.Client, shared: Path
) -> None:
    capture = cv2.VideoCapture(str(shared / "media" / "short_hamilton_clip.mp4"))
    rate = capture.get(cv2.CAP_PROP_FPS)
    # The shipped detector is the slower one here: every other frame is enough of it.
    step = 1 if served.public else 2

    def frames() -> Iterator[facelane.Frame]:
        number = 0
        while (read := capture.read())[0]:
            if number % step == 0:
                ok, data = cv2.imencode(".jpg", read[1], [cv2.IMWRITE_JPEG_QUALITY, 92])
                assert ok
                yield facelane.Frame(
                    facelane.Picture.encoded(bytes(data)), stream_offset=number / rate
                )
            number += 1

    try:
        outcomes = list(client.analyze(frames()))
    finally:
        capture.release()
    assert len(outcomes) == -(-275 // step)
    assert all(outcome.result is not None for outcome in outcomes)
    named = Counter(
        face.identity.subject_id
        for outcome in outcomes
        if outcome.result
        for face in outcome.result.faces
        if face.identity.matched
    )
    assert set(named) <= IN_THE_CLIP, named
    assert named["lin_manuel_miranda"] >= 20
    if served.public:
        assert set(named) == IN_THE_CLIP, named
    # The scene is cut at frame 211: nobody carries his name into the next one.
    for outcome in outcomes[-(-211 // step) :]:
        assert outcome.result is not None
        names = {f.identity.subject_id for f in outcome.result.faces if f.identity.matched}
        assert names <= {"obama"}, outcome.frame_id
    # One name is at one place of a picture.
    for outcome in outcomes:
        assert outcome.result is not None
        names = [f.identity.subject_id for f in outcome.result.faces if f.identity.matched]
        assert len(names) == len(set(names)), outcome.frame_id
