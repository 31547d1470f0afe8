"""Faces, names and scenes for the tests of the tracker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    DetectedFace,
    Identity,
    Landmarks,
)
from facelane_server.tracking import Params, Track, Tracks, Update, update

MS = 1_000_000
FRAME = 40 * MS
PARAMS = Params()


def frontal(box: Box) -> Landmarks:
    """The ArcFace template's points in a box."""
    points = ((0.31, 0.46), (0.69, 0.46), (0.5, 0.64), (0.35, 0.82), (0.65, 0.82))
    return tuple((box.x + u * box.width, box.y + v * box.height) for u, v in points)


def at(x: float, y: float = 100.0, size: float = 60.0, score: float = 0.9) -> DetectedFace:
    box = Box(x, y, size, size)
    return DetectedFace(box, score, frontal(box))


def match(subject: str, similarity: float = 0.6) -> Identity:
    return Identity(Decision.MATCH, subject, similarity, (Candidate(subject, similarity),))


def play(
    frames: Iterable[Sequence[DetectedFace]],
    *,
    start: Tracks | None = None,
    begin_ns: int = 0,
    step_ns: int = FRAME,
    params: Params = PARAMS,
) -> list[Update]:
    tracks = start or Tracks()
    updates = []
    for n, found in enumerate(frames):
        updates.append(update(tracks, found, begin_ns + n * step_ns, params))
        tracks = updates[-1].tracks
    return updates


def one(updates: list[Update] | Update) -> Track:
    last = updates if isinstance(updates, Update) else updates[-1]
    [track] = last.tracks.active
    return track
