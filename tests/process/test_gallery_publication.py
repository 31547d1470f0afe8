"""Gallery snapshots on their way into the recognisers' processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from array import array
from typing import Any

import numpy as np
from tests.real_pool import PACKAGES, RealPool, open_descriptors, real_pool
from tests.waiting import auntil

from facelane_server.domain import Candidate, Stage
from facelane_server.ipc.gallery_log import Added, GalleryLog, Removed
from facelane_server.ipc.messages import GalleryDelta, GallerySnapshot
from facelane_server.pools.report import PoolState
from facelane_server.pools.tasks import EmbedAnswer, EmbedRequest, Task

DIM = 512
SUBJECTS = {
    1: [("staff", "ada"), ("staff", "grace"), ("guests", "ada")],
    2: [("staff", "grace")],
}


def resolve(version: int, index: int) -> tuple[str, str] | None:
    table = SUBJECTS.get(version, [])
    return table[index] if 0 <= index < len(table) else None


def chip(marker: bytes) -> bytes:
    size = PACKAGES[Stage.RECOGNIZER].crops[0].size
    return (marker + bytes(size * size * 3))[: size * size * 3]


async def embed(p: RealPool, marker: bytes, gallery: str = "", **options: Any) -> EmbedAnswer:
    task: Task[Any] = Task(
        EmbedRequest(chip(marker), gallery, **options),
        1,
        1,
        time.monotonic_ns() + 20 * 10**9,
        asyncio.get_running_loop().create_future(),
    )
    p.pool.submit(task)
    answer = await asyncio.wait_for(task.future, 30)
    assert isinstance(answer, EmbedAnswer)
    return answer


async def snapshot(
    p: RealPool, version: int, markers: dict[str, list[bytes]], model_id: str = ""
) -> int:
    """Publish the vectors of the chips of ``markers``, by gallery, in the order of SUBJECTS."""
    rows: list[np.ndarray] = []
    galleries = []
    for gallery, chips in markers.items():
        first = len(rows)
        for marker in chips:
            vector = (await embed(p, marker, want_vector=True)).vector
            rows.append(np.frombuffer(vector, np.float32).astype(np.float16))
        galleries.append((gallery, first, len(rows)))
    fd = os.memfd_create("snapshot")
    matrix = np.stack(rows) if rows else np.empty((0, DIM), np.float16)
    os.write(fd, matrix.tobytes() + array("i", range(len(rows))).tobytes())
    try:
        message = GallerySnapshot(version, len(rows), DIM, tuple(galleries), model_id)
        await p.pool.publish_gallery(message, fd)
    finally:
        os.close(fd)
    return version


FIRST = {"staff": [b"ada", b"grace"], "guests": [b"ada as a guest"]}


async def test_a_published_face_is_found_in_its_gallery_and_in_no_other() -> None:
    async with real_pool(Stage.RECOGNIZER, workers=2, resolve=resolve) as p:
        assert (await embed(p, b"ada", "staff")).candidates == (), "nothing was published yet"
        await snapshot(p, 1, FIRST)
        for _ in range(4):  # whichever worker answers
            best, second = (await embed(p, b"ada", "staff")).candidates
            assert best.subject_id == "ada"
            assert best.similarity > 0.999
            assert second.subject_id == "grace"
            assert second.similarity < 0.5
        (only,) = (await embed(p, b"ada", "guests")).candidates
        assert only == Candidate("ada", only.similarity)
        assert only.similarity < 0.5, "another chip"
        assert (await embed(p, b"ada")).candidates == ()
        assert (await embed(p, b"ada", "nosuch")).candidates == ()
        assert len((await embed(p, b"ada", "staff", top_k=1)).candidates) == 1


async def test_publish_returns_when_every_worker_searches_the_new_gallery() -> None:
    async with real_pool(Stage.RECOGNIZER, workers=2, resolve=resolve) as p:
        await snapshot(p, 1, FIRST)
        await snapshot(p, 2, {"staff": [b"grace"]})
        tasks = [embed(p, b"ada", "staff") for _ in range(20)]
        for answer in await asyncio.gather(*tasks):
            assert [c.subject_id for c in answer.candidates] == ["grace"]


async def test_templates_of_another_model_are_not_compared() -> None:
    async with real_pool(Stage.RECOGNIZER, resolve=resolve) as p:
        await snapshot(p, 1, FIRST, model_id="another@1#0000")
        assert (await embed(p, b"ada", "staff")).candidates == ()
        await snapshot(p, 2, {"staff": [b"grace"]}, model_id=p.pool.model_id)
        [found] = (await embed(p, b"grace", "staff")).candidates
        assert found.subject_id == "grace"


async def test_a_new_worker_serves_only_with_the_newest_gallery() -> None:
    async with real_pool(Stage.RECOGNIZER, resolve=resolve) as p:
        await snapshot(p, 1, FIRST)
        os.kill(p.pids()[0], signal.SIGKILL)
        await auntil(lambda: p.pool.info().losses == 1)
        answers = await asyncio.gather(*(embed(p, b"grace", "staff") for _ in range(5)))
        assert {a.candidates[0].subject_id for a in answers} == {"grace"}


async def test_thousands_of_galleries_reach_the_workers() -> None:
    """Their table is many times larger than a packet."""
    galleries = 20_000
    SUBJECTS[4] = [(f"gallery-{n:064d}", "ada") for n in range(galleries)]
    async with real_pool(Stage.RECOGNIZER, resolve=resolve) as p:
        vector = (await embed(p, b"ada", want_vector=True)).vector
        row = np.frombuffer(vector, np.float32).astype(np.float16)
        fd = os.memfd_create("snapshot")
        with os.fdopen(fd, "wb", closefd=False) as stream:
            stream.write(np.tile(row, (galleries, 1)).tobytes())
            stream.write(np.arange(galleries, dtype=np.int32).tobytes())
        ranges = tuple((name, n, n + 1) for n, (name, _) in enumerate(SUBJECTS[4]))
        await p.pool.publish_gallery(GallerySnapshot(4, galleries, DIM, ranges), fd)
        os.close(fd)
        for name in (SUBJECTS[4][0][0], SUBJECTS[4][-1][0]):
            (found,) = (await embed(p, b"ada", name)).candidates
            assert found.similarity > 0.999
        os.kill(p.pids()[0], signal.SIGKILL)
        await auntil(lambda: p.pool.info().losses == 1)
        assert len((await embed(p, b"ada", SUBJECTS[4][7][0])).candidates) == 1


async def test_publishing_while_workers_die_ends() -> None:
    async with real_pool(Stage.RECOGNIZER, workers=2, resolve=resolve) as p:
        await snapshot(p, 1, FIRST)
        for pid in p.pids():
            os.kill(pid, signal.SIGKILL)
        fd = os.memfd_create("snapshot")
        SUBJECTS[3] = []
        await asyncio.wait_for(p.pool.publish_gallery(GallerySnapshot(3, 0, DIM, ()), fd), 30)
        os.close(fd)
        await auntil(lambda: p.pool.state is PoolState.SERVING)
        assert (await embed(p, b"ada", "staff")).candidates == ()


async def test_a_snapshot_that_lies_ends_the_worker_and_not_the_server() -> None:
    async with real_pool(Stage.RECOGNIZER, resolve=resolve, restart_limit=2) as p:
        fd = os.memfd_create("snapshot")
        await asyncio.wait_for(
            p.pool.publish_gallery(GallerySnapshot(1, 1000, DIM, (("staff", 0, 1000),)), fd), 30
        )
        os.close(fd)
        await auntil(lambda: p.pool.info().losses >= 1)
        assert p.pool.info().workers[0].last_loss == "PROTOCOL"


async def test_a_thousand_publications_leave_nothing_open() -> None:
    async with real_pool(Stage.RECOGNIZER, resolve=resolve) as p:
        await snapshot(p, 1, FIRST)
        pid = p.pids()[0]
        before = open_descriptors(), len(os.listdir(f"/proc/{pid}/fd"))
        fd = os.memfd_create("snapshot")
        for version in range(10, 1010):
            await p.pool.publish_gallery(GallerySnapshot(version, 0, DIM, ()), fd)
        os.close(fd)
        await auntil(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before[1])
        assert open_descriptors() <= before[0]


async def test_an_enrolment_reaches_every_worker_without_the_rest() -> None:
    """What came after the snapshot is sent alone, and a worker that comes later has it too."""
    SUBJECTS[5] = SUBJECTS[6] = SUBJECTS[7] = [*SUBJECTS[1], ("staff", "mary")]
    async with real_pool(Stage.RECOGNIZER, workers=2, resolve=resolve) as p:
        rows = []
        for marker in (b"ada", b"grace", b"mary"):
            vector = (await embed(p, marker, want_vector=True)).vector
            rows.append(np.frombuffer(vector, np.float32).astype(np.float16))
        fd = os.memfd_create("snapshot")
        os.write(fd, np.stack(rows[:2]).tobytes() + array("i", range(2)).tobytes())
        message = GallerySnapshot(5, 2, DIM, (("staff", 0, 2),))
        await p.pool.publish_gallery(message, fd)
        log = GalleryLog()
        log.append([Added("staff", 3, rows[2].tobytes())])
        await p.pool.publish_gallery(message, fd, GalleryDelta(6, 5, log.size), log.reader)
        for _ in range(4):  # whichever worker answers
            assert (await embed(p, b"mary", "staff")).candidates[0].subject_id == "mary"
        log.append([Removed(0)])
        await p.pool.publish_gallery(message, fd, GalleryDelta(7, 5, log.size), log.reader)
        for _ in range(4):
            found = (await embed(p, b"ada", "staff", top_k=5)).candidates
            assert {c.subject_id for c in found} == {"grace", "mary"}
        for pid in p.pids():
            os.kill(pid, signal.SIGKILL)
        await auntil(lambda: p.pool.info().losses == 2)
        found = (await embed(p, b"mary", "staff", top_k=5)).candidates
        assert [c.subject_id for c in found] == ["mary", "grace"]
        os.close(fd)
        log.close()
