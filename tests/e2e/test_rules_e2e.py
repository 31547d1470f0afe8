"""Zones and lines on a real server: from a configuration, from a stream, and in its events."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until

import facelane
from facelane.v1 import analysis_service_pb2 as pb

MIDDLE = [(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)]
"""The face of the null detector is in the middle of every picture."""
CORNER = [(0.0, 0.0), (0.2, 0.0), (0.2, 0.2), (0.0, 0.2)]


class Heard:
    """Events of one source, as far as its stream's end."""

    def __init__(self, client: facelane.Client, source_id: str) -> None:
        self._client = client
        self._source = source_id

    def of(self, frames: list[facelane.Frame], **options: object) -> list[facelane.Event]:
        with self._client.watch_events(source_ids=[self._source]) as events:
            outcomes = list(
                self._client.analyze(frames, source_id=self._source, **options)  # type: ignore[arg-type]
            )
            assert all(outcome.result for outcome in outcomes)
            found = []
            for event in events:
                found.append(event)
                if event.kind == "STREAM_CLOSED":
                    return found
        raise AssertionError("the events ended")


def frames(count: int, seed: int = 90) -> list[facelane.Frame]:
    return [facelane.Frame(wire.picture(seed), stream_offset=k / 10) for k in range(count)]


def rules(events: list[facelane.Event]) -> list[str]:
    return [f"{e.kind} {e.rule.name}" for e in events if e.rule is not None]


def test_a_streams_own_zones(client: facelane.Client) -> None:
    zones = [
        facelane.Zone("middle", MIDDLE, dwell=1.0, unknown=0.5),
        facelane.Zone("corner", CORNER, dwell=1.0, unknown=0.5),
    ]
    client.enroll("somebody-else", wire.picture(91), gallery="zoned")
    events = Heard(client, "own-zones").of(frames(30), zones=zones, gallery="zoned")
    assert rules(events) == [
        "ZONE_ENTERED middle",
        "ZONE_UNKNOWN middle",
        "ZONE_DWELL middle",
        "ZONE_LEFT middle",
    ]
    assert [e.kind for e in events][-2:] == ["TRACK_ENDED", "STREAM_CLOSED"]
    entered, unknown, dwelt, left = [e for e in events if e.rule is not None]
    for event in (entered, unknown, dwelt, left):
        assert event.rule is not None
        assert event.track is not None
        assert event.track.global_track_id == f"{event.stream_id}/{event.track_id}"
        assert event.gallery == "zoned"
    assert entered.rule is not None
    assert dwelt.rule is not None
    assert left.rule is not None
    assert (entered.rule.inside, left.rule.inside) == (1, 0)
    assert dwelt.rule.dwell == pytest.approx(1.0)
    assert left.rule.dwell == pytest.approx(2.9)
    assert unknown.identity.decision == "UNKNOWN"


def test_masks_take_faces_away(client: facelane.Client) -> None:
    for zones, faces in (
        ([facelane.Zone("poster", MIDDLE, faces="ignored")], 0),
        ([facelane.Zone("here", CORNER, faces="only")], 0),
        ([facelane.Zone("here", MIDDLE, faces="only")], 1),
    ):
        outcomes = list(client.analyze(frames(2), zones=zones))
        assert [len(o.result.faces) for o in outcomes if o.result] == [faces, faces]


