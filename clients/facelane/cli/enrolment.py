"""``facelane enroll``: which pictures are whose, and how each of them fared."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import facelane
from facelane import lines
from facelane.cli import output
from facelane.cli.base import OK, PARTLY, REFUSED, USAGE
from facelane.cli.sources import SourceError, passed_over_words
from facelane.cli.stills import load_picture, look_through
from facelane.cli.streams import shown

_NO_ID: Final = re.compile(r"[^A-Za-z0-9\-_.@:]+")

_UNREADABLE: Final = "UNREADABLE"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture, and whose face it shows."""

    subject_id: str
    display_name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is to be enrolled, and what lies beside it."""

    wanted: list[Wanted]
    passed_over: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one picture fared: ``enrolled``, or ``error`` with its reason."""

    wanted: Wanted
    enrolled: facelane.Enrollment | None = None
    reason: str = ""
    message: str = ""


def plan_of(subject_id: str, display_name: str, paths: list[Path]) -> Plan:
    """The pictures of one subject; folders stand for what lies in them."""
    made = Plan([])
    for path in paths:
        pictures = [path]
        if path.is_dir():
            found = look_through(path)
            pictures = found.pictures
            made.passed_over.extend(
                (f"{shown(path)}/{what}", why) for what, why in found.passed_over
            )
        made.wanted.extend(Wanted(subject_id, display_name, picture) for picture in pictures)
    return made


def plan(folder: Path) -> Plan:
    """One folder a subject. A name that can be no id ("Grace Hopper") becomes the display
    name, and the id what is left of it ("Grace-Hopper").

    Raises:
        SourceError: there is no picture in any of them, or two names become one id.
    """
    made = Plan([])
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        name = shown(path.name)
        if path.name.startswith("."):
            made.passed_over.append((name, "hidden"))
        elif not path.is_dir():
            made.passed_over.append((name, "in no subject's folder"))
        else:
            subject_id = _NO_ID.sub("-", name).strip("-")
            if not subject_id:
                made.passed_over.append((name, "of this name no id can be made"))
                continue
            if subject_id in names:
                raise SourceError(
                    f"{names[subject_id]} and {name} would both be the subject {subject_id}: "
                    "rename one of the folders"
                )
            names[subject_id] = name
            found = look_through(path)
            shows = "" if subject_id == name else name
            made.wanted.extend(Wanted(subject_id, shows, picture) for picture in found.pictures)
            made.passed_over.extend((f"{name}/{what}", why) for what, why in found.passed_over)
            if not found.pictures:
                made.passed_over.append((name, "holds no pictures"))
    if not made.wanted:
        raise SourceError(
            f"{shown(folder)} holds no subjects: put the pictures of each into a folder called as "
            f"the subject, {shown(folder)}/grace/any.jpg{passed_over_words(made.passed_over)}"
        )
    return made


def serving(client: facelane.Client) -> str:
    """The recogniser in service, by which a picture counts as enrolled already."""
    try:
        models = client.server_info().models
    except facelane.PermissionDeniedError:
        return ""
    return " ".join(model.model_id for model in models if model.task is facelane.Stage.RECOGNIZER)


def enrol(client: facelane.Client, wanted: Wanted, recognizer: str, **options: Any) -> Outcome:
    """Enrols one picture. With a ``recognizer`` the same picture is not enrolled twice within
    the time for which the server remembers its requests.

    Raises:
        FacelaneError: what is not about this picture.
    """
    try:
        picture = load_picture(wanted.path)
        told = {**options, "display_name": wanted.display_name}
        request_id = None
        if recognizer:
            known = (recognizer, wanted.subject_id, repr(sorted(told.items())))
            digest = hashlib.sha256("\0".join(known).encode() + picture.data)
            request_id = f"cli-{digest.hexdigest()[:40]}"
        try:
            done = client.enroll(wanted.subject_id, picture, request_id=request_id, **told)
        except facelane.NotFoundError as error:
            if request_id is None or error.reason != facelane.Reason.TEMPLATE_NOT_FOUND:
                raise
            # It was enrolled and deleted since: again, then.
            done = client.enroll(wanted.subject_id, picture, **told)
    except OSError as error:
        return Outcome(wanted, None, _UNREADABLE, error.strerror or str(error))
    except (facelane.EnrollmentRefusedError, facelane.PictureError) as error:
        return Outcome(wanted, None, error.reason, error.message)
    return Outcome(wanted, done)


class Report:
    """Tells of every picture as it is done, and of all at the end."""

    def __init__(self, plan: Plan, *, as_lines: bool, grouped: bool) -> None:
        self._plan = plan
        self._as_lines = as_lines
        self._grouped = grouped
        self._console, self._err = output.consoles()
        self._subjects: Counter[str] = Counter({w.subject_id: 0 for w in plan.wanted})
        self._reasons: Counter[str] = Counter()
        self.enrolled = 0

    @property
    def exit_code(self) -> int:
        """What the command gives: its user's fault where nothing could even be read."""
        if not self._reasons:
            return OK
        if self.enrolled:
            return PARTLY
        return USAGE if self._reasons.keys() == {_UNREADABLE} else REFUSED

    def take(self, outcome: Outcome) -> None:
        """One picture is done."""
        wanted, done = outcome.wanted, outcome.enrolled
        name = shown(wanted.path)
        if done is None:
            self._reasons[outcome.reason] += 1
        else:
            self.enrolled += 1
            self._subjects[wanted.subject_id] += 1
        if self._as_lines:
            made: dict[str, Any] = {}
            if done is not None:
                made = {
                    "template_id": done.template.template_id,
                    "ood_score": round(done.template.ood_score, 4),
                    "template_count": done.subject.template_count,
                }
            output.write_line(
                lines.EnrollmentLine(
                    source=name, subject_id=wanted.subject_id, enrolled=done is not None,
                    reason=outcome.reason, message=outcome.message, **made,
                )
            )  # fmt: skip
        elif done is None:
            self._err.print(f"facelane: {name}: {outcome.reason}: {outcome.message}")
        else:
            self._console.print(
                f"{name}: enrolled as {done.subject.subject_id} "
                f"(template {done.template.template_id}, OOD {done.template.ood_score:.2f}, "
                f"{done.subject.template_count} in all)"
            )

    def close(self) -> None:
        """The account of a whole folder."""
        without = sorted(name for name, count in self._subjects.items() if not count)
        over = self._plan.passed_over
        if self._as_lines:
            line = lines.EnrollmentSummaryLine(
                pictures=len(self._plan.wanted),
                enrolled=self.enrolled,
                refused_by_reason=dict(self._reasons),
                subjects=len(self._subjects),
                subjects_without=without,
                passed_over=[{"source": name, "why": why} for name, why in over],
            )
            output.write_line(line)
        elif self._grouped:
            reasons = ", ".join(f"{count} {name}" for name, count in self._reasons.most_common())
            self._console.print(
                f"{self.enrolled} of {len(self._plan.wanted)} pictures enrolled, "
                f"{len(self._subjects) - len(without)} of {len(self._subjects)} subjects"
                f"{f'; refused: {reasons}' if reasons else ''}"
            )
            if without:
                self._err.print(f"facelane: nobody can recognise yet: {', '.join(without)}")
        if over and not self._as_lines:
            self._err.print(f"facelane: {passed_over_words(over).removeprefix('; ')}")
