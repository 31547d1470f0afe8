"""Pictures that lie on their side are stood upright: servers take them as they are stored."""

from __future__ import annotations

from fractions import Fraction

import av.error
import av.filter
from av.video.frame import VideoFrame

# As EXIF numbers orientations; 1 is upright.
_FILTERS = {
    2: ("hflip",),
    3: ("hflip", "vflip"),
    4: ("vflip",),
    5: ("transpose=cclock_flip",),
    6: ("transpose=clock",),
    7: ("transpose=clock_flip",),
    8: ("transpose=cclock",),
}
_BY_QUARTERS = {1: 8, 2: 3, 3: 6}
"""Turns against the clock, as FFmpeg counts them."""


def orientation_of(frame: VideoFrame) -> int:
    """As EXIF numbers it, of what the container says of a frame (a telephone's display matrix)."""
    return _BY_QUARTERS.get(round(frame.rotation / 90) % 4, 1)


class Turner:
    """Turns the frames of one source, and keeps what it takes between frames of one kind."""

    def __init__(self) -> None:
        self._kind: tuple[object, ...] = ()
        self._graph: av.filter.Graph | None = None
        self._count = 0

    def upright(self, frame: VideoFrame, orientation: int) -> VideoFrame:
        """Raises ``av.FFmpegError``."""
        steps = _FILTERS.get(orientation, ())
        if not steps:
            return frame
        kind = (frame.width, frame.height, frame.format.name, orientation)
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = self._made(frame, steps), kind
        self._count += 1
        frame.pts, frame.time_base = self._count, Fraction(1, 1000)
        self._graph.push(frame)
        turned = self._graph.pull()
        assert isinstance(turned, VideoFrame)
        return turned

    @staticmethod
    def _made(frame: VideoFrame, steps: tuple[str, ...]) -> av.filter.Graph:
        graph = av.filter.Graph()
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format,
            time_base=Fraction(1, 1000),
        )  # fmt: skip
        for step in steps:
            name, _, arguments = step.partition("=")
            following = graph.add(name, arguments or None)
            last.link_to(following)
            last = following
        last.link_to(graph.add("buffersink"))
        graph.configure()
        return graph
