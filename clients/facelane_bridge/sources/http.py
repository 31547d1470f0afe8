"""HTTP-MJPEG: a camera's ``multipart/x-mixed-replace`` address; its JPEGs pass untouched."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import urllib.parse

import av
import urllib3.exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

from facelane_bridge.config import CameraSettings, SourceKind
from facelane_bridge.sources.access import NO_SUCH_HOST, load_credentials, trusting
from facelane_bridge.sources.api import CapturedFrame, SourceError, SourceInfo, SourceReason
from facelane_bridge.sources.challenge import Authenticator, challenges
from facelane_bridge.sources.jpeg import MAX_PIXELS, JpegEncoder, decode_picture, jpeg_size
from facelane_bridge.sources.mjpeg import MjpegError, MjpegParser, boundary_of
from facelane_bridge.sources.pace import Decimator, MediaClock

READ_CHUNK_BYTES = 64 * 1024
MAX_REDIRECTS = 5
MAX_STALE_NONCES = 2
"""How often a camera may call a nonce stale that it gave a moment ago."""
_FAILURES = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError)
_BROKEN = "the camera refuses or broke the connection"


class MjpegSource:
    """A camera's ``multipart/x-mixed-replace`` address; its JPEGs pass untouched."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._interrupted = threading.Event()
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._parser: MjpegParser | None = None
        self._ready: list[bytes] = []
        self._clock = MediaClock()
        self._decimator = Decimator(camera.max_fps)
        self._shrink = (
            JpegEncoder(camera.jpeg_quality, camera.max_side) if camera.max_side else None
        )

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

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

    def open(self) -> SourceInfo:
        response = self._response = self._request()
        try:
            boundary = boundary_of(response.headers.get("Content-Type", ""))
        except MjpegError as error:
            self.close()
            raise SourceError(SourceReason.FORMAT_INVALID, error.message, permanent=True) from None
        self._parser = MjpegParser(boundary)
        return SourceInfo(
            SourceKind.MJPEG, "mjpeg", 0, 0, 0.0, None, reencodes=self._shrink is not None
        )

    def _request(self) -> HTTPResponse:
        """The camera's answer of 200, after redirects and one word of authentication.

        Credentials go to the camera's own host alone, and never from https to http.
        """
        url, redirects, stale = self._camera.source, 0, 0
        credentials = load_credentials(self._camera)
        authenticator = None if credentials is None else Authenticator(credentials)
        answered = False
        while True:
            parts = urllib.parse.urlsplit(url)
            own = urllib.parse.urlsplit(self._camera.source)
            trusted = parts.hostname == own.hostname and parts.scheme in (own.scheme, "https")
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            answer = authenticator.answer("GET", path) if authenticator and trusted else None
            response = self._ask(parts, path, answer)
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                redirects += 1
                url = urllib.parse.urljoin(url, location)
                if redirects > MAX_REDIRECTS or urllib.parse.urlsplit(url).scheme not in (
                    "http",
                    "https",
                ):
                    self.close()
                    raise SourceError(
                        SourceReason.CONNECT_FAILED,
                        "the camera redirects to nowhere; check its address",
                    )
            elif response.status == 401 and authenticator is not None and trusted:
                offered = challenges(response.headers.getlist("WWW-Authenticate"))
                stale += any(challenge.is_stale for challenge in offered)
                # Cameras lock accounts after a few wrong passwords: it is sent once.
                if answered and not 0 < stale <= MAX_STALE_NONCES:
                    self.close()
                    raise self._refused(401, had_credentials=True)
                if not authenticator.take(offered):
                    self.close()
                    raise SourceError(
                        SourceReason.AUTHENTICATION_FAILED,
                        "the camera asks for an authentication that is not known here; "
                        "set it to digest or to basic",
                        permanent=True,
                    )
                answered = True
            elif response.status != 200:
                self.close()
                raise self._refused(response.status, credentials is not None)
            else:
                return response
            self.close()

    def _ask(
        self, parts: urllib.parse.SplitResult, path: str, authorization: str | None
    ) -> HTTPResponse:
        camera = self._camera
        timeout = min(camera.open_timeout, camera.read_timeout)
        assert parts.hostname is not None
        # A camera on the local network is not behind the proxy of the environment.
        connection = (
            HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout, ssl_context=trusting(camera)
            )
            if parts.scheme == "https"
            else HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        )
        self._connection = connection
        headers = {"User-Agent": "facelane-bridge", "Connection": "close"}
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
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

    def _refused(self, status: int, had_credentials: bool) -> SourceError:
        if status in (401, 403):
            hint = "check them" if had_credentials else "name them with credentials_env or _file"
            return SourceError(
                SourceReason.AUTHENTICATION_FAILED,
                f"the camera refuses the credentials; {hint}",
                permanent=True,
            )
        if status in (404, 410):
            return SourceError(
                SourceReason.NOT_FOUND, "the camera has no such stream; check its address"
            )
        return SourceError(SourceReason.CONNECT_FAILED, f"the camera answers HTTP {status}")

    def _unreachable(self, error: BaseException) -> SourceError:
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        match error:
            case urllib3.exceptions.NameResolutionError():
                return SourceError(SourceReason.CONNECT_FAILED, NO_SUCH_HOST)
            case urllib3.exceptions.NewConnectionError():  # of urllib3's time-outs, too
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)
            case TimeoutError() | urllib3.exceptions.TimeoutError():
                return SourceError(
                    SourceReason.TIMED_OUT, "the camera does not answer in time; is it on?"
                )
            case ssl.SSLError() | urllib3.exceptions.SSLError():
                return SourceError(
                    SourceReason.TLS_FAILED,
                    "the camera's certificate is not trusted; name its authority in tls_ca_file",
                )
            case http.client.RemoteDisconnected() | urllib3.exceptions.ProtocolError():
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)
            case http.client.HTTPException():
                return SourceError(SourceReason.FORMAT_INVALID, "the camera does not speak HTTP")
            case _:
                return SourceError(SourceReason.CONNECT_FAILED, _BROKEN)

    def read(self) -> CapturedFrame | None:
        while True:
            while self._ready:
                data = self._ready.pop(0)
                media_time = self._clock.media_time(None, time.monotonic())
                if not self._decimator.wants(media_time):
                    continue
                return CapturedFrame(self._shrunk(data), media_time, time.time())
            if self._interrupted.is_set():
                raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
            self._receive()

    def _receive(self) -> None:
        response, parser = self._response, self._parser
        assert response is not None, "open() comes before read()"
        assert parser is not None
        try:
            data = response.read1(READ_CHUNK_BYTES)
        except _FAILURES as error:
            raise self._unreachable(error) from None
        if not data or parser.ended:
            raise SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")
        try:
            self._ready += parser.feed(data)
        except MjpegError as error:
            raise SourceError(SourceReason.FORMAT_INVALID, error.message) from None

    def _shrunk(self, data: bytes) -> bytes:
        if self._shrink is None:
            return data
        size = jpeg_size(data)
        if size is None or max(size) <= self._camera.max_side or size[0] * size[1] > MAX_PIXELS:
            return data  # what cannot be read is the server's to refuse, frame by frame
        try:
            return self._shrink.encode(decode_picture(data, "mjpeg"))
        except (av.FFmpegError, ValueError):
            return data
