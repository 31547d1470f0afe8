"""Names on a real clip, while the recogniser is late; and who is let enrol.

``clip``: the starter models look at every face of every picture of four films (``films``) once.
Their answers are then replayed to the server's own lane (tracker, decisions, order of outcomes) by
pools that answer late and out of order, by a seed. Counted are faces that were shown with the name
of somebody else, and of the pictures in which a look tells who somebody is the share that says so:
``kept`` where the lane has named that person before in the same shot, ``told`` where two other
looks of the shot would have, whether the lane took them or not.

``enrolment``: a server with the starter models enrols all portraits there are, and tight crops of
ordinary photos, by default settings.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import facelane
import facelane.aio
from bench import films, material
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from facelane_server import config, served, tracking
from facelane_server.domain import (
    Decision,
    Encoding,
    Face,
    Frame,
    FrameResult,
    Outcome,
    Overload,
    Picture,
    Stage,
)
from facelane_server.gallery import decide
from facelane_server.lanes import Lane, LaneOptions
from facelane_server.pipeline import Pipeline
from facelane_server.pools.tasks import (
    Answer,
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    EmbedRequest,
    LivenessAnswer,
    LivenessRequest,
    Task,
)

F32 = npt.NDArray[np.float32]

CLIP: Final = "short_hamilton_clip.mp4"
RUNS: Final = 20
LATE: Final = 8
"""Pictures by which a pool's answer may be late."""
KEPT: Final = 0.98
CROPS: Final = 600
ENROLS: Final = 0.98
SECOND: Final = 1_000_000_000
WAIT_S: Final = 30.0


async def run(settings: Settings) -> Report:
    report = Report("names", smoke=settings.smoke)
    media = material.SHARED / "media"
    if not (media / CLIP).is_file():
        raise material.MissingError(f"{media / CLIP} is not here; name its folder's parent with "
                                    "FACELANE_SHARED")  # fmt: skip
    models = material.real_models(settings.cache)
    if settings.wants("clip"):
        await _clip(settings, report, models, media)
    if settings.wants("enrolment"):
        await _enrolment(settings, report, models, media)
    report.note(models.listed)
    return report


# -- told again, late --------------------------------------------------------------------------


class LatePool:
    """A ``PoolPort`` that knows the answers and gives each some pictures late, by chance."""

    available = True

    def __init__(self, answers: Mapping[bytes, Answer], late: int, chance: random.Random) -> None:
        self._answers = answers
        self._late = late
        self._chance = chance
        self._now = 0
        self._due: list[tuple[int, float, Task[Any]]] = []

    def submit(self, task: Task[Any]) -> None:
        task.submitted_ns = task.dispatched_ns = 1
        due = self._now + self._chance.randint(0, self._late)
        self._due.append((due, self._chance.random(), task))

    def withdraw(self, _task: Task[Any]) -> bool:
        return False

    def replace(self, _task: Task[Any], by: Task[Any]) -> bool:
        del by
        return False

    def pass_by(self, _task: Task[Any]) -> None:
        pass

    def release(self, _lane: int) -> None:
        pass

    def tick(self, now: int) -> bool:
        """Answers what is due at this picture, in any order; whether anything was."""
        self._now = now
        due = sorted(item for item in self._due if item[0] <= now)
        self._due = [item for item in self._due if item[0] > now]
        for _, _, task in due:
            task.finished_ns = 2
            if not task.future.done():
                task.future.set_result(self._answers[_key(task)])
        return bool(due)


def _key(task: Task[Any]) -> bytes:
    request = task.request
    if isinstance(request, DetectRequest):
        return bytes(request.picture.data)
    if isinstance(request, EmbedRequest):
        return request.chip
    assert isinstance(request, LivenessRequest)
    return request.crops[0]


