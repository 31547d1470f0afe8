"""Video as cameras make it, through a real server: H.264 and H.265 access units in a stream."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Sequence

import psutil
import pytest
from tests.e2e.conftest import Start
from tests.fakes.access_units import clip, encode
from tests.running_server import RunningServer
from tests.waiting import until

import facelane

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "several slices": {"slices": 4},
    "B-frames": {"bframes": 3},
    "10 bits": {"pix_fmt": "yuv420p10le"},
    "open groups": {"bframes": 3, "open_gop": True},
}
"""How clips are encoded."""


def video(units: Sequence[bytes], encoding: str = "h264") -> list[facelane.Frame]:
    return [
        facelane.Frame(facelane.Picture.access_unit(unit, encoding), stream_offset=i / 25)  # type: ignore[arg-type]
        for i, unit in enumerate(units)
    ]


def analysed(
    client: facelane.Client, frames: Sequence[facelane.Frame], **options: object
) -> list[facelane.Outcome]:
    outcomes = list(client.analyze(frames, **options))  # type: ignore[arg-type]
    assert [o.frame_id for o in outcomes] == list(range(1, len(frames) + 1))
    return outcomes


def kinds(outcomes: Sequence[facelane.Outcome]) -> Counter[str]:
    def kind(outcome: facelane.Outcome) -> str:
        if outcome.result is not None:
            return "result"
        return str(outcome.drop.reason if outcome.drop else outcome.error.reason)  # type: ignore[union-attr]

    return Counter(map(kind, outcomes))


@pytest.mark.parametrize("encoding", ["h264", "h265"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_access_unit_has_its_picture(
    client: facelane.Client, encoding: str, kind: str
) -> None:
    units = clip(encoding, 35, keyint=12, **KINDS[kind])  # type: ignore[arg-type]
    outcomes = analysed(client, video(units, encoding))
    assert kinds(outcomes) == {"result": 35}
    first = outcomes[0].result
    assert first is not None
    assert (first.width, first.height) == (320, 240)
    tracks = {face.track_id for o in outcomes if o.result for face in o.result.faces}
    assert len(tracks) == 1, "the null detector's one face goes on over groups of pictures"


def test_a_change_of_resolution(client: facelane.Client) -> None:
    units = [*clip(count=10), *clip(count=10, size=(640, 480)), *clip(count=5)]
    outcomes = analysed(client, video(units))
    widths = [o.result.width for o in outcomes if o.result]
    assert widths == [320] * 10 + [640] * 10 + [320] * 5


def test_a_stream_that_begins_between_key_frames(server: RunningServer) -> None:
    asked: list[facelane.StreamUpdate] = []
    with (
        server.client() as client,
        client.analyze_stream(overload="lossless", on_update=asked.append) as stream,
    ):
        for frame in video(clip(count=25)[4:]):
            stream.send(frame.picture, stream_offset=frame.stream_offset)
        stream.close_send()
        outcomes = list(stream)
    assert kinds(outcomes[:6]) == {"WAITING_FOR_KEY_FRAME": 6}
    assert kinds(outcomes[6:]) == {"result": 15}
    assert [u.kind for u in asked].count(facelane.StreamUpdateKind.KEY_FRAME_WANTED) == 1


def test_a_broken_access_unit_costs_its_group_and_no_more(client: facelane.Client) -> None:
    units = list(clip(count=25))
    units[14] = units[14][: len(units[14]) // 2]
    outcomes = analysed(client, video(units))
    assert kinds(outcomes[:14]) == {"result": 14}
    assert kinds(outcomes[14:15]) == {"PICTURE_CORRUPT": 1}
    assert kinds(outcomes[15:20]) == {"WAITING_FOR_KEY_FRAME": 5}
    assert kinds(outcomes[20:]) == {"result": 5}


def test_what_is_not_decoded_here_says_why(client: facelane.Client) -> None:
    interlaced = clip(count=2, interlaced=True)
    (first, second) = analysed(client, video(interlaced))
    assert kinds([first, second]) == {"VIDEO_UNSUPPORTED": 1, "WAITING_FOR_KEY_FRAME": 1}
    assert first.error is not None
    assert "interlaced" in first.error.message
    with pytest.raises(facelane.PictureError) as caught:
        client.analyze_image(facelane.Picture.access_unit(clip(count=1)[0]))
    assert caught.value.reason == "ENCODING_UNSUPPORTED"


def test_video_keeps_to_one_encoding(client: facelane.Client) -> None:
    frames = [*video(clip(count=3)), *video(clip("h265", 2), "h265"), *video(clip(count=3))[1:]]
    frames = [facelane.Frame(frame.picture, stream_offset=i / 25) for i, frame in enumerate(frames)]
    outcomes = analysed(client, frames)
    assert kinds(outcomes[3:5]) == {"ENCODING_CHANGED": 2}
    assert kinds(outcomes[:3]) == {"result": 3}


def test_fewer_analyses_than_pictures(client: facelane.Client) -> None:
    """Those between are decoded, have their outcome, and the track goes on over them."""
    for frames in (video(clip(count=50)), stills(50)):
        outcomes = analysed(client, frames, analysis_fps=10)
        assert kinds(outcomes) == {"result": 20, "SUPERSEDED": 30}
        offsets = [o.stream_offset for o in outcomes if o.result]
        assert max(b - a for a, b in itertools.pairwise(offsets)) <= 0.121
        tracks = {face.track_id for o in outcomes if o.result for face in o.result.faces}
        assert len(tracks) == 1


def stills(count: int) -> list[facelane.Frame]:
    from tests.e2e import wire

    return [facelane.Frame(wire.picture(3), stream_offset=i / 25) for i in range(count)]


@pytest.mark.parametrize("bframes", [0, 3])
def test_the_newest_picture_of_a_camera(server: RunningServer, bframes: int) -> None:
    """Whatever is superseded, the last picture is seen, and every frame has one outcome."""
    with server.client() as client, client.analyze_stream() as stream:
        for frame in video(clip(count=60, keyint=20, bframes=bframes)):
            stream.send(frame.picture, stream_offset=frame.stream_offset)
        stream.close_send()
        outcomes = list(stream)
    found = kinds(outcomes)
    assert set(found) <= {"result", "SUPERSEDED"}
    assert sum(found.values()) == 60
    assert outcomes[-1].result is not None


def detectors(server: RunningServer) -> list[int]:
    with server.client() as client:
        pool = next(p for p in client.pools() if p.pool == "detector")
        return [w.pid for w in pool.workers if w.state == "READY"]


def test_a_worker_that_is_killed_costs_no_picture(start: Start) -> None:
    """The group of pictures is decoded again by another one: nothing waits for a key frame."""
    server = start(extra="[limits]\nlossless_frame_age_ms = 60000")
    units = clip(count=120, keyint=120)
    with server.client() as client, client.analyze_stream(overload="lossless") as stream:
        outcomes: list[facelane.Outcome] = []
        for i, frame in enumerate(video(units)):
            if i in (30, 80):
                outcomes += [next(stream) for _ in range(i - len(outcomes))]
                (pid,) = detectors(server)
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: not psutil.pid_exists(pid), what="the worker to be gone")
            stream.send(frame.picture, stream_offset=frame.stream_offset)
        stream.close_send()
        outcomes += list(stream)
    assert kinds(outcomes) == {"result": 120}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_video_and_stills_name_the_same_people(start: Start) -> None:
    """One clip as H.264, as H.265 and as JPEG, with the models that ship."""
    pytest.importorskip("skimage")
    cv2 = pytest.importorskip("cv2")
    from facelane_bridge import demo_clip
    from facelane_server.models.catalog import SHIPPED

    if not (SHIPPED[0] / "facelane-recognizer").is_dir():
        pytest.skip("no starter models in this tree")
    camera = demo_clip.Camera()
    pictures = [camera.frame(number) for number in (*range(0, 70, 2), *range(74, 136, 2))]
    stills = [
        facelane.Picture.encoded(cv2.imencode(".jpg", picture)[1].tobytes()) for picture in pictures
    ]
    kinds_of = {
        "jpeg": stills,
        "h264": [
            facelane.Picture.access_unit(u)
            for u in encode(pictures, "h264", preset="veryfast", crf="18", bf="0", g="20")
        ],
        "h265": [
            facelane.Picture.access_unit(u, "h265")
            for u in encode(
                pictures,
                "h265",
                preset="ultrafast",
                crf="18",
                **{"x265-params": "log-level=none:repeat-headers=1:bframes=0:keyint=20"},
            )
        ],
    }
    server = start("[pools.detector]\n[pools.recognizer]\n[pools.liveness]\n")
    named: dict[str, list[set[str]]] = {}
    with server.client() as client:
        for subject, photo in demo_clip.photos().items():
            client.enroll(subject, facelane.Picture.from_file(photo.path), skip_liveness=True)
        for kind, sent in kinds_of.items():
            frames = [facelane.Frame(p, stream_offset=i / 10) for i, p in enumerate(sent)]
            outcomes = analysed(client, frames)
            assert kinds(outcomes) == {"result": len(pictures)}
            named[kind] = [
                {f.identity.subject_id for f in o.result.faces if f.identity.matched}
                for o in outcomes
                if o.result
            ]
    assert set().union(*named["jpeg"]) == set(demo_clip.photos())
    for kind in ("h264", "h265"):
        assert set().union(*named[kind]) == set().union(*named["jpeg"])
        same = sum(a == b for a, b in zip(named[kind], named["jpeg"], strict=True))
        assert same >= 0.9 * len(pictures), f"{kind}: {same} of {len(pictures)} frames alike"
