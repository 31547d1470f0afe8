"""The same models without a service: one loop in one process, run as a child for a clean start.

``python -m bench.inprocess JOB.json``: reads a job, prints one JSON line with the seconds
that each frame took. The parent calls ``measure``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.material import Models
from facelane_server.domain import Encoding, Stage

WARM_UP_FRAMES = 8


@dataclass(slots=True)
class Loaded:
    """The three models of a pipeline, ready."""

    detector: Any
    recognizer: Any
    liveness: Any


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of each frame, of all of them, and what was found."""

    seconds: list[float]
    elapsed_s: float
    faces: int
    rss_mib: float


def load_models(folders: dict[str, str], *, threads: int, device: str = "cpu") -> Loaded:
    """Warmed models of package folders by stage name, on this thread's device."""
    from facelane_server.models.api import DeviceOptions
    from facelane_server.models.package import read_package
    from facelane_server.worker.decoding.pictures import silence_opencv
    from facelane_server.worker.networks.load import load

    silence_opencv()
    packages = {stage: read_package(Path(folder)) for stage, folder in folders.items()}
    crops = (*packages["recognizer"].crops, *packages["liveness"].crops)
    options = DeviceOptions(device=device, threads=threads)
    models = {}
    for stage, package in packages.items():
        model = load(package, options, batch_max=8, crops=crops if stage == "detector" else ())
        model.warm_up()
        models[stage] = model
    return Loaded(**models)


def detect(loaded: Loaded, data: bytes, max_faces: int = 16) -> Any:
    """One JPEG frame to its detections, crops included."""
    from facelane_server.worker.decoding.pictures import decode

    picture = decode(memoryview(data), Encoding.JPEG)
    return loaded.detector.begin([picture], [max_faces]).finish()[0]


def recognise(loaded: Loaded, crops: Sequence[Any]) -> Any:
    """The aligned chips of one picture to embeddings and OOD scores."""
    return loaded.recognizer.begin(crops[0]).finish()


def judge(loaded: Loaded, crops: Sequence[Any]) -> Any:
    """The context crops of one picture to liveness scores."""
    return loaded.liveness.begin(crops[1:]).finish()


def analyse(loaded: Loaded, data: bytes) -> int:
    """One JPEG frame through all three models, as the service does it. Gives the faces."""
    found = detect(loaded, data)
    for begin in range(0, len(found.boxes), loaded.recognizer.batch_max):
        part = [crops[begin : begin + loaded.recognizer.batch_max] for crops in found.crops]
        recognise(loaded, part)
        judge(loaded, part)
    return len(found.boxes)


def measure(models: Models, frames: Sequence[bytes], *, count: int, threads: int) -> Timed:
    """``count`` frames (repeated from ``frames``) in a child process with ``threads``."""
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        folder = Path(scratch)
        for index, data in enumerate(frames):
            (folder / f"{index:06d}.jpg").write_bytes(data)
        job = folder / "job.json"
        packages = {str(stage): str(p.folder) for stage, p in models.packages.items()}
        job.write_text(json.dumps({"packages": packages, "count": count, "threads": threads}))
        done = subprocess.run(
            [sys.executable, "-m", "bench.inprocess", str(job)],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the in-process loop failed:\n{done.stderr[-3000:]}")
    return Timed(**json.loads(done.stdout))


def main(job_file: Path) -> None:
    """The child."""
    import psutil

    job = json.loads(job_file.read_text())
    frames = [path.read_bytes() for path in sorted(job_file.parent.glob("*.jpg"))]
    loaded = load_models(job["packages"], threads=job["threads"])
    for index in range(WARM_UP_FRAMES):
        analyse(loaded, frames[index % len(frames)])
    seconds = []
    faces = 0
    begin = time.perf_counter()
    for index in range(job["count"]):
        one = time.perf_counter()
        faces += analyse(loaded, frames[index % len(frames)])
        seconds.append(time.perf_counter() - one)
    elapsed = time.perf_counter() - begin
    rss = psutil.Process().memory_info().rss / 2**20
    print(json.dumps({"seconds": seconds, "elapsed_s": elapsed, "faces": faces, "rss_mib": rss}))


if __name__ == "__main__":
    assert set(Stage) == {Stage.DETECTOR, Stage.RECOGNIZER, Stage.LIVENESS}
    main(Path(sys.argv[1]))
