"""The networks and the three tasks on top of them, with random and null weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import (
    F32,
    AlignedCrop,
    ContextCrop,
    Detections,
    DeviceOptions,
    Immediate,
    Pending,
)
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Input, Ood
from facelane_server.modeltools.verify import synthetic_picture, verify
from facelane_server.worker.decoding.device_pictures import Cutting, DevicePictures
from facelane_server.worker.networks.architectures.folding import fold
from facelane_server.worker.networks.architectures.irse import RtsIrSe
from facelane_server.worker.networks.architectures.minifasnet import MiniFASNetPair
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from facelane_server.worker.networks.architectures.yunet import DenseHeads, YuNet, decode
from facelane_server.worker.networks.candidates import decode_yunet, select, turn
from facelane_server.worker.networks.detector import NetworkDetector, fit
from facelane_server.worker.networks.load import load, read_checkpoint
from facelane_server.worker.networks.null import NullDetector, NullLiveness, NullRecognizer
from facelane_server.worker.networks.recognizer import NetworkRecognizer
from facelane_server.worker.networks.runner import Computed, Runner, Ticket
from facelane_server.worker.networks.serving import ServedRecognizer


def test_a_score_by_a_head_that_is_not_there_is_refused() -> None:
    network = MobileFaceNet(stem=8, stages=((8, 1, 8, 8), (16, 1, 16, 16), (16, 1, 32, 16)))
    served = ServedRecognizer(network, Input(112, 112), Ood("head"))
    with pytest.raises(FacelaneError, match="gives no OOD output") as caught:
        served(torch.zeros(1, 112, 112, 3, dtype=torch.uint8))
    assert caught.value.reason is Reason.MODEL_INVALID


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"side": 100}, "multiple of 16"),
        ({"side": 0}, "multiple of 16"),
        ({"side": 1_000_000}, "at most 512"),
        ({"attention": -1}, "at most 8 channels"),
        ({"attention": 9}, "at most 8 channels"),
    ],
)
def test_options_that_make_no_network_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MobileFaceNet(stages=((8, 1, 8, 8), (16, 1, 16, 16), (16, 1, 32, 16)), **options)


def test_gates_and_the_side_change_what_is_computed() -> None:
    stages = ((8, 1, 8, 8), (16, 1, 16, 16), (16, 1, 32, 16))
    network = MobileFaceNet(stem=8, stages=stages, features=32, attention=4, side=128).eval()
    x = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        assert network.entry(x).shape == (1, 8, 64, 64)
        resized = nn.functional.interpolate(x, size=128, mode="bilinear", align_corners=False)
        torch.testing.assert_close(network(x)[0], network(resized)[0])
        gate = network.stages[0][0].gate
        maps = torch.rand(2, 8, 4, 4)
        # One factor for all of a channel, between 0 and 1, and of each picture its own.
        factor = gate(maps) / maps
        torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
        assert 0 < float(factor.min()) <= float(factor.max()) < 1
        assert not torch.allclose(factor[0], factor[1])


def shaken(network: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms that do something."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (YuNet(widths=(4, 8, 8, 8, 8, 8)), [(2, 3, 64, 96)]),
        (
            MobileFaceNet(
                stem=8, stages=((8, 1, 8, 8), (16, 1, 16, 16), (16, 1, 32, 16)), features=32
            ),
            [(2, 3, 112, 112)],
        ),
        (
            MobileFaceNet(
                stem=8,
                stages=((8, 1, 8, 8), (16, 1, 16, 16), (16, 1, 32, 16)),
                features=32,
                attention=4,
                side=128,
            ),
            [(2, 3, 112, 112)],
        ),
        (
            MobileFaceNet(
                stem=8,
                stages=((8, 1, 8, 8), (8, 1, 8, 8), (8, 1, 8, 8)),
                features=16,
                head="flatten",
                neck=4,
            ),
            [(2, 3, 112, 112)],
        ),
        (MiniFASNetPair(), [(2, 3, 80, 80)] * 2),
        (RtsIrSe(units=(1, 1, 1, 1), embedding_dim=32, alpha=3), [(2, 3, 112, 112)]),
    ],
)
def test_folding_changes_nothing(network: nn.Module, inputs: list[tuple[int, ...]]) -> None:
    network = shaken(network)
    xs = [torch.rand(shape) for shape in inputs]
    with torch.inference_mode():
        before = network(*xs)
        norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())
        fold(network)
        after = network(*xs)
    left = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())
    assert left < norms / 2
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    for a, b in pairs:
        if a is not None:
            assert torch.allclose(a, b, atol=1e-4 * max(1.0, float(a.abs().max())))


def test_folding_refuses_a_network_in_training() -> None:
    with pytest.raises(ValueError, match="eval"):
        fold(YuNet())


def test_the_public_sizes() -> None:
    def parameters(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    # 75,856 published weights and biases, without the batch norms' statistics.
    assert 70_000 < parameters(YuNet()) < 80_000
    assert 1_000_000 < parameters(MobileFaceNet()) < 1_400_000
    keys = RtsIrSe(alpha=8).state_dict()
    shapes = {
        "features.0.0.weight": (64, 3, 3, 3),
        "features.0.2.weight": (64,),
        "features.1.0.res_layer.1.weight": (64, 64, 3, 3),
        "features.1.0.res_layer.5.fc1.weight": (4, 64, 1, 1),
        "features.1.3.shortcut_layer.0.weight": (128, 64, 1, 1),
        "features.1.29.res_layer.3.weight": (512, 512, 3, 3),
        "features.2.0.running_var": (512,),
        "features_backbone.0.weight": (512, 25088),
        "features_backbone.1.weight": (512,),
        "logvar_rts_backbone.0.weight": (1, 25088),
        "logvar_rts_plus_backbone.0.weight": (8, 25088),
    }
    for key, shape in shapes.items():
        assert tuple(keys[key].shape) == shape
    assert "features.1.0.shortcut_layer.0.weight" not in keys
    assert "features.1.30.res_layer.1.weight" not in keys


def test_both_decoders_of_yunet_agree() -> None:
    generator = torch.Generator().manual_seed(2)
    height, width = 64, 96
    outputs: dict[str, np.ndarray] = {}
    parts: dict[str, list[torch.Tensor]] = {"cls": [], "obj": [], "bbox": [], "kps": []}
    for stride in (8, 16, 32):
        anchors = (height // stride) * (width // stride)
        for name, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            value = torch.rand((2, anchors, size), generator=generator)
            parts[name].append(value)
            outputs[f"{name}_{stride}"] = value.numpy()
    joined = {name: torch.cat(values, 1) for name, values in parts.items()}
    heads = DenseHeads(joined["cls"][..., 0], joined["obj"][..., 0], joined["bbox"], joined["kps"])
    assert np.allclose(
        decode(heads, height, width), decode_yunet(outputs, height, width), atol=1e-3
    )


def candidate(score: float, x: float, y: float, w: float, h: float) -> list[float]:
    return [score, x, y, w, h, *([0.0] * 10)]


def test_suppression() -> None:
    rows = np.array(
        [
            candidate(0.80, 11, 10, 40, 40),  # the second best of the first face
            candidate(0.95, 10, 10, 40, 40),
            candidate(0.70, 200, 10, 40, 40),
            candidate(0.90, 45, 10, 40, 40),  # overlaps the first a little
            candidate(0.40, 300, 10, 40, 40),  # below the threshold
            candidate(np.nan, 300, 10, 40, 40),
            candidate(0.99, np.inf, 10, 40, 40),
            candidate(0.99, 10, 10, -4, 40),
        ],
        np.float32,
    )
    kept = select(rows, score=0.5, iou=0.3, limit=10)
    assert kept[:, 0].tolist() == pytest.approx([0.95, 0.90, 0.70])
    assert len(select(rows, score=0.5, iou=0.3, limit=2)) == 2
    assert len(select(rows, score=0.5, iou=0.0, limit=10)) == 2
    assert len(select(rows, score=0.5, iou=1.0, limit=10)) == 4
    assert select(rows[:0], score=0.5, iou=0.3, limit=10).shape == (0, 15)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (480, 640)),
        (100, 200, (100, 200)),
        (1080, 1920, (360, 640)),
        (1920, 1080, (640, 360)),
        (16, 16000, (1, 640)),
    ],
)
def test_pictures_are_scaled_down_and_never_up(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    place = fit(height, width, 640)
    assert (place.height, place.width) == expected


class OneFace(Runner):
    """A runner whose network finds one face at a fixed place of its input."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.staged: tuple[np.ndarray, ...] = ()

    def stage(self, count: int, shapes: object) -> tuple[np.ndarray, ...]:
        (shape,) = shapes  # type: ignore[misc]
        self.staged = (np.full((count, *shape, 3), 9, np.uint8),)
        return self.staged

    def launch(self) -> Ticket:
        count = len(self.staged[0])
        self.batches.append(self.staged[0].shape)
        row = np.zeros((count, 1, 15), np.float32)
        row[:, 0, :5] = (0.9, 32, 16, 64, 48)
        row[:, 0, 5:] = [40, 30, 80, 30, 60, 44, 45, 55, 75, 55]
        return Computed(row)

    def warm_up(self) -> None:
        pass