@pytest.mark.parametrize(
    ("zones", "lines", "options", "told"),
    [
        ([facelane.Zone("z", MIDDLE[:2])], [], {}, "three at least"),
        ([facelane.Zone("z", [MIDDLE[k] for k in (0, 2, 1, 3)])], [], {}, "crosses itself"),
        ([facelane.Zone("z", [(10, 10), (20, 10), (20, 20)])], [], {}, "fractions"),
        ([facelane.Zone("z", MIDDLE, dwell=-1)], [], {}, "dwell"),
        ([facelane.Zone("z", MIDDLE), facelane.Zone("z", CORNER)], [], {}, "called `z`"),
        ([], [facelane.Line("l", (0.5, 0.5), (0.5, 0.5))], {}, "same point"),
        ([facelane.Zone("z", MIDDLE)], [], {"disable_tracking": True}, "disable_tracking"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_be_no_zone_or_line_is_told(
    client: facelane.Client,
    zones: list[facelane.Zone],
    lines: list[facelane.Line],
    options: dict[str, bool],
    told: str,
) -> None:
    with pytest.raises(facelane.FacelaneError, match=told) as refused:
        list(client.analyze(frames(1), zones=zones, lines=lines, **options))  # type: ignore[arg-type]
    assert (refused.value.reason, refused.value.retryable) == ("CONFIG_INVALID", False)


@pytest.mark.parametrize("zone", [facelane.Zone("z", [1, 2, 3]), "z", None], ids=str)  # type: ignore[list-item]
def test_what_is_no_zone_at_all_is_told_before_it_is_sent(
    client: facelane.Client, zone: object
) -> None:
    with pytest.raises(facelane.ArgumentError, match="pairs of fractions"):
        client.analyze_stream(zones=[zone])  # type: ignore[list-item]


def test_what_no_client_of_ours_would_send(server: RunningServer) -> None:
    wrong = [
        pb.Zone(name="z"),
        pb.Zone(name="z", polygon=[pb.RelativePoint(x=float("nan"))] * 3),
        pb.Zone(name="z", polygon=[pb.RelativePoint()] * 5000),
        pb.Zone(name="z", faces=77),  # type: ignore[arg-type]
    ]
    for zone in wrong:
        with wire.channel(server.target) as channel:
            stream = wire.RawStream(channel)
            stream.write(wire.config(zones=[zone]))
            with pytest.raises(wire.grpc.RpcError) as refused:
                stream.read()
            assert wire.refusal(refused.value)[1] == "CONFIG_INVALID"


def test_those_of_the_configuration_are_of_their_sources(start: Start) -> None:
    server = start(
        THREAD_POOLS,
        '[[zones]]\nname = "vault"\nsources = ["back-door", "side-*"]\n'
        "polygon = [[0.3, 0.3], [0.7, 0.3], [0.7, 0.7], [0.3, 0.7]]\ndwell_s = 0.5\n",
    )
    told = ["ZONE_ENTERED vault", "ZONE_DWELL vault", "ZONE_LEFT vault"]
    with server.client() as client:
        assert rules(Heard(client, "back-door").of(frames(15))) == told
        assert rules(Heard(client, "side-2").of(frames(15))) == told
        assert rules(Heard(client, "back-dor").of(frames(15))) == []
        own = [facelane.Zone("vault", CORNER)]
        with pytest.raises(facelane.FacelaneError, match="called `vault`"):
            list(client.analyze(frames(1), source_id="back-door", zones=own))
    until(lambda: "nearly its name" in server.text(), what="the warning")
    assert "back-dor" in server.text()


def test_a_configuration_that_cannot_be_does_not_start(tmp_path: Path) -> None:
    crossing = '[[zones]]\nname = "z"\nsources = ["*"]\npolygon = [[0,0],[1,1],[1,0],[0,1]]\n'
    server = RunningServer(tmp_path, toml(tmp_path, extra=crossing))
    code = server.process.wait(60)
    server.stop()
    assert code != 0
    assert "crosses itself" in server.text()
    assert "Traceback" not in server.text()


@pytest.fixture
def walker() -> object:
    """A portrait that can be moved over a picture."""
    pytest.importorskip("matplotlib")
    from bench import material

    return material.photo("grace_hopper.jpg")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_face_that_walks_over_a_line_is_counted_both_ways(start: Start, walker: object) -> None:
    """With the models that ship."""
    import cv2
    import numpy as np

    head = cv2.resize(walker[40:400, 100:420], (160, 180))  # type: ignore[index]
    rng = np.random.default_rng(1)

    def picture(x: int) -> facelane.Picture:
        canvas = np.full((360, 640, 3), 110, np.uint8)
        canvas[90:270, x : x + 160] = head
        noise = rng.integers(-2, 3, canvas.shape, dtype=np.int16)
        ok, data = cv2.imencode(".jpg", np.clip(canvas + noise, 0, 255).astype(np.uint8))
        assert ok
        return facelane.Picture.encoded(bytes(data))

    there = list(range(20, 461, 22))
    way = [*there, *reversed(there), *there]
    shots = [facelane.Frame(picture(x), stream_offset=k / 10) for k, x in enumerate(way)]
    server = start(pools="\n")
    server.wait_serving(120)
    upright = facelane.Line("upright", (0.5, 1.0), (0.5, 0.0))
    short = facelane.Line("short", (0.5, 1.0), (0.5, 0.9))
    with server.client(timeout=60) as client:
        events = Heard(client, "walk").of(shots, lines=[upright, short])
    told = [(e.rule.name, e.rule.direction.value) for e in events if e.rule is not None]
    assert told == [("upright", "IN"), ("upright", "OUT"), ("upright", "IN")]
    last = [e.rule for e in events if e.rule is not None][-1]
    assert (last.in_count, last.out_count) == (2, 1)
