"""Video that is passed on: whether the server takes it so, judged by its outcomes.

What a server takes depends on its version and on its decoder. One that has never heard of
access units refuses each by its encoding; one may find them too large, interlaced on a second
look, broken one and all; one that sees key frames nowhere drops them. All are answered in the
same way: the camera is opened anew, and decoded here.
"""

from __future__ import annotations

import facelane
from facelane_bridge.sources import CapturedFrame

REFUSALS = frozenset({"ENCODING_UNSUPPORTED", "VIDEO_UNSUPPORTED", "PICTURE_TOO_LARGE"})
"""Reasons that hold for a whole video."""
PATIENCE_ERRORS = 50
"""Access units in a row that are errors, after which the next ones will be, too."""
PATIENCE_KEYS = 3
"""Key frames after which a server that still waits for one will see none."""


def picture_of(frame: CapturedFrame) -> facelane.Picture:
    """What is sent of a captured frame. Raises ``facelane.PictureError``."""
    if frame.video is None:
        return facelane.Picture.encoded(frame.data)
    return facelane.Picture.access_unit(frame.data, frame.video)


class Passing:
    """What came of access units so far; pure."""

    def __init__(self) -> None:
        self._passes = False
        self._errors = 0
        """In a row."""
        self._keys = 0
        """Key frames sent since an outcome said anything else than that one is waited for."""

    def sent(self, frame: CapturedFrame) -> None:
        """A frame went out."""
        self._passes = frame.video is not None
        self._keys += frame.video is not None and frame.is_key

    def settled(self, outcome: facelane.Outcome) -> str:
        """Why video cannot go on as it is, in words; empty where it can."""
        if not self._passes:
            return ""
        waiting = facelane.DropReason.WAITING_FOR_KEY_FRAME
        match outcome.body:
            case facelane.FrameError(reason, message, retryable):
                self._keys = 0
                self._errors += not retryable
                if reason in REFUSALS or self._errors >= PATIENCE_ERRORS:
                    return f"the server does not take it: {message}"
            case facelane.FrameDrop(reason) if reason is waiting:
                if self._keys > PATIENCE_KEYS:
                    return "the server waits for a key frame, and sees none"
            case _:
                self._keys = self._errors = 0
        return ""