@dataclass(frozen=True, slots=True)
class Replay:
    """The whole film behind a pipeline."""

    looked: films.Looked
    thresholds: decide.Thresholds
    crops: Mapping[Stage, tuple[int, ...]]

    def pipeline(self, late: int, seed: int) -> tuple[Pipeline, list[LatePool]]:
        chance = random.Random(seed)
        seen = [(face.face.crops[0], face) for faces in self.looked.pictures for face in faces]
        answers: dict[Stage, Mapping[bytes, Answer]] = {
            Stage.DETECTOR: {
                str(k).encode(): DetectAnswer(640, 360, tuple(face.face for face in faces))
                for k, faces in enumerate(self.looked.pictures)
            },
            Stage.RECOGNIZER: {key: EmbedAnswer(s.ood, s.candidates) for key, s in seen},
            Stage.LIVENESS: {key: LivenessAnswer(s.live) for key, s in seen},
        }
        pools = {stage: LatePool(known, late, chance) for stage, known in answers.items()}
        pipeline = Pipeline(
            pools,
            crops=self.crops,
            thresholds=self.thresholds,
            max_pixels=1_000_000,
            searched=lambda _gallery: self.looked.searched,
        )
        return pipeline, list(pools.values())

    def own(self, seen: films.Seen) -> str:
        """Whom a look at this very picture names; "" = nobody."""
        said = decide.identify(
            seen.ood, seen.candidates, self.thresholds, searched=self.looked.searched
        )
        return said.subject_id

    async def shown(
        self, frames: Sequence[int], late: int = 0, seed: int = 0
    ) -> list[tuple[int, tuple[Face, ...]]]:
        """What a lane says of these pictures of the film."""
        pipeline, pools = self.pipeline(late, seed)
        lane = Lane(
            1,
            "bench",
            LaneOptions(overload=Overload.LOSSLESS, max_frame_age_ns=10**15),
            pipeline,
            window=len(frames) + 1,
            window_bytes=1 << 30,
            tracking_params=tracking.Params.of(config.Tracking()),
        )
        for number, index in enumerate(frames):
            picture = Picture(Encoding.JPEG, str(index).encode())
            lane.offer(Frame(number + 1, picture, int(index / self.looked.film.rate * SECOND)))
            await _settle(pools, number)
        lane.close_input()
        for number in range(len(frames), len(frames) + 4 * LATE):
            await _settle(pools, number)
        told: list[tuple[int, tuple[Face, ...]]] = []
        while not lane.settled:
            for item in await asyncio.wait_for(lane.take(), WAIT_S):
                if isinstance(item, Outcome):
                    lane.written()
                    assert isinstance(item.body, FrameResult)
                    told.append((frames[item.frame_id - 1], item.body.faces))
        lane.finish()
        assert len(told) == len(frames), "every picture has its outcome"
        return told


async def _settle(pools: Sequence[LatePool], now: int) -> None:
    """Lets the pools answer what is due at this picture, and what that leads to."""
    more = True
    while more:
        for _ in range(6):
            await asyncio.sleep(0)
        more = bool(sum(pool.tick(now) for pool in pools))  # every one has its turn


# -- the clip --------------------------------------------------------------------------------


async def _clip(settings: Settings, report: Report, models: material.Models, media: Path) -> None:
    at = 0
    crops: dict[Stage, tuple[int, ...]] = {}
    for stage in (Stage.RECOGNIZER, Stage.LIVENESS):
        count = len(models.packages[stage].crops)
        crops[stage] = tuple(range(at, at + count))
        at += count
    thresholds = served.thresholds(models.packages, config.Identity())
    looker = films.Looker(models, media)
    wrong, kept = 0, []
    for film in films.of_all(media):
        settings.say(f"every face of {film.name} is looked at once")
        looked = looker.look(film, settings.sized(10_000, 40))
        replay = Replay(looked, thresholds, crops)
        for late in (LATE, 0):
            for slower in (1, 2, 6) if late else (1, 2, 3, 6):
                runs = settings.sized(RUNS, 2) if late else slower
                counts: Counter[str] = Counter()
                for seed in range(runs):
                    frames = range(seed % slower, len(looked.pictures), slower)
                    counts += _counted(replay, await replay.shown(frames, late, seed))
                row = report.add(_row(film, late, film.rate / slower, models, counts))
                wrong += counts["wrong"]
                if row.extra["kept"] is not None:
                    kept.append(row.extra["kept"])
    report.aim("faces with another's name, in all runs", wrong, 0, at_most=True)
    worst = min(kept, default=float("nan"))
    report.aim("share of honest names kept, at the worst of them", worst, KEPT, at_most=False)


def _row(
    film: films.Film, late: int, fps: float, models: material.Models, counts: Counter[str]
) -> Row:
    def share(part: str, whole: str) -> float | None:
        return counts[part] / counts[whole] if counts[whole] else None

    return Row(
        "lane",
        f"answers up to {late} pictures late" if late else "answers at once, every phase",
        models.name,
        rate_hz=fps,
        extra={
            "film": film.name,
            "runs": counts["runs"],
            "pictures": counts["pictures"],
            "faces": counts["faces"],
            "named": counts["named"],
            "wrong": counts["wrong"],
            "kept": share("kept", "could be kept"),
            "of": counts["could be kept"],
            "told": share("told", "could be told"),
            "of_all": counts["could be told"],
        },
    )


