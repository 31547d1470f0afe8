"""What shards see of each other at any moment: a page of shared memory.

A memory file without a name that the keeper makes and all shards inherit. Each writes its own
*seat*, and reads the others'; a number is four bytes at an even place, which the processor writes
whole. ``seats * SEAT`` numbers::

    streams   open now
    flags     1: it takes connections, 2: it has more than it can carry in time
    rows      of keys that were ever used
    taken     places of all keys, of each kind (COUNTS numbers)
    keys      MAX_SHARED_KEYS times: digest (2 numbers), what it has under way (COUNTS numbers),
              look-ups so far

The seat of a shard that is gone is cleared by the keeper.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from facelane_server import limits

_TAKES: Final = 1
_FULL: Final = 2
COUNTS: Final = 5
"""Kinds of places: streams, calls, watchers, viewers, watchers of health."""
_TAKEN: Final = 3
_HEAD: Final = _TAKEN + COUNTS
_LOOKUPS: Final = COUNTS
"""The place of look-ups among a key's numbers."""
_ROW: Final = 2 + COUNTS + 1
_SEAT: Final = _HEAD + _ROW * limits.MAX_SHARED_KEYS


@dataclass(frozen=True, slots=True)
class Seat:
    """Of one shard. ``full``: it thins its streams."""

    shard: int
    takes: bool
    streams: int
    full: bool = False


def better(seats: Sequence[Seat], mine: int) -> int | None:
    """The shard that a stream which has come to ``mine`` had better be on; None = this one.

    It has more than an even share of the streams, or cannot carry its own in time while another
    can. With both, streams that come to shards at random end up nearly even. Pure.
    """
    here = next((seat for seat in seats if seat.shard == mine), None)
    takes = [seat for seat in seats if seat.takes and seat.shard != mine]
    if here is None or not takes:
        return None
    best = min(takes, key=lambda seat: (seat.full, seat.streams, seat.shard))
    if here.full and not best.full:
        return best.shard
    if best.full and not here.full:
        return None
    even = (here.streams + sum(seat.streams for seat in takes)) / (1 + len(takes))
    return best.shard if here.streams > max(even, best.streams) else None


class Board:
    """All seats. ``make`` at the keeper, ``share`` at a shard; ``close`` at the end."""

    def __init__(self, descriptor: int, seats: int) -> None:
        self.descriptor = descriptor
        self._seats = seats
        self._memory = mmap.mmap(descriptor, seats * _SEAT * 4)
        self._numbers = memoryview(self._memory).cast("I")

    @classmethod
    def make(cls, seats: int) -> Self:
        descriptor = os.memfd_create("facelane-board")
        os.ftruncate(descriptor, seats * _SEAT * 4)
        return cls(descriptor, seats)

    def close(self) -> None:
        """Idempotent."""
        if self.descriptor >= 0:
            self._numbers.release()
            self._memory.close()
            os.close(self.descriptor)
            self.descriptor = -1

    def clear(self, shard: int) -> None:
        """Its process is gone."""
        at = shard * _SEAT
        self._numbers[at : at + _SEAT] = memoryview(bytes(_SEAT * 4)).cast("I")

    def seats(self) -> list[Seat]:
        numbers = self._numbers
        return [
            Seat(
                shard,
                bool(numbers[shard * _SEAT + 1] & _TAKES),
                numbers[shard * _SEAT],
                bool(numbers[shard * _SEAT + 1] & _FULL),
            )
            for shard in range(self._seats)
        ]

    def tell(self, shard: int, *, streams: int, takes: bool, full: bool) -> None:
        at = shard * _SEAT
        self._numbers[at] = streams
        self._numbers[at + 1] = _TAKES * takes | _FULL * full

    def write(
        self, shard: int, row: int, digest: tuple[int, int], place: int, counts: Sequence[int]
    ) -> None:
        """Numbers of a shard's key, from ``place`` on."""
        assert 0 <= place <= place + len(counts) <= COUNTS + 1, "another key's row begins there"
        numbers, at = self._numbers, shard * _SEAT + _HEAD + row * _ROW
        for offset, number in enumerate(counts, 2 + place):
            numbers[at + offset] = number
        numbers[at], numbers[at + 1] = digest
        numbers[shard * _SEAT + 2] = max(numbers[shard * _SEAT + 2], row + 1)

    def tell_taken(self, shard: int, counts: Sequence[int]) -> None:
        assert len(counts) == COUNTS
        for at, number in enumerate(counts, shard * _SEAT + _TAKEN):
            self._numbers[at] = number

    def taken(self, without: int, kind: int) -> int:
        """Places of a kind, over all shards but one."""
        return sum(
            self._numbers[shard * _SEAT + _TAKEN + kind]
            for shard in range(self._seats)
            if shard != without
        )

    def found(self, without: int, digest: tuple[int, int], kind: int) -> int:
        """A key's count of one kind, over all shards but one."""
        numbers, total = self._numbers, 0
        for shard in range(self._seats):
            if shard == without:
                continue
            begin = shard * _SEAT + _HEAD
            for at in range(begin, begin + _ROW * numbers[shard * _SEAT + 2], _ROW):
                if numbers[at] == digest[0] and numbers[at + 1] == digest[1]:
                    total += numbers[at + 2 + kind]
                    break
        return total


class Holdings:
    """What keys have under way in one shard, written for the others, and read of them. A key beyond
    ``MAX_SHARED_KEYS`` is counted in its shard alone."""

    def __init__(self, board: Board, mine: int) -> None:
        self._board = board
        self._mine = mine
        self._rows: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        """By key: the look-ups of others that were taken off already."""

    def tell(self, name: str, counts: Sequence[int]) -> None:
        """``counts``: one for each kind, see ``COUNTS``."""
        if (row := self._row(name)) is not None:
            self._board.write(self._mine, row, _digest(name), 0, counts)

    def of(self, name: str, kind: int) -> int:
        """What a key has under way in all other shards; ``kind``: the place among the counts."""
        return self._board.found(self._mine, _digest(name), kind)

    def tell_taken(self, counts: Sequence[int]) -> None:
        """Places that all keys together have here: ``COUNTS`` numbers."""
        self._board.tell_taken(self._mine, counts)

    def taken(self, kind: int) -> int:
        """Places of a kind in all other shards."""
        return self._board.taken(self._mine, kind)

    def tell_lookups(self, name: str, mine: int) -> None:
        """Faces that a key has had looked up in this shard, since it began."""
        if (row := self._row(name)) is not None:
            self._board.write(self._mine, row, _digest(name), _LOOKUPS, [mine % 2**32])

    def looked_up(self, name: str) -> int:
        """The same in other shards, since this was asked last."""
        if self._row(name) is None:
            return 0
        there = self._board.found(self._mine, _digest(name), _LOOKUPS)
        before, self._seen[name] = self._seen.get(name, there), there
        return max(0, there - before)  # less: a shard began anew

    def _row(self, name: str) -> int | None:
        row = self._rows.get(name)
        if row is None and len(self._rows) < limits.MAX_SHARED_KEYS:
            row = self._rows[name] = len(self._rows)
        return row


def _digest(name: str) -> tuple[int, int]:
    """Eight bytes of a key's name; never 0, which is a row that is free."""
    found = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(found[:4], "little") | 1, int.from_bytes(found[4:8], "little")
