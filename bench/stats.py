"""Percentiles and summaries of measured durations, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between the two nearest ranks; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    """nan of nothing."""
    return percentile(values, 50)


@dataclass(frozen=True, slots=True)
class Summary:
    """Durations in milliseconds, and how many there were a second."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    throughput_per_s: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float], elapsed_s: float) -> Summary:
        """``seconds``: one duration each; ``elapsed_s``: the time in which they all happened."""
        return cls(
            p50_ms=percentile(seconds, 50) * 1e3,
            p99_ms=percentile(seconds, 99) * 1e3,
            max_ms=max(seconds, default=math.nan) * 1e3,
            throughput_per_s=len(seconds) / elapsed_s if elapsed_s > 0 else math.nan,
            count=len(seconds),
        )


def ratio(value: float, base: float) -> float:
    """nan where there is nothing to compare with."""
    return value / base if base and not math.isnan(base) else math.nan
