"""Packed convolutions: the same answers, whatever the sizes; or the network stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from facelane_server.domain import Stage
from facelane_server.models.api import F32, U8
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Input
from facelane_server.worker.networks.architectures.packing import (
    Packable,
    Packed,
    PackedConv,
    can_pack,
)
from facelane_server.worker.networks.architectures.yunet import YuNet
from facelane_server.worker.networks.load import network_with_weights
from facelane_server.worker.networks.serving import (
    Served,
    ServedDetector,
    ServedLiveness,
    ServedRecognizer,
    check_pictures,
)
from facelane_server.worker.networks.torch_runner import CpuRunner

pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)


def packed_convolutions(network: nn.Module) -> list[PackedConv]:
    return [module for module in network.modules() if isinstance(module, PackedConv)]


def starter(task: Stage) -> Served:
    package = Catalog().resolve(f"facelane-{task.value}")
    manifest, network = package.manifest, network_with_weights(package)
    if task is Stage.DETECTOR:
        return ServedDetector(network, manifest.input)
    if task is Stage.RECOGNIZER:
        assert manifest.ood is not None
        return ServedRecognizer(network, manifest.input, manifest.ood)
    return ServedLiveness(network, manifest.input)


def answer(runner: CpuRunner, pictures: list[U8]) -> F32:
    staged = runner.stage(len(pictures[0]), [each.shape[1:3] for each in pictures])
    for target, source in zip(staged, pictures, strict=True):
        target[...] = source
    return runner.launch().wait()


@pytest.mark.parametrize(
    ("task", "warm", "others"),
    [
        (Stage.DETECTOR, [(96, 128)], [(2, [(96, 128)]), (1, [(160, 96)]), (1, [(320, 320)])]),
        pytest.param(
            *(Stage.RECOGNIZER, [(112, 112)], [(1, [(112, 112)]), (5, [(112, 112)])]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(Stage.LIVENESS, [(80, 80)] * 2, [(1, [(80, 80)] * 2), (7, [(80, 80)] * 2)]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_warm_starter_answers_as_a_plain_one(
    task: Stage, warm: list[tuple[int, int]], others: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    plain = CpuRunner(starter(task), warm_shapes=warm)
    served = starter(task)
    runner = CpuRunner(served, warm_shapes=warm)
    runner.warm_up()
    assert packed_convolutions(served.network)
    for count, shapes in others:
        pictures = [each.numpy() for each in check_pictures(shapes, count)]
        before, after = answer(plain, pictures), answer(runner, pictures)
        assert before.shape == after.shape
        if task is Stage.DETECTOR:
            # Near-equal scores may change places.
            assert np.abs(np.sort(before[..., 0]) - np.sort(after[..., 0])).max() < 1e-4
            agreement = served.agreement(torch.from_numpy(before), torch.from_numpy(after))
            assert agreement > 1 - 1e-5
        else:
            assert np.abs(before - after).max() < 1e-4


def test_each_head_of_a_packed_detector_says_what_it_said() -> None:
    network = YuNet(widths=(4, 8, 8, 8, 8, 8)).eval().requires_grad_(requires_grad=False)
    x = torch.rand(2, 3, 64, 96) * 255
    with torch.inference_mode():
        before = network(x)
        Packed(network, x)
        assert packed_convolutions(network)
        for a, b in zip(before, network(x), strict=True):
            assert float(a.std()) > 0
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_undone_it_is_the_network_that_it_was() -> None:
    network = YuNet().eval().requires_grad_(requires_grad=False)
    x = torch.rand(1, 3, 64, 64) * 255
    modules = dict(network.named_modules())
    packed = Packed(network, x)
    assert dict(network.named_modules()) != modules
    packed.undo()
    assert dict(network.named_modules()) == modules


class _Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01


class _Steady(Packable):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def for_cpu(self) -> nn.Module:
        return _Shifted()


class _Scores(nn.Module):
    """A liveness network that a CPU's own form makes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, groups=3)
        self.steady = _Steady()

    def forward(self, x: Tensor) -> Tensor:
        return self.steady(self.conv(x / 255)).mean((1, 2, 3)).sigmoid()


def test_what_changes_the_answers_is_undone(capfd: pytest.CaptureFixture[str]) -> None:
    served = ServedLiveness(_Scores(), Input(32, 32))
    runner = CpuRunner(served, warm_shapes=[(32, 32)])
    pictures = [each.numpy() for each in check_pictures([(32, 32)], 2)]
    before = answer(runner, pictures)
    runner.warm_up()
    assert not packed_convolutions(served.network)
    assert np.array_equal(answer(runner, pictures), before)
    assert "disagree" in capfd.readouterr().err
