"""Cameras for tests: pictures, clips and a real HTTP-MJPEG server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import av
import cv2
import numpy as np
import numpy.typing as npt


def picture(width: int = 64, height: int = 48, value: int = 0) -> npt.NDArray[np.uint8]:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack(
        [(x * 3 + value) % 256, (y * 5) % 256, np.full_like(x, value % 256)], axis=-1
    ).astype(np.uint8)


def jpeg(value: int = 0, width: int = 64, height: int = 48) -> bytes:
    return cv2.imencode(".jpg", picture(width, height, value))[1].tobytes()


def write_clip(path: Path, *, frames: int = 20, fps: int = 10, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(frames):
            # The frame's number is its brightness, so that a test knows which one it sees.
            image = np.full((48, 64, 3), min(255, 20 + index * 10), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    return path


class HttpServer:
    """A real HTTP server that answers with ``respond``."""

    def __init__(self, respond: Callable[[BaseHTTPRequestHandler], Any], port: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                respond(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)


def send_stream(
    handler: BaseHTTPRequestHandler, pictures: Iterable[bytes], *, close: bool = True
) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
    handler.end_headers()
    for data in pictures:
        handler.wfile.write(
            b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
        )
        handler.wfile.write(data + b"\r\n")
    if close:
        handler.wfile.write(b"--frame--\r\n")
    handler.wfile.flush()
