"""The metrics of all shards as one exposition: pure.

Every series carries the label ``shard``, so that counters of a shard that was restarted begin again
by themselves, as Prometheus expects it of a process; whoever wants the server's figure sums over
them. What is the machine's or the store's (``WHOLE``) is the same in every shard, and told once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from facelane_server.pools.restart import Life
from facelane_server.shards.messages import Standing

WHOLE: Final = ("facelane_device_", "facelane_build_info", "facelane_gallery_templates")
KEEPER: Final = "keeper"
"""The value of ``shard`` for what the keeper says of its own process."""


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(texts: Mapping[int, str], standings: Iterable[Standing]) -> bytes:
    """``texts``: of the shards that answered, by number."""
    families: dict[str, Metric] = {}
    for shard, text in sorted(texts.items()):
        for found in text_string_to_metric_families(text):
            _take(families, found, str(shard))
    own = CollectorRegistry()
    ProcessCollector(registry=own)
    for found in own.collect():
        _take(families, found, KEEPER)
    registry = CollectorRegistry()
    registry.register(_Fixed([*families.values(), *_lives(standings)]))
    return generate_latest(registry)


def _take(families: dict[str, Metric], found: Metric, shard: str) -> None:
    whole = found.name.startswith(WHOLE)
    if whole and found.name in families:
        return
    family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
    label = {} if whole else {"shard": shard}
    for sample in found.samples:
        family.add_sample(sample.name, {**sample.labels, **label}, sample.value)


def _lives(standings: Iterable[Standing]) -> Iterable[Metric]:
    shards = list(standings)
    serving = GaugeMetricFamily(
        "facelane_shard_serving",
        "1 while the shard takes connections and can infer.",
        labels=["shard"],
    )
    state = GaugeMetricFamily(
        "facelane_shard_state", "1 for the state that the shard is in.", labels=["shard", "state"]
    )
    restarts = CounterMetricFamily(
        "facelane_shard_restarts", "Starts of a shard after its first.", labels=["shard"]
    )
    for shard in shards:
        number = str(shard.shard)
        serving.add_metric([number], float(shard.takes and shard.life == Life.READY))
        state.add_metric([number, shard.life], 1.0)
        restarts.add_metric([number], shard.restarts)
    return serving, state, restarts
