"""Readers: a thread for each opening of a camera, and a camera opened once, to be checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from facelane_bridge.camera import OPENING_STRETCH
from facelane_bridge.config import CameraSettings
from facelane_bridge.handover import Handover
from facelane_bridge.sources import Source, SourceError, SourceInfo, SourceReason, open_source


class Reader:
    """One opening of a camera: a thread that reads until it ends, fails or is fenced off."""

    def __init__(
        self, source: Source, handover: Handover, report: Callable[[Reader, Said], None]
    ) -> None:
        self.source = source
        self._handover = handover
        self._report = report
        self.thread = threading.Thread(target=self._run, name="camera reader", daemon=True)

    def _run(self) -> None:
        try:
            try:
                self._report(self, self.source.open())
                while (frame := self.source.read()) is not None:
                    if not self._handover.offer(self, frame):
                        return
                self._report(self, _ENDED)
            finally:
                self.source.close()
        except SourceError as error:
            self._report(self, error)
        except Exception as error:
            # A fault of ours or of a driver: this camera tries again, the others go on.
            self._report(self, _broke(error))


def _broke(error: Exception) -> SourceError:
    """What nobody foresaw; its text may repeat an address, so its kind alone is told."""
    kind = type(error).__name__
    return SourceError(SourceReason.CONNECT_FAILED, f"the reader broke ({kind})")


class _Ended:
    """The source gave its last frame."""


_ENDED = _Ended()
Said = SourceInfo | SourceError | _Ended


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What opening a camera once found: ``info`` with the first frame's size, or ``error``."""

    camera: str
    info: SourceInfo | None
    first_frame_bytes: int = 0
    seconds: float = 0.0
    error: SourceError | None = None


def check_camera(settings: CameraSettings) -> CheckResult:
    """Open a camera, read one frame, close it. Blocks up to its opening time and a second."""
    begun = time.monotonic()
    result: list[CheckResult] = []
    source = open_source(settings)

    def probe() -> None:
        try:
            info = source.open()
            frame = source.read()
            if frame is not None and frame.refused is not None:
                raise SourceError(SourceReason.FORMAT_INVALID, frame.refused.message)
            size = 0 if frame is None else len(frame.data)
            result.append(CheckResult(settings.name, info, size, time.monotonic() - begun))
        except SourceError as error:
            seconds = time.monotonic() - begun
            result.append(CheckResult(settings.name, None, 0, seconds, error))
        except Exception as error:
            result.append(
                CheckResult(settings.name, None, 0, time.monotonic() - begun, _broke(error))
            )
        finally:
            source.close()

    # A driver that hangs must not hang the check.
    thread = threading.Thread(target=probe, name=f"check {settings.name}", daemon=True)
    thread.start()
    thread.join(settings.open_timeout + 1.0)
    if not result and source.connected:
        thread.join((OPENING_STRETCH - 1.0) * settings.open_timeout)
    if result:
        return result[0]
    what = source.seen or "is the camera on and reachable?"
    source.interrupt()
    error = SourceError(SourceReason.TIMED_OUT, f"no frame came within the opening time; {what}")
    return CheckResult(settings.name, None, 0, time.monotonic() - begun, error)
