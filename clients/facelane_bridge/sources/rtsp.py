"""Between FFmpeg and an RTSP camera: one connection, in which we have our say.

FFmpeg speaks RTSP well and authenticates badly: it keeps 127 bytes of user and password,
answers the last of several challenges, checks no certificate's name, and calls every refusal
an input/output error. So it connects to this relay on the loopback interface, which speaks
to the camera in its place: authenticates, encrypts, counts, and knows what the camera said.
FFmpeg never sees a password. Media pass as they are.

::

    FFmpeg ──▶ 127.0.0.1, a token in the path ──▶ RtspRelay (a thread) ──▶ camera, TCP or TLS
                                                                (UDP media: past the relay)
"""

from __future__ import annotations

import contextlib
import re
import secrets
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from facelane_bridge.camera import Outlook
from facelane_bridge.config import CameraSettings, Transport
from facelane_bridge.sources.access import (
    NO_SUCH_HOST,
    Trust,
    as_sent,
    host_of,
    load_credentials,
    refused,
    untrusted,
)
from facelane_bridge.sources.api import SourceError, SourceReason
from facelane_bridge.sources.challenge import Authenticator, Credentials, challenges

CHUNK_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 1024 * 1024
MAX_PENDING = 32
"""Requests without an answer."""
MAX_TRIES = 5
"""Of one request: without a password, with it, with a nonce that is not stale."""
IDLE_LOOK = 60.0
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_OPENING = frozenset({"OPTIONS", "DESCRIBE", "SETUP", "PLAY"})


@dataclass(slots=True)
class _Message:
    """A request or a response: first line, headers in their order, body."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]

    def put(self, name: str, value: str) -> None:
        kept = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        self.headers = [*kept, (name, value)]

    def encode(self) -> bytes:
        lines = [self.first, *(f"{key}: {value}" for key, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + self.body


@dataclass(slots=True)
class _Pending:
    """A request of FFmpeg's that the camera has not answered."""

    message: _Message
    method: str
    uri: str
    asked_as: str
    """Its CSeq, as FFmpeg counts."""
    due: float
    tries: int = 1
    answered: bool = False
    """The password went with it."""

    @property
    def is_answer(self) -> bool:
        """It was asked before, of a camera that knows nothing else of us."""
        return self.tries > 1 and self.method in ("OPTIONS", "DESCRIBE")


def split(buffer: bytearray) -> Iterator[bytes | _Message]:
    """Take what is complete from the front of ``buffer``: interleaved media (and whatever is
    no RTSP) as bytes, requests and responses as messages. Raises ``ValueError``."""
    while buffer:
        end = 0
        while end + 4 <= len(buffer) and buffer[end] == 0x24:
            size = 4 + int.from_bytes(buffer[end + 2 : end + 4])
            if end + size > len(buffer):
                break
            end += size
        if end:
            yield bytes(buffer[:end])
            del buffer[:end]
            continue
        if buffer[0] == 0x24:
            return
        if not (0x41 <= buffer[0] <= 0x5A or buffer[0] in b"\r\n"):
            # Stray bytes; FFmpeg looks for the next packet as well.
            at = buffer.find(b"$")
            stray = len(buffer) if at < 0 else at
            yield bytes(buffer[:stray])
            del buffer[:stray]
            continue
        while buffer and buffer[0] in b"\r\n":
            del buffer[:1]
        found = _END_OF_HEAD.search(buffer, 0, MAX_HEAD_BYTES)
        if found is None:
            if len(buffer) >= MAX_HEAD_BYTES:
                raise ValueError("a head without an end")
            return
        first, *lines = bytes(buffer[: found.start()]).decode("latin-1").splitlines()
        headers = []
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                headers.append((name.strip(), value.strip()))
        message = _Message(first, headers, b"")
        length = message.get("content-length")
        size = int(length) if length.isdigit() and len(length) < 10 else 0
        if size > MAX_BODY_BYTES:
            raise ValueError("a body without measure")
        if len(buffer) < found.end() + size:
            return
        message.body = bytes(buffer[found.end() : found.end() + size])
        del buffer[: found.end() + size]
        yield message


def _received(sock: socket.socket) -> bytes:
    """What is there; nothing once the other side has hung up."""
    try:
        return sock.recv(CHUNK_BYTES)
    except ConnectionError:
        return b""


