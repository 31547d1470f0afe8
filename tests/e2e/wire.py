"""The protocol by hand: what a client that is not ours, or a broken one, sends and sees."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import cv2
import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import facelane
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane.v1 import face_pb2

CALL_S = 100.0
"""No call of a test lasts longer."""


# -- pictures ------------------------------------------------------------------------------


@cache
def pixels(width: int = 96, height: int = 80, seed: int = 0) -> np.ndarray[Any, Any]:
    """A BGR picture whose face is like no other seed's."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@cache
def encoded(width: int = 96, height: int = 80, seed: int = 0, suffix: str = ".jpg") -> bytes:
    ok, data = cv2.imencode(suffix, pixels(width, height, seed))
    assert ok
    return bytes(data)


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def picture(seed: int = 0, suffix: str = ".jpg", size: tuple[int, int] = (96, 80)) -> Any:
    """A picture for the SDK."""
    return facelane.Picture.encoded(encoded(*size, seed, suffix))


def pb_picture(data: bytes | None = None, encoding: int = 1, **raw: int) -> face_pb2.Picture:
    return face_pb2.Picture(
        encoding=encoding,  # type: ignore[arg-type]
        data=encoded() if data is None else data,
        **raw,
    )


# -- messages ------------------------------------------------------------------------------


def config(**fields: Any) -> pb.AnalyzeStreamRequest:
    fields.setdefault("overload_policy", pb.OVERLOAD_POLICY_LOSSLESS)
    return pb.AnalyzeStreamRequest(config=pb.StreamConfig(**fields))


def frame(frame_id: int, body: face_pb2.Picture | None = None, **fields: Any) -> Any:
    return pb.AnalyzeStreamRequest(
        frame=pb.Frame(frame_id=frame_id, picture=body or pb_picture(), **fields)
    )


def reason_of(status: status_pb2.Status) -> str:
    """The reason in a status; it must have exactly one ErrorInfo, of our domain."""
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert info.domain == "facelane"
    assert status.message
    return info.reason


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call that was ended with a rich status."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no rich status: {error}"
    return error.code(), reason_of(status)


class RawStream:
    """One ``AnalyzeStream`` call; its owner writes what it likes, and reads or does not."""

    def __init__(self, channel: grpc.Channel, metadata: Any = None) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = pb_grpc.AnalysisServiceStub(channel).AnalyzeStream(
            iter(self._requests.get, None), timeout=CALL_S, metadata=metadata
        )

    def write(self, *messages: Any) -> None:
        for message in messages:
            self._requests.put(message)

    def half_close(self) -> None:
        self._requests.put(None)

    def read(self) -> pb.AnalyzeStreamResponse:
        """The next message. Raises ``grpc.RpcError``, or StopIteration at the end."""
        return next(self.call)

    def outcome(self) -> pb.FrameOutcome:
        """The next outcome; updates in between are skipped."""
        while True:
            message = self.read()
            if message.WhichOneof("message") == "outcome":
                return message.outcome
            assert message.WhichOneof("message") == "update", message

    def open(self, **fields: Any) -> pb.StreamOpened:
        self.write(config(**fields))
        message = self.read()
        assert message.WhichOneof("message") == "opened"
        return message.opened

    def rest(self) -> list[pb.AnalyzeStreamResponse]:
        """Half-closes, and everything up to the end."""
        self.half_close()
        return list(self.call)

    def failure(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end, which must be a refusal."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return refusal(error)
        raise AssertionError("the stream ended well")

    def close(self) -> None:
        self.half_close()
        self.call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


@contextlib.contextmanager
def channel(target: str, *, buffer: int = 0) -> Iterator[grpc.Channel]:
    """A channel without limits of its own on messages, and with a connection of its own.
    ``buffer``: bytes that it takes in unread, where they matter."""
    options = [
        *([("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", buffer)] if buffer else []),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(target, options=options) as made:
        yield made


# -- model packages --------------------------------------------------------------------------


def null_detector(folder: Path, faces: int, version: str = "1.0.0") -> Path:
    """A package like null-detector that sees so many faces in every picture."""
    path = folder / f"null-detector-{faces}-{version}"
    path.mkdir(parents=True)
    (path / "model.toml").write_text(
        f"""schema = 1
name = "null-detector-{faces}"
version = "{version}"
task = "detector"
runtime = "null"
license = "Apache-2.0"
description = "Sees {faces} faces in every picture"

[options]
faces = {faces}
decode = true

[thresholds]
score = 0.5
nms = 0.3
"""
    )
    return path


def pools(seer: str | Path = "null-detector", **lines: str) -> str:
    """The three pools with null models, ``seer`` the detector; ``lines`` add TOML to the
    section of the pool that they are named after, or to ``every``."""
    return "\n".join(
        f'[pools.{stage}]\nmodel = "{model}"\n{lines.get(stage, lines.get("every", ""))}'
        for stage, model in (
            ("detector", seer),
            ("recognizer", "null-recognizer"),
            ("liveness", "null-liveness"),
        )
    )


class Deaf:
    """A peer of HTTP/2 that opens no window: nothing of an answer can be written to it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CALL_S)
        self._socket.connect(path)
        self._next = 1
        no_window = struct.pack(">HI", 4, 0)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(4, 0, 0, no_window))

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload) << 8 | kind)
            + struct.pack(">BI", flags, stream)
            + payload
        )

    def call(self, method: str, **more: str) -> None:
        """Makes a call with one empty message, and ``more`` headers."""
        headers = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost",
            "te": "trailers", "content-type": "application/grpc", **more,
        }  # fmt: skip
        # Each a literal that enters no table (RFC 7541, 6.2.2).
        block = b"".join(
            bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in headers.items()
        )
        number, self._next = self._next, self._next + 2
        self._socket.sendall(self._frame(1, 4, number, block) + self._frame(0, 1, number, bytes(5)))

    def close(self) -> None:
        self._socket.close()
