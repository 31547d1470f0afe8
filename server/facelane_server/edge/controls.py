"""What the services ask of the server that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
