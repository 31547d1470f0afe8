"""Calibrations at rest: one JSON file in the state folder, replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from facelane_server import limits
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.calibration import bounds

NAME: Final = "liveness.json"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """How one source was calibrated. ``model``: its id; another one's scores mean something else.
    ``base``: the thresholds before; ``band``: after. ``made``: UTC, ISO 8601. ``tracks``: that
    taught it; ``far``: that did not, since the model refuses them by far. ``not_live``: the share
    of living faces that was allowed not to be LIVE."""

    model: str
    base: LivenessBand
    band: LivenessBand
    made: str
    tracks: int
    far: int
    not_live: float

    def stale(self, model: str, base: LivenessBand) -> str:
        """Why it does not hold for this model and these thresholds; empty = it does."""
        if self.model != model:
            return f"it is of {self.model}"
        if self.base != base:
            return f"the thresholds were live {self.base.live:g}, spoof {self.base.spoof:g} then"
        return ""


Records = dict[str, Record]
"""By source id."""


class RecordsError(Exception):
    """The file cannot be used; the message says what to do."""


def read(folder: Path) -> Records:
    """Those of a state folder; none where there is no file. Raises ``RecordsError``, also for a
    record that no calibration comes to: an edited file opens no door."""
    path = folder / NAME
    try:
        if path.stat().st_size > limits.MAX_CALIBRATIONS_BYTES:
            raise RecordsError(
                f"{path} is larger than {limits.MAX_CALIBRATIONS_BYTES} bytes; {_REMEDY}"
            )
        found = msgspec.json.decode(path.read_bytes(), type=Records)
    except (FileNotFoundError, NotADirectoryError):  # a folder that cannot be is told of elsewhere
        return {}
    except (OSError, ValueError) as error:
        # What msgspec raises is a ValueError, and so is what a band refuses.
        why = error.strerror if isinstance(error, OSError) else error
        raise RecordsError(f"{path} cannot be read: {why}; {_REMEDY}") from None
    for source, record in found.items():
        loosest, strictest = bounds(record.base)
        if not (
            loosest.live <= record.band.live <= strictest.live
            and loosest.spoof <= record.band.spoof <= strictest.spoof
        ):
            raise RecordsError(f"{path}: the thresholds of {source} are out of bounds; {_REMEDY}")
    return found


_REMEDY: Final = "mend it, or remove it and calibrate again"


def write(folder: Path, records: Mapping[str, Record]) -> None:
    """Replaces the file as a whole, durably. Raises ``RecordsError``."""
    if len(records) > limits.MAX_CALIBRATED_SOURCES:
        raise RecordsError(
            f"more than {limits.MAX_CALIBRATED_SOURCES} sources are calibrated; forget some"
        )
    path = folder / NAME
    try:
        handle, fresh = tempfile.mkstemp(dir=folder, prefix=f".{NAME}-")
        try:
            with open(handle, "wb") as stream:
                # No secrets: the server may be another user than who calibrates.
                os.fchmod(handle, 0o644)
                stream.write(
                    msgspec.json.format(msgspec.json.encode(dict(sorted(records.items()))))
                )
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(fresh, path)
        except OSError:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise RecordsError(f"{path} cannot be written: {error.strerror}") from None