def detector(runner: Runner, **options: object) -> NetworkDetector:
    settings = {"crops": (AlignedCrop(),), "max_side": 320, "score": 0.5, "nms": 0.3}
    return NetworkDetector(runner, batch_max=8, **{**settings, **options})  # type: ignore[arg-type]


def test_a_detector_answers_in_pixels_of_each_picture() -> None:
    runner = OneFace()
    sizes = [(240, 320), (480, 640), (200, 310), (240, 320)]
    pictures = [synthetic_picture(h, w, 1) for h, w in sizes]
    found = detector(runner).begin(pictures, [4] * 4).finish()
    # Padded to multiples of 32, like shapes in one batch, in the order of the pictures.
    assert runner.batches == [(3, 256, 320, 3), (1, 224, 320, 3)]
    assert found[0].boxes[0].tolist() == [32, 16, 64, 48]
    assert found[1].boxes[0].tolist() == [64, 32, 128, 96]
    assert found[1].landmarks[0, 0].tolist() == [80, 60]
    assert found[2].crops[0].shape == (1, 112, 112, 3)
    assert found[0].scores[0] == pytest.approx(0.9)


FROM_BEFORE = [0, 0, 40, 0, 20, 20, 5, 40, 35, 40]
ASIDE = [0, 0, 40, 0, 40, 20, 5, 40, 35, 40]
"""Landmarks: the nose lies half the way from the eyes to the mouth beside their middle."""


