"""What comes out of a picture: faces, who they are, and how far that can be trusted; and the
subjects that faces are compared with."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Point:
    """A point in pixels."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class BoundingBox:
    """An axis-aligned box in pixels; its corner may lie outside of the picture."""

    x: float
    y: float
    width: float
    height: float


class Decision(enum.StrEnum):
    """The outcome of open-set identification of one face."""

    MATCH = "MATCH"
    """One subject is near enough, and far enough from the next."""
    UNKNOWN = "UNKNOWN"
    """Nobody in the gallery is near enough."""
    AMBIGUOUS = "AMBIGUOUS"
    """Two subjects are near enough and too close to each other."""
    REJECTED_OOD = "REJECTED_OOD"
    """The OOD score is below the threshold: the face is not named."""
    NOT_EVALUATED = "NOT_EVALUATED"
    """Recognition was not asked for, or could not answer (see ``missing_stages``)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A subject that is near the probe. ``similarity`` is a cosine in [-1, 1]."""

    subject_id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a face is, as far as the evidence carries.

    ``subject_id`` is empty unless the decision is MATCH. ``similarity`` is the cosine to
    the best candidate in [-1, 1], ``threshold`` what it was compared with; both ``None`` when
    nothing was compared.
    """

    decision: Decision = Decision.NOT_EVALUATED
    subject_id: str = ""
    similarity: float | None = None
    candidates: tuple[Candidate, ...] = ()
    threshold: float | None = None

    @property
    def matched(self) -> bool:
        """Whether the face was named."""
        return self.decision is Decision.MATCH


class LivenessVerdict(enum.StrEnum):
    """ISO/IEC 30107-3: bona fide, attack, no response."""

    LIVE = "LIVE"
    SPOOF = "SPOOF"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, slots=True)
class Liveness:
    """``score`` is in [0, 1], higher = bona fide; ``None`` when the stage did not answer.
    ``no_context``: it was not judged, because the picture shows too little around the face
    (cropped tightly, or at the picture's edge)."""

    verdict: LivenessVerdict = LivenessVerdict.UNDECIDED
    score: float | None = None
    no_context: bool = False


@dataclass(frozen=True, slots=True)
class Face:
    """One face of one picture.

    ``score`` is the detection's in [0, 1]. ``landmarks`` are five points: the eye at the
    picture's left, the other eye, nose, mouth corner at the picture's left, the other.
    ``ood_score`` is in [0, 1], higher = more trustworthy, ``None`` when the recogniser did
    not answer. ``track_id`` is stable over the frames of one stream and 0 for single
    pictures. ``recognized_now``: the recogniser ran on this very frame; otherwise identity
    and OOD score are the best of the track so far. ``evidence_age``: seconds of media time
    since the look that says what is shown, ``None`` when nothing is;
    ``links_since_evidence``: pictures of the track since then.
    """

    track_id: int
    box: BoundingBox
    score: float
    landmarks: tuple[Point, ...]
    identity: Identity
    liveness: Liveness
    ood_score: float | None = None
    recognized_now: bool = False
    evidence_age: float | None = None
    links_since_evidence: int = 0


class Stage(enum.StrEnum):
    """The stages of the pipeline; also what a model package is for."""

    UNSPECIFIED = "unspecified"
    DETECTOR = "detector"
    RECOGNIZER = "recognizer"
    LIVENESS = "liveness"


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Seconds by the server's clock. ``queue``: waiting for a worker; ``service``: from
    dispatch to the answer, transport between processes included."""

    stage: Stage
    queue: float
    service: float


@dataclass(frozen=True, slots=True)
class FrameResult:
    """A picture that was analysed; ``width`` and ``height`` in pixels.

    ``missing_stages`` were asked for and could not answer. What they would have said is
    absent; an absent verdict is never LIVE and never a MATCH.
    """

    width: int
    height: int
    faces: tuple[Face, ...]
    timings: tuple[StageTiming, ...] = ()
    missing_stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """Somebody who can be recognised. ``etag`` changes with every change."""

    subject_id: str
    gallery: str = "default"
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    template_count: int = 0
    create_time: datetime | None = None
    update_time: datetime | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Erased:
    """A subject was deleted. ``receipt``: one signed line, for ``facelane-server erasure verify``;
    empty from a server that gives none."""

    templates: int
    receipt: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """One enrolled face of a subject. The embedding itself never leaves the server."""

    template_id: str
    subject_id: str
    model_id: str
    ood_score: float
    create_time: datetime | None = None
    quality: float = 0.0
    """What it promises for recognition, in [0, 1]; 0 = not measured when it was enrolled."""


class EnrollWarning(enum.StrEnum):
    """What is worth knowing about a face that was enrolled."""

    UNSPECIFIED = "UNSPECIFIED"
    LOW_OOD_SCORE = "LOW_OOD_SCORE"
    """It would not be trusted in a stream: a clearer picture would do better."""
    LOW_QUALITY = "LOW_QUALITY"
    """The subject has a template of twice the quality or more: this one adds little."""


@dataclass(frozen=True, slots=True)
class Enrollment:
    """What enrolling made: the subject as it is now, the new template, the face used."""

    subject: Subject
    template: Template
    face: Face
    warnings: tuple[EnrollWarning, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """1:1. ``similarity`` is a cosine in [-1, 1], ``None`` when the face was rejected;
    ``verified`` only when it reached ``threshold`` and the face could be trusted."""

    verified: bool
    similarity: float | None
    threshold: float
    face: Face
