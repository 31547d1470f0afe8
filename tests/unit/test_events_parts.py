"""What is delivered, how far a sink has come, and what it would not take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.waiting import auntil

from facelane.types import (
    BoundingBox,
    CrossingDirection,
    Decision,
    Event,
    EventKind,
    Identity,
    RuleReport,
    TrackReport,
)
from facelane_events import config
from facelane_events.delivery import Delivery, UnavailableError
from facelane_events.message import event_id, history_lost, message, wanted
from facelane_events.position import DeadLetters, Position
from facelane_events.sinks import onvif
from facelane_events.sinks.doubt import Doubtful
from facelane_events.sinks.homeassistant import States, discovery, topic
from facelane_events.sinks.nats import subject
from facelane_events.sinks.syslog import SyslogSink, record

NOON = datetime(2027, 3, 4, 12, 0, tzinfo=UTC)
TRACK = TrackReport("s-1/7", 0.0, 1.0, None, None, BoundingBox(1, 2, 3, 4), labels={"role": "vip"})
SEEN = Event(
    5, EventKind.SUBJECT_SEEN, NOON, "token", "front-door", "s-1", 7, "default",
    identity=Identity(subject_id="grace"), track=replace(TRACK, display_name='Grace "G"'),
)  # fmt: skip


def sink(**fields: object) -> config.JsonLines:
    return config.JsonLines(name="file", path="/x", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({}, True),
        ({"kinds": (EventKind.UNKNOWN_SEEN,)}, False),
        ({"kinds": (EventKind.SUBJECT_SEEN,)}, True),
        ({"sources": ("front-*",)}, True),
        ({"sources": ("front",)}, False),
        ({"sources": ("back", "front-door")}, True),
        ({"labels": {"role": "vip"}}, True),
        ({"labels": {"role": "guest"}}, False),
        ({"hours": "11:00-13:00"}, True),
        ({"hours": "22:00-06:00"}, False),
        ({"hours": "22:00-12:30"}, True),
    ],
)
def test_filters(fields: dict[str, object], passes: bool) -> None:
    assert wanted(sink(**fields), SEEN, NOON) is passes


def test_what_is_of_no_camera_passes_no_filter_for_cameras() -> None:
    pool = Event(6, EventKind.POOL_CHANGED, NOON, "t", pool="detector")
    assert wanted(sink(), pool, NOON)
    assert not wanted(sink(sources=("*",)), pool, NOON)
    assert not wanted(sink(labels={"role": "vip"}), pool, NOON)


def test_the_body_is_the_event_and_its_id_stays() -> None:
    found = message(sink(), SEEN)
    body = json.loads(found.body)
    assert body["id"] == found.id == event_id(replace(SEEN, resume_token="another"))
    assert (body["type"], body["kind"], body["source_id"]) == (
        "event",
        "SUBJECT_SEEN",
        "front-door",
    )
    assert "resume_token" not in body
    assert body["track"]["labels"] == {"role": "vip"}


def test_a_template_stays_json_whatever_is_in_a_name() -> None:
    text = '{"who": "${display_name}", "at": "${source_id}", "cost": "5 $$", "x": "${nothing}"}'
    found = json.loads(message(sink(template=text), SEEN).body)
    assert found == {
        "who": 'Grace "G"',
        "at": "front-door",
        "cost": "5 $",
        "x": "${nothing}",
    }


@given(st.lists(st.text(max_size=200), min_size=1, max_size=12), st.integers(0, 4095))
def test_a_position_survives_a_write_that_was_cut_short(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[str], at: int
) -> None:
    path = tmp_path_factory.mktemp("position") / "x.position"
    position = Position(path)
    for token in tokens:
        position.save(token)
    position.close()
    again = Position(path)
    assert again.token == tokens[-1]
    again.close()
    # The next write tears: it goes to the slot that the last one did not use.
    slot = (len(tokens) + 1) % 2
    with path.open("r+b") as file:
        file.seek(slot * 4096 + at)
        file.write(b"\xff" * 8)
    torn = Position(path)
    assert torn.token == tokens[-1]
    torn.close()


def test_a_position_is_nobodys_business_and_never_grows(tmp_path: Path) -> None:
    position = Position(tmp_path / "state" / "x.position")
    size = (tmp_path / "state" / "x.position").stat().st_size
    for number in range(50):
        position.save("t" * number)
    position.close()
    found = (tmp_path / "state" / "x.position").stat()
    assert (found.st_mode & 0o777, found.st_size) == (0o600, size)
    with pytest.raises(ValueError, match="too long"):
        Position(tmp_path / "y").save("x" * 4000)


def test_dead_letters_have_an_end(tmp_path: Path) -> None:
    dead = DeadLetters(tmp_path / "dead", 200)
    assert dead.add("1", "it answered 400", b'{"a": 1}')
    assert not dead.add("2", "it answered 400", b"x" * 200)
    (line,) = (tmp_path / "dead").read_text().splitlines()
    assert json.loads(line) == {"id": "1", "why": "it answered 400", "body": '{"a": 1}'}
    assert not DeadLetters(tmp_path / "none", 0).add("1", "", b"")


def test_syslog_has_the_form_of_rfc_5424() -> None:
    found = record(message(sink(), SEEN), 16, "box")
    head, body = found.split(b"\xef\xbb\xbf")
    pid = os.getpid()
    want = f"<133>1 2027-03-04T12:00:00.000+00:00 box facelane-events {pid} SUBJECT_SEEN - "
    assert head.decode() == want
    assert json.loads(body)["kind"] == "SUBJECT_SEEN"


HOME_ASSISTANT_DEVICE = {
    # "Device discovery payload" in Home Assistant's documentation of MQTT.
    "type": "object",
    "required": ["device", "origin", "components"],
    "properties": {
        "device": {
            "type": "object",
            "required": ["identifiers"],
            "properties": {"identifiers": {"type": "array", "minItems": 1}},
        },
        "origin": {"type": "object", "required": ["name"]},
        "availability": {"type": "array", "items": {"required": ["topic"]}},
        "components": {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
            "additionalProperties": {
                "type": "object",
                "required": ["platform", "unique_id", "state_topic"],
                "properties": {
                    "platform": {"enum": ["sensor", "binary_sensor"]},
                    # Those that a binary sensor may have; ON and OFF are its payloads.
                    "device_class": {"enum": ["occupancy", "problem", "tamper"]},
                    "icon": {"pattern": "^mdi:"},
                    "state_class": {"enum": ["measurement", "total", "total_increasing"]},
                },
            },
        },
    },
}


def test_a_camera_is_one_device_whose_topics_are_those_that_are_told() -> None:
    where, device = discovery("front/door", "facelane", "homeassistant", "facelane/status/x")
    plain, _ = discovery("front_door", "facelane", "homeassistant", "facelane/status/x")
    assert where != plain, "two cameras became one"
    assert where.startswith("homeassistant/device/facelane_front_door_")
    assert where.endswith("/config")
    jsonschema.validate(device, HOME_ASSISTANT_DEVICE)
    told = States().after(replace(SEEN, source_id="front/door"))
    topics = {part["state_topic"] for part in device["components"].values()}
    assert topics == {topic("facelane", "front/door", name) for name in told}
    ids = [part["unique_id"] for part in device["components"].values()]
    assert len(set(ids)) == len(ids)
    assert device["availability"] == [{"topic": "facelane/status/x"}]


def test_zones_and_lines_are_parts_of_their_cameras_device() -> None:
    states = States()

    def after(kind: EventKind, rule: RuleReport, track: str = "s/1") -> dict[str, str]:
        report = replace(TRACK, global_track_id=track)
        return states.after(replace(SEEN, kind=kind, track=report, rule=rule))

    vault, other = RuleReport("v.1"), RuleReport("v_1")
    assert after(EventKind.ZONE_ENTERED, vault) == {"zone_v.1": "ON"}
    assert after(EventKind.ZONE_DWELL, other) == {"zone_v_1": "ON"}, "its beginning was missed"
    assert after(EventKind.ZONE_ENTERED, vault, "s/2") == {"zone_v.1": "ON"}
    assert after(EventKind.ZONE_LEFT, vault) == {"zone_v.1": "ON"}
    assert after(EventKind.ZONE_LEFT, vault, "s/2") == {"zone_v.1": "OFF"}
    crossed = RuleReport("door", in_count=3, out_count=1)
    counts = after(EventKind.LINE_CROSSED, crossed)
    assert counts == {"line_door_in": "3", "line_door_out": "1"}
    closed = states.after(replace(SEEN, kind=EventKind.STREAM_CLOSED, track=None))
    assert closed["zone_v_1"] == "OFF"
    _, device = discovery("door", "facelane", "homeassistant", "up", states.rules)
    jsonschema.validate(device, HOME_ASSISTANT_DEVICE)
    parts = device["components"]
    assert len(parts) == 4 + 4, "two zones that look alike, and a line's two counts"
    topics = {part["state_topic"] for part in parts.values()}
    assert {topic("facelane", "door", name) for name in (*counts, "zone_v.1", "zone_v_1")} <= topics
    assert len({part["unique_id"] for part in parts.values()}) == len(parts)


def test_what_is_so_follows_from_what_happened() -> None:
    states = States()

    def after(kind: EventKind, track: str = "s/1") -> dict[str, str]:
        report = replace(TRACK, global_track_id=track)
        return states.after(replace(SEEN, kind=kind, track=report))

    assert after(EventKind.TRACK_STARTED)["occupancy"] == "ON"
    assert after(EventKind.TRACK_STARTED, "s/2")["unknown"] == "OFF"
    assert after(EventKind.UNKNOWN_SEEN, "s/2")["unknown"] == "ON"
    assert after(EventKind.SPOOF_SUSPECTED)["spoof"] == "ON"
    seen = after(EventKind.SUBJECT_SEEN, "s/2")
    assert (seen["person"], seen["unknown"]) == ("grace", "OFF")
    assert after(EventKind.TRACK_ENDED)["spoof"] == "OFF"
    assert after(EventKind.TRACK_ENDED, "s/2")["occupancy"] == "OFF"
    assert after(EventKind.POOL_CHANGED) == {}
    after(EventKind.TRACK_STARTED)
    assert after(EventKind.STREAM_CLOSED)["occupancy"] == "OFF"


ONVIF_MESSAGE = {
    # The grammar of "JSON Event Payload" in ONVIF's Core Specification, without element items.
    "type": "object",
    "required": ["UtcTime", "Source", "Data"],
    "additionalProperties": False,
    "properties": {
        "UtcTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"},
        "Source": {"type": "object", "additionalProperties": {"type": "string"}},
        "Data": {
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        },
    },
}


@pytest.mark.parametrize("kind", [kind for kind in EventKind if kind is not EventKind.UNSPECIFIED])
def test_onvif_payloads_have_its_form(kind: EventKind) -> None:
    # An example of the specification passes the schema; so does everything of ours.
    example = {
        "UtcTime": "2008-10-10T12:24:57.321Z",
        "Source": {"VideoSource": "1", "AnalyticsConfiguration": "2", "Rule": "MyImportantFence1"},
        "Data": {"ObjectId": "15"},
    }
    jsonschema.validate(example, ONVIF_MESSAGE)
    for event in (
        replace(SEEN, kind=kind),
        replace(SEEN, kind=kind, track=None),
        Event(6, kind, NOON, "t", pool="detector", message="lost"),
    ):
        told = message(sink(), event)
        jsonschema.validate(json.loads(onvif.payload(told)), ONVIF_MESSAGE)
        where = onvif.topic("site", told)
        # Topic = TopicPrefix "/" PayloadPrefix "/" LocalTopic [ "/&" Source ]
        assert re.fullmatch(r"site/onvif-ej/[A-Za-z:/]+(/&[^/#+]+(/[^/#+]+)*)?", where), where
        values = json.loads(onvif.payload(told))["Source"].values()
        assert where.partition("/&")[2] == "/".join(values)


def test_onvif_faces_and_what_onvif_has_no_topic_for() -> None:
    named = replace(
        SEEN, identity=replace(SEEN.identity, decision=Decision.MATCH, similarity=0.87654)
    )
    found = json.loads(onvif.payload(message(sink(), named)))
    assert found["UtcTime"] == "2027-03-04T12:00:00.000Z"
    assert found["Source"] == {"VideoSource": "front-door", "Rule": "FaceRecognition"}
    assert found["Data"] == {
        "Likelihood": 0.8765, "EnrollmentID": "grace", "ObjectId": "s-1/7",
        "facelane:DisplayName": 'Grace "G"', "facelane:Liveness": "UNDECIDED",
        "facelane:Gallery": "default", "facelane:EventId": event_id(SEEN),
    }  # fmt: skip
    topics = {
        kind: onvif.topic("site", message(sink(), replace(named, kind=kind, source_id="a/#+b")))
        for kind in (EventKind.SUBJECT_SEEN, EventKind.SPOOF_SUSPECTED)
    }
    assert topics == {
        EventKind.SUBJECT_SEEN: ("site/onvif-ej/RuleEngine/Recognition/Face/&a_b/FaceRecognition"),
        EventKind.SPOOF_SUSPECTED: (
            "site/onvif-ej/RuleEngine/Recognition/facelane:SpoofSuspected/&a_b/FaceRecognition"
        ),
    }
    pool = message(sink(), Event(6, EventKind.POOL_CHANGED, NOON, "t", pool="detector"))
    assert onvif.topic("site", pool) == "site/onvif-ej/Device/facelane:PoolChanged"
    lost = onvif.topic("site", history_lost(NOON))
    assert lost == "site/onvif-ej/Device/facelane:HistoryLost"


def test_onvif_has_rules_for_zones_and_lines() -> None:
    """A zone is a FieldDetector and, for who stays, a LoiteringDetector; a line a LineDetector and
    two counters."""

    def told(kind: EventKind, rule: RuleReport) -> list[tuple[str, dict[str, Any], bool]]:
        found = onvif.messages("site", message(sink(), replace(SEEN, kind=kind, rule=rule)))
        for one in found:
            if one.body:
                jsonschema.validate(json.loads(one.body), ONVIF_MESSAGE)
        return [
            (one.topic.removeprefix("site/onvif-ej/"), json.loads(one.body or b"{}"), one.retain)
            for one in found
        ]

    zone = RuleReport("vault", dwell=30.0, inside=1)
    at = "&front-door/default/vault"
    # A property of the zone, not of who came or went: one is left inside.
    for kind, inside in (
        (EventKind.ZONE_ENTERED, 2), (EventKind.ZONE_LEFT, 1), (EventKind.ZONE_LEFT, 0),
    ):  # fmt: skip
        (where, body, retained), *more = told(kind, replace(zone, inside=inside))
        assert where == f"RuleEngine/FieldDetector/ObjectsInside/{at}"
        assert retained
        assert body["Source"]["Rule"] == "vault"
        assert body["Data"] == {
            "IsInside": inside > 0, "facelane:Inside": inside, "facelane:ObjectId": "s-1/7",
            "facelane:EventId": event_id(SEEN),
        }  # fmt: skip
        # Nobody loiters where nobody is: the property is deleted, by no bytes.
        gone = [(f"RuleEngine/LoiteringDetector/ObjectIsLoitering/{at}", {}, True)]
        assert more == ([] if inside else gone)
    [(where, body, retained)] = told(EventKind.ZONE_DWELL, zone)
    assert where == f"RuleEngine/LoiteringDetector/ObjectIsLoitering/{at}"
    assert retained
    assert body["Data"] == {
        "ObjectId": "s-1/7", "Since": "2027-03-04T11:59:30.000Z",
        "facelane:EventId": event_id(SEEN),
    }  # fmt: skip
    [(where, body, retained)] = told(EventKind.ZONE_UNKNOWN, zone)
    assert where == f"RuleEngine/FieldDetector/facelane:ZoneUnknown/{at}"
    assert not retained
    for way, count in ((CrossingDirection.IN, 4), (CrossingDirection.OUT, 2)):
        line = RuleReport("door", direction=way, in_count=4, out_count=2)
        (where, body, retained), (counter, counted, kept) = told(EventKind.LINE_CROSSED, line)
        assert where == "RuleEngine/LineDetector/Crossed/&front-door/default/door"
        assert body["Data"]["facelane:Direction"] == way.value
        assert [retained, kept] == [False, True]
        rule = f"door-{way.value.lower()}"
        assert counter == f"RuleEngine/CountAggregation/Counter/&front-door/default/{rule}"
        assert counted["Source"]["Rule"] == rule
        assert counted["Data"] == {"Count": count, "facelane:EventId": event_id(SEEN)}


def test_who_is_where_has_a_bound_though_nobody_says_that_they_leave() -> None:
    """As with ``kinds = ["ZONE_DWELL", "UNKNOWN_SEEN"]``."""
    states, zones, sizes = States(), onvif.Zones(), []
    for number in range(3000):
        track = replace(TRACK, global_track_id=f"s-1/{number}")
        states.after(replace(SEEN, kind=EventKind.UNKNOWN_SEEN, track=track))
        rule = RuleReport("hall", dwell=10.0)
        event = replace(SEEN, kind=EventKind.ZONE_DWELL, track=track, rule=rule)
        states.after(event)
        told = onvif.messages("p", message(sink(), event), zones)
        sizes.append(sum(len(one.body) for one in told))
    assert len(states.unknown) == len(states.zones["hall"]) == 1024
    assert max(sizes) < 2 * sizes[255]
    assert f"s-1/{2999}" in told[0].body.decode(), "the newest are those that are told"


def test_onvif_a_line_as_the_specification_shows_it() -> None:
    """Its example of "JSON Event Payload"; what is ours stands behind a namespace."""
    example = {
        "UtcTime": "2008-10-10T12:24:57.321Z",
        "Source": {"VideoSource": "1", "AnalyticsConfiguration": "2", "Rule": "MyImportantFence1"},
        "Data": {"ObjectId": "15"},
    }
    crossed = Event(
        5, EventKind.LINE_CROSSED, datetime(2008, 10, 10, 12, 24, 57, 321000, tzinfo=UTC), "token",
        "1", "s", 7, "2", track=replace(TRACK, global_track_id="15"),
        rule=RuleReport("MyImportantFence1", direction=CrossingDirection.IN, in_count=1),
    )  # fmt: skip
    told = onvif.messages("MyDevice", message(sink(), crossed))[0]
    assert told.topic == (
        "MyDevice/onvif-ej/RuleEngine/LineDetector/Crossed/&1/2/MyImportantFence1"
    )
    body = json.loads(told.body)
    body["Data"] = {k: v for k, v in body["Data"].items() if not k.startswith("facelane:")}
    assert body == example


@pytest.mark.parametrize("kind", [kind for kind in EventKind if kind is not EventKind.UNSPECIFIED])
def test_onvif_items_are_those_of_the_specification_or_have_our_namespace(kind: EventKind) -> None:
    known = {"Likelihood", "EnrollmentID", "ObjectId", "IsInside", "Since", "Count"}
    rule = RuleReport("vault", inside=1) if "ZONE" in kind or "LINE" in kind else None
    for told in onvif.messages("site", message(sink(), replace(SEEN, kind=kind, rule=rule))):
        names = json.loads(told.body)["Data"]
        assert {name for name in names if not name.startswith("facelane:")} <= known


@given(st.lists(st.sampled_from(["send", "break", "again"]), max_size=60), st.integers(1, 8))
def test_what_is_in_doubt_is_told_again_in_order_and_has_an_end(did: list[str], limit: int) -> None:
    doubtful: Doubtful[int] = Doubtful(limit)
    told: list[int] = []
    for what in did:
        if what == "break":
            doubtful.broke()
            continue
        if doubtful.next() is not None:
            doubtful.sent_again()
        elif what == "send":
            doubtful.sent(len(told), 1)
            told.append(len(told))
    doubtful.broke()
    again = []
    while (item := doubtful.next()) is not None:
        again.append(item)
        doubtful.sent_again()
    # The last of what was told, in order, once each: as much as is kept, or everything.
    assert again == told[len(told) - len(again) :]
    assert min(limit, len(told)) <= len(again) <= 2 * limit


async def test_syslog_tells_again_what_a_receiver_that_broke_off_may_not_have_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        one = SyslogSink(config.Syslog(name="x", address=f"tcp://127.0.0.1:{port}"))
        await one.open()
        first, _ = listening.accept()
        for number in range(3):
            await one.send(message(sink(), replace(SEEN, sequence=number)))
        # It read nothing: what lies in its buffer is lost with it.
        first.close()
        with pytest.raises(UnavailableError):
            await auntil(lambda: _refused(one), what="a broken connection")
        await one.close()
        await one.open()
        await one.send(message(sink(), replace(SEEN, sequence=3)))
        await one.close()
        second, _ = listening.accept()
        with second, second.makefile("rb") as reading:
            bodies = re.findall(rb'"sequence":(\d)', reading.read())
    assert bodies == [b"0", b"1", b"2", b"3"]


async def _refused(one: SyslogSink) -> bool:
    await one.send(message(sink(), replace(SEEN, sequence=3)))
    return False


def test_subjects_are_tokens() -> None:
    found = message(sink(), replace(SEEN, source_id="a.b >*c"))
    assert subject("facelane", found) == "facelane.a_b___c.SUBJECT_SEEN"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no sink"),
        ("[[sink", "no TOML"),
        ('[[sink]]\ntype = "fax"\nname = "x"', "fax"),
        ('[[sink]]\ntype = "jsonl"\nname = "x"', "path"),
        ('[[sink]]\ntype = "jsonl"\nname = "x"\npath = "y"\nhours = "9-17"', "22:00-06:00"),
        ('[[sink]]\ntype = "jsonl"\nname = "x"\npath = "y"\ncolour = 1', "colour"),
        ('[[sink]]\ntype = "webhook"\nname = "x"\nurl = "ftp://y"', "url"),
        (
            '[[sink]]\ntype = "mqtt"\nname = "x"\nhost = "y"\npayload = "onvif"\ntemplate = "x"',
            "second sink",
        ),
        (2 * '[[sink]]\ntype = "jsonl"\nname = "x"\npath = "y"\n', "two sinks have one name"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_what_to_write(
    text: str, says: str
) -> None:
    with pytest.raises(config.ConfigError, match=says):
        config.parse(text)


def test_secrets_are_read_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "one").write_text("whsec_x\n")
    assert config.secret("") == ""
    assert config.secret(str(tmp_path / "one")) == "whsec_x"
    for name in ("empty", "absent"):
        with pytest.raises(config.ConfigError, match="hold the secret alone"):
            config.secret(str(tmp_path / name))


class Deaf:
    """A receiver whose library swallows that its task was cancelled, at one step."""

    def __init__(self, step: str) -> None:
        self.step, self.sent = step, 0
        self.there = asyncio.Event()

    async def _do(self, step: str) -> None:
        if step == self.step and not self.there.is_set():
            self.there.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async def open(self) -> None:
        await self._do("open")

    async def send(self, event: object) -> None:
        self.sent += 1
        await self._do("send")
        if self.step == "fail":
            self.step = "close"
            raise UnavailableError("no")

    async def close(self) -> None:
        await self._do("close")


class Told:
    """A server that tells of one event and then of nothing."""

    resume_token = ""

    def watch_events(self, *_args: object, **_options: object) -> Told:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        yield SEEN
        await asyncio.Event().wait()


@pytest.mark.parametrize("step", ["open", "send", "fail"])
async def test_a_delivery_ends_though_a_library_swallows_it(tmp_path: Path, step: str) -> None:
    """``asyncio.wait_for`` of Python 3.11 does where the answer comes at that very moment."""
    deaf = Deaf(step)
    position, dead = Position(tmp_path / "position"), DeadLetters(tmp_path / "dead", 1 << 20)
    running = asyncio.create_task(Delivery(sink(), deaf, position, dead).run(Told()))  # type: ignore[arg-type]
    await deaf.there.wait()
    running.cancel()
    await asyncio.wait([running], timeout=60)
    assert running.cancelled()
    assert deaf.sent == {"open": 0, "send": 1, "fail": 1}[step]
    # What was sent is not sent again.
    assert position.token == ("token" if step == "send" else "")
    position.close()