class Scored(OneFace):
    """Finds faces side by side, with these scores and landmarks."""

    def __init__(self, *faces: tuple[float, list[int]]) -> None:
        super().__init__()
        self._faces = faces

    def launch(self) -> Ticket:
        rows = np.zeros((len(self.staged[0]), len(self._faces), 15), np.float32)
        for place, (score, landmarks) in enumerate(self._faces):
            low = np.array([60.0 * place, 10.0])
            rows[:, place, :5] = (score, *low, 50, 60)
            rows[:, place, 5:] = (np.array(landmarks).reshape(5, 2) + low + 5).ravel()
        return Computed(rows)


@pytest.mark.parametrize("suppressed", [False, True])
def test_a_turned_face_is_believed_at_a_lower_score(suppressed: bool) -> None:
    runner = Scored((0.9, FROM_BEFORE), (0.6, ASIDE), (0.55, FROM_BEFORE), (0.45, ASIDE))
    picture = synthetic_picture(240, 320, 1)

    def scores(most: int, **options: object) -> list[float]:
        made = detector(runner, score=0.7, **options)
        # On a card its kernels have left the faces already.
        made._suppressed = suppressed
        (found,) = made.begin([picture], [most]).finish()
        return [round(float(score), 2) for score in found.scores]

    assert scores(9, score_turned=0.5) == [0.9, 0.6]
    assert scores(1, score_turned=0.5) == [0.9]
    if not suppressed:
        assert scores(9) == [0.9]
        assert scores(9, score_turned=0.9) == [0.9]


def test_how_far_a_face_is_turned_is_no_matter_of_size_place_or_roll() -> None:
    rows = np.zeros((2, 15), np.float32)
    rows[:, 5:] = FROM_BEFORE, ASIDE
    assert turn(rows) == pytest.approx([0.0, 0.5])
    angle = 0.6
    rolled = rows[:, 5:].reshape(2, 5, 2) @ np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )
    rows[:, 5:] = (3 * rolled - 50).reshape(2, 10)
    assert turn(rows) == pytest.approx([0.0, 0.5], abs=1e-5)
    assert np.isfinite(turn(np.zeros((1, 15), np.float32))).all()


class OnCanvases(OneFace):
    """The same on a "card" with canvases."""

    def __init__(self) -> None:
        super().__init__()
        self.canvases = ((320, 320), (192, 320))
        self.pictures = DevicePictures("cpu")
        self.filled: list[np.ndarray] = []

    def run(self, count: int, shape: tuple[int, int], fill: Callable[[Tensor], None]) -> Ticket:
        canvases = torch.full((count, *shape, 3), 9, dtype=torch.uint8)
        fill(canvases)
        self.filled.append(canvases.numpy())
        self.staged = (canvases.numpy(),)
        return self.launch()


