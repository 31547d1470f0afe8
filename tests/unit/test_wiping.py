"""Memory that is overwritten: what holds embeddings, and what is free."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.waiting import until

from facelane_server import allocator, wiping

SECRET = b"SECRET-7f3a91"


def test_buffers_are_overwritten_even_those_that_cannot_change() -> None:
    fixed = bytes(bytearray(b"x" * 100))
    changing = bytearray(b"y" * 100)
    numbers = np.ones((3, 4), np.float32)
    wiping.wipe(fixed, changing, numbers, memoryview(bytearray(1)), b"", b"a")
    assert not any(fixed)
    assert not any(changing)
    assert not numbers.any()
    assert b"a" == b"\x61", "of one byte there is only one object, everybody's"


def test_fleeting_bytes_are_overwritten_with_their_last_reference() -> None:
    kept = wiping.Fleeting(b"z" * 64)
    kept.__del__()
    assert kept == bytes(64)
    made = wiping.fleeting((3, 5), np.float16)
    assert made.shape == (3, 5)
    made[1] = 2.0
    assert made.sum() == 10
    assert wiping.fleeting((0, 5), np.float32).shape == (0, 5)


PROGRAM = """
import sys
from facelane_server import allocator, wiping
if sys.argv[1] == "scrubbed":
    allocator.one_heap()
held = []
word = "-".join(["SECRET", "7f3a91"])
for size in (1, 3, 9, 30, 60, 300, 5000):
    held += [(word * size, bytearray((word * size).encode()), str(i)) for i in range(40)]
held.clear()
del word
if sys.argv[1] == "scrubbed":
    wiping.scrub()
print("done", flush=True)
sys.stdin.read()
"""


def places(pid: int, pattern: bytes) -> int:
    """How often a process has something in its memory."""
    found = 0
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, rights = line.split()[:2]
            if not rights.startswith("rw"):
                continue
            first, last = (int(part, 16) for part in where.split("-"))
            memory.seek(first)
            found += memory.read(last - first).count(pattern)
    return found


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="needs glibc")
def test_nothing_is_found_in_free_memory_after_it_was_scrubbed() -> None:
    found = {}
    for how in ("as-it-is", "scrubbed"):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == b"done\n"
            found[how] = places(program.pid, SECRET)
    assert found["as-it-is"] > 100, "this is what it is for"
    assert found["scrubbed"] == 0


def test_scrubbing_goes_on_while_there_is_something_to_scrub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_go_on = threading.Semaphore(0), threading.Semaphore(0)

    def scrub() -> None:
        begun.release()
        assert may_go_on.acquire(timeout=60)

    monkeypatch.setattr(wiping, "scrub", scrub)
    scrubbing = wiping.Scrubbing()
    scrubbing.begin()
    scrubbing.begin()  # once is enough
    scrubbing.note()
    assert begun.acquire(timeout=60)
    for _ in range(5):  # while it scrubs, others are deleted: once more, for all of them
        scrubbing.note()
    may_go_on.release()
    assert begun.acquire(timeout=60)
    may_go_on.release()
    until(scrubbing._due.locked, what="its rest")
    assert not begun.acquire(blocking=False)
    scrubbing.note()
    assert begun.acquire(timeout=60)
    may_go_on.release()


def test_whoever_deletes_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is started where memory has run out never says that it began."""
    done = threading.Semaphore(0)
    monkeypatch.setattr(wiping, "scrub", done.release)
    scrubbing = wiping.Scrubbing()
    scrubbing.begin()
    monkeypatch.setattr(threading.Thread, "start", lambda thread: threading.Event().wait(100))
    for _ in range(3):
        scrubbing.note()
        assert done.acquire(timeout=60)


def test_other_programs_do_not_inherit_what_the_server_asks_of_its_heap() -> None:
    off = "glibc.malloc.tcache_count=0"
    assert allocator.as_others({"A": "b", "GLIBC_TUNABLES": off}) == {"A": "b"}
    mine = "glibc.malloc.check=1"
    assert allocator.as_others({"GLIBC_TUNABLES": f"{mine}:{off}"}) == {"GLIBC_TUNABLES": mine}
    assert allocator.as_others({"GLIBC_TUNABLES": mine}) == {"GLIBC_TUNABLES": mine}
    assert allocator.as_others({}) == {}


def test_where_no_thread_can_be_started_it_is_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def short_of_memory() -> None:
        done.append(threading.current_thread().name)
        raise MemoryError

    monkeypatch.setattr(wiping, "_fill_blocks", short_of_memory)
    scrubbing = wiping.Scrubbing()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        scrubbing.begin()
        scrubbing.note()
    assert done == [threading.current_thread().name]
    scrubbing.begin()
    scrubbing.note()
    until(lambda: done[1:] == ["scrubbing"], what="the next one, in its thread")


BESIDE_OTHERS = """
import gc
from facelane_server import allocator, wiping
allocator.one_heap()
libc = wiping._libc()
libc.malloc.argtypes = [__import__("ctypes").c_size_t]
held = []


class Libc:
    sbrk, mallinfo2 = libc.sbrk, libc.mallinfo2

    came = False

    def calloc(self, count, size):
        if size == 1024 and not self.came:
            self.came = True
            held.append(libc.malloc(3000))
        return libc.calloc(count, size)

    def free(self, place):
        libc.free(place)


came = 0
for turn in range(40):
    libc.malloc_trim(0)
    beside = Libc()
    wiping._fill_heap(beside)
    came += beside.came
    if turn == 9:
        before = libc.mallinfo2().fordblks
    if len(held) > 1:
        libc.free(held.pop(0))
print(came, libc.mallinfo2().fordblks - before, flush=True)
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="needs glibc")
def test_the_heap_does_not_grow_by_what_others_allocate_while_it_is_scrubbed() -> None:
    """While all free memory is taken, others get theirs behind it, and hold it for a while."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_OTHERS],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.returncode, done.stderr
    came, grown = map(int, done.stdout.split())
    assert came == 40
    assert grown < 1 << 20
