"""The recogniser behind PyTriton: an inference callable in its own worker process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


class Recogniser:
    """Its session is made in the process that infers."""

    def __init__(self, model: str, pids: str) -> None:
        self.model = model
        self.pids = pids
        self.session: Any = None

    @batch
    def __call__(self, chip: Any) -> dict[str, Any]:
        if self.session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(self.model, options)
            with Path(self.pids).open("a") as file:
                file.write(f"{os.getpid()}\n")
        x = ((chip[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
        name = self.session.get_inputs()[0].name
        rows = [self.session.run(None, {name: np.ascontiguousarray(one[None])})[0] for one in x]
        return {"embedding": np.concatenate(rows).astype(np.float32)}


if __name__ == "__main__":
    port = int(sys.argv[2])
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        allow_metrics=False,
    )
    with Triton(config=config, workspace=sys.argv[4]) as triton:
        triton.bind(
            model_name="recogniser",
            infer_func=Recogniser(sys.argv[1], sys.argv[3]),
            inputs=[Tensor(name="chip", dtype=np.uint8, shape=(112, 112, 3))],
            outputs=[Tensor(name="embedding", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(max_batch_size=8),
        )
        triton.serve()
