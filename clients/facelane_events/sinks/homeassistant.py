"""What is so at a camera now, and how Home Assistant is told of it. Pure.

After "MQTT discovery", device-based (https://www.home-assistant.io/integrations/mqtt).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from facelane.types import Event, EventKind, RuleReport

MAX_TRACKS: Final = 1024
"""Of a camera, that are known to be anywhere; a sink that is not told of their ends (``kinds``)
would know ever more."""


def topic(prefix: str, source: str, name: str) -> str:
    """A topic below the source's; what topics cannot hold becomes ``_``."""
    level = re.sub(r"[/#+\x00]", "_", source)
    return f"{prefix}/{level}/{name}"


@dataclass
class States:
    """Of one camera, from its events."""

    present: set[str] = field(default_factory=set)
    """Tracks that have not ended."""
    unknown: set[str] = field(default_factory=set)
    spoof: set[str] = field(default_factory=set)
    zones: dict[str, set[str]] = field(default_factory=dict)
    """Tracks in each."""
    lines: set[str] = field(default_factory=set)

    @property
    def rules(self) -> frozenset[str]:
        """The names of parts that zones and lines have had so far."""
        lines = (f"line_{name}_{way}" for name in self.lines for way in ("in", "out"))
        return frozenset((*(f"zone_{name}" for name in self.zones), *lines))

    def after(self, event: Event) -> dict[str, str]:
        """The topics whose value this event may have changed, and the values."""
        track = event.track.global_track_id if event.track else ""
        found: dict[str, str] = {}
        if event.kind is EventKind.SUBJECT_SEEN and event.identity.subject_id:
            name = event.track.display_name if event.track else ""
            found["person"] = name or event.identity.subject_id
            self.unknown.discard(track)
        elif event.kind is EventKind.UNKNOWN_SEEN:
            _add(self.unknown, track)
        elif event.kind is EventKind.SPOOF_SUSPECTED:
            _add(self.spoof, track)
        elif event.kind is EventKind.TRACK_STARTED:
            _add(self.present, track)
        elif event.kind is EventKind.TRACK_ENDED:
            for tracks in (self.present, self.unknown, self.spoof):
                tracks.discard(track)
        elif event.rule is not None:
            return self._after_rule(event, event.rule, track)
        elif event.kind in (EventKind.STREAM_OPENED, EventKind.STREAM_CLOSED):
            # Tracks end before their stream does; what is left is from before a restart.
            return self.emptied()
        else:
            return found
        found["occupancy"] = _switch(self.present)
        found["unknown"] = _switch(self.unknown)
        found["spoof"] = _switch(self.spoof)
        return found

    def emptied(self) -> dict[str, str]:
        """Nobody is known to be there any more: the topics that say so."""
        for tracks in (self.present, self.unknown, self.spoof, *self.zones.values()):
            tracks.clear()
        names = ("occupancy", "unknown", "spoof", *(f"zone_{name}" for name in self.zones))
        return {name: _switch(set()) for name in names}

    def _after_rule(self, event: Event, rule: RuleReport, track: str) -> dict[str, str]:
        if event.kind is EventKind.LINE_CROSSED:
            self.lines.add(rule.name)
            counts = (("in", rule.in_count), ("out", rule.out_count))
            return {f"line_{rule.name}_{way}": str(count) for way, count in counts}
        inside = self.zones.setdefault(rule.name, set())
        if event.kind is EventKind.ZONE_LEFT:
            inside.discard(track)
        else:
            _add(inside, track)
        return {f"zone_{rule.name}": _switch(inside)}


def _add(tracks: set[str], track: str) -> None:
    if len(tracks) >= MAX_TRACKS:
        tracks.pop()
    tracks.add(track)


def _switch(tracks: set[str]) -> str:
    return "ON" if tracks else "OFF"


def _plain(name: str) -> str:
    """What discovery can hold of a name; two that look alike then stay two."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return plain if plain == name else f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def discovery(
    source: str,
    prefix: str,
    discovery_prefix: str,
    availability: str,
    rules: Iterable[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Topic and payload that make one device of a camera. ``rules``: parts for its zones and
    lines, as ``States.rules`` names them."""
    unique = f"facelane_{_plain(source)}"

    def part(platform: str, name: str, label: str, **more: str) -> dict[str, str]:
        return {
            "platform": platform,
            "name": label,
            "unique_id": f"{unique}_{_plain(name)}",
            "state_topic": topic(prefix, source, name),
            **more,
        }

    own: dict[str, Any] = {}
    for name in sorted(rules):
        kind, _, label = name.partition("_")
        if kind == "zone":
            own[_plain(name)] = part(
                "binary_sensor", name, f"Zone {label}", device_class="occupancy"
            )
        else:
            label, _, way = label.rpartition("_")
            own[_plain(name)] = part(
                "sensor", name, f"Line {label} {way}", state_class="total_increasing",
                icon="mdi:counter",
            )  # fmt: skip
    return f"{discovery_prefix}/device/{unique}/config", {
        "device": {"identifiers": [unique], "name": source, "manufacturer": "facelane"},
        "origin": {"name": "facelane-events"},
        "availability": [{"topic": availability}],
        "components": {
            "person": part("sensor", "person", "Last person", icon="mdi:account"),
            "occupancy": part("binary_sensor", "occupancy", "Occupancy", device_class="occupancy"),
            "unknown": part("binary_sensor", "unknown", "Unknown person", device_class="problem"),
            "spoof": part("binary_sensor", "spoof", "Spoof suspected", device_class="tamper"),
            **own,
        },
    }
