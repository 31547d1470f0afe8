"""What an access unit of H.264 or H.265 says of itself, read before anybody decodes it.

Pure, and bounded: the walk over the NAL units is ``bytes.find``, and of their contents only
parameter sets, the first bits of slices and one SEI message are looked at. What is refused here
costs no decoder: pictures that are too large, interlaced, not 4:2:0, deeper than 10 bits, or
that keep more reference pictures than any level allows.

Sources: ITU-T H.264 (7.3.1, 7.3.2.1, 7.3.3, 7.4.1, D.1.8, E.1) and H.265 (7.3.1, 7.3.2.2, 7.4.2).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason

_START: Final = b"\0\0\1"
_WITH_CHROMA: Final = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
"""Profiles of H.264 whose parameter sets tell chroma and depth."""
_INTRA_SLICES: Final = frozenset({2, 4, 7, 9})
_SET_READ: Final = 1_024
"""Bytes of a parameter set that are looked at: more than all its fields can have before those that
nobody asks for."""
_RECOVERY_POINT: Final = 6
_EXTENDED_SAR: Final = 255


class Key(enum.Enum):
    """Whether a decoder can begin with an access unit."""

    NONE = "none"
    SOFT = "soft"
    """It can; pictures behind it that are shown before it may still need those before it."""
    HARD = "hard"
    """It can, and nothing behind it needs anything before it."""


@dataclass(frozen=True, slots=True)
class Format:
    """Of a sequence: ``width`` and ``height`` as shown, ``depth`` in bits a sample, and how many
    pictures a decoder holds back to show them in order (``reorder``, as far as it is told).
    ``number_bits``: of H.264's frame numbers, where they have no gaps; 0 = they tell nothing."""

    width: int
    height: int
    depth: int
    reorder: int = 0
    number_bits: int = 0


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """``format``: where it brings a sequence parameter set. ``leading``: it is shown before the
    soft key frame that it follows, and cannot be decoded where decoding began with that one.
    ``number``: H.264's frame number, -1 = none is told; ``reference``: others may need it."""

    key: Key
    format: Format | None = None
    leading: bool = False
    number: int = -1
    reference: bool = True

    def follows(self, reference: AccessUnit, found: Format) -> bool:
        """Whether no picture that others need lies between the reference picture and this one.
        H.265 needs no such question: its decoders miss the picture themselves."""
        if not found.number_bits or self.number < 0 or reference.number < 0:
            return True
        return self.number == (reference.number + 1) % (1 << found.number_bits)


def examine(
    data: bytes, encoding: Encoding, max_pixels: int, known: Format | None = None
) -> AccessUnit:
    """``known``: of the sequence that it belongs to, where it brings no parameter sets.

    Raises FacelaneError: PICTURE_CORRUPT, PICTURE_TOO_LARGE, PICTURE_TOO_SMALL,
    PICTURE_TOO_COSTLY, VIDEO_UNSUPPORTED, PARAMETER_SETS_MISSING."""
    if not data.startswith((_START, b"\0" + _START)):
        _corrupt(encoding, "it begins with no start code (Annex B is what is read)")
    try:
        if encoding is Encoding.H264:
            return _h264(data, max_pixels, known)
        return _h265(data, max_pixels)
    except _EndOfBits:
        _corrupt(encoding, "a parameter set is cut off")


def _units(data: bytes, encoding: Encoding) -> Iterator[tuple[int, int]]:
    """(first byte, one past the last) of each NAL unit."""
    at = data.find(_START)
    for _ in range(limits.MAX_NAL_UNITS):
        begin = at + 3
        at = data.find(_START, begin)
        end = at if at >= 0 else len(data)
        if end - begin > 1:
            yield begin, end
        if at < 0:
            return
    raise FacelaneError(
        Reason.PICTURE_TOO_COSTLY,
        f"the {encoding.value} access unit has more than {limits.MAX_NAL_UNITS} NAL units",
    )


# -- H.264 ------------------------------------------------------------------------------


