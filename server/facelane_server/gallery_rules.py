"""What holds for one gallery instead of for all: how its people are named, how long they are kept,
and how many have to look before somebody is said to have been seen. Pure.
"""

from __future__ import annotations

import datetime as dt
import enum
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal

import msgspec

from facelane_server.domain import Keeping

DAY_NS: Final = 24 * 3600 * 1_000_000_000
SETTLE_S: Final = 600.0
"""A clock that leapt is believed after so long."""
LEAP_S: Final = 60.0

Ratio = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Even = Annotated[float, msgspec.Meta(gt=0.0, lt=0.5)]
"""A share of errors that is worth asking for."""
Days = Annotated[float, msgspec.Meta(gt=0.0, le=36_500.0)]


class Naming(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Other naming for one gallery or one source; unset = what holds for all."""

    false_naming: Share | None = None
    match_threshold: Ratio | None = None


class GalleryRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What holds for one gallery beside what holds for all; privacy.md says more."""

    confirm: Literal[0, 1, 2] = 0
    """How many keys with the verb ``confirm`` must say yes before SUBJECT_SEEN is told; until then
    it is a SUBJECT_CANDIDATE, and the gallery's other events name nobody. 0 = none."""
    delete_after_days: Days | None = None
    """A subject is deleted so long after it was made."""
    unseen_days: Days | None = None
    """A subject is deleted when it was neither made, named nor verified for so long. When it was
    last seen is kept for this, to the hour."""
    pictures: Keeping | None = None
    """Of which faces events of this gallery keep pictures; unset = as ``[events]`` says."""
    consent_label: str = ""
    """The label that says until when a subject may be kept, as ``2027-12-31`` (to the end of that
    day, UTC); it is deleted then. Subjects without the label are not touched by this."""

    @property
    def ends(self) -> bool:
        """Whether it ever has anybody deleted."""
        return bool(self.delete_after_days or self.unseen_days or self.consent_label)


class Why(enum.StrEnum):
    """Why somebody is not kept any longer."""

    DELETE_AFTER = "DELETE_AFTER"
    UNSEEN = "UNSEEN"
    CONSENT_ENDED = "CONSENT_ENDED"


def consent_until_ns(value: str) -> int | None:
    """The end of the day that a label names, since the epoch; None = it names none."""
    try:
        day = dt.date.fromisoformat(value.strip())
        end = dt.datetime.combine(day, dt.time(), dt.UTC) + dt.timedelta(days=1)
    except (ValueError, OverflowError):
        return None
    return int(end.timestamp()) * 1_000_000_000


def why_not_kept(
    rules: GalleryRules,
    *,
    made_ns: int,
    seen_ns: int,
    labels: Mapping[str, str],
    now_ns: int,
) -> Why | None:
    """Why a subject is to be deleted now; None = it is kept. ``seen_ns``: when it was last seen, 0
    = never. A label that names no day says nothing, and nobody is deleted for it."""
    if rules.consent_label:
        until_ns = consent_until_ns(labels.get(rules.consent_label, ""))
        if until_ns is not None and until_ns <= now_ns:
            return Why.CONSENT_ENDED
    if rules.delete_after_days and made_ns + int(rules.delete_after_days * DAY_NS) <= now_ns:
        return Why.DELETE_AFTER
    if rules.unseen_days:
        newest_ns = max(made_ns, seen_ns)
        if newest_ns + int(rules.unseen_days * DAY_NS) <= now_ns:
            return Why.UNSEEN
    return None


class SteadyClock:
    """Whether the clock on the wall can be believed: one that leapt against the time that has
    passed is not, until both have agreed again for ``settle_s`` seconds. What is deleted because a
    clock was wrong for a minute does not come back."""

    def __init__(self, *, settle_s: float, tolerance_s: float) -> None:
        self._settle_s = settle_s
        self._tolerance_s = tolerance_s
        self._since: float | None = None
        self._offset_s = 0.0
        self.leapt = False
        """At the last look."""

    def look(self, wall_s: float, monotonic_s: float) -> bool:
        """Whether it can be believed now. To be asked often."""
        offset = wall_s - monotonic_s
        self.leapt = self._since is not None and abs(offset - self._offset_s) > self._tolerance_s
        if self._since is None or self.leapt:
            self._since, self._offset_s = monotonic_s, offset
        # What is slewed, or drifts, is followed.
        drift = max(-self._tolerance_s / 10, min(self._tolerance_s / 10, offset - self._offset_s))
        self._offset_s += drift
        return monotonic_s - self._since >= self._settle_s


class Expiry:
    """From which age on something is kept no longer, for as long as the clock can be believed: by
    one that was wrong for a minute, all that happened would be too old."""

    def __init__(
        self,
        keep_ns: int,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_ns = keep_ns
        self._wall_ns = wall_ns
        self._monotonic = monotonic
        self._clock = SteadyClock(settle_s=SETTLE_S, tolerance_s=LEAP_S)
        self._doubted_until_s = 0.0

    def before_ns(self) -> int:
        """What is older goes; 0 = nothing is, since the clock has leapt lately."""
        wall_ns, now_s = self._wall_ns(), self._monotonic()
        self._clock.look(wall_ns / 1e9, now_s)
        if self._clock.leapt:
            self._doubted_until_s = now_s + SETTLE_S
        return 0 if now_s < self._doubted_until_s else wall_ns - self._keep_ns
