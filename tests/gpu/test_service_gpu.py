"""Workers, pools and the server on a CUDA device, with the models that ship."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from bench import material
from tests.real_pool import alive
from tests.running_server import RunningServer, toml
from tests.waiting import until

import facelane
from facelane_server import config
from facelane_server.domain import Encoding, Picture, Stage
from facelane_server.models.api import Detections, DeviceOptions
from facelane_server.models.catalog import Catalog
from facelane_server.monitor import Nvml
from facelane_server.pools.host import Launchers
from facelane_server.pools.mps import CONTROL, MpsDaemon
from facelane_server.pools.pool import Pool
from facelane_server.pools.tasks import DetectRequest, EmbedRequest, LivenessRequest, Request, Task
from facelane_server.worker.decoding.pictures import decode
from facelane_server.worker.networks.load import load

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

GPU = "cuda:0"
START_S = 100.0
NAMES = {stage: f"facelane-{stage}" for stage in Stage}
MPS = shutil.which(CONTROL, path="/usr/local/nvidia/bin:/usr/bin:/usr/local/bin") is not None


def package(stage: Stage) -> Any:
    return Catalog().resolve(NAMES[stage])


def all_crops() -> tuple[Any, ...]:
    return package(Stage.RECOGNIZER).crops + package(Stage.LIVENESS).crops


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    try:
        return material.make_frames(4, 1280, 720, [1, 2])
    except material.MissingError as error:
        pytest.skip(str(error))


@contextmanager
def models_on(device: str) -> Iterator[dict[Stage, Any]]:
    """Warm models of every stage, in this process."""
    models: dict[Stage, Any] = {}
    try:
        for stage in Stage:
            models[stage] = load(
                package(stage),
                DeviceOptions(device=device),
                batch_max=1 if stage is Stage.DETECTOR else 4,
                crops=all_crops() if stage is Stage.DETECTOR else (),
            )
            models[stage].warm_up()
        yield models
    finally:
        for model in models.values():
            model.close()


SCORE_BAND = 0.05
"""A face whose score is so close above the threshold on one device may be below it on the
other; from here on it is on both."""


def tied(box: np.ndarray, score: float, others: Detections) -> bool:
    """Whether one of ``others`` has the score to half precision, and all but the same place."""
    for other, its in zip(others.boxes, others.scores, strict=True):
        low, high = (
            np.maximum(box[:2], other[:2]),
            np.minimum(box[:2] + box[2:], other[:2] + other[2:]),
        )
        shared = float(np.prod(np.maximum(high - low, 0)))
        union = float(box[2] * box[3] + other[2] * other[3]) - shared
        if abs(score - float(its)) <= 0.001 and shared >= 0.9 * union:
            return True
    return False


def same_faces(a: Detections, b: Detections, threshold: float) -> list[tuple[int, int]]:
    """Rows of the same face in two detections of one picture, boxes within two pixels. Fails
    when a face that is not at the threshold has no partner. Where two candidates of a face have
    the same score to half precision, either may be taken: that is a partner, but no pair."""
    pairs = []
    for i, box in enumerate(a.boxes):
        apart = np.abs(b.boxes - box).max(1) if len(b.boxes) else np.array([np.inf])
        j = int(apart.argmin())
        if apart[j] <= 2.0:
            pairs.append((i, j))
    assert len({j for _, j in pairs}) == len(pairs), "two faces became one"
    ways = ((a, b, {i for i, _ in pairs}), (b, a, {j for _, j in pairs}))
    for found, other, known in ways:
        lonely = [
            float(score)
            for i, score in enumerate(found.scores)
            if i not in known and not tied(found.boxes[i], float(score), other)
        ]
        assert all(score < threshold + SCORE_BAND for score in lonely), lonely
    return pairs


def test_cpu_and_gpu_find_the_same(frames: list[bytes]) -> None:
    """The same faces, boxes within 2 pixels, OOD within 0.02, the same people, the same
    verdicts. A face at the very threshold of the detector may be found on one side alone:
    half precision moves its score by a thousandth or so.

    A liveness score has two bounds. From the same crops: 0.02, as for OOD. From the
    frame: 0.05, because a box that moves by a fraction of a pixel can move the crop, whose
    edges are whole pixels, by one.
    """
    split = len(package(Stage.RECOGNIZER).crops)
    score = package(Stage.DETECTOR).manifest.thresholds.score
    thresholds = package(Stage.LIVENESS).manifest.thresholds

    def verdicts(scores: Any) -> list[str]:
        return [
            "live" if s >= thresholds.live else "spoof" if s < thresholds.spoof else "undecided"
            for s in scores
        ]

    with models_on("cpu") as host, models_on(GPU) as card:
        faces = 0
        for data in frames:
            picture = decode(memoryview(data), Encoding.JPEG)
            [a] = card[Stage.DETECTOR].begin([picture], [4]).finish()
            [b] = host[Stage.DETECTOR].begin([picture], [4]).finish()
            pairs = same_faces(a, b, score)
            faces += len(pairs)
            if not pairs:
                continue
            i, j = (list(rows) for rows in zip(*pairs, strict=True))
            assert np.abs(a.scores[i] - b.scores[j]).max() <= SCORE_BAND
            assert np.abs(a.landmarks[i] - b.landmarks[j]).max() <= 2.0

            ae = card[Stage.RECOGNIZER].begin(a.crops[0][i]).finish()
            be = host[Stage.RECOGNIZER].begin(b.crops[0][j]).finish()
            assert np.abs(ae.ood - be.ood).max() <= 0.02
            assert ((ae.vectors * be.vectors).sum(1) >= 0.995).all()

            context = [crops[j] for crops in b.crops[split:]]
            al = card[Stage.LIVENESS].begin([crops[i] for crops in a.crops[split:]]).finish()
            bl = host[Stage.LIVENESS].begin(context).finish()
            same = card[Stage.LIVENESS].begin(context).finish()
            assert np.abs(same - bl).max() <= 0.02
            assert np.abs(al - bl).max() <= 0.05
            assert verdicts(al) == verdicts(bl)
        assert faces >= 4, "the frames have faces"


def request(stage: Stage, data: bytes) -> Request:
    if stage is Stage.DETECTOR:
        return DetectRequest(Picture(Encoding.JPEG, data), 4, 16_000_000)
    random = np.random.default_rng(3)
    crops = tuple(
        random.integers(0, 256, spec.size * spec.size * 3, np.uint8).tobytes()
        for spec in package(stage).crops
    )
    if stage is Stage.RECOGNIZER:
        return EmbedRequest(crops[0], want_vector=True)
    return LivenessRequest(crops)


@asynccontextmanager
async def pools_on_the_card(
    isolation: str, stages: list[Stage], **settings: Any
) -> AsyncIterator[dict[Stage, Pool]]:
    """Ready pools; on leaving nothing of them is left."""
    import tempfile

    pids: list[int] = []
    with tempfile.TemporaryDirectory(prefix="facelane-") as folder:
        daemon = await MpsDaemon.start(Path(folder) / "mps") if isolation == "mps" else None
        launchers = Launchers(
            Path(folder), mps_pipe_directory=daemon.pipe_directory if daemon else None
        )
        pools: dict[Stage, Pool] = {}
        try:
            for stage in stages:
                chosen = config.Pool(
                    devices=(GPU,),
                    isolation=isolation,  # type: ignore[arg-type]
                    batch_max=2,
                    load_timeout_s=START_S,
                    **settings,
                )
                pools[stage] = Pool(
                    stage,
                    chosen,
                    package(stage),
                    launchers.for_pool(stage, chosen),
                    crops=all_crops() if stage is Stage.DETECTOR else (),
                )
            for pool in pools.values():
                await pool.start()
            for pool in pools.values():
                assert await pool.wait_ready(START_S), pool.info()
                pids += [worker.pid for worker in pool.info().workers]
            yield pools
        finally:
            for pool in pools.values():
                pids += [worker.pid for worker in pool.info().workers if worker.pid]
                await pool.stop(1.0)
            await launchers.close()
            if daemon is not None:
                await daemon.close()
    assert not [pid for pid in pids if alive(pid)]


async def ask(pool: Pool, asked: Request, timeout_s: float = 30.0) -> Any:
    task: Task[Any] = Task(
        asked,
        1,
        1,
        time.monotonic_ns() + int(timeout_s * 1e9),
        asyncio.get_running_loop().create_future(),
    )
    pool.submit(task)
    return await asyncio.wait_for(task.future, timeout_s + 5.0)


@pytest.mark.parametrize(
    "isolation",
    [
        "process",
        "thread",
        pytest.param(
            "mps", marks=pytest.mark.skipif(not MPS, reason=f"{CONTROL} is not installed")
        ),
    ],
)
async def test_every_isolation_serves_the_same_models(isolation: str, frames: list[bytes]) -> None:
    share = {"sm_share": 50} if isolation == "mps" else {}
    async with pools_on_the_card(isolation, list(Stage), memory_mib=4_000, **share) as pools:
        pids = {w.pid for pool in pools.values() for w in pool.info().workers}
        assert len(pids) == (1 if isolation == "thread" else 3)
        for pool in pools.values():
            [worker] = pool.info().workers
            assert worker.device.startswith(GPU)
            assert 100 < worker.memory_mib < 4_000
        answers = await asyncio.gather(
            *(ask(pools[stage], request(stage, frames[1])) for stage in Stage for _ in range(8))
        )
        faces = answers[list(Stage).index(Stage.DETECTOR) * 8].faces
        assert len(faces) >= 2
        embedded = await ask(pools[Stage.RECOGNIZER], EmbedRequest(faces[0].crops[0]))
        assert 0.0 <= embedded.ood_score <= 1.0
        assert all(pool.info().losses == 0 for pool in pools.values())


async def test_a_leak_of_device_memory_ends_at_the_budget_and_loses_nothing() -> None:
    """The worker reaches its cap; its spare takes over with the task that found no memory."""
    stages = [Stage.LIVENESS]
    options = {"fail.leak_mib": "32"}
    asked = request(Stage.LIVENESS, b"")
    async with pools_on_the_card(
        "process", stages, memory_mib=1_600, spares=1, options=options
    ) as pools:
        pool = pools[Stage.LIVENESS]
        most = 0
        for _ in range(60):
            await ask(pool, asked, 60.0)
            most = max(most, *(worker.memory_mib for worker in pool.info().workers))
        info = pool.info()
        assert sum(worker.restarts for worker in info.workers) >= 1
        assert info.losses == 0
        assert info.failed == 0
        assert most <= 1_600


def test_a_config_beyond_the_card_is_refused_before_anything_loads(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(f'[pools.detector]\ndevices = ["{GPU}"]\nmemory_mib = 900000\n')
    for command in ("plan", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "facelane_server", command, "--config", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 78, done.stderr
        assert "lower memory_mib" in done.stdout + done.stderr
        assert "worker ready" not in done.stdout + done.stderr


def test_the_server_on_the_card_end_to_end(tmp_path: Path, frames: list[bytes]) -> None:
    pools = "".join(
        f'[pools.{stage}]\ndevices = ["{GPU}"]\nbatch_max = 2\nmemory_mib = 3000\n'
        for stage in Stage
    )
    with RunningServer(tmp_path, toml(tmp_path, pools)) as server:
        server.wait_serving(START_S)
        with server.client(timeout=30.0) as client:
            result = client.analyze_image(facelane.Picture.encoded(frames[1]))
            assert len(result.faces) >= 2
            assert all(face.ood_score is not None for face in result.faces)
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        workers = {
            child.pid
            for child in psutil.Process(server.process.pid).children()
            if "facelane_server.worker" in child.cmdline()
        }
        assert len(workers) >= len(Stage)
        # NVML, which the monitor uses, opens the driver's library and its device nodes; who
        # has a context is what the driver itself lists.
        until(lambda: workers <= with_a_context(), what="every worker known to NVML")
        assert server.process.pid not in with_a_context()


def with_a_context() -> set[int]:
    """Processes that hold a CUDA context, by NVML. Skips where the driver counts processes in
    another namespace than ours, as in some containers: then nothing can be said."""
    nvml = Nvml.load()
    try:
        listed = {process.pid for device in nvml.read() for process in device.processes}
    finally:
        nvml.close()
    if listed and not any(psutil.pid_exists(pid) for pid in listed):
        pytest.skip("NVML lists processes by ids of another namespace")
    return listed
