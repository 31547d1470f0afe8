"""Parts of the training recipe whose errors no loss curve would show."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, normalize
from training import detector, evaluate, recognizer, run
from training.augment import mild
from training.clock import CpuClock, grown_state
from training.data import is_held_out
from training.imaging import textures
from training.liveness import bystander, held_up_attack
from training.ood import OOD_THRESHOLD, fit_ood, sigmoid
from training.teacher import load_teacher

from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from facelane_server.worker.networks.architectures.yunet import YuNet

SMALL = ((8, 1, 16, 16), (16, 1, 32, 32), (16, 1, 32, 32))
LARGE = ((8, 1, 16, 16), (16, 3, 32, 32), (32, 2, 64, 64))


@pytest.fixture(autouse=True)
def repeatable() -> None:
    # The recipe draws from both generators.
    torch.manual_seed(0)
    random.seed(0)


def student(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[tuple[int, ...], ...]
) -> recognizer.Student:
    monkeypatch.setattr(recognizer, "STAGES", stages)
    torch.manual_seed(1)
    network = recognizer.Student()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
    return network.eval()


def test_a_larger_network_starts_with_the_answers_of_the_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = student(monkeypatch, SMALL)
    large = student(monkeypatch, LARGE)
    pictures = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        before = large(pictures)
        assert recognizer.load_grown(large, small.state_dict())
        assert not torch.allclose(large(pictures), before)
        torch.testing.assert_close(large(pictures), small(pictures))
    assert not recognizer.load_grown(large, large.state_dict())
    with pytest.raises(ValueError, match="another network"):
        recognizer.load_grown(small, large.state_dict())


def test_a_wider_detector_starts_with_the_answers_of_the_narrower() -> None:
    narrow, wide = YuNet((4, 8, 8, 12, 12, 12)).eval(), YuNet((4, 8, 16, 24, 24, 24)).eval()
    state = {k: v for k, v in narrow.state_dict().items() if not k.endswith("batches_tracked")}
    wide.load_state_dict(grown_state(wide, state), strict=False)
    x = torch.rand(1, 3, 96, 64) * 255
    with torch.no_grad():
        for found, wanted in zip(wide(x), narrow(x), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="another network"):
        grown_state(narrow, wide.state_dict())


def test_the_hint_is_the_distance_of_the_maps_that_heads_read() -> None:
    student, teacher = YuNet(detector.WIDTHS).eval(), YuNet(detector.WIDTHS).eval()
    hint = detector.Hint(student, teacher)
    for see in hint.see:
        nn.init.dirac_(see.weight)
        nn.init.zeros_(see.bias)
    x = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        teacher(x)
        taught = hint.taught()
        student(x)
        assert float(hint(taught)) > 0.1
        student.load_state_dict(teacher.state_dict())
        student(x)
        teacher(x * 0)  # the next lesson, made meanwhile
        assert float(hint(taught)) == pytest.approx(0, abs=1e-9)


def test_a_checkpoint_of_another_kind_of_network_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = student(monkeypatch, SMALL)
    state = whole.state_dict()
    without_gates = {k: v for k, v in state.items() if ".gate." not in k}
    with pytest.raises(ValueError, match="another network"):
        recognizer.load_grown(whole, without_gates)
    name = "trunk.head.depthwise.conv.weight"
    with pytest.raises(ValueError, match="another network"):
        recognizer.load_grown(whole, {**state, name: state[name][..., :7, :7]})


def test_a_recognisers_hints_are_the_distance_of_the_bottlenecks_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = student(monkeypatch, SMALL)
    x = torch.rand(4, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        answer, maps = network.with_maps(x)
        torch.testing.assert_close(answer, network(x))
        # Of six bottlenecks those named, and the map that the head reads.
        assert len(maps) == sum(index < 6 for index in recognizer.HINTS) + 1
        hints = recognizer.Hints(maps, maps)
        for place, see in enumerate(hints.see):
            # Seen as it is, standardised: nothing is left to be hinted.
            spread = getattr(hints, f"spread{place}").flatten()
            nn.init.dirac_(see.weight)
            see.weight /= spread[:, None, None, None]
            see.bias.copy_(-getattr(hints, f"centre{place}").flatten() / spread)
        assert float(hints(maps, maps)) == pytest.approx(0, abs=1e-6)
        moved = [m + getattr(hints, f"spread{p}") for p, m in enumerate(maps)]
        assert float(hints(moved, maps)) == pytest.approx(1, abs=1e-3)


@pytest.mark.shared
def test_the_teacher_tells_its_bottlenecks(shared: Path) -> None:
    teacher, network = load_teacher(shared / "models"), recognizer.Student().eval()
    ends = recognizer.hinting(teacher, network)
    x = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        answer, theirs = teacher.with_maps(recognizer.teacher_input(x), ends)
        torch.testing.assert_close(answer, teacher(recognizer.teacher_input(x)))
        _, mine = network.with_maps(recognizer.student_input(x))
    assert len(teacher.block_ends) == 16
    assert [m.shape[2:] for m in mine] == [m.shape[2:] for m in theirs]
    assert all(float(m.std()) > 0 for m in theirs)


def test_a_run_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, arguments in {
        "no run's checkpoints": ["--resume", str(tmp_path / "nothing")],
        "take one": ["--only", "recognizer", "trunk"],
        "needs --resume": ["--only", "trust"],
    }.items():
        monkeypatch.setattr("sys.argv", ["run", "--data", "x", "--out", "y", *arguments])
        with pytest.raises(SystemExit) as ended:
            run.main()
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_scenes_hold_crops_and_cut_faces() -> None:
    photos = torch.full((4, 3, 250, 250), 200, dtype=torch.uint8)
    photos[:, 0] = 0
    crops = torch.zeros(4, 3, 112, 112, dtype=torch.uint8)
    crops[:, 0] = 255
    seen = torch.zeros(())
    for _ in range(8):
        canvas, cover = detector.Scenes(photos, crops).compose(12, 96)
        assert canvas.shape == (12, 3, 96, 96)
        assert float(canvas.min()) >= 0
        assert float(canvas.max()) <= 1
        assert not cover[:2].any(), "the first sixth holds textures alone"
        blue = (canvas[:, 0] > 0.99) & (canvas[:, 1] < 0.01) & (cover[:, 0] > 0.99)
        seen = seen + blue.sum()
    assert float(seen) > 0, "crops are shown"
    halved = detector.halves(400, 16, photos).flatten(1)
    cut = (halved.amax(1) > 0) & (halved.amin(1) == 0)
    assert 0.6 < float(cut.float().mean()) < 0.9


def test_yunets_weaker_detections_are_told_apart() -> None:
    def face(x: float, score: float) -> torch.Tensor:
        return torch.tensor([x, 10.0, 40.0, 40.0, *[x + 5.0] * 10, score])

    truth = [torch.stack((face(10, 0.9), face(100, 0.65)))]
    found = [torch.stack((face(10, 0.8), face(100, 0.66)))]
    told = evaluate._by_score(found, truth)
    clear, weaker = told["by_score"], told["by_score_of_weaker_too"]
    assert (clear["0.6"]["faces"], weaker["0.6"]["faces"]) == (1, 2)
    # Found where YuNet is in doubt: false against its clear ones, right against all.
    assert (clear["0.6"]["precision"], weaker["0.6"]["precision"]) == (0.5, 1.0)
    assert (clear["0.7"]["precision"], weaker["0.7"]["recall"]) == (1.0, 0.5)


def test_what_is_shipped_answers_as_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = student(monkeypatch, LARGE)
    shipped = recognizer.lift(trained)
    options = recognizer.options_of(shipped.state_dict())
    assert options["stages"] == [list(row) for row in LARGE]
    assert (options["attention"], options["side"]) == (recognizer.ATTENTION, 128)
    assert isinstance(shipped, MobileFaceNet)
    pictures = torch.rand(3, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        mine, theirs = normalize(shipped(pictures)[0]), normalize(trained(pictures))
    torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T)


def test_two_percent_of_clean_faces_fall_under_the_threshold() -> None:
    values = np.random.default_rng(3).gamma(9.0, 1.0, 5000)
    centre, scale = fit_ood(values)
    trust = sigmoid((values - centre) / scale)
    assert float((trust < OOD_THRESHOLD).mean()) == pytest.approx(0.02, abs=0.001)
    assert float(np.median(trust)) == pytest.approx(0.9)


def test_fifteen_percent_of_the_names_are_kept_out() -> None:
    share = np.mean([is_held_out(f"Person_{number}") for number in range(20_000)])
    assert share == pytest.approx(0.15, abs=0.01)


def test_a_cpu_clock_stands_still_while_its_process_does() -> None:
    clock = CpuClock(0.2)
    # Waiting costs no CPU time: the one place where a test may sleep, since it is what it tests.
    time.sleep(0.3)  # what is tested
    assert not clock.over
    while not clock.over:
        sum(range(1000))
    assert clock.progress == 1.0


def test_textures_take_turns() -> None:
    drawn = textures(16, 64, torch.zeros(1))
    assert drawn.shape == (16, 3, 64, 64)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
    assert all(float(picture.std()) > 0.01 for picture in drawn)


def test_slight_faults_leave_a_picture_recognisable() -> None:
    clean = interpolate(torch.rand(40, 3, 7, 7), size=(112, 112), mode="bicubic").clamp(0, 1)
    spoilt = mild(clean)
    change = (spoilt - clean).abs().mean((1, 2, 3))
    assert float(change.max()) < 0.45
    assert float((change > 0).float().mean()) > 0.5


def test_a_sheet_hides_what_is_behind_it_only() -> None:
    scenes = torch.rand(12, 3, 1, 1).expand(12, 3, 256, 256).contiguous()
    boxes = torch.tensor([96.0, 96.0, 64.0, 64.0]).repeat(12, 1)
    held = held_up_attack(scenes, boxes)
    # Behind the sheet is the neighbour's colour: at the corner, never at the face's middle.
    behind = scenes.roll(1, 0)
    assert float((held - behind).abs()[:, :, 0, 0].max()) < 0.02
    assert float((held - behind).abs()[:, :, 128, 128].amax(1).min()) > 0.02


@pytest.mark.parametrize("seed", range(8))
def test_a_poster_beside_a_face_leaves_the_face_free(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    # Seed 2 has a poster whose corner reaches over the face.
    scenes = torch.rand(48, 3, 1, 1).expand(48, 3, 256, 256).contiguous()
    boxes = torch.tensor([96.0, 96.0, 64.0, 64.0]).repeat(48, 1)
    changed = (bystander(scenes, boxes) - scenes).abs()
    assert float(changed[:, :, 112:144, 112:144].max()) < 0.05
    assert float(changed.amax((1, 2, 3)).min()) > 0.02
