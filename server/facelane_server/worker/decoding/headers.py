"""Sizes of compressed pictures and what they cost, read before anything is decoded.

A decoder allocates what a header claims and works as long as a file tells it to, so claims
and work are bounded first, by code that allocates next to nothing: a picture that would
cost more than any honest one is PICTURE_TOO_COSTLY. The same walk finds files that were cut
off, which decoders like to repair with grey. Bytes after a picture's end are legal and
ignored (MPO files and motion photos have more pictures there), and so are bytes between the
segments of a JPEG, as decoders skip them.

Pure functions over untrusted bytes: they raise FacelaneError and nothing else.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final, NoReturn

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason

_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC: Final = b"\xff\xd8\xff"

_SOF: Final = frozenset({0xC0, 0xC1, 0xC2})
_SOF_UNSUPPORTED: Final = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_SOF0, _APP14 = 0xC0, 0xEE
_STANDALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})
_BETWEEN: Final = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_IN_SCAN: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of a PNG's colour types."""
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
_DECODED_CHUNKS: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


@dataclass(frozen=True, slots=True)
class Header:
    """What a walk over a picture's file found.

    ``plain``: a JPEG of the kind that every decoder takes: baseline, one scan, three
    components, no colour transform of Adobe's, nothing stray, an end marker, not too large to
    be decoded as it is. ``end``: where
    the end marker of a JPEG stands; negative: where its data end without one. ``scans``,
    ``components``: of a JPEG. ``alpha``: it may have see-through parts. ``chunks``: the
    (start, end) of what a PNG's decoder needs to see. ``ends``: a PNG has its last chunk, a WebP
    the length that it tells; without them all of the picture is there. ``shrink``: one pixel in so
    many of a row is decoded (a JPEG that is larger than what may be decoded).
    """

    width: int
    height: int
    plain: bool = False
    end: int = 0
    scans: int = 1
    components: int = 3
    alpha: bool = False
    chunks: tuple[tuple[int, int], ...] = ()
    ends: bool = True
    shrink: int = 1

    @property
    def decoded(self) -> tuple[int, int]:
        """Width and height of what is decoded."""
        return -(-self.width // self.shrink), -(-self.height // self.shrink)


def examine(data: memoryview, encoding: Encoding, max_pixels: int = 0) -> Header:
    """The header of a JPEG, PNG or WebP that is worth decoding.

    ``max_pixels``: of what is decoded; 0 = the hard ceiling of ``limits``. Larger JPEGs are
    shrunk by 2, 4 or 8 while they are decoded, up to other ceilings of ``limits``.

    Raises FacelaneError: PICTURE_EMPTY, ENCODING_MISMATCH (the bytes are of another format),
    ENCODING_UNSUPPORTED (a rare variant of the format), PICTURE_CORRUPT, PICTURE_TOO_SMALL,
    PICTURE_TOO_LARGE, PICTURE_TOO_COSTLY.
    """
    if not len(data):
        raise FacelaneError(
            Reason.PICTURE_EMPTY, "the picture has no bytes; send an encoded picture"
        )
    actual = sniff(data)
    if actual is not encoding:
        found = f"look like {actual.value}" if actual else "are of no known format"
        raise FacelaneError(
            Reason.ENCODING_MISMATCH,
            f"the encoding says {encoding.value}, but the bytes {found}; send the right encoding",
        )
    try:
        if encoding is Encoding.JPEG:
            return _jpeg(data, max_pixels)
        if encoding is Encoding.PNG:
            return _png(data, max_pixels)
        return _webp(data, max_pixels)
    except (struct.error, IndexError):
        _corrupt(encoding, "it ends inside its header")


def sniff(data: memoryview) -> Encoding | None:
    """The compressed format that the first bytes belong to."""
    head = bytes(data[:12])
    if head.startswith(_JPEG_MAGIC):
        return Encoding.JPEG
    if head.startswith(_PNG_MAGIC):
        return Encoding.PNG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Encoding.WEBP
    return None


def check_bounds(width: int, height: int, max_pixels: int, *, shrinks: bool = False) -> int:
    """Refuse sizes that hold no face or are too large to decode; by how much to shrink the
    others. ``shrinks``: the format can be decoded at 1/2, 1/4 and 1/8.

    Raises FacelaneError: PICTURE_TOO_SMALL or PICTURE_TOO_LARGE.
    """
    size = {"width": str(width), "height": str(height)}
    if width < limits.MIN_SIDE or height < limits.MIN_SIDE:
        raise FacelaneError(
            Reason.PICTURE_TOO_SMALL,
            f"the picture is {width}x{height}, but each side must be at least "
            f"{limits.MIN_SIDE} pixels",
            metadata=size,
        )
    ceiling = min(max_pixels or limits.MAX_PIXELS, limits.MAX_PIXELS)
    shrink = 1
    while shrinks and shrink < limits.MAX_SHRINK and _shrunk(width, height, shrink) > ceiling:
        shrink *= 2
    whole = limits.MAX_SHRUNK_PIXELS if shrink > 1 else ceiling
    if (
        width > limits.MAX_SIDE
        or height > limits.MAX_SIDE
        or width * height > whole
        or _shrunk(width, height, shrink) > ceiling
    ):
        raise too_large(width, height, limits.MAX_SHRUNK_PIXELS if shrinks else ceiling)
    return shrink


def _shrunk(width: int, height: int, shrink: int) -> int:
    return -(-width // shrink) * -(-height // shrink)


def too_large(width: int, height: int, ceiling: int) -> FacelaneError:
    """For the caller to raise."""
    return FacelaneError(
        Reason.PICTURE_TOO_LARGE,
        f"the picture is {width}x{height}, but at most {ceiling} pixels and "
        f"{limits.MAX_SIDE} a side are decoded; scale it down",
        metadata={"width": str(width), "height": str(height), "max_pixels": str(ceiling)},
    )


def too_costly(encoding: Encoding, why: str) -> FacelaneError:
    """For the caller to raise."""
    return FacelaneError(
        Reason.PICTURE_TOO_COSTLY,
        f"the {encoding.value} picture would take too much work: {why}; save it again as a "
        "plain one",
    )


def _corrupt(encoding: Encoding, why: str) -> NoReturn:
    raise FacelaneError(
        Reason.PICTURE_CORRUPT,
        f"the {encoding.value} picture is damaged: {why}; send it again whole",
    )


def _unsupported(encoding: Encoding, what: str) -> NoReturn:
    raise FacelaneError(
        Reason.ENCODING_UNSUPPORTED,
        f"{what} {encoding.value} pictures are not supported; send a plain one",
    )


# -- JPEG -------------------------------------------------------------------------------


def _jpeg(data: memoryview, max_pixels: int) -> Header:
    size: tuple[int, int] | None = None
    samples: dict[int, int] = {}
    blocks = entropy = scans = work = strays = 0
    shrink = 1
    simple = True
    at = 2
    for _ in range(limits.MAX_PICTURE_SEGMENTS):
        marker = _EOI if scans and at + 1 >= len(data) else 0
        if not marker and (data[at] != 0xFF or data[at + 1] in (0x00, 0xFF)):
            strays += data[at] != 0xFF
            if strays > limits.MAX_PICTURE_STRAYS:
                raise too_costly(Encoding.JPEG, "bytes between its segments belong to none")
            at = _next_marker(data, at, in_scan=False)
        marker = marker or data[at + 1]
        if marker == _EOI or (marker == _SOI and scans):
            if size is None or not entropy:
                _corrupt(Encoding.JPEG, "it holds no picture")
            # The shortest code of a block has two bits, of a progressive scan's one.
            if entropy * 8 < blocks:
                _corrupt(Encoding.JPEG, "it holds less data than its size needs")
            ended = at + 1 < len(data) and marker == _EOI
            if scans > 1 and size[0] * size[1] > limits.MAX_PIXELS:
                # A decoder keeps all of it until the last scan, however small the result.
                raise too_large(*size, limits.MAX_PIXELS)
            plain = (
                simple and ended and scans == 1 and len(samples) == 3 and not strays and shrink == 1
            )
            end = at if ended else -at
            return Header(*size, plain, end, scans, len(samples), shrink=shrink)
        at += 2
        if marker in _STANDALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):
            _corrupt(Encoding.JPEG, "a segment is cut off")
        if marker in _SOF_UNSUPPORTED:
            _unsupported(Encoding.JPEG, "lossless, hierarchical or arithmetic-coded")
        if marker in _SOF:
            if size is not None:
                _corrupt(Encoding.JPEG, "it has two frame headers")
            size, samples = _frame_header(data, at, length)
            shrink = check_bounds(*size, max_pixels, shrinks=True)
            blocks = -(-size[0] // 8) * -(-size[1] // 8)
        simple = simple and marker != _APP14 and (marker not in _SOF or marker == _SOF0)
        body, at = at, at + length
        if marker == _SOS:
            if size is None:
                _corrupt(Encoding.JPEG, "its data come before its size")
            scans += 1
            work += _scan_samples(data, body, length, samples)
            if scans > limits.MAX_PICTURE_SCANS or work > limits.MAX_PICTURE_SAMPLES:
                raise too_costly(Encoding.JPEG, f"it has {scans} scans or more")
            begin, at = at, _next_marker(data, at, in_scan=True)
            entropy += at - begin
    raise too_costly(Encoding.JPEG, "it has too many segments")


def _frame_header(data: memoryview, at: int, length: int) -> tuple[tuple[int, int], dict[int, int]]:
    """((width, height), samples of each component)."""
    depth, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
    if depth != 8:
        _unsupported(Encoding.JPEG, f"{depth}-bit")
    if components not in (1, 3, 4) or length != 8 + 3 * components:
        _corrupt(Encoding.JPEG, "its frame header contradicts itself")
    table = [(data[i], data[i + 1] >> 4, data[i + 1] & 15) for i in range(at + 8, at + length, 3)]
    if any(not 1 <= factor <= 4 for _, h, v in table for factor in (h, v)):
        _corrupt(Encoding.JPEG, "its frame header contradicts itself")
    full = max(h for _, h, _ in table) * max(v for _, _, v in table)
    return (width, height), {name: width * height * h * v // full for name, h, v in table}


def _scan_samples(data: memoryview, at: int, length: int, samples: dict[int, int]) -> int:
    count = data[at + 2]
    names = [data[at + 3 + 2 * i] for i in range(count)]
    if length != 6 + 2 * count or not names or any(name not in samples for name in names):
        _corrupt(Encoding.JPEG, "a scan contradicts the frame header")
    return sum(samples[name] for name in names)


def _next_marker(data: memoryview, at: int, *, in_scan: bool) -> int:
    """Where the next marker begins, or the end. FF is none before 00 (a stuffed byte) or FF (fill),
    nor, in a scan, before D0..D7 (a restart)."""
    found = (_IN_SCAN if in_scan else _BETWEEN).search(data, at)
    return found.start() if found else len(data)


# -- PNG --------------------------------------------------------------------------------


def _png(data: memoryview, max_pixels: int) -> Header:
    header: tuple[int, ...] | None = None
    kept: list[tuple[int, int]] = []
    pixels: list[memoryview] = []
    transparent = False
    at = len(_PNG_MAGIC)
    for _ in range(limits.MAX_PICTURE_CHUNKS):
        # Nothing is missing but the end, which is always the same twelve bytes.
        ends = not pixels or at + 12 <= len(data)
        length, kind = struct.unpack_from(">I4s", data, at) if ends else (0, b"IEND")
        end = at + 12 + length if ends else at
        if end > len(data):
            _corrupt(Encoding.PNG, "it is cut off")
        if (kind == b"IHDR") is not (header is None):
            _corrupt(Encoding.PNG, "its header is missing or repeated")
        if header is None:
            if length != 13:
                _corrupt(Encoding.PNG, "its header has a wrong length")
            header = struct.unpack_from(">IIBBBBB", data, at + 8)
            check_bounds(header[0], header[1], max_pixels)
        transparent = transparent or kind == b"tRNS"
        if kind in _DECODED_CHUNKS and ends:
            kept.append((at, end))
        if kind == b"IDAT":
            pixels.append(data[at + 8 : end - 4])
        if kind == b"IEND":
            _check_rows(pixels, _png_rows(*header))
            if any(
                zlib.crc32(data[a + 4 : b - 4]) != int.from_bytes(data[b - 4 : b], "big")
                for a, b in kept
            ):
                _corrupt(Encoding.PNG, "a checksum is wrong")
            alpha = header[3] in (4, 6) or transparent
            return Header(header[0], header[1], alpha=alpha, chunks=tuple(kept), ends=ends)
        at = end
    raise too_costly(Encoding.PNG, "it has too many chunks")


def _png_rows(
    width: int, height: int, depth: int, color: int, _compression: int, _filter: int, adam7: int
) -> int:
    """How many bytes the picture's rows have, with the byte for the filter of each."""
    if depth not in _DEPTHS.get(color, ()) or adam7 > 1:
        _corrupt(Encoding.PNG, "its header contradicts itself")
    bits = depth * _CHANNELS[color]
    parts = [(width, height)]
    if adam7:
        parts = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _ADAM7]
        parts.append((width, height // 2))
    size = sum(h * (1 + -(-w * bits // 8)) for w, h in parts if w > 0 and h > 0)
    if size > limits.MAX_PNG_BYTES:
        raise too_costly(Encoding.PNG, f"its rows have {size} bytes")
    return size


def _check_rows(parts: list[memoryview], size: int) -> None:
    """Whether the compressed data hold ``size`` bytes: a decoder would inflate the rest of
    longer ones to the end, a thousand bytes for each, and fill up what is missing."""
    inflate = zlib.decompressobj()
    left = size
    try:
        for part in parts:
            rest: bytes | memoryview = part
            while len(rest) and left >= 0 and not inflate.eof:
                left -= len(inflate.decompress(rest, min(left + 1, 1 << 18)))
                rest = inflate.unconsumed_tail
            if left < 0:
                raise too_costly(Encoding.PNG, "its data are longer than the picture")
    except zlib.error:
        _corrupt(Encoding.PNG, "its data are no zlib stream")
    if left:
        _corrupt(Encoding.PNG, "its data end before the picture does")


# -- WebP -------------------------------------------------------------------------------


def _webp(data: memoryview, max_pixels: int) -> Header:
    (riff,) = struct.unpack_from("<I", data, 4)
    ends = 12 <= riff <= len(data) - 8
    if not ends:
        _check_chunks(data)
    kind, length = struct.unpack_from("<4sI", data, 12)
    if length + 20 > len(data):
        _corrupt(Encoding.WEBP, "a chunk is cut off")
    if kind == b"VP8 ":
        tag, width, height = struct.unpack_from("<3s3xHH", data, 20)
        if tag[0] & 1 or bytes(data[23:26]) != b"\x9d\x01\x2a":
            _corrupt(Encoding.WEBP, "it does not begin with a key frame")
        size, alpha = (width & 0x3FFF, height & 0x3FFF), False
    elif kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            _corrupt(Encoding.WEBP, "its lossless signature is wrong")
        size, alpha = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), bool(bits >> 28 & 1)
    elif kind == b"VP8X":
        flags, w, h = struct.unpack("<B3x3s3s", data[20:30])
        if flags & 0x02:
            _unsupported(Encoding.WEBP, "animated")
        size = int.from_bytes(w, "little") + 1, int.from_bytes(h, "little") + 1
        alpha = bool(flags & 0x10)
    else:
        _corrupt(Encoding.WEBP, "its first chunk is unknown")
    check_bounds(*size, max_pixels)
    return Header(*size, alpha=alpha, ends=ends)


def _check_chunks(data: memoryview) -> None:
    """Of a WebP whose length is another one (a writer that did not know it, a byte of padding that
    nobody wrote): whether the picture is whole for all that."""
    at, kinds = 12, set[bytes]()
    for _ in range(limits.MAX_PICTURE_CHUNKS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        at += 8 + length
        if at > len(data):
            _corrupt(Encoding.WEBP, "it is cut off")
        at += length % 2
        kinds.add(kind)
    if kinds.isdisjoint((b"VP8 ", b"VP8L", b"ANMF")):
        _corrupt(Encoding.WEBP, "it is cut off")
