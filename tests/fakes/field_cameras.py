"""Cameras as they are met in the field: RTSP over TCP and HTTP-MJPEG, with quirks, in threads.

Everything that a camera may do otherwise is an argument. Nothing here shares code with the
bridge: requests are read, and passwords checked, in this module's own way.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Self

import av
import numpy as np

CLOCK = 90_000
START_CODE = re.compile(rb"\x00\x00\x00?\x01")


@cache
def access_units(frames: int, gop: int) -> tuple[tuple[bytes, ...], ...]:
    """A small H.264 clip: the NAL units of each picture, a key frame every ``gop``."""
    encoder = av.VideoCodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 64, 48, "yuv420p"
    encoder.framerate = 10
    encoder.options = {
        "tune": "zerolatency",
        "x264-params": f"repeat-headers=1:annexb=1:keyint={gop}:scenecut=0",
    }
    units = []
    for index in [*range(frames), None]:
        frame = None
        if index is not None:
            image = np.full((48, 64, 3), (index * 7) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="bgr24").reformat(format="yuv420p")
            frame.pts = index
        units += [
            tuple(nal for nal in START_CODE.split(bytes(packet)) if nal)
            for packet in encoder.encode(frame)
        ]
    return tuple(units)


def rtp(nals: tuple[bytes, ...], sequence: int, stamp: int) -> list[bytes]:
    """The RTP packets of one picture (RFC 6184, single units and FU-A)."""
    payloads: list[bytes] = []
    for nal in nals:
        if len(nal) <= 1300:
            payloads.append(nal)
            continue
        pieces = [nal[at : at + 1300] for at in range(1, len(nal), 1300)]
        for number, piece in enumerate(pieces):
            edge = 0x80 * (number == 0) | 0x40 * (number == len(pieces) - 1)
            payloads.append(bytes([nal[0] & 0xE0 | 28, edge | nal[0] & 31]) + piece)
    last = len(payloads) - 1
    return [
        struct.pack(
            ">BBHII", 0x80, 96 | 0x80 * (n == last), (sequence + n) & 0xFFFF, stamp & 0xFFFFFFFF, 7
        )
        + payload
        for n, payload in enumerate(payloads)
    ]


@dataclass
class Request:
    """A request, RTSP or HTTP. Header names are lower-case."""

    method: str
    uri: str
    headers: dict[str, str]
    count: int
    """How often this method was asked for before, over all connections."""
    connection: int
    """The number of the connection, from 0."""

    def knows(self, user: str, password: str) -> bool:
        """Whether it carries these credentials, in whatever form."""
        given = self.headers.get("authorization", "")
        if given.startswith("Basic "):
            return base64.b64decode(given[6:]) == f"{user}:{password}".encode()
        fields = dict(re.findall(r'(\w+)="?((?:[^",\\]|\\.)*)"?', given.removeprefix("Digest ")))
        name = {"SHA-256": "sha256", "SHA-512-256": "sha512_256"}.get(
            fields.get("algorithm", "MD5"), "md5"
        )

        def digest(*parts: str) -> str:
            return hashlib.new(name, ":".join(parts).encode()).hexdigest()

        if "response" not in fields or fields["uri"] != self.uri:
            return False
        middle = [fields["nonce"]]
        if "qop" in fields:
            middle += [fields["nc"], fields["cnonce"], fields["qop"]]
        secret = digest(user, fields["realm"], password)
        return fields["response"] == digest(secret, *middle, digest(self.method, fields["uri"]))


Reply = tuple[int, list[tuple[str, str]]]
"""A status other than 200, and headers."""


class Camera:
    """A socket, a thread for each connection; closed with the block."""

    scheme = ""

    def __init__(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._server = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self.port = int(self._server.getsockname()[1])
        self.requests: list[Request] = []
        self.connections = 0
        self.stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"{self.scheme}{'s' if self._tls else ''}://127.0.0.1:{self.port}/live"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(30)

    def hang_up(self) -> None:
        """End every connection, as a reboot does."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            self._start(lambda c=connection, n=number: self._one(c, n))  # type: ignore[misc]

    def _one(self, connection: socket.socket, number: int) -> None:
        try:
            with connection:
                self._open.add(connection)
                if self._tls is not None:
                    connection.settimeout(10)
                    wrapped = self._tls.wrap_socket(connection, server_side=True)
                    wrapped.settimeout(None)
                    self._open.add(wrapped)
                    with wrapped:
                        self.serve(wrapped, number)
                    self._open.discard(wrapped)
                else:
                    self.serve(connection, number)
        except (OSError, ValueError):
            pass  # whoever asked has gone
        finally:
            self._open.discard(connection)

    def serve(self, connection: socket.socket, number: int) -> None:
        raise NotImplementedError

    def read(self, reader: object, number: int) -> Request | None:
        """The next request of a connection; media that come in between are passed over."""
        line = b""
        while not line.strip():
            first = reader.read(1)  # type: ignore[attr-defined]
            if not first:
                return None
            if first == b"$":
                _, size = struct.unpack(">BH", reader.read(3))  # type: ignore[attr-defined]
                reader.read(size)  # type: ignore[attr-defined]
                continue
            line = first + reader.readline()  # type: ignore[attr-defined]
        method, _, rest = line.decode("latin-1").partition(" ")
        uri = rest.rpartition(" ")[0]
        headers = {}
        while (text := reader.readline().decode("latin-1").strip()) != "":  # type: ignore[attr-defined]
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        count = sum(1 for request in self.requests if request.method == method)
        request = Request(method, uri, headers, count, number)
        self.requests.append(request)
        return request


