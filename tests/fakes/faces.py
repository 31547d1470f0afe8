"""The faces of a stream without pools: looks are answered when a test says so."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from tests.fakes.scripted_pool import ScriptedPools

from facelane_server import limits, tracking
from facelane_server.domain import (
    Box,
    Candidate,
    DetectedFace,
    Encoding,
    Face,
    Frame,
    Picture,
    Sighting,
)
from facelane_server.gallery.decide import Thresholds
from facelane_server.lanes import LaneOptions
from facelane_server.lanes.faces import Faces, Look
from facelane_server.pipeline import Evidence, Pipeline
from facelane_server.presence import Presence, Telling

THRESHOLDS = Thresholds(match=0.5, margin=0.05, ood=0.4, live=0.8, spoof=0.3)
LANDMARKS = ((15.0, 20.0), (35.0, 20.0), (25.0, 30.0), (18.0, 40.0), (32.0, 40.0))


@functools.cache
def signature(seed: int) -> bytes:
    """Of a face that nobody else has."""
    fields = np.random.default_rng(seed).standard_normal(limits.SIGNATURE_BYTES - 4)
    scaled = np.rint(fields * (127.0 / np.abs(fields).max())).astype(np.int8)
    return scaled.tobytes() + bytes((120, 100, 110, 120))


def detected(x: float, looks: bytes, *, size: float = 50.0) -> DetectedFace:
    points = tuple((x + px, 100.0 + py) for px, py in LANDMARKS)
    return DetectedFace(Box(x, 100.0, size, size), 0.9, points, (), looks)


def evidence(
    subject: str | None, *, ood: float = 0.8, live: float | None = 0.95, similarity: float = 0.9
) -> Evidence:
    """``subject`` None: nobody that the gallery knows."""
    found = () if subject is None else (Candidate(subject, similarity),)
    return Evidence(ood, found, live_score=live, recognized=True)


class Stage:
    """Faces and what is told of them, as a lane drives them: turns at once, results in order."""

    def __init__(self, params: tracking.Params | None = None, **after: int) -> None:
        self.pipeline: Pipeline = ScriptedPools().pipeline
        self.pipeline.thresholds = THRESHOLDS
        self.sightings: list[Sighting] = []
        self.told: list[Telling] = []
        after.setdefault("unknown_after_ns", tracking.track.SECOND)
        after.setdefault("hidden_after_ns", 2 * tracking.track.SECOND)
        self.presence = Presence(**after)
        self.faces = Faces(self.pipeline, LaneOptions(), params or tracking.Params(), self)
        self.under_way: deque[tuple[Frame, list[Look]]] = deque()
        self.gone: list[int] = []
        self._next = 0

    def sighted(self, sighting: Sighting) -> None:
        self.sightings.append(sighting)
        self.told.extend(self.presence.sighted(sighting))

    def ended(self, track_id: int) -> None:
        self.gone.append(track_id)
        self.told.extend(self.presence.ended(track_id))

    def turn(self, found: Sequence[DetectedFace], now_ns: int) -> list[Look]:
        """A frame was detected; its looks that want an answer."""
        self._next += 1
        frame = Frame(self._next, Picture(Encoding.JPEG, b""), now_ns)
        looks = self.faces.turn(found, now_ns, ())
        self.under_way.append((frame, looks))
        return [look for look in looks if look.asked]

    def answer_some(self, said: Mapping[int, Evidence], chance: random.Random) -> None:
        """Some of those that wait, in any order. ``said``: by the looks' ids."""
        waiting = [
            look
            for _, looks in self.under_way
            for look in looks
            if look.asked and look.evidence is None
        ]
        for look in chance.sample(waiting, chance.randint(0, len(waiting))):
            self.answer(look, said[id(look)])

    def answer(self, look: Look, said: Evidence) -> None:
        """The stages that were asked say their part of it."""
        if not look.recognize:
            said = Evidence(live_score=said.live_score)
        if not look.live:
            said.live_score = None
        self.faces.answered(look, said)

    def emit(self) -> list[Face]:
        """The oldest frame's faces; its looks are answered by now."""
        frame, looks = self.under_way.popleft()
        shown = [self.faces.face(look, frame, ()) for look in looks]
        self.faces.settle(lambda: (look for _, looks in self.under_way for look in looks))
        return shown
