"""Baseline: every model a thread of one process, between them queues that are polled.

A frame goes from the detector's thread to the recogniser's and the liveness model's; the
collector joins the two halves by frame id.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from bench import inprocess
from bench.baselines.driver import POLL_S, Baseline, main


class Threads(Baseline):
    """Three model threads and the queues between them."""

    def __init__(self, packages: dict[str, str], threads: int) -> None:
        self._loaded = inprocess.load_models(packages, threads=threads)
        self._frames: queue.Queue[Any] = queue.Queue()
        self._chips: queue.Queue[Any] = queue.Queue()
        self._shots: queue.Queue[Any] = queue.Queue()
        self._results: queue.Queue[Any] = queue.Queue()
        self._halves: dict[int, int] = {}
        self._running = True
        self._threads = [
            threading.Thread(target=self._loop, args=(source, work), daemon=True)
            for source, work in (
                (self._frames, self._detect),
                (self._chips, self._recognise),
                (self._shots, self._judge),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _loop(self, source: queue.Queue[Any], work: Any) -> None:
        while self._running:
            try:
                item = source.get_nowait()
            except queue.Empty:
                time.sleep(POLL_S)
                continue
            work(*item)

    def _detect(self, frame_id: int, data: bytes) -> None:
        found = inprocess.detect(self._loaded, data)
        if len(found.boxes) == 0:
            self._results.put((frame_id, 0, True))
            return
        self._chips.put((frame_id, found.crops))
        self._shots.put((frame_id, found.crops))

    def _recognise(self, frame_id: int, crops: Any) -> None:
        inprocess.recognise(self._loaded, crops)
        self._results.put((frame_id, len(crops[0]), False))

    def _judge(self, frame_id: int, crops: Any) -> None:
        inprocess.judge(self._loaded, crops)
        self._results.put((frame_id, len(crops[0]), False))

    def submit(self, frame_id: int, data: bytes) -> None:
        self._frames.put((frame_id, data))

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
        self._running = False
        for thread in self._threads:
            thread.join(5)


if __name__ == "__main__":
    main(Threads)
