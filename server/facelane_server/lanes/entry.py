"""A frame on its way through its lane."""

from __future__ import annotations

from typing import Final

from facelane_server.domain import Frame, FrameDrop, FrameError, Picture, Stage
from facelane_server.lanes.faces import Look
from facelane_server.pipeline import Detection, Timings
from facelane_server.pools.groups import Group
from facelane_server.pools.tasks import DetectAnswer

_EMPTY: Final = b""


class Entry:
    """One frame on its way through the lane."""

    __slots__ = (
        "answer",
        "body",
        "frame",
        "held",
        "looks",
        "missing",
        "outstanding",
        "place",
        "received_ns",
        "size",
        "task",
        "timings",
        "turned",
    )

    def __init__(self, frame: Frame, received_ns: int) -> None:
        self.frame = frame
        self.received_ns = received_ns
        self.size = len(frame.picture.data)
        self.held = False
        """Its bytes are counted."""
        self.place: tuple[Group, int] | None = None
        """Of video: its picture, by its number in the group."""
        self.task: Detection | None = None
        self.answer: DetectAnswer | None = None
        self.body: FrameDrop | FrameError | None = None
        self.looks: list[Look] = []
        self.missing: tuple[Stage, ...] = ()
        self.outstanding = 0
        self.turned = False
        self.timings = Timings()

    @property
    def under_way(self) -> bool:
        """Something is still to come of it, and not only its turn."""
        return self.body is None and (self.answer is None or self.outstanding > 0)

    def let_go(self) -> bool:
        """Of the picture's bytes; False when that was done before."""
        picture = self.frame.picture
        if picture.data is _EMPTY:
            return False
        self.frame = Frame(
            self.frame.frame_id,
            Picture(picture.encoding, _EMPTY, picture.width, picture.height),
            self.frame.stream_offset_ns,
            self.frame.capture_time_ns,
        )
        return True
