"""Models on a CUDA device: graphs against full precision, batches under way, budgets.

They need no public weights: networks with random ones are run by the same code.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from bench import material

from facelane_server.domain import Encoding, FacelaneError
from facelane_server.models.api import (
    AlignedCrop,
    ContextCrop,
    Detections,
    Detector,
    DeviceOptions,
    Recognizer,
)
from facelane_server.models.canary import batch_buckets
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package, read_package
from facelane_server.modeltools.verify import synthetic_picture, verify
from facelane_server.worker import device
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.pictures import decode
from facelane_server.worker.decoding.pixels import OnDevice
from facelane_server.worker.faults import Fault, classify
from facelane_server.worker.networks import serving, torch_runner
from facelane_server.worker.networks.load import load, network_with_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GPU = "cuda:0"
BATCH = 6
SIDE = 320
ARCFACE: dict[str, Any] = {
    "task": "recognizer",
    "input": {
        "width": 112,
        "height": 112,
        "color": "rgb",
        "mean": [127.5] * 3,
        "std": [127.5] * 3,
        "crops": [{"kind": "aligned", "size": 112}],
    },
    "output": {"embedding_dim": 512},
    "thresholds": {"match": 0.3, "margin": 0.05, "ood": 0.4},
}
TABLES: dict[str, dict[str, Any]] = {
    "yunet": {
        "task": "detector",
        "architecture": "yunet",
        "input": {"max_side": SIDE},
        "thresholds": {"score": 0.5, "nms": 0.3},
    },
    "mobilefacenet": {
        **ARCFACE,
        "architecture": "mobilefacenet",
        "ood": {"source": "norm", "center": 0.5, "scale": 0.5},
    },
    "rts-irse": {
        **ARCFACE,
        "architecture": "rts-irse",
        "ood": {"source": "rts", "mapping": "exp"},
    },
    "minifasnet-pair": {
        "task": "liveness",
        "architecture": "minifasnet-pair",
        "input": {
            "width": 80,
            "height": 80,
            "crops": [
                {"kind": "context", "scale": 2.7, "size": 80},
                {"kind": "context", "scale": 4.0, "size": 80},
            ],
        },
        "thresholds": {"live": 0.9, "spoof": 0.5},
    },
}


def package(name: str, directory: Path) -> Package:
    folder = directory / name
    folder.mkdir(exist_ok=True)
    table = {
        "schema": 1,
        "name": name,
        "version": "1",
        "license": "none",
        "description": "random weights",
        "random_seed": 11,
        **TABLES[name],
    }
    (folder / "model.toml").write_text(tomli_w.dumps(table))
    return read_package(folder)


def dressed(package: Package) -> serving.Served:
    network = network_with_weights(package)
    manifest = package.manifest
    if manifest.task == "detector":
        return serving.ServedDetector(network, manifest.input)
    if manifest.task == "recognizer":
        assert manifest.ood is not None
        return serving.ServedRecognizer(network, manifest.input, manifest.ood)
    return serving.ServedLiveness(network, manifest.input)


def shapes(package: Package) -> list[tuple[int, int]]:
    return [(crop.size, crop.size) for crop in package.crops] or [(SIDE, SIDE)]


def cuda_runner(package: Package, **options: Any) -> torch_runner.CudaRunner:
    settings = DeviceOptions(device=GPU, **options)
    device.open_device(settings)
    sizes = shapes(package)
    runner = torch_runner.CudaRunner(
        dressed(package), shapes=sizes, batch_max=BATCH, options=settings
    )
    runner.warm_up()
    return runner


def pictures(sizes: Sequence[tuple[int, int]], count: int, seed: int) -> list[np.ndarray]:
    return [np.stack([synthetic_picture(h, w, seed + i) for i in range(count)]) for h, w in sizes]


def launch(runner: Any, sizes: Sequence[tuple[int, int]], inputs: list[np.ndarray]) -> Any:
    for target, source in zip(runner.stage(len(inputs[0]), sizes), inputs, strict=True):
        target[...] = source
    return runner.launch()


@pytest.fixture(autouse=True)
def _clean_device() -> Any:
    yield
    gc.collect()
    device._budgets._shares.clear()
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", TABLES)
def test_graphs_in_half_agree_with_full_precision_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Cosine at least 0.999, for every batch size, padded or not."""
    found = package(name, tmp_path)
    runner = cuda_runner(found)
    assert runner.captured == tuple(batch_buckets(BATCH))
    host = torch_runner.CpuRunner(dressed(found), warm_shapes=shapes(found))
    for count in range(1, BATCH + 1):
        inputs = pictures(shapes(found), count, seed=count)
        expected = torch.from_numpy(launch(host, shapes(found), inputs).wait())
        actual = torch.from_numpy(launch(runner, shapes(found), inputs).wait())
        assert actual.shape == expected.shape
        assert dressed(found).agreement(expected, actual) >= 0.999
    runner.close()


