"""Clips of video as cameras send them, encoded while the tests run."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence

import av
import numpy as np
import numpy.typing as npt

_LIBRARIES = {"h264": ("libx264", "h264"), "h265": ("libx265", "hevc")}


def picture(number: int, size: tuple[int, int] = (320, 240)) -> npt.NDArray[np.uint8]:
    """BGR [height, width, 3]: a square that wanders over flat colour; it tells ``number``."""
    width, height = size
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = (40, 80, 160)
    side = height // 4
    x = number * 11 % (width - side)
    pixels[side : 2 * side, x : x + side] = (250, 40, 10)
    return pixels


def encode(
    pictures: Iterable[npt.NDArray[np.uint8]],
    codec: str = "h264",
    *,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> list[bytes]:
    """Access units in decoding order, Annex B. ``options``: of the encoder."""
    library, muxer = _LIBRARIES[codec]
    units: list[bytes] = []
    with av.open(io.BytesIO(), "w", format=muxer) as container:
        stream = container.add_stream(library, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = pix_fmt
        stream.options = {name.replace("_p", "-p"): value for name, value in options.items()}
        for pixels in pictures:
            if not units and not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="bgr24")
            units += [bytes(packet) for packet in stream.encode(frame)]
        units += [bytes(packet) for packet in stream.encode(None)]
    return units


@functools.cache
def clip(
    codec: str = "h264",
    count: int = 20,
    *,
    size: tuple[int, int] = (320, 240),
    keyint: int = 10,
    bframes: int = 0,
    slices: int = 1,
    pix_fmt: str = "yuv420p",
    interlaced: bool = False,
    open_gop: bool = False,
) -> Sequence[bytes]:
    """``count`` access units with a key frame every ``keyint``."""
    pictures = [picture(number, size) for number in range(count)]
    if codec == "h264":
        params = [f"slices={slices}", f"bframes={bframes}", f"keyint={keyint}", "scenecut=0"]
        params += ["interlaced=1"] if interlaced else []
        return encode(
            pictures, codec, pix_fmt=pix_fmt, preset="ultrafast", x264_params=":".join(params)
        )
    params = ["log-level=none", "repeat-headers=1", f"keyint={keyint}", f"bframes={bframes}"]
    params += ["scenecut=0", f"open-gop={int(open_gop)}", "pools=1", "frame-threads=1"]
    return encode(
        pictures, codec, pix_fmt=pix_fmt, preset="ultrafast", **{"x265-params": ":".join(params)}
    )
