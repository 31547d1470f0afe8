"""In which order tests are run, where several processes share them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

TESTS = Path(__file__).resolve().parent

FOLDERS = ("browser", "e2e", "process", "faults", "cases", "contract")
"""Whose files are begun first: they wait for most of their time, and one of them at the end would
keep a single process busy."""

BLOCK = 24
"""Tests of hundreds of a kind that have their turn together."""
GOLDEN = (5**0.5 - 1) / 2

T = TypeVar("T")


def folder_of(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


def is_last(item: pytest.Item) -> bool:
    """One of hundreds of a kind, to be run when all others were, or in blocks that have
    their turn: ``slow(last=True)``."""
    return any(mark.kwargs.get("last", False) for mark in item.iter_markers("slow"))


def in_order(items: list[pytest.Item]) -> None:
    """Files stay whole; those with the most tests first in their folder."""
    sizes = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[bool, int, int, str]:
        folder = folder_of(item.path)
        rank = FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
        return is_last(item), rank, -sizes[item.path], str(item.path)

    items.sort(key=place)


def dealt(items: Sequence[pytest.Item], processes: int, turn: int) -> list[pytest.Item]:
    """Items that are in order, for ``--dist worksteal``, which cuts them into a part for each of
    the processes: so that each begins with what has its ``turn``. Files stay together, all of the
    browser's with one server and one browser; those of hundreds of a kind in blocks."""
    seen: Counter[Path] = Counter()
    units: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        name = item.path.relative_to(TESTS).as_posix()
        if folder_of(item.path) == "browser":
            name = "browser"
        elif is_last(item):
            name = f"{name} {seen[item.path] // BLOCK}"
            seen[item.path] += 1
        units[name].append(item)
    return cut([units[name] for name in in_turn(units, turn)], processes)


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """Where time is over before all were run: each turn begins elsewhere on one round, so that
    whatever part of it the time is enough for, turns that follow each other soon reach all. That
    is what steps of the golden section do. The round itself mixes what is of a kind."""
    mixed = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    first = int(turn * GOLDEN % 1 * len(mixed))
    return mixed[first:] + mixed[:first]


def cut(units: Iterable[Sequence[T]], processes: int) -> list[T]:
    """In turn to whoever has the least; what one has more than xdist's part of it goes to those
    that have less, behind their own."""
    hands: list[list[T]] = [[] for _ in range(processes)]
    for unit in units:
        min(hands, key=len).extend(unit)
    sizes, left = [], sum(map(len, hands))
    for number in range(processes):
        # As xdist cuts them.
        sizes.append(left // (processes - number))
        left -= sizes[-1]
    over = [one for hand, size in zip(hands, sizes, strict=True) for one in hand[size:]]
    found: list[T] = []
    for hand, size in zip(hands, sizes, strict=True):
        part = hand[:size]
        need = size - len(part)
        found += part + over[:need]
        over = over[need:]
    return found
