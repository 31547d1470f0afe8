"""What the services ask of the server that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from facelane_server.domain import Stage
from facelane_server.pools.pool import Pool


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Model ids before and after. ``not_searched``: templates of other models than the new
    recogniser. ``remembered``: a restart comes back with this model."""

    old: str
    new: str
    not_searched: int
    remembered: bool


@dataclass(frozen=True, slots=True)
class Degradation:
    """Something that the server goes on without: see ``server_service.proto``."""

    component: str
    cause: str
    message: str

    @classmethod
    def of_store(cls, cause: str) -> Self:
        what = (
            "nobody is named until the store can be reached: others may have deleted somebody"
            if cause == "FENCED"
            else "recognition goes on from memory, changes are refused"
        )
        return cls("store", cause, f"{what}; see the server's log")

    @classmethod
    def of_events(cls, cause: str, waiting: int, dropped: int) -> Self:
        lost = f", {dropped} were lost" if dropped else ""
        return cls(
            "events",
            cause or "LOST",
            f"{waiting} events wait to be written and told{lost}",
        )


class Controls(Protocol):
    """``started_ns``: wall clock, since the epoch."""

    started_ns: int
    pools: dict[Stage, Pool]

    def model_ids(self) -> Mapping[str, str]:
        """The serving models by stage name; without those of stages that are switched off."""

    async def reload_model(
        self, pool_name: str, model: str, *, forget_templates: bool = False
    ) -> Reloaded:
        """Raises ``FacelaneError``."""

    def degradations(self) -> list[Degradation]:
        """Empty = nothing is amiss."""

    def forgotten(self) -> None:
        """Something was deleted: nothing of it is to be left in memory either."""

    def request_end(self, grace_s: float | None = None) -> None:
        """Drain and end, with all shards."""
