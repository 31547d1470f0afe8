"""What is fuzzed: each target takes any bytes, and raises where it should not.

``make fuzz`` runs them guided by coverage (atheris), ``test_fuzz`` replays the corpus and
mutates it for a moment in every run of the tests.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from google.protobuf.message import DecodeError

from facelane.cli import stills
from facelane.errors import PictureError
from facelane.v1 import (
    admin_service_pb2,
    analysis_service_pb2,
    event_service_pb2,
    gallery_service_pb2,
    view_service_pb2,
)
from facelane_server import config, limits, naming
from facelane_server.domain import Encoding, FacelaneError
from facelane_server.edge import convert, operations, view
from facelane_server.edge.roles import ANYBODY
from facelane_server.events import EventFeed
from facelane_server.ipc import messages
from facelane_server.lanes.video import Footage
from facelane_server.models.package import MANIFEST, read_package
from facelane_server.store import records
from facelane_server.worker.decoding import headers, pictures
from facelane_server.worker.decoding.cpu_video import CpuDecoder, CpuEngine

COMPRESSED: Final = (Encoding.JPEG, Encoding.PNG, Encoding.WEBP)
_MAX_PIXELS: Final = 1 << 20


def header(data: bytes) -> None:
    """The walk over a picture's file: sizes within bounds, or a reason."""
    with contextlib.suppress(FacelaneError):
        encoding = headers.sniff(memoryview(data)) or Encoding.JPEG
        found = headers.examine(memoryview(data), encoding, _MAX_PIXELS)
        assert min(found.width, found.height) >= limits.MIN_SIDE
        assert found.width * found.height <= _MAX_PIXELS
        assert abs(found.end) <= len(data)
        assert all(0 <= a < b <= len(data) for a, b in found.chunks)


def picture(data: bytes) -> None:
    """A whole decoding, raw layouts included: the first byte chooses."""
    choice, data = (data[0], data[1:]) if data else (0, b"")
    raw = [e for e in Encoding if e.is_raw]
    encoding = headers.sniff(memoryview(data)) or raw[choice % len(raw)]
    sides = {"width": choice // 3, "height": choice // 5, "stride": (choice & 3) * 64}
    with contextlib.suppress(FacelaneError):
        found = pictures.decode(memoryview(data), encoding, max_pixels=1 << 16, **sides)
        assert found.ndim == 3
        assert found.shape[0] * found.shape[1] <= 1 << 16


def ipc(data: bytes) -> None:
    """A packet either is a message, which encodes to one that reads the same, or is refused."""
    for decode in (messages.decode_to_worker, messages.decode_from_worker):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            message = decode(data)
            assert repr(decode(messages.encode(message))) == repr(message)


def toml(data: bytes) -> None:
    """A configuration is read or refused in words."""
    with contextlib.suppress(config.ConfigError, UnicodeDecodeError):
        config.parse(data.decode())


_FOLDER: Final = Path(tempfile.mkdtemp(prefix="facelane-fuzz-"))


def package(data: bytes) -> None:
    """A model's manifest is read or refused with a reason."""
    (_FOLDER / MANIFEST).write_bytes(data)
    with contextlib.suppress(FacelaneError):
        read_package(_FOLDER)


def still(data: bytes) -> None:
    """What the command looks at before it sends a picture."""
    width, height = stills.dimensions(data)
    assert width >= 0
    assert height >= 0
    assert 1 <= stills.exif_orientation(data) <= 8
    with contextlib.suppress(PictureError):
        stills.Picture.encoded(data)


def video(data: bytes) -> None:
    """Access units, the first byte choosing between H.264 and H.265: looked at, and where nothing
    is wrong with them decoded."""
    encoding = Encoding.H265 if data[:1] == b"5" else Encoding.H264
    units = [b"\0\0\0\1" + unit for unit in data[1:].split(b"\0\0\0\1\x09|")[1:][:8]]
    footage = Footage(_MAX_PIXELS, 1 << 20)
    footage.check(encoding)
    decoder: CpuDecoder | None = None
    for unit in units:
        with contextlib.suppress(FacelaneError):
            place = footage.take(unit, encoding)
            if place is None:
                continue
            group, number = place
            assert group.format.width * group.format.height <= _MAX_PIXELS
            if number == 0:
                decoder = CpuEngine().open(encoding, group.format)
            if decoder is not None:
                for shown in decoder.decode(unit, number):
                    assert shown.read().ndim == 3


REQUESTS: Final = (
    analysis_service_pb2.AnalyzeStreamRequest,
    analysis_service_pb2.AnalyzeImageRequest,
    gallery_service_pb2.EnrollFaceRequest,
    gallery_service_pb2.IdentifyFaceRequest,
    gallery_service_pb2.UpdateSubjectRequest,
    event_service_pb2.WatchEventsRequest,
    admin_service_pb2.DrainRequest,
    event_service_pb2.ListEventsRequest,
    gallery_service_pb2.CorrectIdentityRequest,
    view_service_pb2.WatchStreamRequest,
)
_SETTINGS: Final = config.Config()


def protobuf(data: bytes) -> None:
    """A request of a kind that the first byte chooses: what of it is read before anything is done,
    is taken or refused with a reason."""
    message = REQUESTS[(data[0] if data else 0) % len(REQUESTS)]()
    try:
        message.ParseFromString(data[1:])
    except DecodeError:
        return
    with contextlib.suppress(FacelaneError):
        match message:
            case analysis_service_pb2.AnalyzeStreamRequest():
                if message.HasField("config"):
                    convert.lane_options(message.config, _SETTINGS, ANYBODY)
                else:
                    frame = message.frame
                    convert.duration_ns(frame.stream_offset, "stream_offset")
                    convert.timestamp_ns(frame.capture_time, "capture_time")
                    convert.picture(frame.picture, _SETTINGS, in_stream=True)
            case analysis_service_pb2.AnalyzeImageRequest():
                convert.plan(message.options, _SETTINGS, "gallery")
                convert.picture(message.picture, _SETTINGS)
            case (
                gallery_service_pb2.EnrollFaceRequest() | gallery_service_pb2.IdentifyFaceRequest()
            ):
                convert.gallery(message.gallery_id, ANYBODY, "identify")
                convert.picture(message.picture, _SETTINGS)
            case gallery_service_pb2.UpdateSubjectRequest():
                naming.check_identifier(message.subject.subject_id, "subject_id")
                records.check_display_name(message.subject.display_name)
                records.check_labels(dict(message.subject.labels))
            case event_service_pb2.WatchEventsRequest():
                EventFeed().watch(message.resume_token, source_ids=message.source_ids)
            case admin_service_pb2.DrainRequest():
                convert.duration_ns(message.grace, "grace")
            case event_service_pb2.ListEventsRequest():
                operations.kinds_of(message)
            case gallery_service_pb2.CorrectIdentityRequest():
                naming.check_identifier(message.subject_id, "subject_id")
                records.check_display_name(message.display_name)
            case view_service_pb2.WatchStreamRequest():
                assert 0 < view.wish_of(message).max_fps <= limits.MAX_VIEW_FPS


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (header, picture, ipc, toml, package, still, video, protobuf)
}
