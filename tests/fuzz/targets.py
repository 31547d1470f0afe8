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

from facelane.cli import stills
from facelane.errors import PictureError
from facelane_server import config, limits
from facelane_server.domain import Encoding, FacelaneError
from facelane_server.ipc import messages
from facelane_server.lanes.video import Footage
from facelane_server.models.package import MANIFEST, read_package
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


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (header, picture, ipc, toml, package, still, video)
}