def test_crops_are_cut_once_the_network_has_ended_and_whoever_polls_does_not_wait() -> None:
    runner = OnCanvases()
    ended = False

    class Under(Computed):
        @property
        def is_ready(self) -> bool:
            return ended

        def wait(self) -> F32:
            assert ended, "somebody waits"
            return super().wait()

    launch, cut = runner.launch, runner.pictures.cut
    runner.launch = lambda: Under(launch().wait())  # type: ignore[method-assign]
    cuts: list[int] = []

    def note(*given: Any) -> Cutting:
        cuts.append(1)
        return cut(*given)

    runner.pictures.cut = note  # type: ignore[method-assign]
    pending = detector(runner).begin([np.full((100, 200, 3), 255, np.uint8)], [1])
    assert not pending.poll()
    assert not cuts
    ended = True
    assert pending.poll()
    assert pending.poll()
    (found,) = pending.finish()
    assert cuts == [1], "once"
    assert found.crops[0].shape == (1, 112, 112, 3)


def test_a_picture_goes_on_the_smallest_canvas_and_is_padded_with_black() -> None:
    runner = OnCanvases()
    sizes = [(100, 200), (600, 300), (720, 1280), (480, 640), (60, 30)]
    pictures = [np.full((*size, 3), 255, np.uint8) for size in sizes]
    pending = detector(runner).begin(pictures, [1, 0, 1, 1, 1])
    assert not isinstance(pending, Immediate)
    found = pending.finish()
    assert runner.batches == [(3, 192, 320, 3), (2, 320, 320, 3)]
    placed = [(100, 200), (320, 160), (180, 320), (240, 320), (60, 30)]
    order = [0, 2, 4, 1, 3]
    canvases = [canvas for batch in runner.filled for canvas in batch]
    for canvas, i in zip(canvases, order, strict=True):
        height, width = placed[i]
        assert (canvas[:height, :width] == 255).all()
        assert canvas.sum(dtype=np.int64) == height * width * 3 * 255
    assert [len(d.boxes) for d in found] == [1, 0, 1, 1, 1]
    assert found[2].boxes[0].tolist() == [128, 64, 256, 192]
    assert found[2].crops[0].shape == (1, 112, 112, 3)


def test_batches_out_of_bounds_are_refused() -> None:
    model = detector(OneFace())
    picture = synthetic_picture(32, 32, 0)
    for pictures, limits in (([], []), ([picture] * 9, [1] * 9), ([picture], [1, 2])):
        with pytest.raises(ValueError, match="batch"):
            model.begin(pictures, limits)


class Fixed(nn.Module):
    """A network whose embedding and logit are given."""

    def __init__(self, embedding: torch.Tensor, logit: torch.Tensor | None = None) -> None:
        super().__init__()
        self.answer = (embedding, logit)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.answer


def served(ood: Ood, embedding: list[list[float]], logit: list[float] | None = None) -> np.ndarray:
    network = Fixed(torch.tensor(embedding), None if logit is None else torch.tensor(logit))
    pictures = torch.zeros((len(embedding), 112, 112, 3), dtype=torch.uint8)
    return np.asarray(ServedRecognizer(network, Input(width=112, height=112), ood)(pictures))


def test_ood_scores_by_source() -> None:
    vectors = [[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]]
    norm = served(Ood("norm", center=4.0, scale=0.5), vectors)
    assert np.allclose(norm[:2, :2], [[0.6, 0.8], [0.6, 0.8]])
    expected = 1 / (1 + np.exp(-(np.array([5.0, 1.0, 0.0]) - 4.0) / 0.5))
    assert np.allclose(norm[:, 2], expected, atol=1e-5)
    assert np.isfinite(norm).all()
    rts = served(Ood("rts", mapping="exp"), vectors, [-0.266, 0.5, -20.0])
    assert np.allclose(rts[:, 2], [0.7664, 1.0, 0.0], atol=1e-3)
    head = served(Ood("head", center=1.0, scale=2.0), vectors, [1.0, 3.0, -1.0])
    assert np.allclose(head[:, 2], [0.5, 0.7311, 0.2689], atol=1e-3)
    assert served(Ood("none"), vectors)[:, 2].tolist() == [1, 1, 1]


