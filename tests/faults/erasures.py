"""``python -m tests.faults.erasures --people 1000 --kills 8``: enrolments and deletions under load,
the server killed in between; then all that it has left is searched for those who are gone.

Everybody is enrolled, seen by a camera (which tells it, keeps a picture of it, and some are
corrected) and deleted, while other cameras, somebody who looks people up and somebody who watches
events go on. Searched for: each deleted subject's vector, name, id, picture and event's picture; in
every file of the state folder (store, write-ahead log, free pages), in the server's log, and in
the memory of every process of the server one second after a round's last receipt. And, to know
that the search finds what is there: those who are enrolled, in memory, and what is planted, on the
disk.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from tests.e2e import wire
from tests.running_server import RunningServer, toml
from tests.waiting import until

import facelane
from facelane_server.auditing import opened
from facelane_server.erasing import problems, traces
from facelane_server.store import schema
from facelane_server.store.chain import Receipt
from facelane_server.store.gallery import Store
from facelane_server.store.opening import unlock

ROUND = 50
"""People who are there at a time."""
AFTER_RECEIPT_S = 1.0
AT_ONCE = 24
"""Calls: the time that a deletion takes for memory is shared by those that come together."""
PAGE = os.sysconf("SC_PAGESIZE")
WORD = 16
"""Bytes of a pattern that are compared; each has at least so many."""
EXTRA = """
[events]
pictures = "all"
unknown_after_s = 0.2
"""

TELL = bool(os.environ.get("FACELANE_TELL"))
"""Print what surrounds what was found."""


@dataclass(frozen=True)
class Pattern:
    """What is looked for."""

    name: str
    kind: str
    content: bytes


@dataclass
class Run:
    """What was done, and what is to be found nowhere."""

    enrolled: set[int] = field(default_factory=set)
    deleted: int = 0
    kills: int = 0
    searched: int = 0
    """Deleted subjects that were looked for in memory."""
    pictured: int = 0
    corrected: int = 0
    receipts: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[Pattern]] = field(default_factory=dict)
    """By subject id."""


def person(number: int) -> tuple[str, str, facelane.Picture]:
    """Id, name, picture."""
    picture = facelane.Picture.encoded(wire.encoded(160, 120, 10_000 + number, ".png"))
    return f"id-{number:06d}-of-somebody", f"Name \u0141 {number:06d} Zqvx of somebody", picture


def patterns_of(number: int) -> list[Pattern]:
    """Of what is known before anybody is enrolled: texts as bytes and as Python keeps them,
    the picture's file and its pixels."""
    name, shown, picture = person(number)
    data = picture.data
    pixels = wire.pixels(160, 120, 10_000 + number)
    return [
        Pattern(name, "id", name.encode()),
        Pattern(name, "name", shown.encode()),
        Pattern(name, "name, as a string", shown.encode("utf-16-le")),
        Pattern(name, "picture", data[len(data) // 2 :][:48]),
        Pattern(name, "pixels", pixels[60, 40:72].tobytes()),
    ]


def sealed(server: RunningServer) -> dict[str, list[Pattern]]:
    """Of those who are enrolled: a part of each vector, as the server has it in memory and as its
    workers have, and the keys that seal it."""
    with opened(server.config) as (settings, database):
        vault = unlock(database, settings, look=True)
        store = Store(database, vault=vault)
        with database.reading() as connection:
            row = connection.execute(
                sa.select(schema.templates.c.model_id, schema.templates.c.dim).limit(1)
            ).first()
            keys = {
                key.subject: vault._opened(
                    vault._epochs[key.wrapped_by], key.wrapped, f"key {key.subject}"
                )
                for key in connection.execute(
                    sa.select(schema.keys).where(schema.keys.c.kind == "subject")
                )
                if key.wrapped_by in vault._epochs
            }
        if row is None:
            return {}
        return {
            one.subject_id: [
                Pattern(one.subject_id, "vector", part.tobytes()),
                Pattern(one.subject_id, "vector, float32", part.astype(np.float32).tobytes()),
                *(
                    Pattern(one.subject_id, "key", key)
                    for key in [keys.get(one.subject)]
                    if key is not None
                ),
            ]
            for one in store.vectors(row.model_id, row.dim)
            for part in [one.vector[100:124]]
        }


class Search:
    """For many patterns at once, wherever they begin."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._of: dict[int, list[Pattern]] = {}
        self._few = np.zeros(1 << 16, np.bool_)
        for pattern in patterns:
            assert len(pattern.content) >= WORD
            # Wherever it begins, one of its first eight words of eight bytes is aligned.
            word = int.from_bytes(pattern.content[:8], "little")
            self._of.setdefault(word, []).append(pattern)
            self._few[word & 0xFFFF] = True
        self._words = np.asarray(sorted(self._of), np.uint64)

    def places(self, content: bytes | bytearray) -> Iterator[tuple[int, Pattern]]:
        for shift in range(8):
            count = (len(content) - shift) // 8
            if count <= 0:
                return
            words = np.frombuffer(content, np.uint64, count, shift)
            low = np.frombuffer(content, np.uint16, count * 4, shift)[::4]
            maybe = np.flatnonzero(self._few[low])
            for at in maybe[np.isin(words[maybe], self._words)]:
                place = shift + 8 * int(at)
                for pattern in self._of[int(words[at])]:
                    if content[place : place + len(pattern.content)] == pattern.content:
                        yield place, pattern


def in_files(folder: Path, patterns: Mapping[str, Sequence[Pattern]]) -> list[str]:
    """Where something of somebody lies."""
    search = Search(pattern for some in patterns.values() for pattern in some)
    return [
        f"{path.name}: {pattern.kind} of {pattern.name}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for _, pattern in search.places(path.read_bytes())
    ]


def memory_of(pid: int) -> Iterator[tuple[str, bytes]]:
    """What a process can have written and has in memory, by place. Pages that it shares and has
    not touched are those of whoever has."""
    with (
        open(f"/proc/{pid}/mem", "rb", 0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap,
    ):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, rights, *_, path = (line + " -").split(maxsplit=5)
            written = "w" in rights or "memfd" in path or not path.startswith("/")
            if rights[0] != "r" or not written or "[v" in path:
                continue
            first, last = (int(part, 16) for part in where.split("-"))
            pagemap.seek(first // PAGE * 8)
            there = np.frombuffer(pagemap.read((last - first) // PAGE * 8), np.uint64) >> 62 != 0
            edges = np.flatnonzero(np.diff(there, prepend=False, append=False))
            for begin, end in edges.reshape(-1, 2).tolist():
                with contextlib.suppress(OSError):
                    memory.seek(first + begin * PAGE)
                    yield f"{where} {path.removesuffix(' -')}", memory.read((end - begin) * PAGE)


def in_memory(
    server: RunningServer, patterns: Mapping[str, Sequence[Pattern]], tell: bool = False
) -> list[str]:
    """The same in the memory of every process of the server, as it is now: they stand still while
    it is read."""
    pids = [server.process.pid, *(child.pid for child in server.children())]
    search = Search(pattern for some in patterns.values() for pattern in some)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        held = {pid: list(memory_of(pid)) for pid in pids}
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    hits = []
    for pid, parts in held.items():
        what = "front" if pid == server.process.pid else "worker"
        for where, content in parts:
            for at, pattern in search.places(content):
                around = content[max(0, at - 64) : at + len(pattern.content) + 32]
                hits.append(f"{what}: {pattern.kind} of {pattern.name} in {where}")
                if tell:
                    print(hits[-1], hex(at), around[:200], file=sys.stderr, flush=True)
    return hits


@contextlib.contextmanager
def load(server: RunningServer, stayer: facelane.Picture) -> Iterator[None]:
    """A camera, somebody who looks people up and somebody who watches events, until the end,
    whatever becomes of the server."""
    ended = threading.Event()
    watched: list[facelane.EventStream] = []

    def frames() -> Iterator[facelane.Frame]:
        for number in itertools.count():
            if ended.wait(0.1):
                return
            yield facelane.Frame(stayer, stream_offset=number * 0.1)

    def show(client: facelane.Client) -> None:
        for _ in client.analyze(frames(), source_id="door"):
            if ended.is_set():
                return

    def watch(client: facelane.Client) -> None:
        with client.watch_events() as events:
            watched.append(events)
            if not ended.is_set():
                for _ in events:
                    pass

    def ask(client: facelane.Client) -> None:
        client.identify(stayer)

    def keep_on(call: Callable[[facelane.Client], None]) -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(facelane.FacelaneError), server.client(timeout=10) as client:
                call(client)

    threads = [
        threading.Thread(target=keep_on, args=(call,), daemon=True) for call in (show, watch, ask)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for events in watched:
            events.close()
        for thread in threads:
            thread.join(60)


def everybody(client: facelane.Client) -> set[str]:
    return {s.subject_id for s in client.list_subjects() if s.subject_id.startswith("id-")}


def play(folder: Path, *, people: int, kills: int, seed: int = 1) -> tuple[Run, list[str]]:
    """What was done, and what was found that must not be there (or not found that must)."""
    dice = random.Random(seed)
    run, wrong = Run(), []
    rounds = -(-people // ROUND)
    killed_in = set(dice.sample(range(rounds - 1), min(kills, rounds - 1))) if rounds > 1 else set()
    stayer = facelane.Picture.encoded(wire.encoded(160, 120, 9_999, ".png"))
    server = RunningServer(folder, toml(folder, extra=EXTRA), forked=False)
    try:
        server.wait_serving(120)
        with server.client(timeout=60) as client:
            client.enroll("stayer", stayer, display_name="Who stays")
        for at in range(rounds):
            print(
                f"{len(run.enrolled)} enrolled, {run.deleted} deleted, {len(wrong)} found",
                file=sys.stderr,
                flush=True,
            )
            numbers = range(at * ROUND, min((at + 1) * ROUND, people))
            dies = at in killed_in
            with load(server, stayer):
                _enroll(server, run, numbers, dice.uniform(0.1, 1.0) if dies else 0.0)
            server = _alive(server, run)
            if dies:  # those that were not enrolled, and those that were, without being told so
                with load(server, stayer):
                    _enroll(server, run, numbers, 0.0)
            known = sealed(server)
            mine = {}
            for number in numbers:
                name = person(number)[0]
                mine[name] = run.patterns[name] = [*patterns_of(number), *known.get(name, ())]
            there = {name: [p for p in some if "vector" in p.kind] for name, some in mine.items()}
            wrong += [f"while enrolled, {hit}" for hit in in_files(folder, mine)]
            found = in_memory(server, there)
            if not all(any(name in hit for hit in found) for name in mine if name in known):
                wrong.append("not all who are enrolled were found in memory: the search is no good")
            with load(server, stayer):
                _see(server, run, numbers)
                _delete(server, run, numbers, dice.uniform(0.1, 1.0) if dies else 0.0)
                server = _alive(server, run)
                with server.client(timeout=60) as client:
                    for name in everybody(client):  # told as failed, or never tried
                        run.receipts[name] = client.erase_subject(name).receipt
                        run.deleted += 1
                returned = time.monotonic()
                time.sleep(max(0.0, returned + AFTER_RECEIPT_S - time.monotonic()))
                mine = {name: some for name, some in mine.items() if name in run.receipts}
                run.searched += len(mine)
                wrong += [f"memory of the {hit}" for hit in in_memory(server, mine, TELL)]
        wrong += in_files(folder, run.patterns)
        wrong += _receipts(server, run, folder)
        server.stop()
        wrong += [f"after the end: {hit}" for hit in in_files(folder, run.patterns)]
        wrong += _planted(folder, run)
    finally:
        server.stop()
    return run, wrong


def _see(server: RunningServer, run: Run, numbers: Sequence[int]) -> None:
    """All of them before a camera each; what is told of them has pictures, and of some somebody
    says that it is not them."""

    def see(number: int) -> None:
        name, _, picture = person(number)
        frames = [facelane.Frame(picture, stream_offset=at * 0.1) for at in range(6)]
        with server.client(timeout=60) as client, contextlib.suppress(facelane.FacelaneError):
            names = {
                face.identity.subject_id
                for outcome in client.analyze(frames, source_id=f"hall-{number}")
                if outcome.result is not None
                for face in outcome.result.faces
            }
            assert name in names, f"{name} was enrolled, and is not known"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(see, numbers))
    wanted = {person(number)[0] for number in numbers}
    with server.client(timeout=60) as client:
        page, _ = client.list_events(kinds=["SUBJECT_SEEN"], page_size=256)
        for event in page:
            name = event.identity.subject_id
            if name not in wanted or event.track is None or not event.track.has_picture:
                continue
            wanted.discard(name)
            kept = client.event_picture(event.sequence).picture
            run.patterns[name].append(Pattern(name, "event's picture", kept[len(kept) // 2 :][:48]))
            run.pictured += 1
            if run.pictured % 5 == 0:
                client.correct_identity(event.sequence, is_not=True)
                run.corrected += 1


def _enroll(server: RunningServer, run: Run, numbers: Sequence[int], kill_after: float) -> None:
    with server.client(timeout=30) as client, ThreadPoolExecutor(AT_ONCE) as pool:

        def enroll(number: int) -> bool:
            name, shown, picture = person(number)
            try:
                client.enroll(name, picture, display_name=shown)
            except facelane.FacelaneError:
                return False
            return True

        with _killing(server, run, kill_after):
            done = {
                number
                for number, well in zip(numbers, pool.map(enroll, numbers), strict=True)
                if well
            }
            run.enrolled |= done


def _delete(server: RunningServer, run: Run, numbers: Sequence[int], kill_after: float) -> None:
    with server.client(timeout=30) as client, ThreadPoolExecutor(AT_ONCE) as pool:

        def delete(number: int) -> None:
            name = person(number)[0]
            with contextlib.suppress(facelane.FacelaneError):
                run.receipts[name] = client.erase_subject(name).receipt
                run.deleted += 1

        with _killing(server, run, kill_after):
            list(pool.map(delete, numbers))


@contextlib.contextmanager
def _killing(server: RunningServer, run: Run, after: float) -> Iterator[None]:
    """kill -9 so many seconds from now; 0 = never."""
    if not after:
        yield
        return

    def kill() -> None:
        server.process.kill()
        server.process.wait(60)  # whoever looks whether it is alive comes behind it
        run.kills += 1

    timer = threading.Timer(after, kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def _alive(server: RunningServer, run: Run) -> RunningServer:
    """The server, or another life of it."""
    if server.process.poll() is None:
        return server
    server.stop()
    again = RunningServer(server.folder, server.config.read_text(), forked=False)
    again.wait_serving(120)
    return again


def _receipts(server: RunningServer, run: Run, folder: Path) -> list[str]:
    """Every receipt is judged as ``erasure verify`` judges it; keys are destroyed in time."""

    def judged() -> list[str]:
        with opened(server.config) as (settings, database):
            return [
                f"{name}: {problem}"
                for name, text in run.receipts.items()
                for problem in problems(Receipt.parse(text), settings, database)
            ]

    with contextlib.suppress(AssertionError):
        until(lambda: not judged(), 120, "the keys of the deleted to be destroyed")
    found = judged()
    for name, text in itertools.islice(run.receipts.items(), 0, None, 25):
        hits = traces([folder / "state"], Receipt.parse(text), name)
        found += [f"erasure verify: {path}" for path, _ in hits]
    return found


def _planted(folder: Path, run: Run) -> list[str]:
    """Whatever is put there is found."""
    name, text = next(iter(run.receipts.items()))
    receipt, missed = Receipt.parse(text), []
    store = folder / "state" / "gallery.db"
    whole = store.read_bytes()
    for pattern in (f"subject-{receipt.subject}\0".encode(), name.encode()):
        backup = folder / "backup.db"
        at = len(whole) // 2
        backup.write_bytes(whole[:at] + pattern + whole[at + len(pattern) :])
        if not list(traces([backup], receipt, name)):
            missed.append(f"what was planted is not found: {pattern[:8]!r}")
        backup.unlink()
    for pattern in run.patterns[name]:
        (folder / "planted").write_bytes(b"x" * 5003 + pattern.content + b"x")
        if len(in_files(folder, {name: run.patterns[name]})) != 1:
            missed.append(f"what was planted is not found: {pattern.kind}")
    (folder / "planted").unlink()
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.erasures", description=__doc__)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10, help="rounds in which it is killed twice")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="facelane-erasures-") as folder:
        run, wrong = play(
            Path(folder), people=options.people, kills=options.kills, seed=options.seed
        )
    told = {
        "enrolled": len(run.enrolled),
        "deleted": run.deleted,
        "kills": run.kills,
        "receipts": len(run.receipts),
        "searched_in_memory": run.searched,
        "pictured": run.pictured,
        "corrected": run.corrected,
        "patterns": sum(map(len, run.patterns.values())),
        "seconds": round(time.monotonic() - begun),
        "wrong": len(wrong),
        "found": wrong[:20],
    }
    print(json.dumps(told, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
