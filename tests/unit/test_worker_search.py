"""Exact search of a gallery snapshot, against the plainest way to do it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_server.ipc import gallery_log
from facelane_server.ipc.gallery_log import Added, Removed
from facelane_server.ipc.messages import GallerySnapshot
from facelane_server.worker import search
from facelane_server.worker.search import Searcher, SnapshotError


def snapshot(
    galleries: dict[str, list[int]], dim: int = 16, seed: int = 0, version: int = 1
) -> tuple[GallerySnapshot, int, np.ndarray, np.ndarray]:
    """``galleries``: templates of each subject, by gallery. Subjects are numbered from 100."""
    rng = np.random.default_rng(seed)
    counts = [count for subjects in galleries.values() for count in subjects]
    subjects = np.repeat(np.arange(100, 100 + len(counts)), counts).astype(np.int32)
    matrix = rng.standard_normal((len(subjects), dim))
    matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    ranges = []
    row = 0
    for name, per_subject in galleries.items():
        ranges.append((name, row, row + sum(per_subject)))
        row += sum(per_subject)
    fd = os.memfd_create("snapshot")
    os.write(fd, matrix.tobytes() + subjects.tobytes())
    return GallerySnapshot(version, len(subjects), dim, tuple(ranges)), fd, matrix, subjects


def plain(
    probe: np.ndarray, matrix: np.ndarray, subjects: np.ndarray, top_k: int
) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    for row, subject in zip(matrix.astype(np.float64), subjects, strict=True):
        best[int(subject)] = max(best.get(int(subject), -2.0), float(row @ probe))
    return sorted(best.items(), key=lambda hit: -hit[1])[:top_k]


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=8), min_size=1, max_size=3),
    st.integers(1, 10),
    st.integers(1, 4),
    st.integers(1, 20),
)
def test_it_finds_what_the_plainest_search_finds(
    layout: list[list[int]], top_k: int, probes: int, chunk: int
) -> None:
    galleries = {f"g{n}": subjects for n, subjects in enumerate(layout)}
    message, fd, matrix, subjects = snapshot(galleries)
    rng = np.random.default_rng(1)
    batch = rng.standard_normal((probes, 16)).astype(np.float32)
    batch /= np.linalg.norm(batch, axis=1, keepdims=True)
    previous, search._CHUNK_ROWS = search._CHUNK_ROWS, chunk  # type: ignore[misc]
    try:
        searcher = Searcher(message, fd, "cpu")
        for name, first, last in message.galleries:
            found = searcher.search(batch, name, top_k)
            assert len(found) == probes
            for probe, hits in zip(batch, found, strict=True):
                expected = plain(probe, matrix[first:last], subjects[first:last], top_k)
                assert [s for s, _ in hits] == [s for s, _ in expected]
                assert [c for _, c in hits] == pytest.approx([c for _, c in expected], abs=1e-5)
    finally:
        search._CHUNK_ROWS = previous  # type: ignore[misc]


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=40),
    st.integers(1, 10),
    st.integers(1, 27),
    st.integers(1, 9),
    st.sets(st.integers(0, 60)),
)
def test_the_search_on_a_device_finds_the_same(
    subjects_of: list[int], top_k: int, scores: int, group: int, gone: set[int]
) -> None:
    """The code for CUDA without its kernels, run by torch on the CPU: half precision finds, single
    decides. With kernels: tests/gpu/test_search_gpu.py."""
    pytest.importorskip("torch")
    from facelane_server.worker import card_search

    message, fd, matrix, subjects = snapshot({"other": [2], "people": subjects_of})
    (_, first, last) = message.galleries[1]
    segment = search._segment(first, last, subjects)
    rng = np.random.default_rng(1)
    batch = rng.standard_normal((3, 16)).astype(np.float32)
    batch /= np.linalg.norm(batch, axis=1, keepdims=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_search, "_SCORES", scores)
        patch.setattr(card_search, "_GROUP", group)
        rows = search._OnCard(card_search.CardRows(matrix, "cpu"))
        removed = [first + row for row in gone if first + row < last]
        if removed:
            rows.remove(removed)
        found = rows.best_of_subjects(batch, segment, top_k)
    os.close(fd)
    left = np.setdiff1d(np.arange(first, last), removed)
    for probe, hits in zip(batch, found, strict=True):
        expected = plain(probe, matrix[left], subjects[left], top_k)
        assert [s for s, _ in hits] == [s for s, _ in expected]
        assert [c for _, c in hits] == pytest.approx([c for _, c in expected], abs=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(1, 20))
def test_a_card_reads_rows_in_groups_that_begin_and_end_between_subjects(
    subjects_of: list[int], size: int
) -> None:
    pytest.importorskip("torch")
    from facelane_server.worker import card_search

    rows = sum(subjects_of)
    starts = np.cumsum([0, *subjects_of[:-1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_search, "_ROWS_A_GROUP", size)
        held = card_search.CardRows(np.zeros((3 + rows, 16), np.float16), "cpu")
        layout = held._layout(3, starts, 3 + rows)
    groups = layout.groups.tolist()
    assert (groups[0], groups[-1]) == (0, rows)
    assert set(groups) <= {*starts.tolist(), rows}
    lengths = np.diff(groups)
    assert lengths.min() >= 1
    assert lengths.max() < size + max(subjects_of)
    first_of = layout.first_of.tolist()
    assert first_of == [*starts.tolist(), rows]
    assert [first_of[subject] for subject in layout.group_subjects.tolist()] == groups


def test_a_probe_that_is_staged_for_kernels_is_overwritten_also_where_its_search_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    from facelane_server.worker import card_search

    seen: list[tuple[str, float]] = []

    class Kernels:
        """They find subject 3."""

        def launch(
            self, name: str, _blocks: tuple[int, int], _threads: int, *given: object
        ) -> None:
            seen.append((name, float(desk.given.sum())))
            if name == "best":
                if len(seen) > 2:
                    raise RuntimeError("CUDA error: out of memory")
                places, cosines, keep = given[4], given[5], given[8]
                assert isinstance(places, torch.Tensor)
                assert isinstance(cosines, torch.Tensor)
                assert isinstance(keep, int)
                places[:keep] = 3
                cosines.view(torch.float32)[:keep] = torch.tensor([0.5] + [-4.0] * (keep - 1))

    class Stream:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(card_search, "kernels_for", lambda *_: Kernels())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    held = card_search.CardRows(np.zeros((9, 16), np.float16), "cpu")
    desk = held._desk
    assert desk is not None
    probe = np.full((1, 16), 0.25, np.float32)
    assert held.best_of_subjects(probe, 0, np.arange(9), 9, 2) == [((3, 0.5),)]
    assert seen == [("scores", 4.0), ("best", 4.0)]
    assert not desk.given.any()
    with pytest.raises(RuntimeError, match="out of memory"):
        held.best_of_subjects(probe, 0, np.arange(9), 9, 2)
    assert not desk.given.any()
    assert probe.all()


@pytest.mark.parametrize(
    ("error", "poisoned"),
    [
        (ImportError("no module named cuda"), False),
        (RuntimeError("NVRTC: NVRTC_ERROR_COMPILATION"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_a_card_whose_kernels_cannot_be_had_searches_without_and_a_poisoned_one_says_so(
    error: Exception, poisoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from facelane_server.worker import card_search

    def fail(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(card_search, "Kernels", fail)
    asked = card_search.kernels_for.__wrapped__
    if poisoned:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            asked(torch.device("cuda:0"), 512, 1)
    else:
        assert asked(torch.device("cuda:0"), 512, 1) is None
    assert asked(torch.device("cpu"), 512, 1) is None


def test_an_unknown_or_empty_gallery_has_no_candidates() -> None:
    message, fd, matrix, _ = snapshot({"people": [1, 2], "nobody": []})
    searcher = Searcher(message, fd, "cpu")
    probe = matrix[:1].astype(np.float32)
    assert searcher.search(probe, "nobody", 2) == [()]
    assert searcher.search(probe, "elsewhere", 2) == [()]
    assert len(searcher.search(probe, "people", 2)[0]) == 2


def test_an_empty_snapshot_is_one() -> None:
    message, fd, _, _ = snapshot({})
    searcher = Searcher(message, fd, "cpu")
    assert searcher.search(np.ones((2, 16), np.float32), "people", 2) == [(), ()]


def test_subjects_of_another_gallery_are_never_candidates() -> None:
    message, fd, matrix, subjects = snapshot({"a": [3, 3], "b": [3, 3]})
    searcher = Searcher(message, fd, "cpu")
    for row in matrix.astype(np.float32):
        hits = searcher.search(row[None], "a", 10)[0]
        assert {subject for subject, _ in hits} == set(subjects[:6].tolist())


@pytest.mark.parametrize(
    "broken",
    [
        {"rows": 99},
        {"rows": -1},
        {"dim": 0},
        {"dim": 10**6},
        {"galleries": (("a", 0, 99),)},
        {"galleries": (("a", 3, 1),)},
    ],
)
def test_a_snapshot_that_lies_is_refused(broken: dict[str, object]) -> None:
    message, fd, _, _ = snapshot({"a": [2, 2]})
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SnapshotError):
        Searcher(GallerySnapshot(**{**values, **broken}), fd, "cpu")
    assert len(os.listdir("/proc/self/fd")) == before - 1


def log_file(operations: list[gallery_log.Operation]) -> gallery_log.GalleryLog:
    log = gallery_log.GalleryLog()
    log.append(operations)
    return log


@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=6),
    st.lists(st.tuples(st.sampled_from(["g", "h"]), st.integers(98, 110)), max_size=90),
    st.sets(st.integers(-90, 17)),
    st.integers(1, 10),
)
def test_what_came_after_is_found_as_if_it_had_always_been_there(
    layout: list[int], late: list[tuple[str, int]], removed: set[int], top_k: int
) -> None:
    message, fd, matrix, subjects = snapshot({"g": layout})
    rng = np.random.default_rng(3)
    added = rng.standard_normal((len(late), 16))
    added = (added / np.linalg.norm(added, axis=1, keepdims=True)).astype(np.float16)
    gone = [row for row in removed if -len(late) <= row < len(subjects)]
    searcher = Searcher(message, fd, "cpu")
    log = log_file([Added(g, s, added[n].tobytes()) for n, (g, s) in enumerate(late)])
    searcher.extend(2, log.reader, log.size)
    log.append([Removed(row) for row in gone])
    searcher.extend(3, log.reader, log.size)
    log.close()
    assert searcher.version == 3
    rows = [("g", int(s), matrix[n]) for n, s in enumerate(subjects) if n not in gone]
    rows += [(g, s, added[n]) for n, (g, s) in enumerate(late) if -1 - n not in gone]
    probes = rng.standard_normal((3, 16)).astype(np.float32)
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    for gallery in ("g", "h"):
        own = [(s, v) for name, s, v in rows if name == gallery]
        held = np.stack([v for _, v in own]) if own else np.empty((0, 16), np.float16)
        for probe, hits in zip(probes, searcher.search(probes, gallery, top_k), strict=True):
            wanted = plain(probe, held, np.asarray([s for s, _ in own], np.int32), top_k)
            assert [s for s, _ in hits] == [s for s, _ in wanted]
            assert np.allclose([c for _, c in hits], [c for _, c in wanted], atol=1e-5)


@pytest.mark.parametrize(
    "operations",
    [
        [Added("g", 1, b"short")],
        [Removed(3)],
        [Removed(-1)],
        [Added("g", 1, bytes(32)), Removed(-2)],
    ],
)
def test_a_log_that_lies_is_refused(operations: list[gallery_log.Operation]) -> None:
    message, fd, *_ = snapshot({"g": [1, 2]})
    searcher = Searcher(message, fd, "cpu")
    log = log_file(operations)
    with pytest.raises(SnapshotError):
        searcher.extend(2, log.reader, log.size)
    log.close()


@pytest.mark.parametrize("data", [b"\1\0", b"\5\0\0\0\x93", b"\1\0\0\0\x01", bytes(8)])
def test_a_log_that_is_none_is_refused(data: bytes) -> None:
    fd = os.memfd_create("log")
    os.write(fd, data)
    with pytest.raises(ValueError, match="gallery's log"):
        gallery_log.LogReader().read(fd, len(data))
    with pytest.raises(ValueError, match="gallery's log"):
        gallery_log.LogReader().read(fd, len(data) + 1)
    os.close(fd)
