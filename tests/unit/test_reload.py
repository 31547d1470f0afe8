"""A model is changed as a whole, whoever asks for it and however long they wait."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.scripted_pool import ScriptedPool

from facelane_server import app, config, served
from facelane_server.domain import FacelaneError, Picture, Reading, Reason, Stage
from facelane_server.edge import errors
from facelane_server.edge.gallery import GalleryService
from facelane_server.gallery.decide import Thresholds
from facelane_server.models.package import Package, read_package
from facelane_server.pipeline import Pipeline
from facelane_server.pools.tasks import EmbedAnswer
from facelane_server.store.chips import KeptChip
from facelane_server.store.records import NewTemplate

BUILTIN = Path(app.__file__).parent / "models" / "builtin"


class Pool:
    """Takes its time to reload."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.name = stage.value
        self.package = read_package(BUILTIN / f"null-{stage.value}")
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.broken = False

    @property
    def model_id(self) -> str:
        return self.package.model_id

    async def reload(self, package: Package) -> None:
        self.begun.set()
        await self.go.wait()
        if self.broken:
            raise FacelaneError(Reason.MODEL_INVALID, "its workers do not become ready")
        self.package = package

    async def publish_gallery(self, *_: Any) -> None:
        """Nobody is there."""


class Gallery:
    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.broken = False
        self.stored = 0
        self.templates = 0
        self.chips = 0
        self.renewed: list[str] = []

    async def without_chip(self) -> int:
        return self.templates - self.chips

    async def behind(self, after: str, _count: int) -> list[KeptChip]:
        kept = [KeptChip(f"{k:02}", bytes(112 * 112 * 3), 0.5) for k in range(self.chips)]
        return [chip for chip in kept if chip.template_id > after][:2]

    async def renew(self, template_id: str, new: NewTemplate) -> bool:
        assert new.model_id == self.model_id
        self.renewed.append(template_id)
        self.templates += 1
        return True

    async def counts(self) -> tuple[int, int]:
        return 1, self.stored

    async def serve(self, model_id: str, *_: Any) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise FacelaneError(Reason.GALLERY_UNAVAILABLE, "the disk is full")
        self.model_id = model_id
        self.templates = 0


class Bench:
    """A server's parts that a reload meets."""

    def __init__(self) -> None:
        chosen = [f'[pools.{s.value}]\nmodel = "null-{s.value}"' for s in Stage]
        self.app = app.App(config.parse("\n".join(chosen)), None)
        self.pools = {stage: Pool(stage) for stage in Stage}
        self.gallery = Gallery(self.pools[Stage.RECOGNIZER].model_id)
        self.app.pools = self.pools  # type: ignore[assignment]
        self.app._gallery = self.gallery  # type: ignore[assignment]
        thresholds, nowhere = self.app.models.thresholds, {Stage.DETECTOR: ScriptedPool()}
        self.pipeline = Pipeline(nowhere, crops={}, thresholds=thresholds, max_pixels=1)
        self.pipeline.embed = self.embed  # type: ignore[method-assign]
        self.app._pipeline = self.pipeline

    @staticmethod
    async def embed(*_asked: Any) -> EmbedAnswer:
        return EmbedAnswer(0.9, (), np.ones(4, np.float32).tobytes())

    @property
    def thresholds(self) -> Any:
        return self.pipeline.thresholds


def variant(folder: Path, stage: Stage, old: str, new: str) -> str:
    """A package like the null model of the stage, but for one line."""
    text = (BUILTIN / f"null-{stage.value}" / "model.toml").read_text()
    assert old in text
    made = folder / stage.value
    made.mkdir()
    changed = text.replace(old, new).replace('"1.0.0"', '"2.0.0"')
    (made / "model.toml").write_text(changed)
    return str(made)


async def test_a_reload_whose_caller_leaves_is_carried_through(tmp_path: Path) -> None:
    bench = Bench()
    pool = bench.pools[Stage.RECOGNIZER]
    strict = variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9")
    caller = asyncio.create_task(bench.app.reload_model("recognizer", strict))
    await pool.begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    pool.go.set()
    # The next one waits for it, and finds all of it done.
    done = await bench.app.reload_model("recognizer", "")
    old, new = done.old, done.new
    assert old == new == pool.model_id == bench.gallery.model_id
    assert "@2.0.0" in new
    assert bench.thresholds.match == 0.9


async def test_a_recogniser_that_knows_nobody_enrolled_is_refused_unless_that_is_meant(
    tmp_path: Path,
) -> None:
    bench = Bench()
    pool = bench.pools[Stage.RECOGNIZER]
    pool.go.set()
    bench.gallery.templates = bench.gallery.stored = 3
    present = pool.model_id
    other = variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9")
    with pytest.raises(FacelaneError) as caught:
        await bench.app.reload_model("recognizer", other)
    assert caught.value.reason is Reason.TEMPLATES_LOST
    assert "--forget-templates" in caught.value.message
    assert pool.model_id == bench.gallery.model_id == present
    again = await bench.app.reload_model("recognizer", "")  # the same model: nothing is lost
    assert (again.not_searched, again.remembered) == (0, True)
    done = await bench.app.reload_model("recognizer", other, forget_templates=True)
    assert (done.old, done.new) == (present, bench.gallery.model_id)
    assert (done.not_searched, done.remembered) == (3, False)


