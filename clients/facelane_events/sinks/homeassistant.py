"""What is so at a camera now, and how Home Assistant is told of it. Pure.

After "MQTT discovery", device-based (https://www.home-assistant.io/integrations/mqtt).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from facelane.types import Event, EventKind


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

    def after(self, event: Event) -> dict[str, str]:
        """The topics whose value this event may have changed, and the values."""
        track = event.track.global_track_id if event.track else ""
        found: dict[str, str] = {}
        if event.kind is EventKind.SUBJECT_SEEN and event.identity.subject_id:
            name = event.track.display_name if event.track else ""
            found["person"] = name or event.identity.subject_id
            self.unknown.discard(track)
        elif event.kind is EventKind.UNKNOWN_SEEN:
            self.unknown.add(track)
        elif event.kind is EventKind.SPOOF_SUSPECTED:
            self.spoof.add(track)
        elif event.kind is EventKind.TRACK_STARTED:
            self.present.add(track)
        elif event.kind is EventKind.TRACK_ENDED:
            for tracks in (self.present, self.unknown, self.spoof):
                tracks.discard(track)
        elif event.kind in (EventKind.STREAM_OPENED, EventKind.STREAM_CLOSED):
            # Tracks end before their stream does; what is left is from before a restart.
            self.present.clear()
            self.unknown.clear()
            self.spoof.clear()
        else:
            return found
        found["occupancy"] = _switch(self.present)
        found["unknown"] = _switch(self.unknown)
        found["spoof"] = _switch(self.spoof)
        return found


def _switch(tracks: set[str]) -> str:
    return "ON" if tracks else "OFF"


def discovery(
    source: str, prefix: str, discovery_prefix: str, availability: str
) -> tuple[str, dict[str, Any]]:
    """Topic and payload that make one device of a camera."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", source)
    if plain != source:
        # Two names that look alike now stay two.
        plain += "_" + hashlib.sha256(source.encode()).hexdigest()[:6]
    unique = f"facelane_{plain}"

    def part(platform: str, name: str, label: str, **more: str) -> dict[str, str]:
        return {
            "platform": platform,
            "name": label,
            "unique_id": f"{unique}_{name}",
            "state_topic": topic(prefix, source, name),
            **more,
        }

    return f"{discovery_prefix}/device/{unique}/config", {
        "device": {"identifiers": [unique], "name": source, "manufacturer": "facelane"},
        "origin": {"name": "facelane-events"},
        "availability": [{"topic": availability}],
        "components": {
            "person": part("sensor", "person", "Last person", icon="mdi:account"),
            "occupancy": part("binary_sensor", "occupancy", "Occupancy", device_class="occupancy"),
            "unknown": part("binary_sensor", "unknown", "Unknown person", device_class="problem"),
            "spoof": part("binary_sensor", "spoof", "Spoof suspected", device_class="tamper"),
        },
    }