def _counted(replay: Replay, told: Sequence[tuple[int, tuple[Face, ...]]]) -> Counter[str]:
    """``wrong``: shown with the name of one who is not there, with another than a look at this very
    picture gives, or twice in one picture. ``could be kept``: a look at this very picture names the
    person, whom the lane has named before in the shot. ``could be told``: two such looks were there
    before in the shot."""
    looked = replay.looked
    counts: Counter[str] = Counter(runs=1, pictures=len(told))
    before: Counter[tuple[int, str]] = Counter()
    named: set[tuple[int, str]] = set()
    for index, faces in told:
        shot = looked.film.shot(index)
        in_this: Counter[str] = Counter()
        for face, seen in zip(faces, looked.pictures[index], strict=True):
            assert face.box == seen.face.box
            counts["faces"] += 1
            shown, own = face.identity.subject_id, replay.own(seen)
            if shown:
                assert face.identity.decision is Decision.MATCH
                counts["named"] += 1
                in_this[shown] += 1
                counts["wrong"] += (
                    shown not in seen.allowed or own not in ("", shown) or in_this[shown] > 1
                )
            if own and own in seen.allowed:
                if (shot, own) in named:
                    counts["could be kept"] += 1
                    counts["kept"] += shown == own
                if before[shot, own] >= 2:
                    counts["could be told"] += 1
                    counts["told"] += shown == own
                before[shot, own] += 1
        named |= {(shot, name) for name in in_this}
    return counts


# -- enrolment -------------------------------------------------------------------------------


async def _enrolment(
    settings: Settings, report: Report, models: material.Models, media: Path
) -> None:
    portraits = [(f"p{k}", path.read_bytes()) for k, path in enumerate(_portraits(media))]
    crops = _crops(material.SHARED / "data" / "lfw_train.npz", settings.sized(CROPS, 4))
    async with (
        Service(models.pools_toml()) as service,
        facelane.aio.Client(service.target, timeout=60) as client,
    ):
        for name, people in (("gallery portraits", portraits), ("crops of 150 x 150", crops)):
            settings.say(f"{len(people)} {name} are enrolled")
            refused: Counter[str] = Counter()
            unhelpful = 0
            for subject, data in people[: settings.sized(10_000, 2)]:
                # Each in a gallery of its own: they are not to be told apart here.
                try:
                    await client.enroll(subject, facelane.Picture.encoded(data), gallery=subject)
                except facelane.EnrollmentRefusedError as error:
                    refused[error.reason] += 1
                    unhelpful += len(error.message) < 20
            total = len(people[: settings.sized(10_000, 2)])
            share = 1 - refused.total() / total
            extra = {"pictures": total, "enrolled": share, "refused": dict(refused)}
            report.add(Row("server", name, models.name, extra=extra))
            report.aim(f"{name} that enrol by default", share, ENROLS, at_most=False)
            if unhelpful:
                report.note(f"{unhelpful} refusals hardly say what to do")


def _portraits(media: Path) -> list[Path]:
    return sorted((media / "gallery").glob("*/*"))


def _crops(path: Path, count: int) -> list[tuple[str, bytes]]:
    """Aligned crops of as many people, as portraits of 150 x 150 pixels."""
    import cv2

    if not path.is_file():
        raise material.MissingError(f"{path} is not here")
    data = np.load(io.BytesIO(path.read_bytes()))
    offsets, identity = data["offsets"], data["identity"]
    _, first = np.unique(identity, return_index=True)
    chosen = np.random.default_rng(0).choice(first, min(count, len(first)), replace=False)
    found = []
    for at in sorted(chosen.tolist()):
        jpeg = data["jpeg"][offsets[at] : offsets[at + 1]]
        picture = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        assert picture is not None
        grown = cv2.resize(picture, (150, 150), interpolation=cv2.INTER_CUBIC)
        ok, encoded = cv2.imencode(".jpg", grown, [cv2.IMWRITE_JPEG_QUALITY, 92])
        assert ok
        found.append((f"c{at}", bytes(encoded)))
    return found
