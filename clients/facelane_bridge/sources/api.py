"""What every source gives and how it fails: frames, ``SourceInfo``, ``SourceError``."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from facelane import Encoding
from facelane_bridge.camera import Outlook
from facelane_bridge.config import SourceKind


class SourceReason(enum.StrEnum):
    """Why a source failed."""

    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    AUTHENTICATION_FAILED = "AUTHENTICATION_FAILED"
    NOT_FOUND = "NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CONNECT_FAILED = "CONNECT_FAILED"
    TIMED_OUT = "TIMED_OUT"
    DISCONNECTED = "DISCONNECTED"
    FORMAT_INVALID = "FORMAT_INVALID"
    NO_VIDEO = "NO_VIDEO"
    UNDECODABLE = "UNDECODABLE"
    TLS_FAILED = "TLS_FAILED"
    INTERRUPTED = "INTERRUPTED"
    NOT_PASSABLE = "NOT_PASSABLE"
    """The server takes no video of this kind."""


class SourceError(Exception):
    """A source cannot go on. ``outlook``: what this says about opening it again.

    ``message`` never holds credentials.
    """

    def __init__(
        self, reason: SourceReason, message: str, outlook: Outlook = Outlook.PASSING
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.outlook = outlook


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What was found when the source was opened."""

    kind: SourceKind
    codec: str
    width: int
    """Pixels; 0 where the source does not tell before its first frame."""
    height: int
    fps: float
    """Nominal; 0 where unknown."""
    duration: float | None
    """Seconds; ``None`` for live sources."""
    reencodes: bool
    """False: the camera's own bytes are passed on, JPEG or access units of video."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a picture goes no further than the bridge."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CapturedFrame:
    """One frame: encoded as JPEG (PNG and WebP files stay what they are), or an access unit."""

    data: bytes
    """Empty for a picture that is not sent on: ``refused`` says why."""
    media_time: float
    """Seconds since the source was opened, on the source's own clock; never decreases."""
    captured_at: float
    """Wall clock (Unix seconds) when the frame was complete here."""
    refused: Refusal | None = None
    video: Encoding | None = None
    """Of an access unit: what it is part of. Without the one before it is worth nothing,"""
    is_key: bool = True
    """unless it is a key frame."""


class Source(Protocol):
    """A blocking source of frames, used by one thread; ``interrupt`` is for the others."""

    def open(self) -> SourceInfo: ...

    def read(self) -> CapturedFrame | None:
        """The next frame, ``None`` at the end. Raises ``SourceError``."""
        ...

    def interrupt(self) -> None:
        """Make a waiting ``open`` or ``read`` return soon. From any thread."""
        ...

    def close(self) -> None:
        """Let go of sockets and files. Idempotent; from the thread that reads."""
        ...

    def wants_key_frame(self, since: float) -> None:
        """Give a key frame soon, and what follows it, where that can be done; what was given
        from the media time ``since`` on was worth nothing. From any thread."""
        ...

    @property
    def connected(self) -> bool:
        """Whether somebody answered since it was opened. From any thread."""
        ...

    @property
    def seen(self) -> str:
        """What came that was no frame, in words; empty where nothing did. From any thread."""
        ...

    @property
    def skipped(self) -> int:
        """Frames passed over to keep to ``max_fps`` and ``analysis_fps``."""
        ...
