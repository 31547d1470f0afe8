"""A camera that has worked, or may still start, is never given up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from facelane_bridge.camera import Outlook
from tests.cases.cameras import Watched, failure
from tests.fakes.cameras import jpeg
from tests.fakes.field_cameras import (
    MULTIPART,
    HttpCamera,
    Play,
    Reply,
    Request,
    RtspCamera,
    head,
    parts,
)
from tests.soak_cameras import soak
from tests.waiting import auntil

CHALLENGE = [("WWW-Authenticate", 'Digest realm="cam", nonce="n", qop="auth"')]


def pictures(request: Request) -> Iterator[bytes]:
    """Twenty frames, then the camera hangs up."""
    yield head(MULTIPART)
    yield from parts(jpeg(number) for number in range(20))


async def test_one_401_after_a_reboot() -> None:
    def reply(request: Request) -> Reply | None:
        second = request.method == "DESCRIBE" and request.count == 1
        return (401, []) if second else None

    plays = [Play(last=10), Play()]
    with RtspCamera(lambda number: plays[min(number, 1)], reply=reply) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: watched.states.count("STREAMING") >= 2)
    assert "AUTHENTICATION_FAILED" in watched.reasons
    assert "FAILED" not in watched.states


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
async def test_whatever_an_http_camera_answers_after_it_streamed(status: int) -> None:
    def reply(request: Request) -> Reply | None:
        return (status, []) if request.count in (1, 2) else None

    with HttpCamera(pictures, reply=reply) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: watched.states.count("STREAMING") >= 2)
    assert "FAILED" not in watched.states


async def test_a_password_that_has_worked_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAM", "viewer:pw")
    sent: list[str] = []

    def reply(request: Request) -> Reply | None:
        if "authorization" not in request.headers:
            return 401, CHALLENGE
        sent.append(request.headers["authorization"])
        return (401, CHALLENGE) if len(sent) in (2, 3) else None

    with HttpCamera(pictures, reply=reply) as camera:
        async with Watched(camera.url, credentials_env="CAM", credentials_backoff=0.1) as watched:
            await auntil(lambda: watched.states.count("STREAMING") >= 2)
    assert "FAILED" not in watched.states


async def test_a_password_that_has_worked_is_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAM", "viewer:pw")
    sent: list[str] = []

    def reply(request: Request) -> Reply | None:
        if "authorization" not in request.headers:
            return 401, CHALLENGE
        sent.append(request.headers["authorization"])
        return (401, CHALLENGE) if len(sent) > 1 else None

    with HttpCamera(pictures, reply=reply) as camera:
        async with Watched(camera.url, credentials_env="CAM") as watched:
            await auntil(lambda: len(sent) == 3)
            await auntil(lambda: watched.states.count("BACKOFF") >= 3)
            # One more now, the next in a minute at the earliest.
            state = watched.bridge._runners[0]._camera
            assert state is not None
            assert state.retry_at is not None
            assert state.retry_at - state.since >= 60
    assert len(sent) == 3


@pytest.mark.parametrize("kind", ["http", "rtsp"])
async def test_a_password_that_never_worked_is_sent_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAM", "viewer:wrong")

    def reply(request: Request) -> Reply | None:
        return None if request.knows("viewer", "pw") else (401, CHALLENGE)

    camera: HttpCamera | RtspCamera = (
        HttpCamera(pictures, reply=reply) if kind == "http" else RtspCamera(reply=reply)
    )
    with camera:
        async with Watched(camera.url, credentials_env="CAM") as watched:
            await auntil(lambda: watched.states == ["FAILED"])
    assert sum("authorization" in request.headers for request in camera.requests) == 1


# --- what a camera answers while it starts ---


async def test_a_page_of_a_camera_that_starts() -> None:
    def body(request: Request) -> Iterator[bytes]:
        if request.count < 3:
            yield head("text/html") + b"<html>starting up</html>"
        else:
            yield from pictures(request)

    with HttpCamera(body) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: "STREAMING" in watched.states)
    assert watched.reasons[:1] == ["FORMAT_INVALID"]


@pytest.mark.parametrize(
    "description", ["", "v=0\r\n", "v=0\r\nm=audio 0 RTP/AVP 0\r\n", "<html></html>"]
)
async def test_a_description_without_video_of_a_camera_that_starts(description: str) -> None:
    with RtspCamera(sdp=lambda request: description if request.count < 3 else None) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: "STREAMING" in watched.states)
    assert watched.reasons[:1] == ["NO_VIDEO"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 453, 454, 500, 503])
async def test_any_refusal_of_a_camera_that_starts(status: int) -> None:
    def reply(request: Request) -> Reply | None:
        early = request.method == "DESCRIBE" and request.count < 2
        return (status, []) if early else None

    with RtspCamera(reply=reply) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: "STREAMING" in watched.states)
    assert watched.states[:2] == ["BACKOFF", "CONNECTING"]


# --- what an answer announces ---


@pytest.mark.parametrize(
    "kind",
    [None, "", "text/plain", "multipart/x-mixed-replace", "video/x-motion-jpeg", "image/jpeg"],
)
async def test_pictures_count_whatever_the_answer_calls_them(kind: str | None) -> None:
    def body(_: Request) -> Iterator[bytes]:
        yield head(kind)
        yield from parts(jpeg(number) for number in range(10))

    with HttpCamera(body) as camera:
        async with Watched(camera.url) as watched:
            await auntil(lambda: watched.results >= 5)


def test_what_is_no_multipart_is_told_as_such() -> None:
    with HttpCamera(lambda _: iter([head("application/json"), b'{"error": 7}'])) as camera:
        error = failure(camera.url)
    assert "answers 'application/json', and no pictures" in error.message
    assert error.outlook is Outlook.PASSING


def test_what_is_no_rtsp_is_told_as_such() -> None:
    with HttpCamera(lambda _: iter([head("text/html")])) as camera:
        error = failure(camera.url.replace("http", "rtsp"))
    assert error.outlook is Outlook.PASSING
    assert "RTSP" in error.message


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_fleet_that_misbehaves_for_a_while_is_never_given_up() -> None:
    """``make soak-cameras`` does this for a day, and judges how soon each camera is back."""
    report = soak(hours=0.2, scale=20.0, seed=7)
    assert report["exit"] == 0
    assert report["states"] == {"STOPPED": 12}
    results = report["results"]
    assert isinstance(results, int)
    assert results > 0
