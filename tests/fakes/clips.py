"""Small videos for tests: every kind of H.264 and H.265 that files and cameras hold."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from facelane import Encoding, Picture

KINDS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "plain": ("clip.mp4", "libx264", "yuv420p", {"bf": "0", "g": "10"}),
    "b-frames": ("clip.mp4", "libx264", "yuv420p", {"bf": "3", "b_strategy": "0", "g": "10"}),
    "b-frames in Matroska": ("clip.mkv", "libx264", "yuv420p", {"bf": "3", "b_strategy": "0"}),
    "open groups": ("clip.mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=10"}),
    "slices": ("clip.mp4", "libx264", "yuv420p", {"slices": "4"}),
    "10 bits": ("clip.mp4", "libx264", "yuv420p10le", {}),
    "transport stream": ("clip.ts", "libx264", "yuv420p", {"g": "10"}),
    "no container": ("clip.h264", "libx264", "yuv420p", {"g": "10"}),
    "H.265": ("clip.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:keyint=10"}),
    "H.265, closed groups": (
        "clip.mp4",
        "libx265",
        "yuv420p",
        {"x265-params": "log-level=none:keyint=10:min-keyint=10:scenecut=0:open-gop=0"},
    ),
    "H.265 in Matroska": ("clip.mkv", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "4:2:2": ("clip.mp4", "libx264", "yuv422p", {}),
    "interlaced": (
        "clip.mp4", "libx264", "yuv420p", {"flags": "+ilme+ildct", "x264-params": "interlaced=1"},
    ),
    "MPEG-4": ("clip.mp4", "mpeg4", "yuv420p", {}),
}  # fmt: skip
NOT_PASSABLE = ("4:2:2", "interlaced", "MPEG-4")


def brightness(number: int) -> int:
    """Of a clip's picture, by its number."""
    return 20 + number * 7


def write(
    folder: Path, kind: str, *, frames: int = 30, fps: int = 10, size: tuple[int, int] = (128, 96)
) -> Path:
    """A clip of a kind; each picture is as bright as its number says."""
    name, codec, pixels, options = KINDS[kind]
    path = folder / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        for number in range(frames):
            image = np.full((size[1], size[0], 3), brightness(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode(None))
    return path


def shown(pictures: list[Picture]) -> list[float]:
    """The brightness of what a decoder that knows nothing else makes of access units."""
    name = "h264" if pictures[0].encoding is Encoding.H264 else "hevc"
    decoder = av.VideoCodecContext.create(name, "r")
    found = []
    for data in [*(picture.data for picture in pictures), None]:
        packet = None if data is None else av.Packet(data)
        found += [
            float(frame.reformat(format="bgr24").to_ndarray().mean())
            for frame in decoder.decode(packet)
        ]
    return found
