"""The order of the tests themselves: each process begins with what has its turn."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.collecting import TESTS, importable, rotated
from tests.ordering import cut, in_turn
from tests.properties import some


def parts(found: list[str], processes: int) -> list[list[str]]:
    """As xdist's `worksteal` cuts a list at the beginning."""
    made, left = [], list(found)
    for number in range(processes):
        size = len(left) // (processes - number)
        made.append(left[:size])
        left = left[size:]
    return made


def test_each_process_begins_with_what_has_its_turn() -> None:
    units = [["a"] * 3, ["b"] * 4, ["c"] * 3, ["d"] * 2, ["e"] * 3]
    assert [Counter(part) for part in parts(cut(units, 3), 3)] == [
        {"a": 3, "d": 2},
        {"b": 4, "e": 1},
        {"c": 3, "e": 2},
    ]


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 5))
def test_however_many_there_are_each_is_there_once(sizes: list[int], processes: int) -> None:
    units = [[f"{unit} {number}" for number in range(size)] for unit, size in enumerate(sizes)]
    made = cut(units, processes)
    assert Counter(made) == Counter(one for unit in units for one in unit)
    for unit, part in zip(units, parts(made, processes), strict=False):
        assert part[: len(unit)] == unit[: len(part)], "its own come first"


@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(2, 20))
def test_whatever_part_the_time_is_enough_for_all_are_soon_reached(
    many: int, turn: int, fraction: int
) -> None:
    names = {str(number) for number in range(many)}
    enough = math.ceil(many / fraction) + 1
    reached = {
        name for next_ in range(3 * fraction) for name in in_turn(names, turn + next_)[:enough]
    }
    assert reached == names


def test_a_turn_can_be_repeated() -> None:
    names = [str(number) for number in range(50)]
    assert in_turn(names, 7) == in_turn(names[::-1], 7) != in_turn(names, 8)
    assert sorted(in_turn(names, 7)) == sorted(names)


def test_each_process_compiles_a_part_of_the_tests_and_imports_all() -> None:
    paths = [Path(f"test_{number}.py") for number in range(10)]
    orders = [rotated(paths, number, 3) for number in range(3)]
    assert all(sorted(order) == sorted(paths) for order in orders)
    assert [order[0].stem for order in orders] == ["test_0", "test_3", "test_6"]


def test_tests_are_imported_as_pytest_does() -> None:
    assert importable(Path(__file__)) == (TESTS / "unit", __name__)
    browser = TESTS / "browser" / "test_console.py"
    assert importable(browser) == (TESTS.parent, "tests.browser.test_console")


def test_a_third_of_the_examples_is_asked_at_once() -> None:
    kept = settings(max_examples=300, stateful_step_count=7)
    assert (some(kept).max_examples, some(kept).stateful_step_count) == (100, 7)
    assert [some(settings(max_examples=most)).max_examples for most in (15, 30, 90)] == [15, 20, 30]
