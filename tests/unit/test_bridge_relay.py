"""The relay between FFmpeg and an RTSP camera: what it makes of bytes, and whom it lets in."""

from __future__ import annotations

import contextlib
import socket
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.field_cameras import RtspCamera
from tests.waiting import until

from facelane_bridge import config
from facelane_bridge.sources import SourceError, SourceReason
from facelane_bridge.sources.access import host_of
from facelane_bridge.sources.challenge import Credentials
from facelane_bridge.sources.rtsp import MAX_HEAD_BYTES, RtspRelay, split

MEDIA = b"$\x00\x00\x04abcd"
RESPONSE = b"RTSP/1.0 200 OK\r\nCSeq: 7\r\nX: a: b\r\nContent-Length: 3\r\n\r\nxyz"


def parts(data: bytes, step: int) -> list[object]:
    buffer, found = bytearray(), []
    for at in range(0, len(data), step):
        buffer += data[at : at + step]
        found += list(split(buffer))
    return found


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_media_and_messages_are_told_apart(step: int) -> None:
    found = parts(MEDIA * 2 + RESPONSE + MEDIA + b"\r\n" + RESPONSE, step)
    media = b"".join(part for part in found if isinstance(part, bytes))
    messages = [part for part in found if not isinstance(part, bytes)]
    assert media == MEDIA * 3
    assert [message.get("cseq") for message in messages] == ["7", "7"]  # type: ignore[attr-defined]
    assert messages[0].encode() == RESPONSE  # type: ignore[attr-defined]
    assert messages[0].body == b"xyz"  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [3, 1000])
def test_stray_bytes_are_passed_on_and_hide_nothing(step: int) -> None:
    found = parts(b"\x00\x01\x02" + MEDIA + RESPONSE, step)
    assert b"".join(part for part in found if isinstance(part, bytes)) == b"\x00\x01\x02" + MEDIA
    assert sum(not isinstance(part, bytes) for part in found) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"RTSP/1.0 200 OK\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES,
        b"RTSP/1.0 200 OK\r\nContent-Length: 99999999\r\n\r\n",
    ],
)
def test_what_has_no_measure_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="without"):
        parts(data, 4096)


@given(
    st.lists(
        st.sampled_from(
            [MEDIA, RESPONSE, b"$", b"\x00", b"RTSP/1.0", b"\r\n\r\n", b"A", b"Content-Length: 9"]
        )
        | st.binary(max_size=20),
        max_size=30,
    ),
    st.integers(1, 50),
)
def test_whatever_comes_it_ends(pieces: list[bytes], step: int) -> None:
    with contextlib.suppress(ValueError):
        parts(b"".join(pieces), step)


def relay_to(camera: RtspCamera, **options: object) -> tuple[RtspRelay, str]:
    given = config.single(camera.url, server={}, options=options)
    relay = RtspRelay(given.cameras[0])
    return relay, relay.open(camera.url)


def ask(url: str, request: str) -> bytes:
    parts_of = urllib.parse.urlsplit(url)
    assert parts_of.hostname is not None
    with socket.create_connection((parts_of.hostname, parts_of.port or 0), 30) as sock:
        sock.settimeout(30)
        sock.sendall(request.encode())
        with contextlib.suppress(OSError):
            return sock.recv(10_000)
    return b""


def test_whoever_does_not_know_the_token_is_not_let_in() -> None:
    with RtspCamera() as camera:
        relay, url = relay_to(camera)
        stranger = urllib.parse.urlsplit(url)._replace(path="/live").geturl()
        assert ask(url, f"OPTIONS {stranger} RTSP/1.0\r\nCSeq: 1\r\n\r\n") == b""
        assert camera.requests == []
        answer = ask(url, f"OPTIONS {url} RTSP/1.0\r\nCSeq: 12\r\n\r\n")
        relay.close()
    assert b"200" in answer
    assert b"CSeq: 12" in answer
    assert camera.requests[0].uri == camera.url, "the camera reads its own address"


def test_a_camera_that_takes_the_call_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x"
        relay = RtspRelay(config.single(url, server={}, options={"open_timeout": 0.3}).cameras[0])
        local = relay.open(url)
        assert ask(local, f"OPTIONS {local} RTSP/1.0\r\nCSeq: 1\r\n\r\n") == b""
        until(lambda: relay.error)
        relay.close()
    assert relay.error is not None
    assert relay.error.reason is SourceReason.TIMED_OUT


def test_a_relay_that_is_closed_leaves_nothing_open() -> None:
    with RtspCamera() as camera:
        relay, url = relay_to(camera)
        relay.close()
        relay.close()
        with pytest.raises(OSError, match="refused"):
            ask(url, "OPTIONS * RTSP/1.0\r\n\r\n")
    with pytest.raises(SourceError) as caught:
        relay_to(camera)
    assert caught.value.reason is SourceReason.CONNECT_FAILED


def test_a_name_that_nobody_knows() -> None:
    relay = RtspRelay(config.single("rtsp://camera.invalid/x", server={}).cameras[0])
    with pytest.raises(SourceError, match="name is not known"):
        relay.open("rtsp://camera.invalid/x")


@pytest.mark.parametrize(
    ("own", "moved", "known"),
    [
        ("rtsp://cam/a", "rtsp://cam:8554/b", True),
        ("rtsp://cam/a", "rtsps://cam/b", True),
        ("rtsps://cam/a", "rtsps://cam/b", True),
        ("rtsps://cam/a", "rtsp://cam/b", False),
        ("rtsp://cam/a", "rtsp://other/b", False),
    ],
)
def test_a_password_goes_nowhere_that_a_redirect_chooses(
    own: str, moved: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the camera's own host alone, and never in clear where it went by TLS."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        monkeypatch.setattr(RtspRelay, "_connect", lambda _self: here)
        relay = RtspRelay(
            config.single(own, server={}, options={}).cameras[0], Credentials("u", "p")
        )
        relay.open(moved)
        assert (relay._authenticator is not None) is known
        relay.interrupt()
        relay.close()


@pytest.mark.parametrize(
    ("address", "host", "told"),
    [
        ("rtsp://cam/a", "cam", "cam"),
        ("rtsp://[2001:db8::1]:554/a", "2001:db8::1", "2001:db8::1"),
        ("rtsp://[fe80::1%25enP1s0]/a", "fe80::1%enP1s0", "fe80::1"),
        ("http://[fe80::1%eth0]:80/a", "fe80::1%eth0", "fe80::1"),
    ],
)
def test_a_link_local_address_names_its_zone_to_this_machine_alone(
    address: str, host: str, told: str
) -> None:
    parts = urllib.parse.urlsplit(address)
    assert host_of(parts) == host
    assert host_of(parts, zone=False) == told
