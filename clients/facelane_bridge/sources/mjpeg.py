"""A splitter of ``multipart/x-mixed-replace`` (HTTP-MJPEG), free of sockets.

Bytes go in as they come, whole JPEG pictures come out. It is written for cameras as they
are: lengths that are too large, too small or absent, parts of any type, boundaries that are
announced in one way and written in another or not at all, pictures without an end marker,
no multipart whatsoever. So the picture itself is believed first: its markers are walked, as
a decoder would, and its end marker ends it, without waiting for the next boundary. A
boundary at the begin of a line, or the announced length where a boundary follows, ends a
picture that has no end marker.

Every buffer has a bound, every byte is looked at a fixed number of times, and what gives
no picture raises ``MjpegError`` instead of being searched for ever.
"""

from __future__ import annotations

import re
from email.message import Message

MAX_HEADER_BYTES = 8 * 1024
"""Headers of one part that are looked at. Real cameras send under 200 bytes."""
MAX_PART_BYTES = 16 * 1024 * 1024
"""One JPEG, and what may lie between two. A 4K camera at the best quality sends 3-4 MiB."""
MIN_PICTURE_BYTES = 16
"""Markers without a picture between them are none."""
MAX_BOUNDARY_CHARS = 200
"""RFC 2046 allows 70; some cameras use more."""

_START = re.compile(rb"\xff\xd8\xff")
# What ends entropy-coded data: stuffed zeros, restart markers and damage do not.
_SCAN_END = re.compile(rb"\xff[\xc4\xd8-\xdd\xe0-\xef\xfe]")
_FILL = re.compile(rb"\xff+")
_TYPE = re.compile(rb"(?i)content-type[ \t]{0,8}:[ \t]{0,8}([^\r\n;]{1,60})")
_LENGTH = re.compile(rb"(?i)content-length[ \t]{0,8}:[ \t]{0,8}(\d{1,12})[ \t\r]{0,8}\n")
_DELIMITER = re.compile(rb"(?:^|[\r\n])-{2,}([^\r\n]{1,%d})" % MAX_BOUNDARY_CHARS)