class RtspRelay:
    """One opening of one RTSP camera. ``open`` gives the address for FFmpeg."""

    def __init__(self, camera: CameraSettings, credentials: Credentials | None = None) -> None:
        """``credentials``: where the settings name none."""
        self._camera = camera
        self._given = credentials
        self._own = urllib.parse.urlsplit(camera.source)
        self._address = self._own
        self._interrupted = threading.Event()
        self._upstream: socket.socket | None = None
        self._client: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._local = ""
        self._authenticator: Authenticator | None = None
        self._pending: dict[int, _Pending] = {}
        self._sequence = 0
        self._hung_up = False
        self.answered = False
        """The camera has answered something."""
        self.playing = False
        self.packets = 0
        """Chunks of media that came through here; none with UDP."""
        self.redirect = ""
        self.error: SourceError | None = None
        """What the camera's refusal means."""

    # --- from the reader's thread, but interrupt ---

    def open(self, address: str) -> str:
        """Connect to the camera at ``address``; gives the address that FFmpeg shall open.
        Raises ``SourceError``."""
        self._address = urllib.parse.urlsplit(address)
        credentials = load_credentials(self._camera) or self._given
        # To the camera's own host alone, and never from rtsps to rtsp.
        same = self._address.hostname == self._own.hostname
        if credentials and same and self._address.scheme in (self._own.scheme, "rtsps"):
            self._authenticator = Authenticator(credentials)
        self._upstream = upstream = self._connect()
        family = socket.AF_INET6 if upstream.family == socket.AF_INET6 else socket.AF_INET
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=4)
        except OSError:
            raise SourceError(
                SourceReason.CONNECT_FAILED, "this machine gives no socket; see its limits"
            ) from None
        port = self._listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        # The token keeps other users of this machine out of a connection that is not theirs.
        self._local = f"rtsp://{shown}:{port}/{secrets.token_hex(16)}"
        self._thread = threading.Thread(target=self._run, name="rtsp relay", daemon=True)
        self._thread.start()
        path = urllib.parse.urlunsplit(("", "", self._address.path, self._address.query, ""))
        return self._local + as_sent(path)

    def interrupt(self) -> None:
        """End both connections; whoever waits for them gets an end of file."""
        self._interrupted.set()
        for sock in (self._upstream, self._client, self._listener):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            # FFmpeg has said good-bye, if it could: a moment to pass it on.
            thread.join(0.5)
            self.interrupt()
            thread.join(5.0)
        for sock in (self._upstream, self._client, self._listener):
            if sock is not None:
                sock.close()

    def _connect(self) -> socket.socket:
        camera, address = self._camera, self._address
        tls = address.scheme == "rtsps"
        trust = Trust(camera, verify=bool(camera.tls_ca_file))
        timeout = min(camera.open_timeout, camera.read_timeout)
        where = (host_of(address), address.port or (322 if tls else 554))
        first: ssl.SSLError | None = None
        while True:
            context = trust.context() if tls else None
            try:
                self._upstream = sock = socket.create_connection(where, timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if context is None:
                    return sock
                name = camera.tls_server_name or host_of(address, zone=False)
                return context.wrap_socket(sock, server_hostname=name)
            except ssl.SSLCertVerificationError as error:
                sock.close()
                first = first or error
                if not trust.fall_back():
                    raise untrusted(camera, first) from None
            except ssl.SSLError as error:
                sock.close()
                raise untrusted(camera, error) from None
            except OSError as error:
                raise self._unreachable(error) from None

    def _unreachable(self, error: OSError) -> SourceError:
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        match error:
            case TimeoutError():
                return SourceError(
                    SourceReason.TIMED_OUT, "the camera does not answer in time; is it on?"
                )
            case socket.gaierror():
                return SourceError(SourceReason.CONNECT_FAILED, NO_SUCH_HOST)
            case _:
                return SourceError(
                    SourceReason.CONNECT_FAILED, "the camera refuses or broke the connection"
                )

    # --- the relay's own thread ---

    def _run(self) -> None:
        assert self._listener is not None
        try:
            from_client = bytearray()
            client = self._client = self._accept(self._listener, from_client)
            if client is not None:
                self._pump(client, from_client)
        except (OSError, ValueError):
            pass  # one of the two has gone, or speaks no RTSP: both are told below
        finally:
            for sock in (self._client, self._upstream):
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket, received: bytearray) -> socket.socket | None:
        """FFmpeg's connection: the one whose first request knows the token."""
        until = time.monotonic() + self._camera.open_timeout
        token = self._local.rpartition("/")[2].encode()
        try:
            while (left := until - time.monotonic()) > 0 and not self._interrupted.is_set():
                listener.settimeout(left)
                client, _ = listener.accept()
                client.settimeout(min(left, 2.0))
                with contextlib.suppress(OSError):
                    while b"\n" not in received and len(received) < MAX_HEAD_BYTES:
                        data = client.recv(CHUNK_BYTES)
                        if not data:
                            break
                        received += data
                if token in received.partition(b"\n")[0]:
                    client.settimeout(None)
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return client
                client.close()
                received.clear()
        finally:
            listener.close()
        return None

    def _pump(self, client: socket.socket, from_client: bytearray) -> None:
        upstream = self._upstream
        assert upstream is not None
        from_camera = bytearray()
        patience = min(self._camera.open_timeout, self._camera.read_timeout)
        self._from_client(from_client, upstream, patience)
        while not self._interrupted.is_set():
            due = min((pending.due for pending in self._pending.values()), default=None)
            wait = IDLE_LOOK if due is None else max(0.0, due - time.monotonic())
            waiting = isinstance(upstream, ssl.SSLSocket) and upstream.pending()
            readable, _, _ = select.select([client, upstream], [], [], 0 if waiting else wait)
            if waiting or upstream in readable:
                data = _received(upstream)
                if not data:
                    again = self._answer_anew()
                    if again is None:
                        return
                    upstream, from_camera = again, bytearray()
                    continue
                from_camera += data
                out = self._from_camera(from_camera, upstream)
                if out:
                    client.sendall(out)
                if self.redirect or (self.error is not None and not self.playing):
                    return
            if client in readable:
                data = client.recv(CHUNK_BYTES)
                if not data:
                    return
                from_client += data
                self._from_client(from_client, upstream, patience)
            if due is not None and not readable and not waiting and time.monotonic() >= due:
                if not self.playing:
                    self.error = SourceError(
                        SourceReason.TIMED_OUT,
                        "the camera takes the connection and does not answer in time",
                    )
                    return
                self._pending.clear()

    def _from_client(self, buffer: bytearray, upstream: socket.socket, patience: float) -> None:
        for part in split(buffer):
            if isinstance(part, bytes):
                upstream.sendall(part)  # RTCP
                continue
            method, _, rest = part.first.partition(" ")
            uri, _, version = rest.rpartition(" ")  # a camera may call its track "video 1"
            if method.startswith("RTSP/") or not version.startswith("RTSP/"):
                upstream.sendall(part.encode())  # an answer to a request of the camera's
                continue
            if uri.startswith(self._local):
                netloc = re.sub(r"%[^]]*(?=])", "", self._address.netloc)
                uri = f"{self._address.scheme}://{netloc}{uri[len(self._local) :]}"
            part.first = f"{method} {uri} {version}"
            due = time.monotonic() + patience
            self._send(_Pending(part, method, uri, part.get("cseq"), due), upstream)

    def _send(self, request: _Pending, upstream: socket.socket) -> None:
        self._sequence += 1
        message = request.message
        message.headers = [(k, v) for k, v in message.headers if k.lower() != "authorization"]
        message.put("CSeq", str(self._sequence))
        if self._authenticator is not None:
            answer = self._authenticator.answer(request.method, request.uri)
            if answer is not None:
                message.put("Authorization", answer)
                request.answered = True
        if request.method != "TEARDOWN":
            while len(self._pending) >= MAX_PENDING:
                del self._pending[next(iter(self._pending))]
            self._pending[self._sequence] = request
        with contextlib.suppress(ConnectionError):  # the next look at it tells
            upstream.sendall(message.encode())

    def _answer_anew(self) -> socket.socket | None:
        """The camera has hung up. Some do so with every question for a password: the answer goes
        by a connection of its own, where nothing but the question has been."""
        waiting = list(self._pending.values())
        if self._hung_up or not waiting or not all(one.is_answer for one in waiting):
            return None
        self._hung_up = True
        if self._upstream is not None:
            self._upstream.close()
        try:
            upstream = self._connect()
        except SourceError as error:
            self.error = error
            return None
        if self._interrupted.is_set():
            return None
        self._pending.clear()
        for one in waiting:
            self._send(one, upstream)
        return upstream

    def _from_camera(self, buffer: bytearray, upstream: socket.socket) -> bytes:
        out: deque[bytes] = deque()
        for part in split(buffer):
            if isinstance(part, bytes):
                if part[0] == 0x24:
                    self.packets += 1
                out.append(part)
            elif not part.first.startswith("RTSP/"):
                out.append(part.encode())  # a request of the camera's
            elif self._take(part, upstream):
                out.append(part.encode())
        return b"".join(out)

    def _take(self, response: _Message, upstream: socket.socket) -> bool:
        """Note what a response says. False: it is not for FFmpeg."""
        self.answered = True
        words = response.first.split(" ", 2)
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        sequence = response.get("cseq")
        number = int(sequence) if sequence.isdigit() else -1
        if number not in self._pending and self._pending and not sequence:
            number = next(iter(self._pending))  # some cameras forget to number
        request = self._pending.pop(number, None)
        if request is None:
            return False
        response.put("CSeq", request.asked_as)
        if status == 401 and self._asks_again(response, request):
            self._send(request, upstream)
            return False
        if 200 <= status < 300:
            if request.answered and self._authenticator is not None:
                self._authenticator.accepted()
            self._understood(response, request)
        elif 300 <= status < 400 and response.get("location"):
            # Not for FFmpeg, which would go there without us.
            self.redirect = urllib.parse.urljoin(
                request.uri, as_sent(response.get("location"), "latin-1")
            )
            return False
        elif request.method in _OPENING and not self.playing:
            self.error = self._refusal(status, response, request)
        return True

    def _asks_again(self, response: _Message, request: _Pending) -> bool:
        """Whether a 401 is a question and no refusal."""
        offered = challenges(response.get_all("www-authenticate"))
        if self._authenticator is None or request.tries >= MAX_TRIES:
            return False
        request.tries += 1
        return self._authenticator.take(offered)

    def _understood(self, response: _Message, request: _Pending) -> None:
        match request.method:
            case "DESCRIBE" if b"m=video" not in response.body.replace(b" ", b""):
                what = "no video" if response.body.strip() else "nothing yet"
                self.error = SourceError(
                    SourceReason.NO_VIDEO, f"the camera describes {what}; it may still start"
                )
            case "SETUP":
                transport = response.get("transport")
                if "server_port" in transport and "source=" not in transport:
                    # FFmpeg would send its reports to where the relay is.
                    assert self._upstream is not None
                    peer = self._upstream.getpeername()[0]
                    response.put("Transport", f"{transport};source={peer}")
            case "PLAY":
                self.playing = True
            case _:
                pass

    def _refusal(self, status: int, response: _Message, request: _Pending) -> SourceError:
        reason, outlook = SourceReason.CONNECT_FAILED, Outlook.PASSING
        match status:
            case 401 | 403:
                asked_for = [c.scheme for c in challenges(response.get_all("www-authenticate"))]
                return refused(self._camera, status, answered=request.answered, asked_for=asked_for)
            case 404 | 410:
                reason = SourceReason.NOT_FOUND
                message = "the camera has no such stream; check the path of its address"
            case 453:
                message = (
                    "the camera has no place for another viewer (RTSP 453); close other viewers, "
                    "or use its second stream"
                )
            case 461:
                other = "udp" if self._camera.transport is Transport.TCP else "tcp"
                message = (
                    f"the camera refuses to send over {self._camera.transport.value.upper()} "
                    f'(RTSP 461); set transport = "{other}"'
                )
            case 503:
                message = "the camera is busy or still starts (RTSP 503)"
            case _ if status >= 500:
                message = f"the camera has a fault of its own (RTSP {status} to {request.method})"
            case _:
                message = f"the camera answers RTSP {status} to {request.method}"
        return SourceError(reason, message, outlook)