def _h264(data: bytes, max_pixels: int, known: Format | None) -> AccessUnit:
    found: Format | None = None
    number, reference = -1, False
    idr = recovery = pps = False
    intra = True
    pictures = slices = sets = 0
    for begin, end in _units(data, Encoding.H264):
        head = data[begin]
        kind = head & 0x1F
        if kind in (1, 5):
            pictures += data[begin + 1] >> 7  # its first macroblock is the picture's
            idr = idr or kind == 5
            reference = reference or head & 0x60 > 0
            slices += 1
            if slices > 1 and not (recovery and intra):
                continue  # there are hundreds, and they say no more
            bits = _Bits(_unescaped(data[begin + 1 : min(end, begin + 17)]))
            bits.ue()
            slice_type = bits.ue()
            intra = intra and slice_type in _INTRA_SLICES
            if number < 0 and (sequence := found or known) is not None and sequence.number_bits:
                bits.ue()
                number = bits.u(sequence.number_bits)
        elif kind in (2, 3, 4):
            _unsupported(Encoding.H264, "partitioned")
        elif kind == 7:
            sets = _one_more(sets, Encoding.H264)
            found = _h264_sps(_parameter_set(data, begin + 1, end, Encoding.H264))
            _check(Encoding.H264, found, max_pixels)
        elif kind == 8:
            pps = True
        elif kind == 6:
            recovery = recovery or _is_recovery_point(data[begin + 1 : min(end, begin + 17)])
    if pictures != 1:
        _not_one(Encoding.H264, pictures)
    if idr:
        if found is None or not pps:
            _sets_missing(Encoding.H264, "SPS and PPS")
        return AccessUnit(Key.HARD, found, number=number)
    soft = recovery and intra and found is not None and pps
    key = Key.SOFT if soft else Key.NONE
    return AccessUnit(key, found, number=number, reference=reference)


def _is_recovery_point(payload: bytes) -> bool:
    """Whether an SEI begins with a recovery point of no frames."""
    return payload[:1] == bytes((_RECOVERY_POINT,)) and len(payload) > 2 and payload[2] & 0x80 > 0


def _h264_sps(data: bytes) -> Format:
    bits = _Bits(data)
    profile = bits.u(8)
    bits.u(16)
    bits.ue()
    chroma, depth = 1, 8
    if profile in _WITH_CHROMA:
        chroma = bits.ue()
        if chroma == 3:
            bits.u(1)
        depth = 8 + max(bits.ue(), bits.ue())
        bits.u(1)
        if bits.u(1):
            for i in range(8 if chroma != 3 else 12):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if i < 6 else 64)
    number_bits = bits.ue() + 4
    if number_bits > 16:
        _corrupt(Encoding.H264, "a parameter set contradicts itself")
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1)
        bits.ue()
        bits.ue()
        cycle = bits.ue()
        if cycle > 255:
            _corrupt(Encoding.H264, "a parameter set contradicts itself")
        for _ in range(cycle):
            bits.ue()
    references = bits.ue()
    if bits.u(1):  # numbers may be left out on purpose
        number_bits = 0
    columns, rows = bits.ue() + 1, bits.ue() + 1
    if not bits.u(1):
        _unsupported(Encoding.H264, "interlaced")
    bits.u(1)
    _check_decodable(Encoding.H264, chroma, depth, (columns * 16, rows * 16), references)
    left, right, top, bottom = [bits.ue() for _ in range(4)] if bits.u(1) else [0, 0, 0, 0]
    reorder = 0
    if order != 2 and bits.u(1):
        try:
            reorder = _h264_reorder(bits)
        except _EndOfBits:
            reorder = 0  # what it says beside is not needed
    width = columns * 16 - 2 * (left + right)
    height = rows * 16 - 2 * (top + bottom)
    return Format(width, height, depth, min(reorder, limits.MAX_REORDER), number_bits)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            step = bits.ue()
            delta = (step + 1) // 2 if step % 2 else -(step // 2)
            following = (last + delta) % 256
        last = following or last