def test_colours_and_normalisation_reach_the_network() -> None:
    seen: list[torch.Tensor] = []

    class Spy(Fixed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            seen.append(x)
            return self.answer

    picture = torch.zeros((1, 112, 112, 3), dtype=torch.uint8)
    picture[..., 0], picture[..., 2] = 10, 250  # blue, red
    spec = Input(width=128, height=128, color="rgb", mean=(10, 0, 5), std=(2, 1, 1))
    ServedRecognizer(Spy(torch.ones(1, 2)), spec, Ood("none"))(picture)
    assert seen[0].shape == (1, 3, 128, 128)
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx([120.0, 0.0, 5.0])


def test_a_wrong_declared_dimension_is_found_in_warm_up() -> None:
    class Wide(Runner):
        def stage(self, count: int, shapes: object) -> tuple[np.ndarray, ...]:
            return (np.zeros((count, 112, 112, 3), np.uint8),)

        def launch(self) -> Ticket:
            return Computed(np.zeros((1, 257), np.float32))

        def warm_up(self) -> None:
            pass

    model = NetworkRecognizer(Wide(), crop=AlignedCrop(), embedding_dim=512, batch_max=1)
    with pytest.raises(FacelaneError, match="512, but the network gives 256"):
        model.warm_up()


def finish(pending: Pending[list[Detections]]) -> list[Detections]:
    return pending.finish()


def test_the_null_detector() -> None:
    crops = (AlignedCrop(), ContextCrop(2.7))
    model = NullDetector(crops=crops, faces=3)
    assert model.needs_pixels
    (found,) = finish(model.begin([synthetic_picture(120, 300, 2)], [8]))
    assert found.boxes.shape == (3, 4)
    low, high = found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]
    assert (low >= 0).all()
    assert (high <= (300, 120)).all()
    assert [c.shape for c in found.crops] == [(3, 112, 112, 3), (3, 80, 80, 3)]
    assert found.crops[0].std() > 0
    (fewer,) = finish(model.begin([synthetic_picture(120, 300, 2)], [2]))
    assert len(fewer.scores) == 2

    blind = NullDetector(crops=crops, faces=2, decode=False)
    assert not blind.needs_pixels
    empty = np.empty((0, 0, 3), np.uint8)
    (found,) = finish(blind.begin([empty], [8]))
    assert [c.shape for c in found.crops] == [(2, 112, 112, 3), (2, 80, 80, 3)]


def test_the_null_recognizer_knows_equal_chips() -> None:
    model = NullRecognizer(embedding_dim=64)
    chips = np.stack([synthetic_picture(112, 112, seed) for seed in (1, 2, 1)])
    result = model.begin(chips).finish()
    similarity = result.vectors @ result.vectors.T
    assert np.allclose(np.diag(similarity), 1, atol=1e-5)
    assert similarity[0, 2] == pytest.approx(1, abs=1e-5)
    assert abs(similarity[0, 1]) < 0.6
    assert (result.ood == 1).all()


def test_null_liveness_calls_all_live() -> None:
    model = NullLiveness(crops=(ContextCrop(2.7),))
    assert model.begin([np.zeros((3, 80, 80, 3), np.uint8)]).finish().tolist() == [1, 1, 1]


@pytest.mark.slow
def test_the_random_rts_package_passes_verification() -> None:
    result = verify(Catalog().resolve("rts-irse64-random"))
    assert result.passed, result.checks
    assert result.random_weights
    assert any("random" in check.detail for check in result.checks)


@pytest.mark.parametrize("name", ["null-detector", "null-recognizer", "null-liveness"])
def test_null_packages_pass_verification(name: str) -> None:
    result = verify(Catalog().resolve(name))
    assert result.passed, result.checks
    assert result.latency_ms is not None


def test_a_null_model_needs_no_pixels_only_when_told() -> None:
    package = Catalog().resolve("null-detector")
    for value, expected in (("true", True), ("false", False)):
        model = load(package, DeviceOptions(), batch_max=2, extra={"decode": value})
        assert isinstance(model, NullDetector)
        assert model.needs_pixels is expected


@pytest.mark.filterwarnings("ignore")  # that there may be no quantized tensors one day
@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, 3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
        lambda: torch.ones(1, dtype=torch.half).expand(1 << 20, 1 << 20),
    ],
    ids=["sparse", "of no device", "quantized", "two bytes that are terabytes"],
)
def test_a_checkpoint_holds_plain_tensors_alone(made: Callable[[], Tensor]) -> None:
    file = io.BytesIO()
    torch.save({"bias": torch.ones(3)}, file)
    assert read_checkpoint(file.getvalue())["bias"].tolist() == [1.0] * 3
    file = io.BytesIO()
    torch.save({"state_dict": {"weight": made()}}, file)
    with pytest.raises(ValueError, match="weight, which is no plain tensor"):
        read_checkpoint(file.getvalue())
