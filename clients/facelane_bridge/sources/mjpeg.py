"""A parser of ``multipart/x-mixed-replace`` (HTTP-MJPEG), free of sockets.

Bytes go in as they come, whole JPEG pictures come out. It is written for cameras that
cannot be trusted: every buffer has a bound, and what breaks the format raises
``MjpegError`` instead of being searched for ever.

Cameras differ in what they call the boundary: some announce ``--frame`` and write
``--frame``, others announce ``frame`` and write ``--frame``. Both are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from email.message import Message

MAX_HEADER_BYTES = 8 * 1024
"""Headers of one part. Real cameras send under 200 bytes."""
MAX_PREAMBLE_BYTES = 64 * 1024
"""Bytes before the first boundary."""
MAX_PART_BYTES = 16 * 1024 * 1024
"""One JPEG. A 4K camera at the best quality sends 3-4 MiB."""


class MjpegError(Exception):
    """The stream is not what it says; the connection has to be opened again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def boundary_of(content_type: str) -> str:
    """The boundary of a ``Content-Type`` header; raises ``MjpegError`` when it has none."""
    header = Message()
    header["Content-Type"] = content_type
    if header.get_content_maintype() != "multipart":
        raise MjpegError(
            "NOT_MULTIPART",
            f"the address answers {header.get_content_type()!r}, not multipart/x-mixed-replace; "
            "use the camera's MJPEG stream address",
        )
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary.strip():
        raise MjpegError("BOUNDARY_MISSING", "the multipart answer announces no boundary")
    boundary = boundary.strip()
    if len(boundary) > 200:  # RFC 2046 allows 70; some cameras use more
        raise MjpegError("BOUNDARY_TOO_LONG", "the boundary has more than 200 characters")
    return boundary


class MjpegParser:
    """Turns a byte stream into JPEG pictures.

    ``feed`` gives the pictures completed by these bytes, in order. A part whose
    ``Content-Type`` is not ``image/jpeg`` is passed over. A part without
    ``Content-Length`` ends at the next boundary.
    """

    def __init__(self, boundary: str, *, max_part_bytes: int = MAX_PART_BYTES) -> None:
        self._delimiter = b"--" + boundary.removeprefix("--").encode("latin-1", "replace")
        self._max_part = max_part_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._mode: Callable[[list[bytes]], bool] = self._find_first
        self._length: int | None = None
        self._is_jpeg = True
        self.ended = False
        """The closing boundary was seen: nothing more will come."""
        self.parts_passed_over = 0

    @property
    def buffered(self) -> int:
        """Bytes held; never more than one part with its headers, and the last ``feed``."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; give the pictures that are now complete."""
        if self.ended:
            return []
        self._buffer += data
        pictures: list[bytes] = []
        while not self.ended and self._mode(pictures):
            pass
        return pictures

    # Each mode eats from the buffer and says whether it got anywhere.

    def _find_first(self, _: list[bytes]) -> bool:
        at = self._search(self._delimiter)
        if at < 0:
            if len(self._buffer) > MAX_PREAMBLE_BYTES:
                raise MjpegError("BOUNDARY_MISSING", "no boundary came where one was announced")
            return False
        self._eat(at + len(self._delimiter))
        self._mode = self._after_delimiter
        return True

    def _after_delimiter(self, _: list[bytes]) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] == b"--":
            self.ended = True
            self._buffer.clear()
            return False
        self._mode = self._headers
        return True

    def _headers(self, _: list[bytes]) -> bool:
        # The line end after the boundary is part of the text, so that a part without
        # any header ends it with an empty line just as well.
        crlf, lf = self._buffer.find(b"\r\n\r\n"), self._buffer.find(b"\n\n")
        if crlf < 0 and lf < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise MjpegError("HEADER_TOO_LONG", "the headers of a part do not end")
            return False
        end, width = (crlf, 4) if lf < 0 or 0 <= crlf < lf else (lf, 2)
        if end > MAX_HEADER_BYTES:
            raise MjpegError("HEADER_TOO_LONG", "the headers of a part do not end")
        self._length, self._is_jpeg = self._read_headers(bytes(self._buffer[:end]))
        self._eat(end + width)
        self._mode = self._body_by_boundary if self._length is None else self._body_by_length
        return True

    def _read_headers(self, text: bytes) -> tuple[int | None, bool]:
        length: int | None = None
        is_jpeg = True
        for line in text.splitlines():
            name, colon, value = line.partition(b":")
            if not colon:
                continue
            match name.strip().lower():
                case b"content-length":
                    digits = value.strip()
                    if not digits.isdigit() or len(digits) > 12:
                        raise MjpegError("LENGTH_INVALID", "a part's Content-Length is no number")
                    length = int(digits)
                    if length > self._max_part:
                        raise MjpegError(
                            "PART_TOO_LARGE",
                            f"a part announces more than {self._max_part} bytes; "
                            "lower the camera's resolution or quality",
                        )
                case b"content-type":
                    kind = value.split(b";")[0].strip().lower()
                    is_jpeg = kind in (b"image/jpeg", b"image/jpg", b"image/pjpeg")
                case _:
                    pass
        # Content-Length: 0 is what firmware writes that does not know the length yet.
        return length or None, is_jpeg

    def _body_by_length(self, pictures: list[bytes]) -> bool:
        assert self._length is not None
        if len(self._buffer) < self._length:
            return False
        self._emit(bytes(self._buffer[: self._length]), pictures)
        self._eat(self._length)
        self._mode = self._boundary_after_length
        return True

    def _boundary_after_length(self, _: list[bytes]) -> bool:
        # Some cameras put one or two line ends here, others none: but nothing else.
        stripped = self._buffer.lstrip(b"\r\n")
        self._eat(len(self._buffer) - len(stripped))
        if len(stripped) < len(self._delimiter):
            return False
        if not stripped.startswith(self._delimiter):
            raise MjpegError("LENGTH_WRONG", "a part is not as long as its Content-Length says")
        self._eat(len(self._delimiter))
        self._mode = self._after_delimiter
        return True

    def _body_by_boundary(self, pictures: list[bytes]) -> bool:
        at = self._search(self._delimiter)
        if at < 0:
            if len(self._buffer) > self._max_part:
                raise MjpegError(
                    "PART_TOO_LARGE", f"a part is longer than {self._max_part} bytes without an end"
                )
            return False
        if at > self._max_part:
            raise MjpegError("PART_TOO_LARGE", f"a part is longer than {self._max_part} bytes")
        body = bytes(self._buffer[:at])
        # The line end before a boundary belongs to the boundary (RFC 2046, 5.1.1).
        body = body.removesuffix(b"\n").removesuffix(b"\r")
        self._emit(body, pictures)
        self._eat(at + len(self._delimiter))
        self._mode = self._after_delimiter
        return True

    def _emit(self, body: bytes, pictures: list[bytes]) -> None:
        if self._is_jpeg and body.startswith(b"\xff\xd8"):
            pictures.append(body)
        else:
            self.parts_passed_over += 1

    def _search(self, needle: bytes) -> int:
        """``find`` that does not look twice at what it has looked at: without this, a
        part that comes in small pieces costs the square of its length."""
        at = self._buffer.find(needle, max(0, self._searched - len(needle)))
        self._searched = 0 if at >= 0 else len(self._buffer)
        return at

    def _eat(self, count: int) -> None:
        del self._buffer[:count]
        self._searched = 0
