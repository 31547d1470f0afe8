"""The demo's camera and its judgement: each has to be able to say no."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from facelane_bridge import demo, demo_clip
from facelane_bridge.demo_clip import COLLINS, HOPPER, SCRIPT, Camera, StretchKind, stretch_at
from facelane_bridge.demo_verdict import Verdict
from facelane_bridge.output import CameraTotals, FaceLine, merge

FRAMES = round(demo_clip.SECONDS * demo_clip.FPS)


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera()


def number_in(kind: StretchKind) -> int:
    stretch = next(stretch for stretch in SCRIPT if stretch.kind is kind)
    return round((stretch.start + stretch.end) / 2 * demo_clip.FPS)


def sharpness(image: np.ndarray) -> float:
    """The strong edges; averaging over 4x4 pixels takes the sensor's noise away."""
    means = image.astype(np.float32).reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
    return float(np.percentile(np.abs(np.diff(means, axis=1)), 99))


def test_the_script_covers_the_clip_without_a_gap() -> None:
    assert SCRIPT[0].start == 0
    assert demo_clip.SECONDS == 20
    for before, after in itertools.pairwise(SCRIPT):
        assert before.end == after.start
    assert {stretch.kind for stretch in SCRIPT} == set(StretchKind)
    for number in range(FRAMES):
        assert stretch_at(number / demo_clip.FPS).contains(number / demo_clip.FPS)


def test_no_track_can_carry_a_name_from_the_clear_into_the_rest() -> None:
    for before, after in itertools.pairwise(SCRIPT):
        if after.kind not in (StretchKind.CLEAR, StretchKind.EMPTY):
            assert before.kind is StretchKind.EMPTY
            assert before.end - before.start > 1.0


@pytest.mark.parametrize("step", [453, pytest.param(151, marks=pytest.mark.slow)])
def test_a_frame_is_a_function_of_its_number(camera: Camera, step: int) -> None:
    again = Camera()
    for number in range(0, FRAMES, step):
        first, second = camera.frame(number), again.frame(number)
        assert first.shape == (480, 640, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, second)


def test_the_stretches_are_what_they_say(camera: Camera) -> None:
    clear = camera.frame(number_in(StretchKind.CLEAR))
    blurred = camera.frame(number_in(StretchKind.BLURRED))
    dark = camera.frame(number_in(StretchKind.DARK))
    empty = camera.frame(number_in(StretchKind.EMPTY))
    assert dark.mean() < 0.12 * clear.mean()
    assert sharpness(blurred) < 0.5 * sharpness(clear)
    assert np.abs(empty.astype(int) - camera.frame(145)).mean() < 4, "nothing but noise moves"


def test_the_clip_and_its_script_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_clip, "SECONDS", 1.0)
    clip = demo_clip.render(tmp_path)
    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == demo_clip.FPS
    assert (frames[0].width, frames[0].height) == (640, 480)
    script = json.loads((tmp_path / "camera.json").read_text())
    assert script["stretches"][0] == {
        "kind": "clear", "start": 0.0, "end": 3.5, "subjects": [HOPPER],
    }  # fmt: skip
    assert len(script["stretches"]) == len(SCRIPT)


def test_both_photos_are_those_of_the_wheels() -> None:
    digests = {
        name: hashlib.sha256(photo.path.read_bytes()).hexdigest()
        for name, photo in demo_clip.photos().items()
    }
    assert set(digests) == {HOPPER, COLLINS}
    assert digests[COLLINS].startswith("88431cd9653ccd539741b555fb0a46b61558b301")


def test_a_missing_wheel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(demo_clip.MissingPhotoError, match=r"facelane\[demo\]"):
        demo_clip.photos()


# --- the verdict ---


def face(subject: str = "", decision: str = "MATCH") -> FaceLine:
    return FaceLine(
        track_id=1,
        box=(0, 0, 1, 1),
        score=0.9,
        landmarks=(),
        decision=decision,
        subject_id=subject,
        similarity=None,
        ood_score=None,
        liveness="LIVE",
        liveness_score=None,
        recognized_now=True,
    )