async def test_those_whose_chips_were_kept_are_enrolled_again(tmp_path: Path) -> None:
    bench = Bench()
    pool = bench.pools[Stage.RECOGNIZER]
    pool.go.set()
    other = variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9")
    bench.gallery.templates = bench.gallery.stored = 3
    bench.gallery.chips = 2
    with pytest.raises(FacelaneError) as caught:
        await bench.app.reload_model("recognizer", other)
    assert caught.value.metadata == {"templates": "1"}
    bench.gallery.chips = 3
    done = await bench.app.reload_model("recognizer", other)
    assert bench.gallery.renewed == ["00", "01", "02"]
    assert (done.new, done.not_searched) == (bench.gallery.model_id, 0)


async def test_two_reloads_at_a_time_keep_the_thresholds_of_both(tmp_path: Path) -> None:
    bench = Bench()
    asked = {
        Stage.RECOGNIZER: variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9"),
        Stage.LIVENESS: variant(tmp_path, Stage.LIVENESS, "live = 0.9", "live = 0.7"),
    }
    calls = [
        asyncio.create_task(bench.app.reload_model(stage.value, path))
        for stage, path in asked.items()
    ]
    await bench.pools[Stage.RECOGNIZER].begun.wait()
    for pool in bench.pools.values():
        pool.go.set()
    await asyncio.gather(*calls)
    assert (bench.thresholds.match, bench.thresholds.live) == (0.9, 0.7)


@pytest.mark.parametrize("fails", [False, True])
async def test_what_was_calibrated_during_a_reload_holds_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    bench = Bench()
    pool, before = bench.pools[Stage.RECOGNIZER], bench.pools[Stage.RECOGNIZER].model_id
    calibrated: list[float] = []
    plain = served.thresholds_of

    def thresholds_of(*asked: Any) -> Thresholds:
        found = plain(*asked)
        return replace(found, live=calibrated[-1]) if calibrated else found

    monkeypatch.setattr(served, "thresholds_of", thresholds_of)
    strict = variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9")
    caller = asyncio.create_task(bench.app.reload_model("recognizer", strict))
    await pool.begun.wait()
    calibrated.append(0.99)
    pool.broken = fails
    pool.go.set()
    if fails:
        with pytest.raises(FacelaneError):
            await caller
    else:
        await caller
    assert (bench.thresholds.match, bench.thresholds.live) == (0.5 if fails else 0.9, 0.99)
    judged = bench.pipeline.models[Stage.RECOGNIZER]
    assert bench.pipeline.liveness_models == 1, "who was LIVE by other thresholds is judged anew"
    assert judged == pool.model_id
    assert (judged == before) is fails


async def test_a_gallery_that_could_not_follow_follows_when_asked_again(tmp_path: Path) -> None:
    bench = Bench()
    bench.pools[Stage.RECOGNIZER].go.set()
    other = variant(tmp_path, Stage.RECOGNIZER, "match = 0.5", "match = 0.9")
    bench.gallery.broken = True
    with pytest.raises(FacelaneError):
        await bench.app.reload_model("recognizer", other)
    bench.gallery.broken = False
    await bench.app.reload_model("recognizer", other)
    assert bench.gallery.model_id == bench.pools[Stage.RECOGNIZER].model_id


async def test_a_reload_ends_with_the_server() -> None:
    bench = Bench()
    caller = asyncio.create_task(bench.app.reload_model("liveness", ""))
    await bench.pools[Stage.LIVENESS].begun.wait()
    async with asyncio.timeout(30):
        await bench.app._end_reloads()
        with pytest.raises(asyncio.CancelledError):
            await caller


# -- what comes meanwhile -----------------------------------------------------------------------


class Analysis:
    """One picture, over which the recogniser's model changes."""

    def __init__(self) -> None:
        self.models = ["m@1", "m@2"]

    def model_ids(self) -> dict[str, str]:
        return {Stage.RECOGNIZER: self.models.pop(0)}

    async def analyse(self, picture: Picture, plan: Any, *, remaining_s: float | None) -> Any:
        return Reading(None, (), "m@1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "match", "given_up"),
    [
        (["m@1", "m@1"], 0.5, False),
        (["m@1", "m@2"], 0.5, True),
        (["m@2", "m@2"], 0.5, True),  # by a worker that was still there
        (["m@1", "m@1"], 0.3, True),  # what the caller compares with is of the one before
    ],
)
async def test_vectors_of_either_model_are_given_up(
    models: list[str], match: float, given_up: bool
) -> None:
    before = Thresholds(match=0.5)
    now = {"pools": {Stage.RECOGNIZER: None}, "thresholds": Thresholds(match=match)}
    pipeline = type("Pipeline", (), now)()
    both: Any = Analysis()
    both.models = models
    service = GalleryService(config.Config(), None, both, pipeline, both, both, both, both, both)  # type: ignore[arg-type]
    read = service._read(None, service._plan(""), None, before)  # type: ignore[arg-type]
    if not given_up:
        assert (await read).model_id == "m@1"
        return
    with pytest.raises(FacelaneError) as changing:
        await read
    assert (changing.value.reason, changing.value.retryable) == (Reason.POOL_UNAVAILABLE, True)


async def test_a_server_without_a_recogniser_says_so_and_not_to_try_again() -> None:
    pipeline = type("Pipeline", (), {"pools": {}})()
    service = GalleryService(config.Config(), None, None, pipeline, None, None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(FacelaneError) as refused:
        service._plan("default")
    assert not refused.value.retryable
    assert "[pools.recognizer]" in refused.value.message
    assert refused.value.reason in errors.CODES
