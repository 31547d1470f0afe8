"""Passwords of any length, several challenges, stale nonces, certificates of cameras' own."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from facelane_bridge.camera import Outlook
from facelane_bridge.config import ConfigError
from facelane_bridge.reader import check_camera
from facelane_bridge.sources import SourceReason
from tests.cases.cameras import certificate, failure, frames, settings
from tests.fakes.cameras import jpeg
from tests.fakes.field_cameras import (
    MULTIPART,
    Camera,
    HttpCamera,
    Reply,
    Request,
    RtspCamera,
    head,
    parts,
)

USER = 'us"er\\ü'
LONG = "#@!$%&*()_+{}|<>?/.,;:[]=-~^\\'\"äöü" * 20
SHA = 'Digest realm="cam", qop="auth", algorithm=SHA-256, nonce="s1"'
MD5 = 'Digest realm="cam", qop="auth", algorithm=MD5, nonce="m1"'
OLD = 'Digest realm="cam", nonce="o1"'
BASIC = 'Basic realm="cam"'


def pictures(_: Request) -> Iterator[bytes]:
    yield head(MULTIPART)
    yield from parts(jpeg(number) for number in range(3))


def a_camera(kind: str, reply: Any, **options: Any) -> HttpCamera | RtspCamera:
    if kind == "http":
        return HttpCamera(pictures, reply=reply, **options)
    return RtspCamera(reply=reply, **options)


@pytest.fixture
def long_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAM", f"viewer:{LONG}")


@pytest.mark.parametrize("kind", ["http", "rtsp"])
@pytest.mark.parametrize(
    "offered", [[BASIC], [OLD], [SHA, MD5], [MD5, SHA], [f"{BASIC}, {MD5}"], ["NTLM", SHA]]
)
def test_a_long_password_through_any_challenge(
    long_password: None, kind: str, offered: list[str]
) -> None:
    def reply(request: Request) -> Reply | None:
        if request.knows("viewer", LONG):
            return None
        return 401, [("WWW-Authenticate", challenge) for challenge in offered]

    with a_camera(kind, reply) as camera:
        assert len(frames(camera.url, 2, credentials_env="CAM")) == 2
    sent = [r.headers["authorization"] for r in camera.requests if "authorization" in r.headers]
    assert sent[0].startswith("Basic") == (offered == [BASIC])
    assert all("SHA-256" in header for header in sent) == (SHA in offered)


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_names_with_quotes_and_letters_of_all_kinds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAM", f"{USER}:pw")

    def reply(request: Request) -> Reply | None:
        raw = request.headers.get("authorization", "")
        name = hashlib.sha256(f"{USER}:cam:pw".encode()).hexdigest()
        found = '"us\\"er\\\\ü"'.encode().decode("latin-1") in raw
        return None if found and name else (401, [("WWW-Authenticate", SHA)])

    with a_camera(kind, reply) as camera:
        assert len(frames(camera.url, 2, credentials_env="CAM")) == 2


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_firmware_that_offers_more_than_it_computes(long_password: None, kind: str) -> None:
    def reply(request: Request) -> Reply | None:
        md5 = "algorithm=MD5" in request.headers.get("authorization", "")
        if md5 and request.knows("viewer", LONG):
            return None
        return 401, [("WWW-Authenticate", SHA), ("WWW-Authenticate", MD5)]

    with a_camera(kind, reply) as camera:
        assert len(frames(camera.url, 2, credentials_env="CAM")) == 2


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_a_stale_nonce_is_no_refusal(long_password: None, kind: str) -> None:
    def reply(request: Request) -> Reply | None:
        given = request.headers.get("authorization", "")
        if 'nonce="n2"' in given and request.knows("viewer", LONG):
            return None
        stale = ", stale=TRUE" if given else ""
        nonce = "n2" if given else "n1"
        challenge = f'Digest realm="cam", qop="auth", nonce="{nonce}"{stale}'
        return 401, [("WWW-Authenticate", challenge)]

    with a_camera(kind, reply) as camera:
        assert len(frames(camera.url, 2, credentials_env="CAM")) == 2


@pytest.mark.parametrize("told", [True, False])
def test_a_camera_that_hangs_up_with_its_question(long_password: None, told: bool) -> None:
    """The answer has to go by another connection. A password that is wrong is sent once."""

    def reply(request: Request) -> Reply | None:
        if request.knows("viewer", LONG):
            return None
        close = [("Connection", "close")] if told else []
        return 401, [("WWW-Authenticate", MD5), *close]

    with RtspCamera(reply=reply, hangs_up=True) as camera:
        assert len(frames(camera.url, 2, credentials_env="CAM")) == 2
    refusal = (401, [("WWW-Authenticate", MD5)])
    with RtspCamera(reply=lambda _: refusal, hangs_up=True) as camera:
        assert failure(camera.url, credentials_env="CAM").outlook is Outlook.REFUSED
    assert sum("authorization" in request.headers for request in camera.requests) == 1


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_a_camera_that_calls_every_nonce_stale_is_given_up(long_password: None, kind: str) -> None:
    def reply(request: Request) -> Reply | None:
        count = len(camera.requests)
        return 401, [("WWW-Authenticate", f'Digest realm="c", nonce="{count}", stale=true')]

    with a_camera(kind, reply) as camera:
        assert failure(camera.url, credentials_env="CAM").outlook is Outlook.REFUSED
    assert len(camera.requests) < 8


@pytest.mark.parametrize("kind", ["http", "rtsp"])
@pytest.mark.parametrize(
    ("offered", "credentials", "text"),
    [
        ([MD5], False, "name them with credentials_env"),
        (["NTLM", "Bearer"], True, "not known here .ntlm, bearer"),
    ],
)
def test_what_cannot_be_answered(
    long_password: None, kind: str, offered: list[str], credentials: bool, text: str
) -> None:
    refusal = (401, [("WWW-Authenticate", challenge) for challenge in offered])
    with a_camera(kind, lambda _: refusal) as camera:
        error = failure(camera.url, **({"credentials_env": "CAM"} if credentials else {}))
    assert error.reason is SourceReason.AUTHENTICATION_FAILED
    assert error.outlook is Outlook.UNPROVEN
    assert all(word in error.message for word in text.split(" ."))


def test_a_password_goes_to_its_own_camera_alone(long_password: None) -> None:
    demanding = (401, [("WWW-Authenticate", BASIC)])
    with RtspCamera(reply=lambda _: demanding) as thief:
        moved = thief.url.replace("127.0.0.1", "localhost")
        with RtspCamera(reply=lambda _: (302, [("Location", moved)])) as camera:
            failure(camera.url, credentials_env="CAM")
    with HttpCamera(pictures, reply=lambda _: demanding) as other:
        moved = other.url.replace("127.0.0.1", "localhost")
        with HttpCamera(pictures, reply=lambda _: (302, [("Location", moved)])) as camera:
            failure(camera.url, credentials_env="CAM")
    assert thief.requests
    assert other.requests
    for asked in (thief, other):
        assert not any("authorization" in request.headers for request in asked.requests)


# --- certificates ---

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    """A camera's certificate, made out to no address; another one; the camera's side of TLS."""
    folder = tmp_path_factory.mktemp("certificates")
    cert, key = certificate(folder, "IPCAM-0815")
    other, _ = certificate(folder, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, other, context


def fingerprint(cert: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert.read_text())).hexdigest()


@needs_openssl
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_the_very_certificate_is_enough(own: tuple[Path, Path, ssl.SSLContext], kind: str) -> None:
    cert, other, tls = own
    with a_camera(kind, lambda _: None, tls=tls) as camera:
        digits = fingerprint(cert)
        for options in (
            {"tls_ca_file": str(cert)},
            {"tls_fingerprint": digits},
            {"tls_fingerprint": "SHA256:" + ":".join(digits[i : i + 2] for i in range(0, 64, 2))},
        ):
            assert len(frames(camera.url, 2, **options)) == 2
        for options, text in (
            ({"tls_ca_file": str(other)}, "not trusted"),
            ({"tls_fingerprint": fingerprint(other)}, "not the one that tls_fingerprint names"),
        ):
            checked = check_camera(settings(camera.url, **options))
            assert checked.error is not None
            assert checked.error.reason is SourceReason.TLS_FAILED
            assert text in checked.error.message
            assert checked.error.outlook is Outlook.PASSING


@needs_openssl
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_another_name_is_told_and_can_be_set(tmp_path: Path, kind: str) -> None:
    authority, authority_key = certificate(tmp_path, "authority")
    cert, key = certificate(
        tmp_path, "camera", "-CA", str(authority), "-CAkey", str(authority_key),
        "-addext", "subjectAltName=DNS:yard.example",
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    with a_camera(kind, lambda _: None, tls=tls) as camera:
        trusted = {"tls_ca_file": str(authority)}
        error = failure(camera.url, **trusted)
        assert "another name than its address" in error.message
        assert "tls_server_name" in error.message
        assert len(frames(camera.url, 2, **trusted, tls_server_name="yard.example")) == 2


class Plain(Camera):
    """Speaks no TLS, and says so at once."""

    scheme = "https"

    def serve(self, connection: socket.socket, number: int) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_firmware_that_speaks_old_tls_alone(tmp_path: Path, kind: str) -> None:
    """By its fingerprint it is known whatever it speaks; else it is told what is the matter."""
    cert, key = certificate(tmp_path, "cam")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.load_cert_chain(cert, key)
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert.read_text())).hexdigest()
    with a_camera(kind, lambda _: None, tls=old) as camera:
        assert len(frames(camera.url, 2, tls_fingerprint=digest)) == 2
        error = failure(camera.url, tls_ca_file=str(cert))
    assert "TLS older than 1.2" in error.message
    assert "tls_fingerprint" in error.message


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_tls_to_a_port_without_it(scheme: str) -> None:
    with Plain() as camera:
        error = failure(camera.url.replace("https", scheme))
    assert error.reason is SourceReason.TLS_FAILED
    assert "no common TLS" in error.message


@pytest.mark.parametrize("text", ["abc", "zz" * 32, "a" * 63])
def test_a_fingerprint_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="tls_fingerprint"):
        settings("https://h/x", tls_fingerprint=text)
