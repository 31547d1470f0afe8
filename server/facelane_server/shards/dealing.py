"""How many shards there are, and what of the configuration each is given: pure, but for what
``cards`` counts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import msgspec

from facelane_server import config, limits

CORES_EACH: Final = 4
"""A front, and a worker for each of three stages."""
SHARDS_A_CARD: Final = 4


def count(settings: config.Config, *, cores: int, cards: int) -> int:
    """Shards of a server on a machine with so many cores and cards."""
    chosen = settings.server.shards
    if chosen != "auto":
        return chosen
    most = max(1, cores // CORES_EACH)
    if cards and any(
        device != "cpu" for pool in settings.stages.values() for device in pool.devices
    ):
        most = min(most, SHARDS_A_CARD * cards)
    return min(most, limits.MAX_SHARDS)


def dealt(devices: tuple[str, ...], index: int, of: int) -> tuple[str, ...]:
    """A shard's part of a pool's devices: in turn, and by turns where there are more shards."""
    return devices[index::of] or (devices[index % len(devices)],)


def beside(path: str, index: int) -> str:
    """Of a Unix socket that only one can listen on: the first shard's, and numbered ones."""
    return path if index == 0 else f"{path}.{index}"


def settings_of(
    settings: config.Config,
    index: int,
    of: int,
    *,
    runtime_dir: str,
    port: int = 0,
    models: Mapping[str, str] | None = None,
) -> config.Config:
    """What one of several shards is configured as. ``port``: the one that the server has, where
    the configuration leaves it to the system; ``models``: see ``messages.Launch``."""
    replace = msgspec.structs.replace
    listen = settings.listen
    if listen.startswith("unix:"):
        listen = beside(listen, index)
    elif port:
        listen = f"{listen.rpartition(':')[0]}:{port}"
    pools = {}
    for stage, pool in settings.stages.items():
        pools[stage.value] = replace(
            pool,
            devices=dealt(pool.devices, index, of),
            socket=pool.socket and beside(pool.socket, index),
            model=(models or {}).get(stage.value, pool.model),
        )
    return replace(
        settings,
        server=replace(settings.server, listen=listen),
        pools=replace(settings.pools, **pools),
        metrics=replace(settings.metrics, listen=""),
        runtime_dir=runtime_dir,
    )


def cards(environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA cards that this process may use, without asking their driver."""
    there = sum(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev"))
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    return min(
        there, sum(bool(part.strip()) and part.strip() != "-1" for part in chosen.split(","))
    )
