"""From which liveness score on a face is what."""

from __future__ import annotations

import msgspec


class LivenessBand(msgspec.Struct, frozen=True):
    """Scores from ``live`` on are bona fide, scores below ``spoof`` an attack, and what lies
    between is undecided; 0 <= spoof <= live <= 1. Raises ``ValueError`` else."""

    live: float
    spoof: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.spoof <= self.live <= 1.0:
            raise ValueError(
                f"liveness thresholds spoof {self.spoof} and live {self.live} "
                "must satisfy 0 <= spoof <= live <= 1"
            )
