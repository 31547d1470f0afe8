"""The pictures of a folder, in the order of their names."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import av
import structlog

from facelane.cli.stills import exif_orientation
from facelane_bridge.camera import Outlook
from facelane_bridge.config import CameraSettings, Pace, SourceKind
from facelane_bridge.sources.api import CapturedFrame, SourceError, SourceInfo, SourceReason
from facelane_bridge.sources.jpeg import JpegEncoder, decode_picture
from facelane_bridge.sources.pace import Decimator, Pacer
from facelane_bridge.sources.turning import Turner

MAX_PICTURE_FILE_BYTES = 32 * 1024 * 1024
log = structlog.get_logger("facelane_bridge")

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".png", ".webp"})


class FolderSource:
    """The pictures of a folder in the order of their names, at ``folder_fps``."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._interrupted = threading.Event()
        self._paths: list[Path] = []
        self._next = 0
        self._pacer = Pacer(self._interrupted)
        self._decimator = Decimator(camera.analysed_fps)
        self._encoder = JpegEncoder(camera.jpeg_quality, camera.max_side)
        self._turner = Turner()

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    @property
    def connected(self) -> bool:
        return bool(self._paths)

    @property
    def seen(self) -> str:
        return ""

    def wants_key_frame(self, since: float) -> None:
        """Every picture is one."""

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self._paths = []

    def open(self) -> SourceInfo:
        folder = Path(self._camera.source)
        try:
            found = sorted(folder.iterdir())
            self._paths = [path for path in found if _is_picture(path)]
        except PermissionError:
            raise SourceError(
                SourceReason.PERMISSION_DENIED, "the folder may not be read", Outlook.HOPELESS
            ) from None
        except OSError:
            raise SourceError(
                SourceReason.NOT_FOUND, "the folder does not exist", Outlook.HOPELESS
            ) from None
        if not self._paths:
            raise SourceError(
                SourceReason.NO_VIDEO,
                "the folder holds no .jpg, .png or .webp picture"
                + (f", only {_kinds(found, self._paths)}" if found else ""),
                Outlook.HOPELESS,
            )
        if len(found) > len(self._paths):
            # By kind: a file's name may be a person's.
            log.warning(
                "files of the folder are passed over",
                camera=self._camera.name,
                passed_over=_kinds(found, self._paths),
            )
        return SourceInfo(
            SourceKind.FOLDER,
            "pictures",
            0,
            0,
            self._camera.folder_fps,
            len(self._paths) / self._camera.folder_fps,
            reencodes=self._camera.max_side > 0,
        )

    def read(self) -> CapturedFrame | None:
        while True:
            if self._next >= len(self._paths) and not self._camera.loop:
                return None
            path = self._paths[self._next % len(self._paths)]
            media_time = self._next / self._camera.folder_fps
            self._next += 1
            if not self._decimator.wants(media_time):
                continue
            if self._camera.pace is Pace.REALTIME:
                self._pacer.wait_for(media_time)
            if self._interrupted.is_set():
                raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
            return CapturedFrame(self._load(path), media_time, time.time())

    def _load(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                data = _read_bounded(file)
        except OSError:
            return b""  # an error of this frame, which the stream outlives
        codec = {b"\xff\xd8": "mjpeg", b"\x89P": "png", b"RI": "webp"}.get(data[:2])
        orientation, most = exif_orientation(data), self._camera.max_side
        if codec is not None and (most or orientation > 1):
            try:
                frame = decode_picture(data, codec)
                if orientation > 1 or max(frame.width, frame.height) > most:
                    return self._encoder.encode(self._turner.upright(frame, orientation))
            except (av.FFmpegError, ValueError):
                pass  # the server says what is wrong with it, frame by frame
        return data


def _is_picture(path: Path) -> bool:
    """No pipe, which would be waited for, and no ``._`` companion that macOS leaves behind."""
    return (
        path.suffix.lower() in PICTURE_SUFFIXES
        and not path.name.startswith("._")
        and path.is_file()
    )


def _kinds(found: list[Path], taken: list[Path]) -> str:
    """What was not taken, by kind: ``2 .heic, 1 folder``."""

    def kind(path: Path) -> str:
        if path.is_dir():
            return "folder"
        if path.name.startswith("._"):
            return "._ file"
        if not path.is_file():
            return "pipe or device"
        return path.suffix.lower()[:12] or "file without a suffix"

    counted = Counter(kind(path) for path in found if path not in set(taken))
    return ", ".join(f"{count} {name}" for name, count in counted.most_common(8))


def _read_bounded(file: IO[Any]) -> bytes:
    data: bytes = file.read(MAX_PICTURE_FILE_BYTES + 1)
    if len(data) > MAX_PICTURE_FILE_BYTES:
        raise OSError("too large")
    return data
