"""The order of the tests themselves: what is worth most is begun first, by every process."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from tests.ordering import cut

UNITS = ("browser", "a", "b", "c", "d")


def parts(found: list[str], processes: int) -> list[list[str]]:
    """As xdist's `worksteal` cuts a list at the beginning."""
    made, left = [], list(found)
    for number in range(processes):
        size = len(left) // (processes - number)
        made.append(left[:size])
        left = left[size:]
    return made


def test_each_process_begins_with_what_is_worth_most() -> None:
    units = ["browser"] * 3 + ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    first = [f"{unit}{number}" for number, unit in enumerate(units)]
    last = [f"last{number}" for number in range(30)]
    one, two, three = parts(cut(first, last, units, 3), 3)
    assert one[:4] == [*first[:3], "last0"]
    assert two[:5] == [*first[3:7], "last11"]
    assert three[:6] == [*first[7:12], "last21"]


@given(st.lists(st.sampled_from(UNITS), max_size=30), st.integers(0, 30), st.integers(1, 5))
def test_however_many_there_are_each_is_there_once(
    found: list[str], many: int, processes: int
) -> None:
    units = sorted(found, key=UNITS.index)
    first = [f"{unit}{number}" for number, unit in enumerate(units)]
    last = [f"last{number}" for number in range(many)]
    dealt = cut(first, last, units, processes)
    assert Counter(dealt) == Counter([*first, *last])
    assert [one for one in dealt if one in last] == last
