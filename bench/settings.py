"""What the command line says to every benchmark."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.report import Report


def _not_kept(report: Report) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Settings:
    """``smoke``: tiny sizes, to see that the code runs; figures mean nothing then.

    ``device``: ``cpu`` or ``cuda:N``, for the benchmarks that take one. ``cache``: where
    imported models and the peers' environments are kept between runs. ``frames``: a
    folder of JPEG files instead of rendered frames, or None. ``docs``: where drawings go.
    ``only``: parts of a benchmark by name, empty = all. ``servers``: how many share the card, for
    ``streams``; ``shards``: how many processes each of them is, 0 = as the benchmark has it.
    ``cameras``: how many of them ``streams`` tries, one number after the other until one is not
    kept; empty = it looks for the most.
    ``keep``: stores a report as far as it has come, so that a run that is ended early leaves what
    it had measured.
    """

    smoke: bool
    device: str
    cache: Path
    docs: Path
    frames: Path | None = None
    only: tuple[str, ...] = ()
    servers: int = 1
    shards: int = 0
    cameras: tuple[int, ...] = ()
    keep: Callable[[Report], object] = _not_kept
    began: float = field(default_factory=time.monotonic)

    def sized(self, full: int, smoke: int) -> int:
        """A count for a real run and for a smoke run."""
        return smoke if self.smoke else full

    def lasting(self, full: float, smoke: float) -> float:
        """Seconds for a real run and for a smoke run."""
        return smoke if self.smoke else full

    def wants(self, part: str) -> bool:
        return not self.only or part in self.only

    def say(self, text: str) -> None:
        """A line on stderr for whoever waits: what is going on, and since when."""
        elapsed = int(time.monotonic() - self.began)
        print(f"  {elapsed // 60}:{elapsed % 60:02d} {text}", file=sys.stderr, flush=True)
