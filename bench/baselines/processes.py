"""Baseline: every model a process of its own, between them ``multiprocessing.Queue`` with
pickled arrays: the decoded frame to the detector, the crops to the other two.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np

from bench.baselines.driver import POLL_S, Baseline, main

_START_S = 120.0


def _worker(
    stage: str,
    package: str,
    everything: dict[str, str],
    threads: int,
    source: Any,
    targets: list[Any],
    ready: Event,
    stop: Event,
) -> None:
    """One model's process: polls its queue, infers, passes on."""
    from pathlib import Path

    from facelane_server.models.api import DeviceOptions
    from facelane_server.models.package import read_package
    from facelane_server.worker.networks.load import load

    crops = (
        *read_package(Path(everything["recognizer"])).crops,
        *read_package(Path(everything["liveness"])).crops,
    )
    model: Any = load(
        read_package(Path(package)),
        DeviceOptions(threads=threads),
        batch_max=8,
        crops=crops if stage == "detector" else (),
    )
    model.warm_up()
    ready.set()
    while not stop.is_set():
        try:
            frame_id, payload = source.get_nowait()
        except queue.Empty:
            time.sleep(POLL_S)
            continue
        if stage == "detector":
            found = model.begin([payload], [16]).finish()[0]
            if len(found.boxes):
                targets[0].put((frame_id, found.crops))
                targets[1].put((frame_id, found.crops))
            else:
                targets[2].put((frame_id, 0, True))
        else:
            chips = payload[0] if stage == "recognizer" else payload[1:]
            model.begin(chips).finish()
            targets[2].put((frame_id, len(payload[0]), False))


class Processes(Baseline):
    """Three model processes; decoding happens here, where the camera would be read."""

    def __init__(self, packages: dict[str, str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._frames: Any = context.Queue()
        chips: Any = context.Queue()
        shots: Any = context.Queue()
        self._results: Any = context.Queue()
        self._stop = context.Event()
        self._halves: dict[int, int] = {}
        self._processes = []
        ready = []
        for stage, source in (
            ("detector", self._frames),
            ("recognizer", chips),
            ("liveness", shots),
        ):
            flag = context.Event()
            process = context.Process(
                target=_worker,
                args=(
                    stage,
                    packages[stage],
                    packages,
                    threads,
                    source,
                    [chips, shots, self._results],
                    flag,
                    self._stop,
                ),
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            ready.append(flag)
        for flag in ready:
            if not flag.wait(_START_S):
                raise RuntimeError("a model process did not start")

    def submit(self, frame_id: int, data: bytes) -> None:
        import cv2

        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        self._frames.put((frame_id, picture))

    def poll(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while True:
            try:
                frame_id, faces, whole = self._results.get_nowait()
            except queue.Empty:
                return done
            if whole or self._halves.pop(frame_id, None) is not None:
                done.append((frame_id, faces))
            else:
                self._halves[frame_id] = faces

    def close(self) -> None:
        self._stop.set()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)


if __name__ == "__main__":
    main(Processes)
