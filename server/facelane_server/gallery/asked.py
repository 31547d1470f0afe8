"""What one caller asks of names, beside what the server is set up for: pure.

A caller may want names that are surer than the operator promises, never such that are less so,
unless its role has ``loosen-naming``. What it asks is held against the thresholds as they are at
each decision, so it stays right when the gallery grows or the recogniser is changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery.decide import Thresholds
from facelane_server.models.promise import Promise

_BEST_LOOK: Final = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """``false_naming``: in (0, 1); ``match``: least cosine of a match, [0, 1]; one of them.
    ``looser``: it counts alone, instead of as a further bound.

    ``grain``: thresholds that come of it are multiples of this; 0 = exact. Whoever does not see
    similarities as they are must not find them out by asking for one threshold after another.
    """

    false_naming: float | None = None
    match: float | None = None
    looser: bool = False
    grain: float = 0.0

    def applied(self, to: Thresholds) -> Thresholds | None:
        """What holds for the caller; ``None``: what it asks cannot be kept, so nobody is named."""
        if self.false_naming is not None:
            if not to.bands:
                return None
            before = to.promise
            share = self.false_naming
            if self.looser:
                own = replace(to, least=-1.0)
            elif before is None:
                own = replace(to, least=max(to.least, to.match))
            else:
                own = to
                share = min(share, before.false_naming)
            changed = before is None or share != before.false_naming
            own = replace(own, promise=Promise(share, to.bands))
        elif self.match is not None:
            if self.looser:
                own = replace(to, match=self.match, promise=None, least=-1.0)
            else:
                own = replace(to, least=max(to.least, self.match))
            changed = own != to
        else:
            return to
        return replace(own, grain=self.grain) if changed else own

    def check(self, against: Thresholds, searched: int) -> None:
        """``against``: what holds for everybody. ``searched``: the number of templates there.
        Raises ``FacelaneError``: NAMING_TOO_LOOSE, NAMING_NOT_MEASURED."""
        if self.false_naming is not None:
            if not against.bands:
                raise FacelaneError(
                    Reason.NAMING_NOT_MEASURED,
                    "the recogniser's package does not say how similar different people are to it, "
                    "so no share of strangers can be kept to; ask for a match_threshold, or have "
                    "`facelane-server models evaluate` measure the package",
                    metadata={"field": "false_naming"},
                )
            promise = against.promise
            if promise is not None and self.false_naming > promise.false_naming:
                self._refuse("false_naming", f"{promise.false_naming:g}", "at most")
        elif self.match is not None:
            needed = against.match_at(_BEST_LOOK, searched)
            if self.match < needed:
                self._refuse("match_threshold", f"{math.ceil(needed * 100) / 100:g}", "at least")

    def verifying(self, against: Thresholds) -> Thresholds:
        """What holds for one comparison with one subject. Raises as ``check``."""
        self.check(against, 1)
        own = self.applied(against)
        assert own is not None, "what cannot be kept was refused"
        return own

    def _refuse(self, field: str, allowed: str, bound: str) -> None:
        if self.looser:
            return
        raise FacelaneError(
            Reason.NAMING_TOO_LOOSE,
            f"{field} is looser than this server names people; ask for {bound} {allowed}, leave it "
            "out, or use a key whose role has `loosen-naming`",
            metadata={"field": field, "allowed": allowed, "scope": "loosen-naming"},
        )
