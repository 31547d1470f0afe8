"""What security software is told of the tracks of a stream."""

from __future__ import annotations

import itertools
import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.fakes.faces import Stage, detected, evidence, signature

from facelane_server.domain import (
    Box,
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
    Sighting,
)
from facelane_server.events import EventKind
from facelane_server.pipeline import Evidence
from facelane_server.presence import UPDATE_INTERVAL_NS, Presence, Telling

MS = 1_000_000
SECOND = 1000 * MS
UNKNOWN = Identity(Decision.UNKNOWN)
REJECTED = Identity(Decision.REJECTED_OOD)
ADA = Identity(Decision.MATCH, "ada", 0.7)
LIVE, SPOOF, UNDECIDED = (Liveness(verdict) for verdict in LivenessVerdict)
BOX = Box(1, 2, 3, 4)


def presence() -> Presence:
    return Presence(unknown_after_ns=SECOND, hidden_after_ns=2 * SECOND)


def seen(
    identity: Identity,
    at_ms: int,
    liveness: Liveness = UNDECIDED,
    *,
    track: int = 1,
    ood: float | None = None,
    looked: bool = False,
) -> Sighting:
    return Sighting(track, BOX, at_ms * MS, 5 + at_ms, identity, liveness, ood, looked)


def test_a_camera_without_a_clock_tells_what_can_be_kept() -> None:
    """Years 1 to 9999 are timestamps; what is kept counts nanoseconds in 64 bits."""
    for year_s in (-62_135_596_800, 253_402_300_799):
        here = presence()
        first = replace(seen(ADA, 0), capture_time_ns=year_s * SECOND)
        for _, report in (*here.sighted(first), *here.ended(1)):
            assert (report.first_capture_ns, report.last_capture_ns) == (None, None)
            msgspec.msgpack.encode(report)
        told = here.sighted(seen(ADA, 40))
        assert {(report.first_capture_ns, report.last_capture_ns) for _, report in told} == {
            (45, 45)
        }


def kinds(told: list[Telling]) -> list[str]:
    return [kind.value for kind, _ in told]


def test_a_name_is_told_and_again_when_it_is_live() -> None:
    here = presence()
    assert kinds(here.sighted(seen(ADA, 0))) == ["TRACK_STARTED", "SUBJECT_SEEN"]
    assert here.sighted(seen(ADA, 40)) == []
    assert kinds(here.sighted(seen(ADA, 80, LIVE))) == ["TRACK_UPDATED", "SUBJECT_SEEN"]
    assert here.sighted(seen(ADA, 120)) == []
    assert kinds(here.sighted(seen(ADA, 280))) == ["TRACK_UPDATED"]
    assert kinds(here.sighted(seen(ADA, 1000, LIVE))) == ["TRACK_UPDATED"]
    assert kinds(here.ended(1)) == ["TRACK_ENDED"]
    assert here.ended(1) == []
    assert len(here) == 0


def test_live_at_once_is_told_once() -> None:
    here = presence()
    assert kinds(here.sighted(seen(ADA, 0, LIVE))) == ["TRACK_STARTED", "SUBJECT_SEEN"]
    assert here.sighted(seen(ADA, 500, LIVE)) == []


def test_an_unknown_face_is_told_while_it_is_there() -> None:
    here = presence()
    assert kinds(here.sighted(seen(UNKNOWN, 0))) == ["TRACK_STARTED"]
    assert here.sighted(seen(UNKNOWN, 999)) == []
    assert kinds(here.sighted(seen(UNKNOWN, 1000))) == ["UNKNOWN_SEEN"]
    assert here.sighted(seen(UNKNOWN, 9000)) == []
    assert kinds(here.ended(1)) == ["TRACK_ENDED"]


def test_a_face_that_stays_hidden_is_told_and_again_after_it_showed_itself() -> None:
    here = presence()
    told = [kinds(here.sighted(seen(REJECTED, 500 * k))) for k in range(8)]
    assert told == [["TRACK_STARTED"], [], [], [], ["FACE_HIDDEN"], [], [], []]
    here.sighted(seen(ADA, 4000))
    assert "FACE_HIDDEN" not in kinds(here.sighted(seen(REJECTED, 5900)))
    assert "FACE_HIDDEN" in kinds(here.sighted(seen(REJECTED, 7900)))


def test_a_stream_that_is_not_recognised_hides_nobody() -> None:
    here = presence()
    for k in range(10):
        assert "FACE_HIDDEN" not in kinds(
            here.sighted(seen(Identity(Decision.NOT_EVALUATED), 1000 * k))
        )


def test_an_attack_is_told_once() -> None:
    here = presence()
    assert kinds(here.sighted(seen(UNKNOWN, 0, SPOOF))) == ["TRACK_STARTED", "SPOOF_SUSPECTED"]
    assert here.sighted(seen(UNKNOWN, 40, SPOOF)) == []


def test_a_report_holds_what_is_known() -> None:
    here = presence()
    here.sighted(seen(ADA, 100, ood=0.8, looked=True))
    here.sighted(seen(replace(ADA, similarity=0.6), 200, ood=0.5, looked=True))
    here.sighted(seen(REJECTED, 300, ood=0.9))
    [(_, report)] = here.ended(1)
    assert (report.first_ns, report.last_ns) == (100 * MS, 300 * MS)
    assert (report.first_capture_ns, report.last_capture_ns) == (105, 305)
    assert (report.best_ood_score, report.ood_score, report.looks) == (0.8, 0.9, 2)
    assert (report.box, report.track_id) == (BOX, 1)