@dataclass
class Play:
    """What an RTSP camera sends on PLAY."""

    frames: int = 300
    gop: int = 10
    fps: float = 50.0
    first: int = 0
    """The access unit that it begins with."""
    stamp: Callable[[int], int] = field(default=lambda index: (index + 1) * CLOCK // 10)
    last: int | None = None
    """It hangs up after so many; ``None`` = never."""


class RtspCamera(Camera):
    """RTSP, media interleaved. ``reply`` may refuse a request; ``None`` lets it pass."""

    scheme = "rtsp"

    def __init__(
        self,
        play: Play | Callable[[int], Play] | None = None,
        *,
        reply: Callable[[Request], Reply | None] = lambda _: None,
        sdp: Callable[[Request], str | None] = lambda _: None,
        sets_in_stream: bool = True,
        hangs_up: bool = False,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``sets_in_stream`` False: parameter sets are in the description alone. ``hangs_up``:
        it closes the connection after a refusal."""
        super().__init__(port=port, tls=tls)
        self._sets_in_stream = sets_in_stream
        self._hangs_up = hangs_up
        given = play or Play()
        self._play = given if callable(given) else lambda _: given
        self._reply = reply
        self._sdp = sdp

    def serve(self, connection: socket.socket, number: int) -> None:
        reader = connection.makefile("rb")
        lock = threading.Lock()

        def send(data: bytes) -> None:
            with lock:
                connection.sendall(data)

        while (request := self.read(reader, number)) is not None:
            status, headers = self._reply(request) or (200, [])
            body = ""
            if status == 200 and request.method == "DESCRIBE":
                given = self._sdp(request)
                body = self._description() if given is None else given
                headers = [("Content-Type", "application/sdp"), ("Content-Base", request.uri + "/")]
            elif status == 200 and request.method == "SETUP":
                headers = [("Transport", "RTP/AVP/TCP;unicast;interleaved=0-1"), ("Session", "9")]
            lines = [f"RTSP/1.0 {status} Whatever", f"CSeq: {request.headers.get('cseq', '')}"]
            lines += [f"{name}: {value}" for name, value in headers]
            lines += (
                [f"Content-Length: {len(body)}"] if body or request.method == "DESCRIBE" else []
            )
            send(("\r\n".join([*lines, "", ""]) + body).encode())
            if status == 200 and request.method == "PLAY":
                self._start(lambda: self._pump(send, number, connection))
            if request.method == "TEARDOWN" or (self._hangs_up and status != 200):
                return

    def _description(self) -> str:
        if self._sets_in_stream:
            return DESCRIPTION
        play = self._play(0)
        sets = [nal for nal in access_units(play.frames, play.gop)[0] if nal[0] & 31 in (7, 8)]
        told = ",".join(base64.b64encode(nal).decode() for nal in sets)
        mode = "packetization-mode=1"
        return DESCRIPTION.replace(mode, f"{mode};sprop-parameter-sets={told}")

    def _pump(self, send: Callable[[bytes], None], number: int, connection: socket.socket) -> None:
        play = self._play(number)
        units = access_units(play.frames, play.gop)
        sequence = 1
        with contextlib.suppress(OSError):
            for index in range(play.first, 10**9):
                if play.last is not None and index - play.first >= play.last:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                unit = units[index % len(units)]
                if not self._sets_in_stream:
                    unit = tuple(nal for nal in unit if nal[0] & 31 not in (7, 8))
                packets = rtp(unit, sequence, play.stamp(index))
                sequence += len(packets)
                for packet in packets:
                    send(b"$\0" + struct.pack(">H", len(packet)) + packet)
                if self.stopped.wait(1 / play.fps):
                    return


DESCRIPTION = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=Cam\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\na=control:*\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    "a=fmtp:96 packetization-mode=1\r\na=control:track1\r\n"
)


class HttpCamera(Camera):
    """HTTP: ``reply`` may refuse; then ``body`` gives the bytes of the answer, the head
    included, piece by piece."""

    scheme = "http"

    def __init__(
        self,
        body: Callable[[Request], Iterator[bytes]],
        *,
        reply: Callable[[Request], Reply | None] = lambda _: None,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(port=port, tls=tls)
        self._body = body
        self._reply = reply

    def serve(self, connection: socket.socket, number: int) -> None:
        reader = connection.makefile("rb")
        request = self.read(reader, number)
        if request is None:
            return
        refusal = self._reply(request)
        if refusal is not None:
            status, headers = refusal
            lines = [f"HTTP/1.1 {status} Whatever", *(f"{k}: {v}" for k, v in headers)]
            connection.sendall("\r\n".join([*lines, "Content-Length: 0", "", ""]).encode())
            return
        for piece in self._body(request):
            connection.sendall(piece)
            if self.stopped.is_set():
                return


def head(content_type: str | None, status: str = "200 OK") -> bytes:
    """The head of an HTTP answer; ``None`` = it names no type."""
    kind = "" if content_type is None else f"Content-Type: {content_type}\r\n"
    return f"HTTP/1.1 {status}\r\nServer: cam\r\n{kind}\r\n".encode()


MULTIPART = "multipart/x-mixed-replace; boundary=frame"


def parts(pictures: Iterator[bytes], boundary: bytes = b"--frame") -> Iterator[bytes]:
    """Well-written parts."""
    for picture in pictures:
        yield b"%b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (
            boundary,
            len(picture),
            picture,
        )
