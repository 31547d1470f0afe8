"""HTTP-MJPEG: a camera's stream of pictures, or one picture a connection.

The body decides what it is, not the header: cameras announce multipart and send none, or
the other way round. A page instead of pictures is told as what it is and asked for again:
cameras serve such while they start.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
from collections import deque

import structlog
import urllib3.exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

from facelane_bridge.config import CameraSettings, SourceKind
from facelane_bridge.sources.access import (
    NO_SUCH_HOST,
    Trust,
    as_sent,
    host_of,
    load_credentials,
    refused,
    untrusted,
)
from facelane_bridge.sources.api import (
    CapturedFrame,
    Refusal,
    SourceError,
    SourceInfo,
    SourceReason,
)
from facelane_bridge.sources.challenge import Authenticator, challenges
from facelane_bridge.sources.jpeg import JpegGate, read_header
from facelane_bridge.sources.mjpeg import MjpegError, MjpegSplitter, media_type
from facelane_bridge.sources.pace import Decimator, MediaClock

READ_CHUNK_BYTES = 64 * 1024
MAX_REDIRECTS = 5
MAX_PAGE_BYTES = 256 * 1024
"""Of an answer that announces no pictures, until one has to come."""
SINGLE_INTERVAL = 0.1
"""Seconds between two connections to a camera that gives one picture each, at least."""
_FAILURES = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError)
_BROKEN = "the camera refuses or broke the connection"
_REDIRECTS = (301, 302, 303, 307, 308)

log = structlog.get_logger("facelane_bridge")


class _Answer(http.client.HTTPResponse):
    """Firmware that has to write a length, and cannot know that of a stream, writes 0."""

    def begin(self) -> None:
        super().begin()
        if self.length == 0 and self.headers.get_content_maintype() == "multipart":
            del self.headers["Content-Length"]
            self.length, self.will_close = None, True


class MjpegSource:
    """A camera's HTTP address; its plain JPEGs pass untouched."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._interrupted = threading.Event()
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._type = ""
        self._splitter = MjpegSplitter()
        self._ready: deque[bytes] = deque()
        self._asked_at = 0.0
        self._told_lengths = False
        self._clock = MediaClock()
        self._decimator = Decimator(camera.analysed_fps)
        self._gate = JpegGate(camera.jpeg_quality, camera.max_side)

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    @property
    def connected(self) -> bool:
        return self._response is not None

    @property
    def seen(self) -> str:
        return self._splitter.describe()

    def wants_key_frame(self, since: float) -> None:
        """Every picture is one."""

    def interrupt(self) -> None:
        self._interrupted.set()
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        response, self._response = self._response, None
        connection, self._connection = self._connection, None
        for open_one in (response, connection):
            if open_one is not None:
                open_one.close()

    # --- opening ---

    def open(self) -> SourceInfo:
        self._connect()
        if self._type.partition("/")[0] not in ("multipart", "image"):
            # It does not announce pictures: it may give some all the same.
            while not self._ready:
                self._receive()
        header = read_header(self._ready[0]) if self._ready else None
        return SourceInfo(
            SourceKind.MJPEG,
            "mjpeg",
            0 if header is None else header.width,
            0 if header is None else header.height,
            0.0,
            None,
            reencodes=self._gate.scales,
        )

    def _connect(self) -> None:
        self._asked_at = time.monotonic()
        response = self._request()
        self._type, boundary = media_type(response.headers.get("Content-Type", ""))
        self._splitter = MjpegSplitter(boundary)
        # From here on it is the camera's pictures that have to come in time.
        connection = self._connection
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(self._camera.read_timeout)

    def _request(self) -> HTTPResponse:
        """The camera's answer of 200, after redirects and one word of authentication.

        Credentials go to the camera's own host alone, and never from https to http.
        """
        own = urllib.parse.urlsplit(self._camera.source)
        url, redirects = self._camera.source, 0
        credentials = load_credentials(self._camera)
        authenticator = None if credentials is None else Authenticator(credentials)
        while True:
            parts = urllib.parse.urlsplit(url)
            trusted = parts.hostname == own.hostname and parts.scheme in (own.scheme, "https")
            path = as_sent(urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")))
            answer = authenticator.answer("GET", path) if authenticator and trusted else None
            response = self._ask(parts, path, answer)
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                redirects += 1
                url = self._redirected(url, location, redirects)
            elif response.status == 401:
                offered = challenges(response.headers.getlist("WWW-Authenticate"))
                if authenticator is None or not trusted or not authenticator.take(offered):
                    self.close()
                    schemes = [challenge.scheme for challenge in offered]
                    raise refused(self._camera, 401, answered=answer is not None, asked_for=schemes)
            elif response.status != 200:
                self.close()
                raise self._turned_away(response.status, answer is not None)
            else:
                return response
            self.close()

    def _redirected(self, url: str, location: str, count: int) -> str:
        try:
            url = urllib.parse.urljoin(url, as_sent(location, "latin-1"))
            parts = urllib.parse.urlsplit(url)
            nowhere = parts.scheme not in ("http", "https") or not parts.hostname
            _ = parts.port
        except ValueError:
            nowhere = True
        if nowhere or count > MAX_REDIRECTS:
            self.close()
            raise SourceError(
                SourceReason.CONNECT_FAILED, "the camera redirects to nowhere; check its address"
            )
        return url

    def _turned_away(self, status: int, answered: bool) -> SourceError:
        match status:
            case 403:
                return refused(self._camera, 403, answered=answered)
            case 404 | 410:
                return SourceError(
                    SourceReason.NOT_FOUND, "the camera has no such stream; check its address"
                )
            case 503:
                message = "the camera is busy or still starts (HTTP 503)"
            case _:
                message = f"the camera answers HTTP {status}"
        return SourceError(SourceReason.CONNECT_FAILED, message)

    def _ask(
        self, parts: urllib.parse.SplitResult, path: str, authorization: str | None
    ) -> HTTPResponse:
        headers = {"User-Agent": "facelane-bridge", "Connection": "close"}
        if authorization is not None:
            headers["Authorization"] = authorization
        trust = Trust(self._camera)
        first: ssl.SSLError | None = None
        while True:
            connection = self._new_connection(parts, trust)
            connection.response_class = _Answer
            self._connection = connection
            try:
                connection.connect()
                break
            except ssl.SSLCertVerificationError as error:
                self.close()
                first = first or error
                if not trust.fall_back():
                    raise untrusted(self._camera, first) from None
            except _FAILURES as error:
                self.close()
                raise self._unreachable(error) from None
        try:
            if self._interrupted.is_set():
                raise OSError
            connection.request(
                "GET",
                path,
                headers=headers,
                preload_content=False,
                decode_content=False,
                enforce_content_length=False,
            )
            response = connection.getresponse()
        except _FAILURES as error:
            self.close()
            raise self._unreachable(error) from None
        self._response = response
        return response

    def _new_connection(self, parts: urllib.parse.SplitResult, trust: Trust) -> HTTPConnection:
        host = host_of(parts)
        timeout = min(self._camera.open_timeout, self._camera.read_timeout)
        # A camera on the local network is not behind the proxy of the environment.
        if parts.scheme == "http":
            return HTTPConnection(host, parts.port, timeout=timeout)
        context = trust.context()
        return HTTPSConnection(
            host,
            parts.port,
            timeout=timeout,
            ssl_context=context,
            cert_reqs=context.verify_mode,
            server_hostname=self._camera.tls_server_name or host_of(parts, zone=False),
        )

    def _unreachable(self, error: BaseException) -> SourceError:
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        match error:
            case urllib3.exceptions.NameResolutionError():
                return SourceError(SourceReason.CONNECT_FAILED, NO_SUCH_HOST)
            case urllib3.exceptions.NewConnectionError():  # of urllib3's time-outs, too
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)
            case TimeoutError() | urllib3.exceptions.TimeoutError():
                return SourceError(SourceReason.TIMED_OUT, self._silence())
            case ssl.SSLError() | urllib3.exceptions.SSLError():
                return untrusted(self._camera, error)
            case http.client.RemoteDisconnected() | urllib3.exceptions.ProtocolError():
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)
            case http.client.HTTPException():
                return SourceError(SourceReason.FORMAT_INVALID, "the camera does not speak HTTP")
            case _:
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)

    def _silence(self) -> str:
        if not self.connected:
            return "the camera does not answer in time; is it on?"
        return f"the camera answered and fell silent; {self.seen}".rstrip("; ")

    # --- reading ---

    def read(self) -> CapturedFrame | None:
        while True:
            while self._ready:
                data = self._ready.popleft()
                media_time = self._clock.media_time(None, time.monotonic())
                if not self._decimator.wants(media_time):
                    continue
                taken = self._gate.take(data)
                if isinstance(taken, Refusal):
                    return CapturedFrame(b"", media_time, time.time(), taken)
                return CapturedFrame(taken, media_time, time.time())
            self._receive()

    def _receive(self) -> None:
        if self._interrupted.is_set():
            raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        response, splitter = self._response, self._splitter
        assert response is not None, "open() comes before read()"
        try:
            data = response.read1(READ_CHUNK_BYTES)
        except _FAILURES as error:
            raise self._unreachable(error) from None
        try:
            self._ready += splitter.feed(data) if data else splitter.finish()
        except MjpegError as error:
            raise SourceError(SourceReason.FORMAT_INVALID, error.message) from None
        if splitter.lengths_wrong and not self._told_lengths:
            self._told_lengths = True
            log.info(
                "the camera's parts are not as long as they say; their own markers count",
                camera=self._camera.name,
            )
        if not data:
            self._ended()
        elif not splitter.pictures and splitter.passed > MAX_PAGE_BYTES and not self._announced:
            raise self._no_pictures()

    @property
    def _announced(self) -> bool:
        return self._type.startswith(("multipart/", "image/"))

    def _ended(self) -> None:
        """The camera has closed the connection: what that means follows from what it gave."""
        match self._splitter.pictures:
            case 0:
                raise self._no_pictures()
            case 1:
                # A picture a connection: the next one is asked for at the camera's own pace.
                if not self._ready:
                    interval = max(SINGLE_INTERVAL, 0.9 / (self._camera.max_fps or 1000))
                    self._interrupted.wait(self._asked_at + interval - time.monotonic())
                    self.close()
                    self._connect()
            case _:
                if not self._ready:
                    raise SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")

    def _no_pictures(self) -> SourceError:
        if self._announced:
            what = self.seen or "it ended without a picture"
            return SourceError(SourceReason.FORMAT_INVALID, f"the camera gives no picture: {what}")
        kind = f"{self._type!r}" if self._type else "something that it gives no type of"
        return SourceError(
            SourceReason.FORMAT_INVALID,
            f"the address answers {kind}, and no pictures; use the camera's MJPEG stream "
            "address, or wait until it has started",
        )
