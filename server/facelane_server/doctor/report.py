"""What was found, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from facelane_server import __version__


class Status(StrEnum):
    OK = "ok"
    SKIP = "skip"
    """Nothing to look at here."""
    WARN = "warn"
    """It works, but not as well or as safely as it could."""
    FAIL = "fail"
    """The server cannot serve like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``advice``: what to do; empty when all is well. ``facts``: for programs."""

    name: str
    status: Status
    detail: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    checks: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The worst; a report of nothing but skipped checks is OK."""
        found = {check.status for check in self.checks}
        return next((s for s in (Status.FAIL, Status.WARN) if s in found), Status.OK)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "version": __version__,
            "status": self.status.value,
            "checks": [
                {
                    "name": check.name,
                    "status": check.status.value,
                    "detail": check.detail,
                    "advice": check.advice,
                    "facts": check.facts,
                }
                for check in self.checks
            ],
        }

    def as_text(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            lines.append(f"{check.status.value:<5}{check.name:<{width + 2}}{check.detail}")
            if check.advice:
                lines.append(f"{'':<{width + 7}}-> {check.advice}")
        lines.append("")
        lines.append(
            {
                Status.OK: "all is well",
                Status.WARN: "it will serve; see the warnings",
                Status.FAIL: "it cannot serve like this; see the failures",
            }[self.status]
        )
        return "\n".join(lines)
