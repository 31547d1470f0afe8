"""JSON lines, as the ``facelane`` command and ``facelane-bridge`` print them: one shape.

Every line is an object with ``type``. The frames of a stream, from whichever program, are the
structs below; what the command alone prints has the fields of ``facelane.types``.
``docs/lines.schema.json`` is made of this module: ``python -m facelane.lines``.
"""

from __future__ import annotations

import dataclasses
import json
import time
import typing
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from facelane import types


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    time: str
    """UTC, ISO 8601, when the line was made."""
    camera: str
    """The camera's name; of a source on the command line the stream's source id."""


class FaceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One face of a result. Pixels of the frame as sent, origin at the top left."""

    track_id: int
    box: tuple[float, float, float, float]
    """x, y, width, height."""
    score: float
    landmarks: tuple[tuple[float, float], ...]
    decision: str
    subject_id: str
    similarity: float | None
    """Cosine to the best candidate, -1 to 1; null when nothing was compared."""
    threshold: float | None = None
    """What the similarity was compared with."""
    ood_score: float | None
    """0 to 1, higher = more trustworthy; null when the recogniser did not answer."""
    liveness: str
    liveness_score: float | None
    recognized_now: bool
    evidence_age_s: float | None = None
    """Media time since the look that says what is shown; null when nothing is."""
    links_since_evidence: int = 0
    """Pictures of the track since that look."""
    candidates: tuple[tuple[str, float], ...] = ()


class ResultLine(_Line, frozen=True, kw_only=True, tag="result"):
    """A frame that was analysed."""

    frame_id: int
    offset_s: float
    """Media time since the camera's first frame."""
    captured: str
    """UTC, ISO 8601, when the frame had arrived at the client."""
    latency_ms: float
    """From the frame's arrival at the client to its result."""
    age_ms: float
    """The part of it that was spent on the server."""
    width: int
    height: int
    faces: tuple[FaceLine, ...]
    missing_stages: tuple[str, ...] = ()
    stream_id: str = ""
    """Track ids are unique within a stream; a camera that came back has another."""
    source: str = ""
    """The file, where a frame is one of a folder's."""


class DropLine(_Line, frozen=True, kw_only=True, tag="drop"):
    """Frames that were given up before they were analysed."""

    frame_id: int
    """The first of them."""
    count: int
    """How many, with consecutive ids."""
    reason: str
    where: str
    """``server``, or ``bridge``, ``client``: the window was full and a newer frame came."""


class ErrorLine(_Line, frozen=True, kw_only=True, tag="error"):
    """A frame that could not be analysed."""

    frame_id: int
    reason: str
    message: str
    retryable: bool
    source: str = ""
    """The file, where a frame is one of a folder's."""


class StateLine(_Line, frozen=True, kw_only=True, tag="state"):
    """A camera's state changed."""

    state: str
    previous: str
    reason: str = ""
    message: str = ""
    retry_in_s: float | None = None


class UpdateLine(_Line, frozen=True, kw_only=True, tag="update"):
    """Something about the server's stream that is not about one frame."""

    kind: str
    stage: str = ""
    track_id: int = 0
    message: str = ""


class CameraTotals(msgspec.Struct, kw_only=True):
    """One camera's counters since the start. ``frames = results + drops + errors``, except
    for the frames that are on their way (``in_flight``)."""

    frames: int = 0
    """Frames that the camera gave, without those skipped by ``max_fps``."""
    results: int = 0
    drops: int = 0
    errors: int = 0
    faces: int = 0
    skipped: int = 0
    """Passed over to keep to ``max_fps``."""
    in_flight: int = 0
    openings: int = 0
    """How often the camera was opened."""
    connections: int = 0
    """How often a stream to the server was opened."""
    drops_by_reason: dict[str, int] = msgspec.field(default_factory=dict)
    errors_by_reason: dict[str, int] = msgspec.field(default_factory=dict)
    decisions: dict[str, int] = msgspec.field(default_factory=dict)
    p50_ms: float | None = None
    p99_ms: float | None = None
    age_s: float | None = None
    """Seconds since the newest frame; null before the first."""
    state: str = "CONNECTING"
    reason: str = ""

    @property
    def balanced(self) -> bool:
        """Every frame has exactly one outcome."""
        return self.frames == self.results + self.drops + self.errors and not self.in_flight


class SummaryLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="summary"):
    """The last line: every camera's totals, and their sum."""

    time: str
    cameras: dict[str, CameraTotals]
    frames: int
    results: int
    drops: int
    errors: int
    faces: int


class PassedOverLine(_Line, frozen=True, kw_only=True, tag="passed_over"):
    """What of a folder is no picture."""

    source: str
    why: str


Line = ResultLine | DropLine | ErrorLine | StateLine | UpdateLine | PassedOverLine | SummaryLine


class IdentifiedFaceLine(FaceLine, frozen=True, kw_only=True, tag_field="type", tag="face"):
    """``facelane identify``: one face of a picture."""

    source: str


class VerificationLine(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="verification"
):
    """``facelane verify``."""

    verified: bool
    similarity: float | None
    threshold: float
    face: FaceLine


class EnrollmentLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="enrollment"):
    """``facelane enroll``: one picture, enrolled or refused with its reason."""

    source: str
    subject_id: str
    enrolled: bool
    template_id: str = ""
    ood_score: float | None = None
    template_count: int | None = None
    reason: str = ""
    message: str = ""


class EnrollmentSummaryLine(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="enrollment_summary"
):
    """The last line of ``facelane enroll``."""

    pictures: int
    enrolled: int
    subjects: int
    refused_by_reason: dict[str, int]
    subjects_without: list[str]
    passed_over: list[dict[str, str]]


TOLD: Final = {
    "subject": types.Subject,
    "template": types.Template,
    "server": types.ServerInfo,
    "pool": types.PoolInfo,
    "event": types.Event,
}
"""What the command prints as it is: the fields of these types, and ``type``."""


def utc(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def now_utc() -> str:
    return utc(time.time())


def face_line(face: types.Face) -> FaceLine:
    """The SDK's face as it is written out; figures rounded to what they are worth."""
    box = face.box
    return FaceLine(
        track_id=face.track_id,
        box=(round(box.x, 1), round(box.y, 1), round(box.width, 1), round(box.height, 1)),
        score=round(face.score, 4),
        landmarks=tuple((round(point.x, 1), round(point.y, 1)) for point in face.landmarks),
        decision=face.identity.decision.value,
        subject_id=face.identity.subject_id,
        similarity=_rounded(face.identity.similarity),
        threshold=_rounded(face.identity.threshold),
        ood_score=_rounded(face.ood_score),
        liveness=face.liveness.verdict.value,
        liveness_score=_rounded(face.liveness.score),
        recognized_now=face.recognized_now,
        evidence_age_s=_rounded(face.evidence_age),
        links_since_evidence=face.links_since_evidence,
        candidates=tuple(
            (candidate.subject_id, round(candidate.similarity, 4))
            for candidate in face.identity.candidates
        ),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def schema() -> dict[str, Any]:
    """The JSON Schema of all lines."""
    told = [
        msgspec.defstruct(
            f"{kind.capitalize()}Line",
            [
                (field.name, typing.get_type_hints(told)[field.name])
                for field in dataclasses.fields(told)
            ],
            tag_field="type",
            tag=kind,
            kw_only=True,
        )
        for kind, told in TOLD.items()
    ]
    lines = (
        *typing.get_args(Line), IdentifiedFaceLine, VerificationLine, EnrollmentLine,
        EnrollmentSummaryLine, *told,
    )  # fmt: skip
    references, parts = msgspec.json.schema_components(lines, ref_template="#/$defs/{name}")
    for part in parts.values():
        if part.get("type") == "object" and "properties" in part:
            # Every field is always there.
            part["required"] = list(part["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A JSON line of facelane or facelane-bridge",
        "oneOf": list(references),
        "$defs": dict(sorted(parts.items())),
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
