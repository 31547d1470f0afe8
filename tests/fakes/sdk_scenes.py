"""What the tests of the blocking client share."""

from __future__ import annotations

import threading

import facelane

JPEG = b"\xff\xd8\xff\xe0" + b"x" * 60
PICTURE = facelane.Picture.encoded(JPEG)
QUICK = facelane.Reconnect(initial_delay=0.01, max_delay=0.05, jitter=0.0)


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("facelane")}
