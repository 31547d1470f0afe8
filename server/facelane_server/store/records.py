"""What goes into the store and comes out of it, and which names and labels it takes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Subject:
    """Somebody who can be recognised. Times in nanoseconds since the epoch."""

    gallery_id: str
    subject_id: str
    display_name: str
    labels: Mapping[str, str]
    etag: str
    created_ns: int
    updated_ns: int
    template_count: int


class Correction(enum.IntEnum):
    """What somebody said of the face that a template was made of."""

    NONE = 0
    """Nothing: it was enrolled."""
    NOT = 1
    """That it is not this subject, though it was taken for it. A face that is nearer to it than to
    any of the subject's own is not the subject."""
    IS = 2
    """That it is this subject."""


@dataclass(frozen=True, slots=True)
class Template:
    """One enrolled face, without its vector. ``ood_score`` in [0, 1]. ``quality``: what it
    promises, [0, 1]; 0 = enrolled before this was measured."""

    template_id: str
    subject_id: str
    model_id: str
    ood_score: float
    created_ns: int
    quality: float = 0.0
    correction: Correction = Correction.NONE


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A template as the index needs it: ``vector`` [dim] float16, unit norm. ``subject``: the
    number of its subject, which is never another's. ``quality``: as ``Template`` has it."""

    gallery_id: str
    subject_id: str
    template_id: str
    vector: F16
    subject: int = 0
    quality: float = 0.0
    negative: bool = False
    """It is not this subject's face: see ``Correction.NOT``."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """A subject that is gone. ``number``: its own; ``revision``: of the gallery; ``receipt``: see
    ``chain.Receipt``."""

    number: int
    templates: int
    revision: int
    receipt: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """``created`` is false when the template was there already: an earlier call with this
    request id, or the same picture again. ``answer`` is what was kept with the request id."""

    subject: Subject
    template: Template
    created: bool
    answer: Mapping[str, Any] | None = None
    best_quality: float = 0.0
    """Of all templates that the subject has of this model, the new one included."""


@dataclass(frozen=True, slots=True)
class RequestKey:
    """``fingerprint``: a digest of all the other arguments of the call."""

    request_id: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class NewTemplate:
    """``vector`` [dim] float32, any positive norm; ``ood_score`` and ``quality`` in
    [0, 1]. ``chip``: size x size x 3 uint8 BGR, kept where it is given; see ``chips``."""

    model_id: str
    vector: F32
    ood_score: float
    quality: float = 0.0
    chip: bytes = b""
    correction: Correction = Correction.NONE


def invalid(field: str, message: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, f"{field}: {message}", metadata={"field": field})


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``labels`` if they are within the limits; else ARGUMENT_INVALID."""
    if len(labels) > limits.MAX_LABELS:
        raise invalid("labels", f"at most {limits.MAX_LABELS} entries are kept")
    for key, value in labels.items():
        if not 1 <= len(key.encode()) <= limits.MAX_LABEL_KEY_BYTES:
            raise invalid("labels", f"a key has 1-{limits.MAX_LABEL_KEY_BYTES} bytes")
        if len(value.encode()) > limits.MAX_LABEL_VALUE_BYTES:
            raise invalid("labels", f"a value has at most {limits.MAX_LABEL_VALUE_BYTES} bytes")
        if "\0" in key + value:
            raise invalid("labels", "the character of code 0 is not kept")
    return dict(labels)


def check_display_name(name: str) -> str:
    """``name`` if it is short enough; else ARGUMENT_INVALID."""
    if len(name.encode()) > limits.MAX_DISPLAY_NAME_BYTES:
        raise invalid("display_name", f"at most {limits.MAX_DISPLAY_NAME_BYTES} bytes are kept")
    if "\0" in name:  # PostgreSQL keeps none
        raise invalid("display_name", "the character of code 0 is not kept")
    return name


def unit_float16(vector: F32) -> F16:
    """``vector`` scaled to unit norm, as it is stored. Raises INTERNAL for a vector of no
    direction: that is a broken model, not a bad picture."""
    wide = np.asarray(vector, dtype=np.float64).reshape(-1)
    norm = float(np.linalg.norm(wide))
    if not np.isfinite(norm) or norm < 1e-9:
        raise FacelaneError(
            Reason.INTERNAL,
            "the recogniser gave an embedding of no direction; check the model package "
            "with `facelane-server models verify`",
        )
    return (wide / norm).astype(np.float16)


def subject_missing() -> FacelaneError:
    return FacelaneError(
        Reason.SUBJECT_NOT_FOUND,
        "the gallery has no such subject; create it first, or let the enrolment create it",
    )


def check_etag(etag: str, current: Subject) -> None:
    """ETAG_MISMATCH where one is given that is not the subject's."""
    if etag and etag != current.etag:
        raise FacelaneError(
            Reason.ETAG_MISMATCH,
            "the subject has changed since it was read; read it again, then update",
            metadata={"etag": current.etag},
        )
