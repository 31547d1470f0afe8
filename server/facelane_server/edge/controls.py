"""What the services ask of the server that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from facelane_server.domain import Stage
from facelane_server.pools.pool import Pool


class Controls(Protocol):
    """``started_ns``: wall clock, since the epoch."""

    started_ns: int
    pools: dict[Stage, Pool]

    def model_ids(self) -> Mapping[str, str]:
        """The serving models by stage name; without those of stages that are switched off."""

    async def reload_model(self, pool_name: str, model: str) -> tuple[str, str]:
        """(old, new model id). Raises ``FacelaneError``."""

    def request_stop(self, grace_s: float | None = None) -> None:
        """Drain and end."""
