"""Faults, batch buckets, precision checks: what of the device layer needs no device."""

from __future__ import annotations

import errno
import os

import cv2
import pytest
import torch

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import DeviceOptions
from facelane_server.models.canary import batch_buckets
from facelane_server.worker import device
from facelane_server.worker.exit_codes import INTERNAL, OUT_OF_MEMORY
from facelane_server.worker.faults import Fault, classify, ending
from facelane_server.worker.networks.serving import (
    ServedDetector,
    ServedLiveness,
    ServedRecognizer,
    check_pictures,
)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: misaligned address",
        "CUDA error: the launch timed out and was terminated",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
        "CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server",
    ],
)
def test_sticky_errors_poison(text: str) -> None:
    assert classify(RuntimeError(text)) is Fault.POISONED


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("can't start new thread"),
        cv2.error("OpenCV(4.11.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to ..."),
    ],
)
def test_out_of_memory_is_told_apart(error: Exception) -> None:
    assert classify(error) is Fault.OUT_OF_MEMORY


def test_out_of_the_hosts_memory_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(raised.value) is Fault.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a batch has 1 to batch_max chips"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: invalid argument"),
        OSError("unspecified launch failure of a rocket"),
    ],
)
def test_ordinary_errors_leave_the_context_alone(error: Exception) -> None:
    assert classify(error) is Fault.ORDINARY


def test_a_worker_without_memory_says_so_and_where_it_was_is_nobodys_concern(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ending(MemoryError()).code == OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert "worker has no memory left" in said
    assert "traceback" not in said
    assert ending(ValueError("what is this")).code == INTERNAL
    assert "traceback" in capsys.readouterr().err


def test_the_cause_counts() -> None:
    error = ValueError("the batch failed")
    error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert classify(error) is Fault.POISONED


@pytest.mark.parametrize(
    ("batch_max", "buckets"),
    [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_batch_buckets(batch_max: int, buckets: list[int]) -> None:
    assert batch_buckets(batch_max) == buckets


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:x", "rocm:0"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(FacelaneError) as caught:
        device.open_device(DeviceOptions(device=name))
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(FacelaneError, match="does not exist here") as caught:
        device.open_device(DeviceOptions(device="cuda:63"))
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_cpu_has_no_device_memory() -> None:
    assert device.memory_mib("cpu") == 0
    assert device.device_name("cpu") == "cpu"


def test_check_pictures_are_the_same_everywhere() -> None:
    first, second = (check_pictures([(32, 48)], 3)[0] for _ in range(2))
    assert first.shape == (3, 32, 48, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert first.float().std() > 20


def test_agreement_sees_what_matters() -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn((4, 32), generator=generator))
    ood = torch.rand((4, 1), generator=generator)
    reference = torch.cat((vectors, ood), 1)
    assert ServedRecognizer.agreement(reference, reference) > 0.9999
    assert ServedRecognizer.agreement(reference, reference.half().float()) > 0.999
    other = reference.clone()
    other[2, :4] += 0.2
    assert ServedRecognizer.agreement(reference, other) < 0.999
    shifted = reference.clone()
    shifted[1, -1] += 0.05
    assert ServedRecognizer.agreement(reference, shifted) < 0.999

    assert ServedLiveness.agreement(ood, ood + 0.01) > 0.999
    assert ServedLiveness.agreement(ood, ood + 0.05) < 0.999

    candidates = torch.rand((2, 64, 15), generator=generator) * 100
    shuffled = candidates[:, torch.randperm(64, generator=generator)]
    assert ServedDetector.agreement(candidates, shuffled) > 0.9999
    assert ServedDetector.agreement(candidates, candidates.roll(20, dims=2)) < 0.999
