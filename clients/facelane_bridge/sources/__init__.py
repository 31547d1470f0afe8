"""Where frames come from: RTSP, files, V4L2 devices, HTTP-MJPEG, folders of pictures.

A ``Source`` is blocking and belongs to one reader thread. It gives each frame as an
encoded picture with its media time. Pictures that are JPEG already (MJPEG cameras,
files) are passed on as they are; everything else is decoded and encoded once, in the
decoder's own 4:2:0 planes, without a detour over BGR.

Every wait inside has a deadline (``read_timeout``), and every failure is a
``SourceError`` with a reason and an outlook. Credentials come from the environment or a
file, are never part of an address, and no text of an underlying library, which might repeat
one, ever gets into an error message.
"""

from __future__ import annotations

from facelane_bridge.config import CameraSettings, SourceKind
from facelane_bridge.sources.api import CapturedFrame as CapturedFrame
from facelane_bridge.sources.api import Refusal as Refusal
from facelane_bridge.sources.api import Source as Source
from facelane_bridge.sources.api import SourceError as SourceError
from facelane_bridge.sources.api import SourceInfo as SourceInfo
from facelane_bridge.sources.api import SourceReason as SourceReason
from facelane_bridge.sources.challenge import Credentials
from facelane_bridge.sources.container import ContainerSource
from facelane_bridge.sources.folder import FolderSource
from facelane_bridge.sources.http import MjpegSource


def open_source(camera: CameraSettings, credentials: Credentials | None = None) -> Source:
    """The source for a camera's settings; nothing is opened yet. ``credentials``: of an RTSP
    camera whose settings name none."""
    match camera.resolved_kind:
        case SourceKind.MJPEG:
            return MjpegSource(camera)
        case SourceKind.FOLDER:
            return FolderSource(camera)
        case _:
            return ContainerSource(camera, credentials)
