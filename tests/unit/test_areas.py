"""Zones and lines: what can be one, where a point lies, and what a configuration is told."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from facelane_server import areas, limits
from facelane_server.areas import Area, Line, Mask, Zone
from facelane_server.config import ConfigError, parse
from facelane_server.events import EventKind

SQUARE = ((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8))
HOOK = ((0.1, 0.1), (0.9, 0.1), (0.9, 0.3), (0.3, 0.3), (0.3, 0.9), (0.1, 0.9))
fractions = st.floats(0.0, 1.0)
points = st.tuples(fractions, fractions)
exact = st.integers(0, 1024).map(lambda part: part / 1024)
"""Whose products have no rest: which side of a line a point is on does not depend on its order."""


def zone(*polygon: tuple[float, float], name: str = "z", **more: object) -> Zone:
    return Zone(name=name, polygon=polygon, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("polygon", [SQUARE, HOOK, SQUARE[::-1], SQUARE[:3]], ids=str)
def test_what_is_a_zone(polygon: tuple[tuple[float, float], ...]) -> None:
    assert areas.problem([zone(*polygon)]) == ""


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (zone((0, 0), (1, 1)), "three at least"),
        (zone(), "0 points"),
        (zone(*[(k / 70, k * k / 4900) for k in range(65)]), "64 at most"),
        (zone((0.2, 0.2), (0.8, 0.8), (0.8, 0.2), (0.2, 0.8)), "crosses itself"),
        (zone((0, 0), (1, 0), (1, 1), (0.5, -0.0)), "crosses itself"),
        (zone((0, 0), (1, 0), (0.5, 0), (0.5, 1)), "crosses itself"),
        (zone((0, 0), (1, 0), (0, 0), (0, 1)), "crosses itself"),
        (zone((0, 0), (0.5, 0.5), (1, 1)), "crosses itself|no area"),
        (zone((0, 0), (0, 0), (1, 0), (1, 1)), "points 1 and 2 are the same"),
        (zone((0, 0), (1, 0), (1, 1), (0, 0)), "points 4 and 1 are the same"),
        (zone((0, 0), (1, 0), (1, 1), (2.3e-308, 0)), "points 4 and 1 are the same"),
        (zone((10, 20), (300, 20), (300, 200)), "fractions"),
        (zone((0, 0), (1, 0), (math.nan, 1)), "fractions"),
        (zone((0, 0), (1, 0), (math.inf, 1)), "fractions"),
        (zone((0, 0), (0.001, 0), (0, 0.001)), "no area"),
        (zone(*SQUARE, dwell_s=-1.0), "dwell_s"),
        (zone(*SQUARE, unknown_s=math.nan), "unknown_s"),
        (zone(*SQUARE, name="a zone"), "a name has"),
        (zone(*SQUARE, name=""), "a name has"),
        (Line(name="l", start=(0.5, 0.5), end=(0.5, 0.5)), "same point"),
        (Line(name="l", start=(0.5, 0.5), end=(0.5, 5)), "fractions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_none_is_told(made: Area, told: str) -> None:
    found = areas.problem([made])
    assert re.search(told, found), found


def test_one_name_is_one_area_of_a_stream() -> None:
    assert "called `z`" in areas.problem([zone(*SQUARE), Line(name="z", start=(0, 0), end=(1, 1))])
    front, back = (zone(*SQUARE, sources=(source,)) for source in ("front", "back"))
    assert areas.problem([front, back], placed=True) == ""
    assert "called" in areas.problem([front, front], placed=True)
    many = [zone(*SQUARE, name=f"z{k}") for k in range(limits.MAX_AREAS + 1)]
    assert "at most" in areas.problem(many)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("polygon = [[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]", "sources is missing"),
        ('sources = ["the front"]\npolygon = [[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]', "no camera's"),
        ('sources = ["*"]\npolygon = [[0.1, 0.1], [0.9, 0.1]]', "three at least"),
        ('sources = ["*"]\npolygon = [[100, 100], [900, 100], [500, 900]]', "fractions"),
        ('sources = ["*"]\npolygon = [[0.1, 0.1], [0.9, 0.9], [0.9, 0.1], [0.1, 0.9]]', "crosses"),
        ('sources = ["*"]\npolygon = [[0.1], [0.9, 0.1], [0.5, 0.9]]', "length 2"),
        ('sources = ["*"]\npolygon = [[0, 0], [1, 0], [1, 1]]\nfaces = "some"', "faces"),
        ('sources = ["*"]\npolygon = [[0, 0], [1, 0], [1, 1]]\ndwel_s = 1', "dwell_s"),
    ],
    ids=lambda value: value.rpartition("\n")[2],
)
def test_a_configuration_says_what_is_wrong_with_it(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(f'[[zones]]\nname = "vault"\n{text}')


def test_a_configuration_with_zones_and_lines() -> None:
    config = parse(
        '[[zones]]\nname = "vault"\nsources = ["back-*"]\n'
        "polygon = [[0, 0], [1, 0], [1, 1]]\ndwell_s = 10\nunknown_s = 3.5\n"
        '[[lines]]\nname = "door"\nsources = ["front"]\nstart = [0, 0.5]\nend = [1, 0.5]\n'
    )
    [vault], [door] = config.zones, config.lines
    assert (vault.dwell_s, vault.unknown_s, vault.faces) == (10, 3.5, "all")
    assert vault.lies_in("back-1")
    assert not vault.lies_in("front")
    assert door.lies_in("front")


def test_the_page_has_what_can_be_configured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "zones.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = parse(example)
    assert [area.name for area in (*config.zones, *config.lines)] == ["vault", "poster", "door"]
    told = [kind for kind in EventKind if kind.startswith(("ZONE", "LINE"))]
    assert all(f"| `{kind}` |" in page for kind in told)


def test_where_a_point_lies() -> None:
    assert areas.depth(HOOK, (0.2, 0.5)) == pytest.approx(0.1)
    assert areas.depth(HOOK, (0.6, 0.6)) == pytest.approx(-0.3), "in the bend, outside"
    assert areas.depth(SQUARE, (0.5, 0.5)) == pytest.approx(0.3)
    assert areas.depth(SQUARE, (1.0, 1.0)) == pytest.approx(-math.hypot(0.2, 0.2))
    down = areas.beyond((0, 0.5), (1, 0.5), (0.3, 0.7))
    assert down == pytest.approx(0.2), "IN is down where the line goes to the right"
    assert areas.beyond((0.5, 0), (0.5, 1), (0.4, 0.5)) == pytest.approx(0.1)


@given(points, points, points, points)
def test_a_way_between_two_sides_meets_the_line_or_goes_around_it(
    start: tuple[float, float],
    end: tuple[float, float],
    before: tuple[float, float],
    now: tuple[float, float],
) -> None:
    assume(math.dist(start, end) > 0.05)
    first, second = (areas.beyond(start, end, at) for at in (before, now))
    assume(min(abs(first), abs(second)) > 1e-3)
    assume(first * second < 0)
    assert areas.passes(start, end, before, now) is areas.passes(start, end, now, before)
    assert areas.passes(start, end, before, now) is areas.passes(end, start, before, now)
    # A line much longer in both directions is met by every way between its sides.
    dx, dy = end[0] - start[0], end[1] - start[1]
    long = 1e6
    ends = (start[0] - dx * long, start[1] - dy * long), (end[0] + dx * long, end[1] + dy * long)
    assert areas.passes(*ends, before, now)


@given(st.lists(st.tuples(exact, exact), min_size=3, max_size=8), points)
def test_every_polygon_is_a_zone_or_told_why_not(
    polygon: list[tuple[float, float]], at: tuple[float, float]
) -> None:
    made = zone(*polygon)
    found = areas.problem([made])
    if "are the same" not in found:
        edges = list(areas._edges(polygon))
        crosses = any(
            areas._fold_back(edges[k], edges[other])
            if other == k + 1 or (k == 0 and other == len(edges) - 1)
            else areas._meet(edges[k], edges[other])
            for k in range(len(edges))
            for other in range(k + 1, len(edges))
        )
        assert ("crosses itself" in found) is crosses
    if found:
        return
    # Its order and where it begins do not matter.
    turned = (*polygon[1:], polygon[0])
    assert areas.problem([zone(*turned)]) == areas.problem([zone(*polygon[::-1])]) == ""
    deep = areas.depth(polygon, at)
    assume(abs(deep) > 1e-9)
    assert areas.holds(polygon, at) is (deep > 0)
    assert areas.depth(turned, at) == pytest.approx(deep)
    assert areas.depth(polygon[::-1], at) == pytest.approx(deep)


def test_masks() -> None:
    assert Mask.of([zone(*SQUARE)]) is None
    only = Mask.of([zone(*SQUARE, faces="only"), zone(*HOOK, faces="only")])
    assert only is not None
    assert [only.keeps(at) for at in ((0.5, 0.5), (0.15, 0.85), (0.95, 0.95))] == [
        True, True, False,
    ]  # fmt: skip
    poster = Mask.of([zone(*SQUARE, faces="ignored")])
    assert poster is not None
    assert [poster.keeps(at) for at in ((0.5, 0.5), (0.1, 0.1))] == [False, True]
    both = Mask.of([zone(*HOOK, faces="only"), zone(*SQUARE, faces="ignored")])
    assert both is not None
    assert [both.keeps(at) for at in ((0.15, 0.5), (0.25, 0.5), (0.95, 0.95))] == [
        True, False, False,
    ]  # fmt: skip