def test_who_was_deleted_is_not_told_at_the_end() -> None:
    here = presence()
    here.sighted(seen(ADA, 0))
    [(_, report)] = here.ended(1, forget=True)
    assert report.identity == Identity(Decision.NOT_EVALUATED)


states = st.tuples(
    st.sampled_from([ADA, UNKNOWN, REJECTED, Identity(Decision.NOT_EVALUATED)]),
    st.sampled_from([LIVE, SPOOF, UNDECIDED]),
    st.integers(0, 400),
    st.integers(1, 3),
)


@settings(max_examples=60)
@given(st.lists(states, max_size=40))
def test_every_track_starts_and_ends_once_and_changes_a_few_times_a_second(
    history: list[tuple[Identity, Liveness, int, int]],
) -> None:
    here, now = presence(), 0
    told: list[tuple[int, EventKind, int]] = []
    for identity, liveness, step, track in history:
        now += step
        for kind, report in here.sighted(seen(identity, now, liveness, track=track)):
            told.append((report.track_id, kind, report.last_ns))
    for track in range(1, 4):
        told += [(r.track_id, kind, r.last_ns) for kind, r in here.ended(track)]
    for track in {t for t, _, _ in told}:
        own = [kind for t, kind, _ in told if t == track]
        assert own[0] is EventKind.TRACK_STARTED
        assert own[-1] is EventKind.TRACK_ENDED
        assert own.count(EventKind.TRACK_STARTED) == own.count(EventKind.TRACK_ENDED) == 1
        at = [ns for t, kind, ns in told if t == track and kind is EventKind.TRACK_UPDATED]
        close = sum(b - a < UPDATE_INTERVAL_NS for a, b in itertools.pairwise(at))
        assert close <= 12, "more than there are states"


# -- a door and an alarm on events alone -----------------------------------------------------


class Scene:
    """A camera over a door: people come, go, cover their faces, swap, hold up photos; scenes
    are cut. Seeded; the truth is known."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.stage = Stage()
        self.now = 0
        self._looks = seed * 1000

    def play(self) -> None:
        for _ in range(self.chance.randint(2, 6)):
            self._act()
        self.stage.faces.finish()

    def _act(self) -> None:
        who = self.chance.choice(["ada", "bob", None])
        trouble = self.chance.choice(["", "", "covered", "photo"])
        fps = self.chance.choice([5, 10, 25])
        gap = self.chance.choice([0, 0, 1500])  # ms in which nobody is there
        for _ in range(gap * fps // 1000):
            self._frame([], fps)
        self._looks += 1
        for k in range(self.chance.randint(1, fps + 5)):
            if self.chance.random() < 0.05:
                self._looks += 1  # turns the head
            said = evidence(who, ood=self.chance.choice([0.5, 0.7, 0.9]))
            if trouble == "covered" or self.chance.random() < 0.1:
                said = evidence(None, ood=0.1, live=said.live_score)
            if trouble == "photo":
                said.live_score = 0.05
            elif self.chance.random() < 0.1:
                said.live_score = 0.6
            del k
            self._frame([said], fps)

    def _frame(self, said: list[Evidence], fps: int) -> None:
        self.now += SECOND // fps
        found = [detected(100, signature(self._looks)) for _ in said]
        asked = self.stage.turn(found, self.now)
        for look, answer in zip(asked, said, strict=False):
            late = self.chance.random() < 0.05
            self.stage.answer(look, Evidence() if late else answer)
        self.stage.emit()


def opens(identity: Identity, liveness: Liveness) -> bool:
    return identity.decision is Decision.MATCH and liveness.verdict is LivenessVerdict.LIVE


DERIVED = frozenset({EventKind.SUBJECT_SEEN})
OF_TRACKS = frozenset({EventKind.TRACK_STARTED, EventKind.TRACK_UPDATED, EventKind.TRACK_ENDED})


def openings(told: list[Telling], kinds_used: frozenset[EventKind]) -> dict[tuple[int, str], int]:
    """When a door that hears these events opens, for whom."""
    opened: dict[tuple[int, str], int] = {}
    for kind, report in told:
        if kind in kinds_used and opens(report.identity, report.liveness):
            opened.setdefault((report.track_id, report.identity.subject_id), report.last_ns)
    return opened


def test_a_door_and_an_alarm_need_the_events_alone() -> None:
    """Openings and alarms by the results and by the events are the same, none of them by
    more than half a second of media time later."""
    opened = alarmed = 0
    for seed in range(200):
        scene = Scene(seed)
        scene.play()
        stage = scene.stage
        doors: dict[tuple[int, str], int] = {}
        for s in stage.sightings:
            if opens(s.identity, s.liveness):
                doors.setdefault((s.track_id, s.identity.subject_id), s.at_ns)
        for kinds_used in (DERIVED, OF_TRACKS):
            by_events = openings(stage.told, kinds_used)
            assert by_events.keys() == doors.keys(), f"seed {seed}, {sorted(kinds_used)}"
            late = max((at - doors[key] for key, at in by_events.items()), default=0)
            assert late <= 500 * MS, f"seed {seed}, {sorted(kinds_used)}"
        spoofs = {
            s.track_id for s in stage.sightings if s.liveness.verdict is LivenessVerdict.SPOOF
        }
        alarms = {r.track_id for kind, r in stage.told if kind is EventKind.SPOOF_SUSPECTED}
        assert alarms == spoofs, f"seed {seed}"
        opened, alarmed = opened + len(doors), alarmed + len(alarms)
    assert min(opened, alarmed) > 50, "the scenes have something to tell"
