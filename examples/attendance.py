"""Who was there today, from when to when: a table, on a server's events alone.

    python examples/attendance.py --gate entrance-1 --gate entrance-2 --out attendance

Writes ``attendance/2026-03-02.csv``, a line a person: first seen, last seen, how often, and at
which gates. A day is one of this machine's clock. Only people who are known and live are written
down, by the ids that a gallery has for them.

Nothing is lost and nothing counts twice: how far it has come is kept beside the tables, with whom
it has counted, and it goes on from there when it or the server was gone. Copy it and make it yours:
``Register`` is the rule, ``main`` the loop around it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import sys
import time
from collections import OrderedDict
from datetime import date, datetime
from pathlib import Path

import facelane

KINDS = ("SUBJECT_SEEN", "TRACK_UPDATED", "TRACK_ENDED")
"""Named first, seen to be live later: an event tells both of a track when it knows them."""
REMEMBERED = 10_000
"""Tracks that were counted: each counts once, also where its events come again."""
SAVE_AFTER_S = 1.0
"""Between an event and the files that know of it, at most, where many come at once."""


class Register:
    """The days that are not over; older ones are files. ``state`` is what a restart begins with."""

    def __init__(self, gates: frozenset[str], state: dict | None = None) -> None:
        self._gates = gates
        state = state or {}
        self.resume_token: str = state.get("resume_token", "")
        self._counted: OrderedDict[str, None] = OrderedDict.fromkeys(state.get("counted", []))
        self.days: dict[str, dict[str, dict]] = state.get("days", {})
        """By day, then by subject: first, last (ISO 8601), times, gates."""
        self.gaps: list[str] = state.get("gaps", [])
        """When events were lost: who came then is not in the table."""

    def hears(self, event: facelane.Event) -> bool:
        """Whether somebody has come."""
        self.resume_token = event.resume_token
        track, subject = event.track, event.identity.subject_id
        if event.source_id not in self._gates or track is None or event.event_time is None:
            return False
        if not event.identity.matched or event.liveness.verdict != "LIVE":
            return False
        at = event.event_time.astimezone()
        moment = at.isoformat(timespec="seconds")
        people = self.days.setdefault(at.date().isoformat(), {})
        row = people.setdefault(subject, {"first": moment, "last": moment, "times": 0, "gates": []})
        row["first"], row["last"] = min(row["first"], moment), max(row["last"], moment)
        if event.source_id not in row["gates"]:
            row["gates"].append(event.source_id)
        visit = f"{track.global_track_id} {subject}"
        if visit in self._counted:
            return False
        self._counted[visit] = None
        if len(self._counted) > REMEMBERED:
            self._counted.popitem(last=False)
        row["times"] += 1
        return True

    def lost(self, at: datetime, resume_token: str = "") -> None:
        """The server does not have all that happened since the last event any more;
        ``resume_token``: behind which it still has everything."""
        self.resume_token = resume_token
        self.gaps.append(at.isoformat(timespec="seconds"))

    def forget(self, today: date) -> None:
        """Days that are over; their files stay. Yesterday may still come, by a slow delivery."""
        for day in list(self.days):
            if (today - date.fromisoformat(day)).days > 1:
                del self.days[day]

    def table(self, day: str) -> str:
        """CSV."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["subject", "first", "last", "times", "gates"])
        for subject, row in sorted(self.days[day].items()):
            rows.writerow(
                [subject, row["first"], row["last"], row["times"], " ".join(row["gates"])]
            )
        return out.getvalue()

    def state(self) -> dict:
        return {
            "resume_token": self.resume_token,
            "counted": list(self._counted),
            "days": self.days,
            "gaps": self.gaps,
        }


def write(path: Path, text: str) -> None:
    """All of it, or what was there before."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "w", encoding="utf-8", opener=_private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def save(register: Register, folder: Path) -> None:
    """The tables first: what the state says was counted is in them."""
    for day in register.days:
        write(folder / f"{day}.csv", register.table(day))
    register.forget(datetime.now().astimezone().date())
    write(folder / "state.json", json.dumps(register.state()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default=None, help="the server; default: this machine's")
    parser.add_argument("--token", default=None, help="the key's secret")
    parser.add_argument("--gallery", default="default", help="whose people count")
    parser.add_argument("--gate", action="append", required=True, help="a camera's source id")
    parser.add_argument("--out", type=Path, default=Path("attendance"), help="a folder")
    chosen = parser.parse_args()
    chosen.out.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = chosen.out / "state.json"
    register = Register(
        frozenset(chosen.gate), json.loads(kept.read_text()) if kept.exists() else None
    )
    with (
        contextlib.suppress(KeyboardInterrupt),
        facelane.Client(chosen.target, token=chosen.token, timeout=5.0) as client,
    ):
        while True:
            try:
                follow(client, register, chosen.out, chosen.gallery)
                tell({"waits": "EVENTS_ENDED"})
            except facelane.HistoryLostError as error:
                behind = error.metadata.get("resume_token", "")
                register.lost(datetime.now().astimezone(), behind)
                save(register, chosen.out)
                tell({"gap": register.gaps[-1]})
            except facelane.FacelaneError as error:
                tell({"waits": error.reason})
                if not error.retryable:
                    print(error, file=sys.stderr)
                    return 1
            time.sleep(1.0)
    return 0


def follow(client: facelane.Client, register: Register, folder: Path, gallery: str) -> None:
    saved = 0.0
    try:
        with client.watch_events(
            register.resume_token, kinds=KINDS, gallery_ids=(gallery,)
        ) as events:
            # Whoever comes from here on counts, whatever becomes of the connection or of this.
            register.resume_token = events.resume_token
            save(register, folder)
            tell({"listening": True})
            for event in events:
                if register.hears(event):
                    tell({"seen": event.identity.subject_id, "gate": event.source_id})
                if time.monotonic() - saved > SAVE_AFTER_S:
                    save(register, folder)
                    saved = time.monotonic()
    finally:
        save(register, folder)


def tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
