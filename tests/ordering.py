"""In which order tests are run, where several processes share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

TESTS = Path(__file__).resolve().parent

FOLDERS = ("browser", "e2e", "process", "faults", "cases", "contract")
"""Whose files are begun first: they wait for most of their time, and one of them at the end would
keep a single process busy."""

T = TypeVar("T")


def folder_of(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


def is_last(item: pytest.Item) -> bool:
    """One of hundreds of a kind, to be run when all others were: ``slow(last=True)``."""
    return any(mark.kwargs.get("last", False) for mark in item.iter_markers("slow"))


def in_order(items: list[pytest.Item]) -> None:
    """Files stay whole; those with the most tests first in their folder."""
    sizes = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[bool, int, int, str]:
        folder = folder_of(item.path)
        rank = FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
        return is_last(item), rank, -sizes[item.path], str(item.path)

    items.sort(key=place)


def dealt(items: Sequence[pytest.Item], processes: int) -> list[pytest.Item]:
    """Items that are in order, for ``--dist worksteal``, which cuts them into a part for each of
    the processes: so that each begins with what is worth most, and not one alone while the others
    have the last. One process gets all of the browser's, with one server and one browser; files of
    the others are dealt in turn."""
    first = [item for item in items if not is_last(item)]
    last = [item for item in items if is_last(item)]
    return cut(first, last, [_unit(item) for item in first], processes)


def _unit(item: pytest.Item) -> str:
    return "browser" if folder_of(item.path) == "browser" else str(item.path)


def cut(first: Sequence[T], last: Iterable[T], units: Sequence[str], processes: int) -> list[T]:
    """``units``: of each of ``first``, with which others it stays together; those of "browser" are
    the first process's, and nobody else's are, where there are several processes."""
    hands: list[list[T]] = [[] for _ in range(processes)]
    hand_of: dict[str, int] = {"browser": 0}
    for one, unit in zip(first, units, strict=True):
        if unit not in hand_of:
            free = range(1, processes) if processes > 1 and "browser" in units else range(processes)
            hand_of[unit] = min(free, key=lambda number: (len(hands[number]), number))
        hands[hand_of[unit]].append(one)
    rest = [*last]
    sizes, left = [], len(first) + len(rest)
    for number in range(processes):
        # As xdist cuts them.
        sizes.append(left // (processes - number))
        left -= sizes[-1]
    over = [one for hand, size in zip(hands, sizes, strict=True) for one in hand[size:]]
    rest = over + rest
    found: list[T] = []
    for hand, size in zip(hands, sizes, strict=True):
        part = hand[:size]
        need = size - len(part)
        found += part + rest[:need]
        rest = rest[need:]
    return found