class MjpegError(Exception):
    """No picture can be had of this connection; it has to be opened again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def media_type(content_type: str) -> tuple[str, str]:
    """(type, boundary) of a ``Content-Type`` header, each empty where it does not say."""
    if not content_type.strip():
        return "", ""
    header = Message()
    header["Content-Type"] = content_type.replace("\r", " ").replace("\n", " ")
    boundary = header.get_param("boundary")
    boundary = boundary.strip() if isinstance(boundary, str) else ""
    return header.get_content_type(), boundary if len(boundary) <= MAX_BOUNDARY_CHARS else ""


class MjpegSplitter:
    """Turns a byte stream into JPEG pictures.

    ``feed`` gives the pictures completed by these bytes, in order; ``finish`` the one that
    the end of the stream completes. ``boundary`` is what the answer announced, if anything.
    """

    def __init__(self, boundary: str = "", *, max_part_bytes: int = MAX_PART_BYTES) -> None:
        self._max_part = max_part_bytes
        self._buffer = bytearray()
        self._core = b""  # of the boundary, without its dashes
        # ``find`` takes ten times as long as a pattern in what pictures are made of.
        self._needles: tuple[re.Pattern[bytes], ...] = ()
        self._learn(boundary.encode("latin-1", "replace"))
        self._in_picture = False
        # Between pictures:
        self._looked = 0  # no picture begins before this
        self._passed = 0  # bytes since the last picture
        self._rest = 0  # of the part whose picture has ended
        self._any_start = False  # begins of pictures count in the middle of a line, too
        self._starts_passed = 0
        # Within a picture:
        self._length = 0
        self._at = 0  # the marker walk has come so far
        self._in_scan = False
        self._searched = 0  # no boundary begins before this

        self.pictures = 0
        self.lengths_wrong = 0
        """Parts that are not as long as they say."""
        self.parts_passed_over = 0
        """Parts that hold no JPEG."""
        self.passed_type = ""
        """The type of the newest of them."""

    @property
    def buffered(self) -> int:
        """Bytes held; never more than one part with its headers, and the last ``feed``."""
        return len(self._buffer)

    @property
    def passed(self) -> int:
        """Bytes since the newest picture in which none began."""
        return self._passed + (0 if self._in_picture else len(self._buffer))

    def describe(self) -> str:
        """What came instead of pictures, in words; empty where some or nothing came."""
        if self.pictures or not (self._passed or self._buffer):
            return ""
        if self._in_picture:
            return "a picture began and did not end"
        kinds = _TYPE.findall(bytes(self._buffer[-MAX_HEADER_BYTES:]))
        kind = _readable(kinds[-1]) if kinds else self.passed_type
        if kind:
            return f"parts came, none of them a JPEG (of type {kind!r})"
        return "data came, and no JPEG in it"

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; give the pictures that are now complete."""
        self._buffer += data
        pictures: list[bytes] = []
        while (self._end if self._in_picture else self._begin)(pictures):
            pass
        return pictures

    def finish(self) -> list[bytes]:
        """The stream is over: the picture that nothing but its end completes, if there is."""
        if not self._in_picture or not self._in_scan:
            return []
        return self._emit(len(self._buffer.rstrip(b"\r\n")))

    # Each of these eats from the buffer and says whether it got anywhere.

    def _begin(self, _: list[bytes]) -> bool:
        buffer = self._buffer
        while (found := _START.search(buffer, self._looked)) is not None:
            at = found.start()
            self._looked = at + 1
            if self._is_start(at):
                if self._passed + at < self._rest:
                    self.lengths_wrong += 1  # too large: the next part begins within it
                self._read_head(at)
                del buffer[:at]
                self._in_picture, self._in_scan = True, False
                self._passed = self._starts_passed = self._rest = 0
                self._at = self._searched = 2
                return True
            self._starts_passed += 1
        self._looked = max(self._looked, len(buffer) - 2)
        surplus = len(buffer) - MAX_HEADER_BYTES
        if surplus > MAX_HEADER_BYTES:
            for kind in _TYPE.findall(bytes(buffer[:surplus])):
                self._pass_over(kind)
            del buffer[:surplus]
            self._looked -= surplus
            self._passed += surplus
            if self._starts_passed and not self.pictures:
                self._any_start = True
            if self._passed > self._max_part:
                raise MjpegError(
                    "NO_PICTURE",
                    f"no picture in {self._passed >> 20} MiB: {self.describe()}"
                    if not self.pictures
                    else "the camera sends no more pictures",
                )
        return False

    def _is_start(self, at: int) -> bool:
        """Whether a picture begins here, and not just three bytes that look like one."""
        before = self._buffer[max(0, at - 1) : at]
        if self._passed + at < self._rest and b"\n" not in self._buffer[:at]:
            return False  # a second picture in the same part: MPO, a preview
        return before in b"\r\n\0 " or self._any_start

    def _read_head(self, at: int) -> None:
        """What the lines before a picture say of it."""
        head = bytes(self._buffer[max(0, at - MAX_HEADER_BYTES) : at])
        delimiters = list(_DELIMITER.finditer(head))
        if delimiters:
            newest = delimiters[-1]
            for kind in _TYPE.findall(head[: newest.start()]):
                self._pass_over(kind)
            head = head[newest.start() :]
            if not self._core or self._core not in head:
                self._learn(newest.group(1))
        lengths = _LENGTH.findall(head)
        # 0 is what firmware writes that does not know the length yet.
        length = int(lengths[-1]) if lengths else 0
        self._length = length if length <= self._max_part else 0

    def _learn(self, boundary: bytes) -> None:
        """How a boundary looks that is announced or written like this, with any dashes."""
        core = boundary.strip().strip(b"-")
        if core:
            self._core = core
            written = re.escape(core)
            self._needles = (re.compile(b"--" + written), re.compile(b"\n" + written))

    def _pass_over(self, kind: bytes) -> None:
        self.parts_passed_over += 1
        self.passed_type = _readable(kind)

    def _end(self, pictures: list[bytes]) -> bool:
        by_marker, by_boundary = self._walk(), self._boundary()
        if by_boundary and (not by_marker or by_boundary < by_marker):
            end = by_boundary
        elif by_marker:
            end = by_marker
        elif self._is_length_right():
            end = self._length
        elif len(self._buffer) > self._max_part:
            raise MjpegError(
                "PART_TOO_LARGE",
                f"a picture has more than {self._max_part} bytes; lower the camera's "
                "resolution or quality",
            )
        else:
            return False
        if end > self._max_part:
            raise MjpegError("PART_TOO_LARGE", f"a picture has more than {self._max_part} bytes")
        pictures += self._emit(end)
        return True

    def _emit(self, end: int) -> list[bytes]:
        picture = bytes(self._buffer[:end])
        if 0 < self._length < end - 2:
            self.lengths_wrong += 1
        self._rest = max(0, self._length - end)
        del self._buffer[:end]
        self._in_picture = False
        self._looked = 0
        if end < MIN_PICTURE_BYTES:
            return []
        self.pictures += 1
        return [picture]

    def _walk(self) -> int:
        """Where the picture ends by its own markers; 0 while that is not known."""
        buffer = self._buffer
        while self._at < len(buffer):
            if self._in_scan:
                found = _SCAN_END.search(buffer, self._at)
                if found is None:
                    self._at = max(self._at, len(buffer) - 1)
                    return 0
                self._at, self._in_scan = found.start(), False
            # Stray bytes between two segments are passed over, as decoders do.
            fill = _FILL.search(buffer, self._at)
            if fill is None:
                self._at = len(buffer)
                return 0
            self._at = at = fill.end() - 1
            if at + 1 >= len(buffer):
                return 0
            marker = buffer[at + 1]
            if marker == 0xD9:
                return at + 2
            if marker == 0xD8:
                return at  # the next picture begins: this one has no end marker
            if marker <= 0x01 or 0xD0 <= marker <= 0xD7:
                self._at = at + 2
                continue
            if at + 4 > len(buffer):
                return 0
            size = int.from_bytes(buffer[at + 2 : at + 4])
            self._at = at + 2 + (size if size >= 2 else 0)
            self._in_scan = marker == 0xDA
        return 0

    def _boundary(self) -> int:
        """Where the picture ends because a boundary follows; 0 where none has come."""
        buffer, ends = self._buffer, []
        for needle in self._needles:
            found = needle.search(buffer, max(2, self._searched - len(self._core) - 2))
            # In the middle of a line it counts where no length says that it is data.
            while found is not None and not self._ends_picture(found.start()):
                found = needle.search(buffer, found.start() + 1)
            if found is not None:
                at = found.start()
                before = bytes(buffer[max(2, at - MAX_BOUNDARY_CHARS) : at])
                at -= len(before) - len(before.rstrip(b"-"))
                # The line end before a boundary belongs to the boundary (RFC 2046, 5.1.1).
                if buffer[at - 1] == 0x0A:
                    at -= 1
                if buffer[at - 1] == 0x0D:
                    at -= 1
                ends.append(max(at, 2))
        self._searched = len(buffer)
        return min(ends, default=0)

    def _ends_picture(self, at: int) -> bool:
        return self._buffer[at] == 0x0A or self._buffer[at - 1] in b"\r\n-" or at >= self._length

    def _is_length_right(self) -> bool:
        """Whether the announced length leads to a boundary, or to the next picture."""
        if not self._length or len(self._buffer) < self._length + 6:
            return False
        after = bytes(self._buffer[self._length : self._length + 6])
        if after.lstrip(b"\r\n").startswith((b"--", b"\xff\xd8")):
            if after[:1] == b"-" and self._buffer[self._length - 2 : self._length] == b"\r\n":
                self._length -= 2  # it counts the line end before the boundary
            return True
        self._length = 0  # it is wrong: the rest of the part says where it ends
        self.lengths_wrong += 1
        return False


def _readable(kind: bytes) -> str:
    return kind.strip().decode("ascii", "replace")