def _h264_reorder(bits: _Bits) -> int:
    """From the usability information (E.1.1): max_num_reorder_frames, 0 where it is not told."""
    if bits.u(1) and bits.u(8) == _EXTENDED_SAR:
        bits.u(32)
    if bits.u(1):
        bits.u(1)
    if bits.u(1):
        bits.u(4)
        if bits.u(1):
            bits.u(24)
    if bits.u(1):
        bits.ue()
        bits.ue()
    if bits.u(1):
        bits.u(65)
    buffered = [_skip_hrd(bits) if bits.u(1) else False for _ in range(2)]
    if any(buffered):
        bits.u(1)
    bits.u(1)
    if not bits.u(1):
        return 0
    bits.u(1)
    for _ in range(4):
        bits.ue()
    return bits.ue()


def _skip_hrd(bits: _Bits) -> bool:
    count = bits.ue() + 1
    if count > 32:
        raise _EndOfBits
    bits.u(8)
    for _ in range(count):
        bits.ue()
        bits.ue()
        bits.u(1)
    bits.u(20)
    return True


# -- H.265 ------------------------------------------------------------------------------


def _h265(data: bytes, max_pixels: int) -> AccessUnit:
    found: Format | None = None
    sets = sequences = 0
    pictures, kind_of = 0, -1
    for begin, end in _units(data, Encoding.H265):
        if end - begin < 3:
            continue
        kind = data[begin] >> 1 & 0x3F
        layer = (data[begin] & 1) << 5 | data[begin + 1] >> 3
        if layer:
            continue  # further views and layers are not decoded
        if kind < 32:
            pictures += data[begin + 2] >> 7
            kind_of = kind
        elif kind == 33:
            sequences = _one_more(sequences, Encoding.H265)
            found = _h265_sps(_parameter_set(data, begin + 2, end, Encoding.H265))
            _check(Encoding.H265, found, max_pixels)
            sets |= 2
        elif kind in (32, 34):
            sets |= 1 if kind == 32 else 4
    if pictures != 1:
        _not_one(Encoding.H265, pictures)
    if not 16 <= kind_of <= 23:
        return AccessUnit(Key.NONE, found, leading=kind_of in (8, 9))
    # The second kind of BLA and CRA alone have pictures behind them that may need those before.
    if kind_of == 21 and sets != 7:
        return AccessUnit(Key.NONE, found)
    if sets != 7:
        _sets_missing(Encoding.H265, "VPS, SPS and PPS")
    return AccessUnit(Key.SOFT if kind_of == 21 else Key.HARD, found)


def _h265_sps(data: bytes) -> Format:
    bits = _Bits(data)
    bits.u(4)
    layers = bits.u(3)
    bits.u(1)
    bits.u(40)
    progressive, interlaced = bits.u(1), bits.u(1)
    bits.u(46 + 8)
    present = [(bits.u(1), bits.u(1)) for _ in range(layers)]
    if layers:
        bits.u(2 * (8 - layers))
    for profile, level in present:
        bits.u(88 * profile + 8 * level)
    bits.ue()
    chroma = bits.ue()
    if chroma == 3:
        bits.u(1)
    columns, rows = bits.ue(), bits.ue()
    left, right, top, bottom = [bits.ue() for _ in range(4)] if bits.u(1) else [0, 0, 0, 0]
    depth = 8 + max(bits.ue(), bits.ue())
    bits.ue()
    buffered = reorder = 0
    for _ in range(layers + 1 if bits.u(1) else 1):
        buffered, reorder, _latency = bits.ue() + 1, bits.ue(), bits.ue()
    if interlaced and not progressive:
        _unsupported(Encoding.H265, "interlaced")
    _check_decodable(Encoding.H265, chroma, depth, (columns, rows), buffered)
    width, height = columns - 2 * (left + right), rows - 2 * (top + bottom)
    return Format(width, height, depth, min(reorder, limits.MAX_REORDER))


# -- what both have in common ---------------------------------------------------------------


class _EndOfBits(Exception):  # noqa: N818 - never leaves this module
    """A parameter set ends too early, or holds a number that cannot be."""


