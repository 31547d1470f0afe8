"""A door that opens for people who are known and alive, on a server's events alone.

    python examples/door.py --source front-door -- /usr/local/bin/open-door

Prints a JSON line for every opening, and runs the command after ``--`` with the subject's id as its
last argument. Copy it and make it yours: ``Door`` is the rule, ``main`` the loop around it.

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
"""Tracks for which the door has opened; a track opens it once for each name."""


class Door:
    """Whom to open for."""

    def __init__(self, source_id: str, latest_s: float = LATEST_S) -> None:
        self._source_id = source_id
        self._latest_s = latest_s
        self._opened: OrderedDict[tuple[str, str], None] = OrderedDict()

    def hears(self, event: facelane.Event, now: datetime) -> str:
        """The subject to open for; "" = stay closed."""
        if event.source_id != self._source_id or event.track is None or event.event_time is None:
            return ""
        if not event.identity.matched or event.liveness.verdict != "LIVE":
            return ""
        age_s = (now - event.event_time).total_seconds()
        if abs(age_s) > self._latest_s:
            print(f"closed: an event is {age_s:.1f} s old; do the clocks agree?", file=sys.stderr)
            return ""
        whom = (event.track.global_track_id, event.identity.subject_id)
        if whom in self._opened:
            return ""
        self._opened[whom] = None
        if len(self._opened) > REMEMBERED:
            self._opened.popitem(last=False)
        return event.identity.subject_id


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
                        if subject := door.hears(event, datetime.now(UTC)):
                            open_for(subject, event, chosen.command)
            except facelane.FacelaneError as error:
                print(f"closed: {error}", file=sys.stderr)
                if not error.retryable:
                    return 1
            time.sleep(1.0)
    return 0


def open_for(subject: str, event: facelane.Event, command: list[str]) -> None:
    assert event.track is not None
    line = {
        "open": subject,
        "stream": event.stream_id,
        "track": event.track_id,
        "offset": event.track.last_offset,
    }
    print(json.dumps(line), flush=True)
    if command:
        try:
            subprocess.run([*command, subject], timeout=5, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"the command failed: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
