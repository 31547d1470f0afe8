"""``facelane-fleet``: servers and cameras of many machines, placed by Ray's actors."""

from __future__ import annotations