def perfect() -> list[tuple[float, list[FaceLine]]]:
    results = []
    for number in range(FRAMES):
        offset = number / demo_clip.FPS
        stretch = stretch_at(offset + 0.002)
        faces = [
            face(subject)
            if stretch.kind in (StretchKind.CLEAR, StretchKind.RECAPTURED)
            else face(decision="REJECTED_OOD")
            for subject in stretch.subjects
        ]
        results.append((offset, faces))
    return results


def judged(
    results: list[tuple[float, list[FaceLine]]], *, drops: int = 0, errors: int = 0, lost: int = 0,
    failed: tuple[str, ...] = (),
) -> tuple[list[str], dict[str, object]]:  # fmt: skip
    verdict = Verdict()
    for offset, faces in results:
        verdict.take(offset, faces)
    count = len(results)
    totals = CameraTotals(
        frames=count + drops + errors + lost, results=count, drops=drops, errors=errors,
        p50_ms=1.0, p99_ms=2.0, reason="TIMED_OUT" if failed else "ENDED",
    )  # fmt: skip
    report = SimpleNamespace(summary=merge({"demo-camera": totals}), failed=failed)
    return verdict.problems(report), verdict.line(report)


def test_a_good_run_passes() -> None:
    problems, line = judged(perfect(), drops=3)
    assert problems == []
    assert line["frames"] == 403
    assert line["subjects"] == {COLLINS: 70 + 36, HOPPER: 70}
    assert line["rejected_ood"] == 40 * 2 + 40 + 34
    assert list(line) == [
        "frames", "results", "drops", "errors", "faces", "subjects", "rejected_ood",
        "p50_ms", "p99_ms",
    ]  # fmt: skip


def at(offset: float, *faces: FaceLine) -> list[tuple[float, list[FaceLine]]]:
    """A good run, but for the frames of one tenth of a second."""
    return [(t, list(faces) if offset <= t < offset + 0.1 else f) for t, f in perfect()]


@pytest.mark.parametrize(
    ("results", "options", "problem"),
    [
        (at(9.0, face(HOPPER)), {}, "somebody was named in the blurred stretch"),
        (at(13.0, face(COLLINS)), {}, "somebody was named in the dark stretch"),
        (at(1.0, face(COLLINS)), {}, "eileen_collins was named in the clear stretch at 0 s"),
        (at(7.5, face(HOPPER)), {}, "grace_hopper was named in the empty stretch"),
        (at(16.0, face(COLLINS)), {}, "eileen_collins was named in the occluded stretch"),
        (at(19.0, face("stranger")), {}, "stranger was named in the recaptured stretch"),
        ([r for r in perfect() if not 0 <= r[0] < 3.5], {}, "no result came from the clear"),
        ([(t, [] if t < 2.5 else f) for t, f in perfect()], {}, "grace_hopper was named in 20 of"),
        (perfect(), {"lost": 1}, "frames without an outcome"),
        (perfect(), {"errors": 2}, "2 frames ended in errors"),
        (perfect(), {"failed": ("demo-camera",)}, "the camera failed: TIMED_OUT"),
        ([], {}, "the camera gave no frame"),
    ],
)
def test_what_is_wrong_is_found(
    results: list[tuple[float, list[FaceLine]]], options: dict[str, int], problem: str
) -> None:
    problems, _ = judged(results, **options)  # type: ignore[arg-type]
    assert any(problem in found for found in problems), problems


# -- its folder ------------------------------------------------------------------------------------


def test_a_temporary_folder_that_is_too_long_for_sockets_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with contextlib.ExitStack() as stack:
        folder = demo._folder(None, keep=False, stack=stack)
        assert folder.parent == Path("/tmp")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "grpc.sock"))
    assert not folder.exists()
    assert list(long.iterdir()) == []


def test_a_folder_that_is_too_long_for_sockets_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(demo.DemoError, match="shorter --folder"):
        demo._folder(tmp_path / ("a" * 100), keep=True, stack=stack)
    assert list(tmp_path.iterdir()) == []
