"""What encryption at rest costs: a start with 100,000 templates, an enrolment, an identification.

The same store as it lies open and as it is encrypted, in turns. A start: until a server with
null models serves, which load in no time, and of that the reading of the store. Enrolment and
identification: through a whole server with null models, whose own time is next to nothing, so
that the store's share is as large as it can be; both servers write the audit log.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import numpy as np
import sqlalchemy as sa

import facelane
import facelane.aio
from bench import material
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import percentile
from facelane_server.domain import Stage
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import FILE_NAME, Source
from facelane_server.store.opening import open_store
from facelane_server.store.schema import counters, galleries, subjects, templates
from facelane_server.store.vault import open_vault

MODES: Final = ("open", "encrypted")
START_AT_MOST: Final = 1.3
RATE_AT_LEAST: Final = 0.95


async def run(settings: Settings) -> Report:
    report = Report("vault", smoke=settings.smoke)
    if settings.wants("start"):
        await _start(settings, report)
    if settings.wants("calls"):
        await _calls(settings, report)
    return report


async def _start(settings: Settings, report: Report) -> None:
    count, rounds = settings.sized(100_000, 500), settings.sized(3, 1)
    models = material.null_models()
    recogniser = models.packages[Stage.RECOGNIZER]
    model_id, dim = recogniser.model_id, recogniser.embedding_dim
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        folder = Path(scratch)
        paths = {mode: folder / mode / "gallery.db" for mode in MODES}
        settings.say(f"{count} templates")
        fill(paths["open"], count, model_id, dim)
        (folder / "encrypted").mkdir()
        shutil.copy(paths["open"], paths["encrypted"])
        begun = time.perf_counter()
        _opened(paths["encrypted"], encrypt=True).close()
        sealing_s = time.perf_counter() - begun
        read: dict[str, list[float]] = {mode: [] for mode in MODES}
        started: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(rounds):
            for mode in MODES if number % 2 else reversed(MODES):
                settings.say(f"start {number + 1} of {rounds}, {mode}")
                with contextlib.closing(_opened(paths[mode], encrypt=False)) as store:
                    begun = time.process_time()
                    vectors = sum(1 for _ in store.vectors(model_id, dim))
                    read[mode].append(time.process_time() - begun)
                    assert vectors == count
                tables = (
                    f'[gallery]\npath = "{paths[mode]}"\n'
                    f'[store]\nencryption = "{"off" if mode == "open" else "on"}"\n'
                )
                if mode != "open":
                    tables += f'master_key = "file:{paths[mode].with_name(FILE_NAME)}"\n'
                begun = time.perf_counter()
                async with Service(models.pools_toml(), tables=tables):
                    started[mode].append(time.perf_counter() - begun)
    _add(report, "reading, processor time", read, templates=count, sealing_s=sealing_s)
    _add(report, "start until serving", started, templates=count)
    ratio = percentile(started["encrypted"], 50) / percentile(started["open"], 50)
    report.aim(f"a start with {count} encrypted templates, x", ratio, START_AT_MOST, at_most=True)


def fill(path: Path, count: int, model_id: str, dim: int) -> None:
    dice = np.random.default_rng(7)
    with contextlib.closing(open_store(path)) as database, database.writing() as connection:
        connection.execute(
            sa.insert(galleries).values(gallery_id="bench", settings={}, created_ns=1)
        )
        for begin in range(0, count, 5_000):
            numbers = range(begin + 1, min(begin + 5_000, count) + 1)
            found = dice.standard_normal((len(numbers), dim)).astype(np.float32)
            found /= np.linalg.norm(found, axis=1, keepdims=True)
            common = {"created_ns": 1, "updated_ns": 1}
            connection.execute(
                sa.insert(subjects),
                [
                    {"id": n, "gallery_id": "bench", "subject_id": f"subject-{n:06d}",
                     "display_name": f"Name {n}", "labels": {}, "etag": "0", **common}
                    for n in numbers
                ],
            )  # fmt: skip
            connection.execute(
                sa.insert(templates),
                [
                    {"template_id": secrets.token_hex(16), "subject": n, "model_id": model_id,
                     "dim": dim, "vector": vector.astype(np.float16).tobytes(), "ood_score": 0.9,
                     "created_ns": 1}
                    for n, vector in zip(numbers, found, strict=True)
                ],
            )  # fmt: skip
        connection.execute(
            sa.update(counters).where(counters.c.name == "gallery").values(value=count)
        )


def _opened(path: Path, *, encrypt: bool) -> Store:
    database = open_store(path)
    vault = open_vault(database, Source("", path.parent), mode="on" if encrypt else "off")
    return Store(database, vault=vault)


async def _calls(settings: Settings, report: Report) -> None:
    count = settings.sized(400, 5)
    picture = facelane.Picture.encoded(material.frames_of_size(1, 20_000)[0])
    models = material.null_models()
    taken: dict[str, dict[str, list[float]]] = {
        what: {mode: [] for mode in MODES} for what in ("enrolment", "identification")
    }
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for mode, setting in zip(MODES, ("off", "on"), strict=True):
            tables = f'[store]\nencryption = "{setting}"\n'
            service = await stack.enter_async_context(Service(models.pools_toml(), tables=tables))
            clients[mode] = await stack.enter_async_context(facelane.aio.Client(service.target))
        for number in range(count + 20):
            for mode in MODES if number % 2 else reversed(MODES):
                client = clients[mode]
                calls: dict[str, Callable[[], Awaitable[object]]] = {
                    # One subject each: the same picture again would add nothing to one.
                    "enrolment": lambda c=client, n=number: c.enroll(f"s{n}", picture),  # type: ignore[misc]
                    "identification": lambda c=client: c.identify(picture),  # type: ignore[misc]
                }
                for what, call in calls.items():
                    begun = time.perf_counter()
                    await call()
                    if number >= 20:  # warm
                        taken[what][mode].append(time.perf_counter() - begun)
    for what, by_mode in taken.items():
        _add(report, what, by_mode, calls=count)
        ratio = percentile(by_mode["open"], 50) / percentile(by_mode["encrypted"], 50)
        report.aim(f"{what}s in a second, encrypted, x", ratio, RATE_AT_LEAST, at_most=False)


def _add(report: Report, scenario: str, taken: dict[str, list[float]], **extra: float) -> None:
    base = percentile(taken["open"], 50)
    for mode, seconds in taken.items():
        report.add(
            Row(
                mode,
                scenario,
                p50_ms=percentile(seconds, 50) * 1e3,
                p99_ms=percentile(seconds, 99) * 1e3,
                overhead_p50=percentile(seconds, 50) / base,
                extra=dict(extra),
            )
        )
