"""An alarm for what should not be before a camera, on a server's events alone.

    python examples/alarm.py --source vault

Prints a JSON line, ``{"alarm": why, ...}``, for a face that is held up as a picture or a mask
(``SPOOF_SUSPECTED``), for one that nobody knows (``UNKNOWN_SEEN``), and for one that hides
(``FACE_HIDDEN``); ``{"blind": why}`` while it cannot know. Copy it and make it yours: ``rule``
decides, ``main`` is the loop around it.

It fails closed: an alarm that hears nothing is itself an alarm. It is told when the server cannot
be reached, when events were lost, and when a pool of the server cannot infer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

import facelane

KINDS = ("SPOOF_SUSPECTED", "UNKNOWN_SEEN", "FACE_HIDDEN", "POOL_CHANGED")


def rule(event: facelane.Event, source_id: str) -> dict[str, object] | None:
    """What to tell of an event; None = nothing."""
    if event.kind == "POOL_CHANGED":
        return {"blind": f"{event.pool}: {event.message}"}
    if event.source_id != source_id or event.track is None:
        return None
    return {
        "alarm": event.kind.value,
        "stream": event.stream_id,
        "track": event.track_id,
        "offset": event.track.last_offset,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default=None, help="the server; default: this machine's")
    parser.add_argument("--token", default=None, help="the key's secret")
    parser.add_argument("--source", required=True, help="the camera's source id")
    chosen = parser.parse_args()
    token = ""
    with (
        contextlib.suppress(KeyboardInterrupt),
        facelane.Client(chosen.target, token=chosen.token, timeout=5.0) as client,
    ):
        while True:
            try:
                with client.watch_events(token, kinds=KINDS) as events:
                    # What happens from here on is heard, whenever the connection breaks.
                    token = events.resume_token
                    tell({"listening": chosen.source})
                    for event in events:
                        token = event.resume_token
                        if (told := rule(event, chosen.source)) is not None:
                            tell(told)
                tell({"blind": "the server ended the events"})
            except facelane.HistoryLostError:
                token = ""
                tell({"blind": "events were lost"})
            except facelane.FacelaneError as error:
                tell({"blind": error.reason})
                if not error.retryable:
                    return 1
            time.sleep(1.0)
    return 0


def tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
