"""The recogniser behind LitServe: one worker process, JSON with base64 over HTTP."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Recogniser(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002 - the interface
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)
        self.input = self.session.get_inputs()[0].name
        self.session.run(None, {self.input: np.zeros((1, 3, 112, 112), np.float32)})
        with Path(sys.argv[3]).open("a") as pids:
            pids.write(f"{os.getpid()}\n")

    def decode_request(self, request: dict[str, str]) -> Any:
        chip = np.frombuffer(base64.b64decode(request["chip"]), np.uint8).reshape(112, 112, 3)
        return ((chip[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]

    def predict(self, x: Any) -> Any:
        return self.session.run(None, {self.input: np.ascontiguousarray(x)})[0][0]

    def encode_response(self, output: Any) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Recogniser(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
