"""Zones and lines over sightings: nothing is told twice, nothing that was not seen."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.areas import Line, Zone
from facelane_server.domain import (
    Box,
    Decision,
    Direction,
    Identity,
    Liveness,
    LivenessVerdict,
    RuleReport,
    Sighting,
)
from facelane_server.events import EventKind
from facelane_server.zoning import GHOST_NS, Zoning

SIZE = (1000, 500)
WIDTH = 40.0
"""Of a face: beyond a border by 10 pixels it is beyond it."""
SECOND = 1_000_000_000
MIDDLE = Line(name="door", start=(0.0, 0.5), end=(1.0, 0.5))
"""IN is down: from y < 250 to y > 250."""
HALF = Line(name="half", start=(0.0, 0.5), end=(0.5, 0.5))
VAULT = Zone(
    name="vault", polygon=((0.4, 0.2), (0.6, 0.2), (0.6, 0.8), (0.4, 0.8)), dwell_s=2, unknown_s=1
)
"""x 400-600, y 100-400."""


class Camera:
    """Sightings of a stream, ten a second, and what came of them."""

    def __init__(self, *areas: Zone | Line) -> None:
        self.rules = Zoning(
            [area for area in areas if isinstance(area, Zone)],
            [area for area in areas if isinstance(area, Line)],
        )
        self.now_ns = 0
        self.told: list[tuple[EventKind, RuleReport]] = []

    def sees(
        self, *at: tuple[float, float], track: int = 1, step: float = 0.1, **more: object
    ) -> list[tuple[EventKind, RuleReport]]:
        """A track at these places, one picture each."""
        found = []
        for x, y in at:
            self.now_ns += round(step * SECOND)
            found += self.rules.sighted(self.sighting(track, x, y, **more))
        self.told += found
        return found

    def sighting(
        self,
        track: int,
        x: float,
        y: float,
        decision: Decision = Decision.NOT_EVALUATED,
        doubtful: bool = False,
    ) -> Sighting:
        box = Box(x - WIDTH / 2, y - WIDTH / 2, WIDTH, WIDTH)
        identity = Identity(decision, "ada" if decision is Decision.MATCH else "")
        return Sighting(
            track, box, self.now_ns, None, identity, Liveness(LivenessVerdict.UNDECIDED),
            size=SIZE, doubtful=doubtful,
        )  # fmt: skip

    def ends(self, track: int = 1, after: float = 1.0) -> list[tuple[EventKind, RuleReport]]:
        self.now_ns += round(after * SECOND)
        found = self.rules.ended(track)
        self.told += found
        return found

    @property
    def counted(self) -> tuple[int, int]:
        """Crossings told, in and out."""
        told = Counter(r.direction for k, r in self.told if k is EventKind.LINE_CROSSED)
        return told[Direction.IN], told[Direction.OUT]


def kinds(told: Iterable[tuple[EventKind, RuleReport]]) -> list[str]:
    return [kind.value for kind, _ in told]


def walk(y0: float, y1: float, x: float = 500.0, steps: int = 10) -> list[tuple[float, float]]:
    return [(x, y0 + (y1 - y0) * k / steps) for k in range(steps + 1)]


# -- lines ---------------------------------------------------------------------------------


def test_in_is_down_and_out_is_up_again() -> None:
    camera = Camera(MIDDLE)
    [(kind, report)] = camera.sees(*walk(100, 400))
    assert kind is EventKind.LINE_CROSSED
    assert report == RuleReport("door", direction=Direction.IN, entered=1)
    [(_, report)] = camera.sees(*walk(400, 100))
    assert report == RuleReport("door", direction=Direction.OUT, entered=1, left=1)


def test_a_jump_over_the_line_is_a_crossing_where_it_meets_it() -> None:
    camera = Camera(HALF)
    assert kinds(camera.sees((400, 100), (400, 400))) == ["LINE_CROSSED"]
    assert camera.sees((600, 100), track=2) == []
    assert camera.sees((600, 400), track=2) == [], "beside the line's end"


def test_around_the_end_is_no_crossing_and_through_it_again_is_one() -> None:
    camera = Camera(HALF)
    camera.sees(*walk(100, 400, x=400))
    camera.sees((700, 400), (700, 100), (400, 100))
    assert camera.counted == (1, 0)
    camera.sees(*walk(100, 400, x=400))
    assert camera.counted == (2, 0)


def test_who_comes_and_goes_on_one_side_counts_nothing() -> None:
    camera = Camera(MIDDLE)
    camera.sees(*walk(100, 245), *walk(245, 100))
    camera.sees(*walk(255, 400), track=2)
    camera.sees(*walk(250, 252), track=3)
    camera.ends(3)
    assert camera.counted == (0, 0)


@given(st.lists(st.floats(-9.9, 9.9), min_size=1, max_size=60), st.booleans())
def test_shaking_at_the_line_counts_once(shakes: list[float], back: bool) -> None:
    camera = Camera(MIDDLE)
    camera.sees((500, 100), *((500, 250 + shake) for shake in shakes))
    assert camera.counted == (0, 0)
    camera.sees((500, 100 if back else 400))
    assert camera.counted == (0, 0) if back else (1, 0)


@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 500)), min_size=2, max_size=80),
    st.lists(st.floats(-9.0, 9.0), min_size=80, max_size=80),
)
def test_what_is_counted_of_a_track_is_where_it_came_from_and_went_to(
    places: list[tuple[float, float]], shakes: list[float]
) -> None:
    """A line over the whole picture: crossings alternate, and their sum is the change of sides."""
    camera = Camera(MIDDLE)
    for (x, y), shake in zip(places, shakes, strict=False):
        camera.sees((x, y + shake))
    sides = [y + s > 250 for (_, y), s in zip(places, shakes, strict=False)
             if abs(y + s - 250) >= 10]  # fmt: skip
    changes = sum(a != b for a, b in itertools.pairwise(sides))
    came, went = camera.counted
    assert came + went == changes
    assert came - went == (int(sides[-1]) - int(sides[0]) if sides else 0)
    told = [r.direction for k, r in camera.told if k is EventKind.LINE_CROSSED]
    assert all(a is not b for a, b in itertools.pairwise(told))


@given(
    st.lists(
        st.tuples(st.floats(0, 500), st.integers(1, 3), st.booleans(), st.booleans()),
        max_size=60,
    )
)
def test_no_more_is_counted_than_was_seen_whatever_becomes_of_tracks(
    moves: list[tuple[float, int, bool, bool]],
) -> None:
    """Tracks that flicker, end, come again and are doubted: each crossing is one that a single
    track was seen to make."""
    camera = Camera(MIDDLE)
    ways: dict[int, list[bool]] = {}
    names: dict[int, int] = {}
    fresh = 10
    for y, who, ended, doubtful in moves:
        track = names.setdefault(who, who)
        camera.sees((who * 200, y), track=track, doubtful=doubtful)
        if abs(y - 250) >= 10:
            ways.setdefault(track, []).append(y > 250)
        if ended:
            camera.ends(track, after=0.5)
            fresh += 1
            names[who] = fresh
    seen = sum(sum(a != b for a, b in itertools.pairwise(sides)) for sides in ways.values())
    assert sum(camera.counted) <= seen
    reports = [r for k, r in camera.told if k is EventKind.LINE_CROSSED]
    for number, report in enumerate(reports, 1):
        assert report.entered + report.left == number


def test_a_track_lost_behind_the_line_is_not_counted_again_for_the_same_way() -> None:
    camera = Camera(MIDDLE)
    camera.sees(*walk(200, 262))
    camera.ends()
    camera.sees(*walk(238, 400), track=2)
    assert camera.counted == (1, 0), "it was counted already, and nobody saw it go back"
    camera.sees(*walk(400, 100), track=2)
    assert camera.counted == (1, 1)
    camera.sees(*walk(100, 400), track=2)
    assert camera.counted == (2, 1)


def test_one_lost_is_one_found() -> None:
    camera = Camera(MIDDLE)
    camera.sees(*walk(200, 262))
    camera.ends()
    camera.sees(*walk(238, 400), track=2)
    camera.sees(*walk(238, 400), track=3)
    assert camera.counted == (2, 0), "another one behind it"


@pytest.mark.parametrize(
    ("x", "after"), [(500.0, GHOST_NS / SECOND + 1), (600.0, 0.0)], ids=["later", "elsewhere"]
)
def test_who_comes_later_or_elsewhere_is_somebody_else(x: float, after: float) -> None:
    camera = Camera(MIDDLE)
    camera.sees(*walk(200, 262))
    camera.ends(after=1.0 + after)
    camera.sees(*walk(238, 400, x=x), track=2)
    assert camera.counted == (2, 0)


def test_people_side_by_side_and_behind_one_another_are_all_counted() -> None:
    camera = Camera(MIDDLE)
    for y in range(100, 420, 12):
        camera.now_ns += SECOND // 10
        for track in range(1, 7):
            at = y - 45 * (track // 3)
            sighting = camera.sighting(track, 200 + 60 * (track % 3), at)
            camera.told += camera.rules.sighted(sighting)
    assert camera.counted == (6, 0)


def test_a_doubtful_way_waits_and_goes_on_from_before() -> None:
    camera = Camera(MIDDLE)
    camera.sees((500, 200))
    assert camera.sees((500, 300), (500, 310), doubtful=True) == []
    assert kinds(camera.sees((500, 320))) == ["LINE_CROSSED"], "the same face after all"


def test_another_face_behind_a_cut_has_crossed_nothing() -> None:
    camera = Camera(MIDDLE)
    camera.sees((500, 200))
    camera.sees((500, 300), doubtful=True)
    camera.sees((500, 305), (500, 310), track=2)
    camera.ends(1)
    assert camera.counted == (0, 0)


def test_a_doubt_that_lasts_begins_the_way_anew() -> None:
    camera = Camera(MIDDLE)
    camera.sees((500, 200))
    camera.sees(*[(500, 300)] * 20, doubtful=True)
    camera.sees((500, 310))
    assert camera.counted == (0, 0)
    camera.sees(*walk(310, 100))
    assert camera.counted == (0, 1)


# -- zones ---------------------------------------------------------------------------------


def test_in_and_out_of_a_zone() -> None:
    camera = Camera(VAULT)
    assert kinds(camera.sees((300, 250), (500, 250))) == ["ZONE_ENTERED"]
    camera.sees((510, 250), step=1.0)
    [(kind, report)] = camera.sees((700, 250), step=0.5)
    assert kind is EventKind.ZONE_LEFT
    assert report == RuleReport("vault", dwell_ns=round(1.5 * SECOND), inside=0)


def test_a_track_that_ends_in_a_zone_has_left_it() -> None:
    camera = Camera(VAULT)
    camera.sees((500, 250), (500, 250))
    camera.sees((500, 250), track=2)
    [(kind, report)] = camera.ends(1)
    assert (kind, report.inside) == (EventKind.ZONE_LEFT, 1)
    assert report.dwell_ns == round(0.1 * SECOND), "until it was seen last"
    assert camera.ends(1) == []
    assert kinds(camera.ends(2)) == ["ZONE_LEFT"]
    assert len(camera.rules) == 0


@given(st.lists(st.floats(-9.9, 9.9), min_size=1, max_size=40))
def test_shaking_at_the_border_tells_once(shakes: list[float]) -> None:
    camera = Camera(VAULT)
    camera.sees((500, 250))
    camera.sees(*((400 + shake, 250) for shake in shakes), step=0.05)
    camera.sees((500, 250))
    told = [k for k in kinds(camera.told) if k in ("ZONE_ENTERED", "ZONE_LEFT")]
    # One who stays for half a second on the other side of the border is there.
    runs = 1
    length = 0
    for shake in shakes:
        length = length + 1 if shake < 0 else 0
        runs += length == 11
    assert len(told) <= 2 * runs
    assert told[::2] == ["ZONE_ENTERED"] * len(told[::2])
    assert told[1::2] == ["ZONE_LEFT"] * len(told[1::2])


def test_a_zone_smaller_than_a_face_is_entered_by_staying() -> None:
    small = Zone(name="small", polygon=((0.5, 0.5), (0.51, 0.5), (0.505, 0.52)))
    camera = Camera(small)
    assert camera.sees((505, 254)) == []
    assert kinds(camera.sees(*[(505, 254)] * 5)) == ["ZONE_ENTERED"]


def test_dwelling_is_told_once_a_stay() -> None:
    camera = Camera(VAULT)
    camera.sees(*[(500, 250)] * 20)
    assert kinds(camera.told) == ["ZONE_ENTERED"]
    [(kind, report)] = camera.sees((500, 250))
    assert (kind, report.dwell_ns) == (EventKind.ZONE_DWELL, 2 * SECOND)
    assert camera.sees(*[(500, 250)] * 50) == []
    camera.sees((700, 250))
    camera.sees(*[(500, 250)] * 30)
    assert kinds(camera.told).count("ZONE_DWELL") == 2


def test_passing_through_again_and_again_is_no_dwelling() -> None:
    camera = Camera(VAULT)
    for _ in range(10):
        camera.sees(*[(500, 250)] * 15, *[(700, 250)] * 3)
    assert "ZONE_DWELL" not in kinds(camera.told)


def test_unknown_for_long_enough_in_the_zone() -> None:
    camera = Camera(VAULT)
    camera.sees(*[(300, 250)] * 30, decision=Decision.UNKNOWN)
    camera.sees(*[(500, 250)] * 10, decision=Decision.UNKNOWN)
    assert "ZONE_UNKNOWN" not in kinds(camera.told), "outside does not count"
    assert "ZONE_UNKNOWN" in kinds(camera.sees((500, 250), decision=Decision.UNKNOWN))
    assert "ZONE_UNKNOWN" not in kinds(camera.sees(*[(500, 250)] * 30, decision=Decision.UNKNOWN))


@pytest.mark.parametrize("decision", [Decision.REJECTED_OOD, Decision.NOT_EVALUATED])
def test_untrusted_in_between_neither_counts_nor_forgives(decision: Decision) -> None:
    camera = Camera(VAULT)
    camera.sees(*[(500, 250)] * 30, decision=decision)
    assert "ZONE_UNKNOWN" not in kinds(camera.told)
    camera.sees((500, 250), decision=Decision.UNKNOWN)
    camera.sees(*[(500, 250)] * 15, decision=decision)
    assert "ZONE_UNKNOWN" in kinds(camera.sees((500, 250), decision=Decision.UNKNOWN))


def test_a_name_in_between_begins_it_anew() -> None:
    camera = Camera(VAULT)
    for decision, count in ((Decision.UNKNOWN, 8), (Decision.MATCH, 1), (Decision.UNKNOWN, 10)):
        camera.sees(*[(500, 250)] * count, decision=decision)
    assert "ZONE_UNKNOWN" not in kinds(camera.told)


moves = st.lists(
    st.tuples(
        st.integers(1, 4), st.floats(0, 1000), st.floats(0, 500), st.floats(0.02, 0.9),
        st.sampled_from(list(Decision)), st.booleans(), st.booleans(),
    ),
    max_size=80,
)  # fmt: skip


@given(moves)
def test_every_stay_has_a_beginning_and_an_end(
    steps: list[tuple[int, float, float, float, Decision, bool, bool]],
) -> None:
    camera = Camera(VAULT, MIDDLE)
    inside: Counter[int] = Counter()
    stays: dict[int, list[str]] = {}
    for track, x, y, step, decision, doubtful, ended in steps:
        told = camera.sees((x, y), track=track, step=step, decision=decision, doubtful=doubtful)
        told = [item for item in told if item[0] is not EventKind.LINE_CROSSED]
        if ended:
            told += camera.ends(track, after=0.0)
        for kind, report in told:
            stay = stays.setdefault(track, [])
            if kind is EventKind.ZONE_ENTERED:
                assert stay == []
                inside[track] += 1
            else:
                assert "ZONE_ENTERED" in stay, "nothing happens in a zone before it is entered"
            assert kind.value not in stay, "each once a stay"
            stay.append(kind.value)
            assert 0 <= report.dwell_ns <= camera.now_ns
            if kind is EventKind.ZONE_LEFT:
                stays[track] = []
                inside[track] -= 1
            assert report.inside == inside.total()
        if ended:
            assert inside[track] == 0


def test_nothing_is_kept_of_tracks_that_have_ended() -> None:
    camera = Camera(VAULT, MIDDLE)
    for track in range(1, 500):
        camera.sees(*walk(240, 262, steps=2), track=track, step=0.001)
        camera.ends(track, after=0.001)
    assert len(camera.rules) == 0
    assert len(camera.rules._ghosts) <= 64


def test_pictures_of_another_size_have_the_same_zones() -> None:
    camera = Camera(MIDDLE)
    camera.sees((500, 100))
    sighting = camera.sighting(1, 500, 400)
    small = Box(*(value / 2 for value in (sighting.box.x, sighting.box.y, WIDTH, WIDTH)))
    import msgspec

    told = camera.rules.sighted(msgspec.structs.replace(sighting, box=small, size=(500, 250)))
    assert kinds(told) in (["LINE_CROSSED"], [])
    assert camera.rules.sighted(msgspec.structs.replace(sighting, size=(0, 0))) == []
    assert not math.isnan(camera.counted[0])
