"""Addresses of cameras as people write them, and as firmware does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cases.cameras import frames
from tests.fakes.cameras import jpeg
from tests.fakes.field_cameras import (
    DESCRIPTION,
    MULTIPART,
    HttpCamera,
    Reply,
    Request,
    RtspCamera,
    head,
    parts,
)


def pictures(_: Request) -> Iterator[bytes]:
    yield head(MULTIPART)
    yield from parts(jpeg(number) for number in range(3))


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("a b/übung?pwd=pä ss&x=%20", "a%20b/%C3%BCbung?pwd=p%C3%A4%20ss&x=%20"),
        ("live?user=[1]&q='(z)'", "live?user=[1]&q='(z)'"),
    ],
)
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_addresses_as_people_write_them(kind: str, written: str, asked: str) -> None:
    """Neither protocol's requests can hold spaces, or letters beyond ASCII."""

    with HttpCamera(pictures) if kind == "http" else RtspCamera() as camera:
        assert len(frames(camera.url.replace("live", written), 2)) == 2
    assert camera.requests[0].uri.endswith(f"/{asked}")


def test_a_redirection_as_firmware_writes_it() -> None:
    def moved(request: Request) -> Reply | None:
        there = camera.url.replace("live", "Kanal 1/ü")
        return (302, [("Location", there)]) if request.uri == "/live" else None

    with HttpCamera(pictures, reply=moved) as camera:
        assert len(frames(camera.url, 2)) == 2
    assert camera.requests[1].uri == "/Kanal%201/%C3%BC"


def test_a_track_whose_name_has_a_space() -> None:
    described = DESCRIPTION.replace("control:track1", "control:video 1")
    with RtspCamera(sdp=lambda _: described) as camera:
        assert len(frames(camera.url, 2)) == 2
    (setup,) = (request for request in camera.requests if request.method == "SETUP")
    assert setup.uri == f"{camera.url}/video 1"
