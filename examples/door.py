"""A door that opens for people who are known and alive, on a server's events alone.

    python examples/door.py --source front-door -- /usr/local/bin/open-door

Prints a JSON line for every opening, ``{"open": who, ...}``, and runs the command after ``--`` with
the subject's id as its last argument; ``{"closed": why, ...}`` says why it stays closed for a face,
or for everybody. Copy it and make it yours: ``Door`` is the rule, ``main`` the loop around it.

It fails closed. Nothing opens without an event that says so, and each event opens once: not for a
face that is known but not LIVE, not for one of another source, not while the server cannot be
reached, and not afterwards for what happened meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections import OrderedDict
from datetime import UTC, datetime

import facelane

KINDS = ("SUBJECT_SEEN", "TRACK_STARTED", "TRACK_UPDATED")
LATEST_S = 2.0
"""An event older than this opens nothing (``--latest``): who stood there may be gone."""
REMEMBERED = 1000
"""Tracks for which the door has opened, or said why not; each once for each name or reason."""


class Door:
    """Whom to open for."""

    def __init__(self, source_id: str, latest_s: float = LATEST_S) -> None:
        self._source_id = source_id
        self._latest_s = latest_s
        self._opened: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    def hears(self, event: facelane.Event, now: datetime) -> str:
        """The subject to open for; "" = stay closed."""
        if event.track is None or self.why_not(event, now):
            return ""
        whom = (event.track.global_track_id, event.identity.subject_id)
        return event.identity.subject_id if _first(self._opened, whom) else ""

    def why_not(self, event: facelane.Event, now: datetime) -> str:
        """Why an event opens nothing; "" = it does, or did."""
        if event.source_id != self._source_id or event.track is None or event.event_time is None:
            return "NOT_HERE"
        if event.liveness.verdict == "SPOOF":
            return "SPOOF_SUSPECTED"
        if not event.identity.matched:
            return _UNNAMED.get(event.identity.decision.value, "NOT_SURE_YET")
        if event.liveness.verdict != "LIVE":
            return "NOT_KNOWN_TO_BE_LIVE"
        age_s = (now - event.event_time).total_seconds()
        # An event that is old, or from the future: who stood there may be gone, or the clocks
        # of the server and of this machine disagree.
        return "EVENT_TOO_OLD" if abs(age_s) > self._latest_s else ""

    def explains(self, event: facelane.Event, now: datetime) -> str:
        """What ``why_not`` says, once a track; "" = nothing that has to be told."""
        why = self.why_not(event, now)
        if event.track is None or why in ("", "NOT_HERE"):
            return ""
        return why if _first(self._told, (event.track.global_track_id, why)) else ""


_UNNAMED = {"UNKNOWN": "UNKNOWN", "AMBIGUOUS": "UNKNOWN", "REJECTED_OOD": "NOT_TRUSTED"}


def _first(known: OrderedDict[tuple[str, str], None], what: tuple[str, str]) -> bool:
    """Whether it was not known before; now it is."""
    if what in known:
        return False
    known[what] = None
    if len(known) > REMEMBERED:
        known.popitem(last=False)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default=None, help="the server; default: this machine's")
    parser.add_argument("--token", default=None, help="the key's secret")
    parser.add_argument("--source", required=True, help="the camera's source id")
    parser.add_argument("--latest", type=float, default=LATEST_S, help="seconds; see LATEST_S")
    parser.add_argument("command", nargs="*", help="what opens the door")
    chosen = parser.parse_args()
    door = Door(chosen.source, chosen.latest)
    with (
        contextlib.suppress(KeyboardInterrupt),
        facelane.Client(chosen.target, token=chosen.token, timeout=5.0) as client,
    ):
        while True:
            try:
                # No resume token: what happened while nobody listened opens nothing.
                with client.watch_events(kinds=KINDS) as events:
                    print(json.dumps({"listening": chosen.source}), flush=True)
                    for event in events:
                        now = datetime.now(UTC)
                        if subject := door.hears(event, now):
                            open_for(subject, event, chosen.command)
                        elif why := door.explains(event, now):
                            tell("closed", why, event)
                print(json.dumps({"closed": "EVENTS_ENDED"}), flush=True)
            except facelane.FacelaneError as error:
                print(json.dumps({"closed": error.reason}), flush=True)
                print(f"closed: {error}", file=sys.stderr)
                if not error.retryable:
                    return 1
            time.sleep(1.0)
    return 0


def open_for(subject: str, event: facelane.Event, command: list[str]) -> None:
    tell("open", subject, event)
    if command:
        try:
            subprocess.run([*command, subject], timeout=5, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"the command failed: {error}", file=sys.stderr)


def tell(what: str, whom_or_why: str, event: facelane.Event) -> None:
    assert event.track is not None
    seen = event.track.last_capture_time
    line = {
        what: whom_or_why,
        "stream": event.stream_id,
        "track": event.track_id,
        "offset": event.track.last_offset,
        "seen": seen.isoformat() if seen else None,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
