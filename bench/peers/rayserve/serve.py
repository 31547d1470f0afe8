"""The recogniser behind Ray Serve: one replica, raw bytes over HTTP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import ray
from ray import serve

MODEL, PORT, PIDS = sys.argv[1], int(sys.argv[2]), sys.argv[3]


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.5})
class Recogniser:
    def __init__(self, model: str, pids: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options)
        self.input = self.session.get_inputs()[0].name
        self.session.run(None, {self.input: np.zeros((1, 3, 112, 112), np.float32)})
        with Path(pids).open("a") as file:
            file.write(f"{os.getpid()}\n")

    async def __call__(self, request: Any) -> dict[str, list[float]]:
        chip = np.frombuffer(await request.body(), np.uint8).reshape(112, 112, 3)
        x = ((chip[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]
        found = self.session.run(None, {self.input: np.ascontiguousarray(x)})[0][0]
        return {"embedding": found.tolist()}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[4])
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Recogniser.bind(MODEL, PIDS), route_prefix="/")
    # The deployment lives as long as this driver does.
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