@pytest.mark.parametrize(
    "options", [{"graphs": False}, {"precision": "fp32"}, {"precision": "fp32", "graphs": False}]
)
@pytest.mark.parametrize("name", ["yunet", "mobilefacenet"])
def test_every_mode_agrees(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = package(name, tmp_path)
    runner = cuda_runner(found, **options)
    assert bool(runner.captured) is options.get("graphs", True)
    inputs = pictures(shapes(found), 3, seed=1)
    host = torch_runner.CpuRunner(dressed(found), warm_shapes=shapes(found))
    expected = torch.from_numpy(launch(host, shapes(found), inputs).wait())
    actual = torch.from_numpy(launch(runner, shapes(found), inputs).wait())
    least = 0.99999 if options.get("precision") == "fp32" else 0.999
    assert dressed(found).agreement(expected, actual) >= least


def test_two_batches_under_way_do_not_mix(tmp_path: Path) -> None:
    found = package("mobilefacenet", tmp_path)
    runner, sizes = cuda_runner(found), shapes(found)
    batches = [pictures(sizes, 1 + i % BATCH, seed=40 + i) for i in range(12)]
    alone = [launch(runner, sizes, batch).wait() for batch in batches]
    for i in range(0, 12, 2):
        first, second = (launch(runner, sizes, batches[i + k]) for k in range(2))
        assert np.array_equal(first.wait(), alone[i])
        assert np.array_equal(second.wait(), alone[i + 1])
    # More than the staging buffers hold: earlier batches are kept, none is overwritten.
    tickets = [launch(runner, sizes, batch) for batch in batches]
    for ticket, expected in zip(tickets, alone, strict=True):
        assert np.array_equal(ticket.wait(), expected)


def test_a_network_that_half_precision_breaks_runs_in_full(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = package("mobilefacenet", tmp_path)

    def overflowing() -> serving.Served:
        served = dressed(found)
        with torch.no_grad():
            # Activations beyond 65504, brought back later.
            served.network.get_submodule("stem.conv").weight.mul_(1e6)
            served.network.get_submodule("stem_depthwise.conv").weight.mul_(1e-6)
        return served

    settings = DeviceOptions(device=GPU)
    device.open_device(settings)
    runner = torch_runner.CudaRunner(
        overflowing(), shapes=shapes(found), batch_max=BATCH, options=settings
    )
    runner.warm_up()
    assert runner.captured == tuple(batch_buckets(BATCH)), "graphs, but in full precision"
    assert not runner.is_half
    assert "disagrees with full precision" in capfd.readouterr().err
    inputs = pictures(shapes(found), 3, seed=1)
    host = torch_runner.CpuRunner(overflowing(), warm_shapes=shapes(found))
    expected = torch.from_numpy(launch(host, shapes(found), inputs).wait())
    actual = torch.from_numpy(launch(runner, shapes(found), inputs).wait())
    assert dressed(found).agreement(expected, actual) >= 0.99999


def test_memory_does_not_grow(tmp_path: Path) -> None:
    found = package("mobilefacenet", tmp_path)
    runner, sizes = cuda_runner(found), shapes(found)
    inputs = [pictures(sizes, count, seed=count) for count in range(1, BATCH + 1)]
    before = torch.cuda.memory_reserved(0)
    for i in range(200):
        launch(runner, sizes, inputs[i % BATCH]).wait()
    assert torch.cuda.memory_reserved(0) == before


def test_models_as_threads_of_one_process(tmp_path: Path) -> None:
    """Warm-up and service side by side, each on its own stream."""
    results: dict[str, bool] = {}

    def serve(name: str) -> Callable[[], None]:
        def run() -> None:
            found = package(name, tmp_path)
            runner, sizes = cuda_runner(found), shapes(found)
            inputs = pictures(sizes, 3, seed=5)
            expected = launch(runner, sizes, inputs).wait()
            same = [
                np.allclose(launch(runner, sizes, inputs).wait(), expected, atol=1e-5)
                for _ in range(100)
            ]
            results[name] = all(same) and runner.captured == tuple(batch_buckets(BATCH))

        return run

    threads = [threading.Thread(target=serve(name)) for name in TABLES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert results == dict.fromkeys(TABLES, True)


def test_the_memory_cap_holds_and_its_breach_is_told() -> None:
    context = device.memory_mib(GPU) or device.CONTEXT_MIB_UNMEASURED
    budget = context + 512
    device.open_device(DeviceOptions(device=GPU, memory_mib=budget))
    held: list[torch.Tensor] = []

    def fill() -> None:
        while len(held) < 64:
            held.append(torch.zeros(64 * device.MIB, dtype=torch.uint8, device=GPU))

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fill()
    assert 1 <= len(held) <= 9
    assert classify(caught.value) is Fault.OUT_OF_MEMORY
    held.clear()
    device.free_cache()
    assert torch.zeros(1024, device=GPU).sum().item() == 0


def test_a_budget_below_the_context_is_refused() -> None:
    with pytest.raises(FacelaneError, match="raise the pool's memory_mib"):
        device.open_device(DeviceOptions(device=GPU, memory_mib=16))


def test_a_device_has_a_name_and_its_process_memory() -> None:
    device.open_device(DeviceOptions(device=GPU))
    assert device.device_name(GPU)
    before = device.memory_mib(GPU)
    block = torch.zeros(512 * device.MIB, dtype=torch.uint8, device=GPU)
    assert 500 <= device.memory_mib(GPU) - before <= 530
    del block


def test_a_device_assert_is_sticky() -> None:
    """In a process of its own: its context does not survive."""
    code = (
        "import torch\n"
        "from facelane_server.worker.faults import Fault, classify\n"
        "x = torch.zeros(4, device='cuda:0')\n"
        "try:\n"
        "    x[torch.tensor([9], device='cuda:0')].cpu()\n"
        "except Exception as error:\n"
        "    raise SystemExit(0 if classify(error) is Fault.POISONED else 3)\n"
        "raise SystemExit(4)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_packages_pass_verification_on_the_device() -> None:
    packages, _ = Catalog().scan()
    for found in packages:
        if found.manifest.runtime == "torch":
            result = verify(found, DeviceOptions(device=GPU))
            assert result.passed, result.checks


def test_starter_models_give_the_same_on_both_devices() -> None:
    """Same OOD within 0.02 and cosine 0.999; runs where the starter models are shipped."""
    recognizers = [p for p in Catalog().scan()[0] if p.task == "recognizer" and p.manifest.weights]
    if not recognizers:
        pytest.skip("no recogniser with trained weights is shipped in this tree")
    chips = np.stack([synthetic_picture(112, 112, seed) for seed in range(4)])
    for found in recognizers:
        results = []
        for name in ("cpu", GPU):
            model = load(found, DeviceOptions(device=name), batch_max=4)
            assert isinstance(model, Recognizer)
            model.warm_up()
            results.append(model.begin(chips).finish())
            model.close()
        assert ((results[0].vectors * results[1].vectors).sum(1) >= 0.999).all()
        assert np.abs(results[0].ood - results[1].ood).max() <= 0.02


def detections(data: list[bytes], **options: Any) -> list[Detections]:
    """What the starter detector finds on the card; pictures decoded where ``options`` say."""
    crops = (AlignedCrop(112), ContextCrop(2.7, 80))
    model = load(
        Catalog().resolve("facelane-detector"),
        DeviceOptions(device=GPU, **options),
        batch_max=len(data),
        crops=crops,
    )
    assert isinstance(model, Detector)
    model.warm_up()
    views = [memoryview(one) for one in data]
    pictures: list[Any] = [decode(view, Encoding.JPEG) for view in views]
    if model.decodes:
        found = model.decode(views)
        assert all(picture is not None for picture in found), "a plain JPEG is decoded there"
        # Two batches under way, one of them mixed: neither disturbs the other.
        first = model.begin([found[0], *pictures[1:]], [4] * len(data))
        again = model.begin(model.decode(views), [4] * len(data))
        mixed, results = first.finish(), again.finish()
        assert np.abs(mixed[0].boxes - results[0].boxes).max(initial=0.0) <= 0.5
    else:
        results = model.begin(pictures, [4] * len(data)).finish()
    model.close()
    return results


@pytest.fixture
def frames() -> list[bytes]:
    try:
        return material.make_frames(4, 1280, 720, [1, 2, 4, 2])
    except material.MissingError as error:
        pytest.skip(str(error))


def assert_same_faces(a: Detections, b: Detections) -> None:
    """Every face that is not at the threshold is in both, its box within two pixels."""
    threshold = Catalog().resolve("facelane-detector").manifest.thresholds.score
    assert threshold is not None
    for one, other in ((a, b), (b, a)):
        for box, score in zip(one.boxes, one.scores, strict=True):
            apart = np.abs(other.boxes - box).max(1)
            assert score < threshold + 0.05 or (len(apart) and apart.min() <= 2.0)


def test_pictures_decoded_on_the_card_give_the_same_faces(frames: list[bytes]) -> None:
    """nvJPEG's pixels are not OpenCV's to the last grey level."""
    pytest.importorskip("torchvision", reason="facelane[nvjpeg] is not installed")
    for a, b in zip(detections(frames), detections(frames, decode="cuda"), strict=True):
        assert_same_faces(a, b)
        if len(a.boxes) == len(b.boxes):
            order = [int(np.abs(b.boxes - box).sum(1).argmin()) for box in a.boxes]
            for host, card in zip(a.crops, b.crops, strict=True):
                assert np.abs(host.astype(int) - card[order].astype(int)).mean() <= 4.0


def test_a_broken_picture_does_not_cost_the_card(frames: list[bytes]) -> None:
    """Data damaged in the middle: nvJPEG refuses or repairs; the next picture is decoded."""
    pytest.importorskip("torchvision", reason="facelane[nvjpeg] is not installed")
    pictures = DevicePictures(GPU)
    pictures.add_nvjpeg()
    good = frames[0]
    rng = np.random.default_rng(4)
    for _ in range(20):
        broken = bytearray(good)
        for at in rng.integers(800, len(good) - 2, 40):
            broken[at] = int(rng.integers(0, 255))
        pictures.decode([memoryview(bytes(broken)), memoryview(good)])
        pictures.decode([memoryview(good[: len(good) // 2] + b"\xff\xd9")])
    [found] = pictures.decode([memoryview(good)])
    assert isinstance(found, OnDevice)
    host = decode(memoryview(good), Encoding.JPEG)
    card = found.pixels.cpu().numpy()[::-1].transpose(1, 2, 0)
    assert np.abs(card.astype(int) - host.astype(int)).mean() <= 4.0