class _Bits:
    """Bits of a raw byte sequence payload, most significant first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def u(self, count: int) -> int:
        if count > self._left:
            raise _EndOfBits
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def ue(self) -> int:
        """Exponential Golomb code, up to 32 bits."""
        rest = self._value & ((1 << self._left) - 1)
        zeros = self._left - rest.bit_length()
        if not rest or zeros > 32:
            raise _EndOfBits
        self._left -= zeros
        return self.u(zeros + 1) - 1


def _unescaped(data: bytes) -> bytes:
    """Without emulation prevention."""
    return data.replace(b"\0\0\3", b"\0\0")


def _parameter_set(data: bytes, begin: int, end: int, encoding: Encoding) -> bytes:
    if end - begin > limits.MAX_PARAMETER_SET_BYTES:
        _corrupt(encoding, "a parameter set is longer than any")
    return _unescaped(data[begin : min(end, begin + _SET_READ)])


def _one_more(sets: int, encoding: Encoding) -> int:
    """Parameter sets of sequences so far."""
    if sets >= limits.MAX_PARAMETER_SETS:
        raise FacelaneError(
            Reason.PICTURE_TOO_COSTLY,
            f"the {encoding.value} access unit has more than {limits.MAX_PARAMETER_SETS} "
            "parameter sets of sequences",
        )
    return sets + 1


def _check_decodable(
    encoding: Encoding, chroma: int, depth: int, coded: tuple[int, int], references: int
) -> None:
    """What decoding would take, whatever is shown of it."""
    if chroma != 1:
        _unsupported(encoding, "not 4:2:0")
    if depth > 10:
        _unsupported(encoding, f"of {depth} bits a sample")
    pixels = coded[0] * coded[1]
    if pixels > limits.MAX_VIDEO_PIXELS or max(coded) > limits.MAX_SIDE:
        _too_large(encoding, coded, limits.MAX_VIDEO_PIXELS)
    if references > limits.MAX_REFERENCES or pixels * references > limits.MAX_KEPT:
        raise FacelaneError(
            Reason.VIDEO_UNSUPPORTED,
            f"the {encoding.value} video keeps more pictures for reference than any level allows",
        )


def _check(encoding: Encoding, found: Format, max_pixels: int) -> None:
    width, height = found.width, found.height
    if width < limits.MIN_SIDE or height < limits.MIN_SIDE:
        raise FacelaneError(
            Reason.PICTURE_TOO_SMALL,
            f"the {encoding.value} video is {width}x{height}; at least {limits.MIN_SIDE} pixels a "
            "side are needed",
        )
    most = min(max_pixels or limits.MAX_VIDEO_PIXELS, limits.MAX_VIDEO_PIXELS)
    if width * height > most:
        _too_large(encoding, (width, height), most)


def _too_large(encoding: Encoding, size: tuple[int, int], most: int) -> NoReturn:
    raise FacelaneError(
        Reason.PICTURE_TOO_LARGE,
        f"the {encoding.value} video is {size[0]}x{size[1]}; this server takes up to {most} "
        "pixels: choose a smaller size in the camera",
        metadata={"max_pixels": str(most)},
    )


def _corrupt(encoding: Encoding, why: str) -> NoReturn:
    raise FacelaneError(
        Reason.PICTURE_CORRUPT, f"the {encoding.value} access unit cannot be decoded: {why}"
    )


def _not_one(encoding: Encoding, pictures: int) -> NoReturn:
    _corrupt(encoding, f"it holds {pictures or 'no'} pictures; a frame is one access unit")


def _unsupported(encoding: Encoding, what: str) -> NoReturn:
    raise FacelaneError(
        Reason.VIDEO_UNSUPPORTED,
        f"the {encoding.value} video is {what}; send progressive 4:2:0 video of 8 or 10 bits, or "
        "let the bridge decode it",
    )


def _sets_missing(encoding: Encoding, which: str) -> NoReturn:
    raise FacelaneError(
        Reason.PARAMETER_SETS_MISSING,
        f"the {encoding.value} key frame has no parameter sets; send {which} with every one",
    )
