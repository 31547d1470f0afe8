"""``python -m tests.faults.erasures --people 1000 --kills 8``: enrolments and deletions under load,
the server killed in between; then all that it has left is searched for those who are gone.

Searched for: each deleted subject's vector, name, id and picture; in every file of the state folder
(store, write-ahead log, free pages), in the server's log, and, of those deleted last, in the memory
of every process of the server one second after the receipt. And, to know that the search finds what
is there: somebody who stays, in memory, and what is planted, on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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
IN_MEMORY = 30
"""Of the last round: so many are searched for in memory."""
AFTER_RECEIPT_S = 1.0
AT_ONCE = 24
"""Calls: the time that a deletion takes for memory is shared by those that come together."""


@dataclass
class Run:
    """What was done, and what is to be found nowhere."""

    enrolled: set[int] = field(default_factory=set)
    deleted: int = 0
    kills: int = 0
    receipts: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[bytes]] = field(default_factory=dict)
    """By subject id."""


def person(number: int) -> tuple[str, str, facelane.Picture, bytes]:
    """Id, name, picture, and what the picture is known by."""
    data = wire.encoded(160, 120, 10_000 + number, ".png")
    middle = len(data) // 2
    picture = facelane.Picture.encoded(data)
    return f"id-{number:06d}-zq", f"Name {number:06d} Zqvx", picture, data[middle : middle + 48]


def vectors(server: RunningServer) -> dict[str, bytes]:
    """A part of each vector, as the server has it in memory."""
    with opened(server.config) as (settings, database):
        store = Store(database, vault=unlock(database, settings, look=True))
        with database.reading() as connection:
            row = connection.execute(
                sa.select(schema.templates.c.model_id, schema.templates.c.dim).limit(1)
            ).first()
        if row is None:
            return {}
        found = store.vectors(row.model_id, row.dim)
        return {one.subject_id: one.vector[100:124].tobytes() for one in found}


def in_files(folder: Path, patterns: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Where something of somebody lies."""
    hits = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        for name, wanted in patterns.items():
            hits += [f"{path.name}: {name}" for pattern in wanted if pattern in content]
    return hits


def in_memory(server: RunningServer, patterns: Mapping[str, Sequence[bytes]]) -> list[str]:
    """The same in the memory of every process of the server."""
    hits = []
    for pid in (server.process.pid, *(child.pid for child in server.children())):
        with open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                where, rights = line.split()[:2]
                if not rights.startswith("r") or "[v" in line:
                    continue
                first, last = (int(part, 16) for part in where.split("-"))
                for begin in range(first, last, 16 << 20):
                    try:
                        memory.seek(begin)
                        part = memory.read(min((16 << 20) + 64, last - begin))
                    except OSError:
                        break
                    for name, wanted in patterns.items():
                        hits += [f"{pid}: {name}" for pattern in wanted if pattern in part]
    return hits


@contextlib.contextmanager
def load(server: RunningServer, stayer: facelane.Picture) -> Iterator[None]:
    """A camera, and somebody who looks people up, until the end, whatever becomes of the server."""
    ended = threading.Event()

    def frames() -> Iterator[facelane.Frame]:
        for number in itertools.count():
            if ended.wait(0.1):
                return
            yield facelane.Frame(stayer, stream_offset=number * 0.1)

    def watch() -> None:
        while not ended.wait(0.2):
            with contextlib.suppress(facelane.FacelaneError), server.client(timeout=10) as client:
                for _ in client.analyze(frames(), source_id="door"):
                    if ended.is_set():
                        return

    def ask() -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(facelane.FacelaneError), server.client(timeout=10) as client:
                client.identify(stayer)

    threads = [threading.Thread(target=call, daemon=True) for call in (watch, ask)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
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
    server = RunningServer(folder, toml(folder))
    try:
        server.wait_serving(120)
        with server.client(timeout=60) as client:
            client.enroll("stayer", stayer, display_name="Who stays")
        for at in range(rounds):
            print(
                f"{len(run.enrolled)} enrolled, {run.deleted} deleted", file=sys.stderr, flush=True
            )
            numbers = range(at * ROUND, min((at + 1) * ROUND, people))
            dies = at in killed_in
            with load(server, stayer):
                _enroll(server, run, numbers, dice.uniform(0.1, 1.0) if dies else 0.0)
            server = _alive(server, run)
            if dies:  # those that were not enrolled, and those that were, without being told so
                with load(server, stayer):
                    _enroll(server, run, numbers, 0.0)
            known = vectors(server)
            for number in numbers:
                name, shown, _, mark = person(number)
                one = [name.encode(), shown.encode(), mark]
                run.patterns[name] = [*one, known[name]] if name in known else one
            if at == rounds - 1:
                last = [person(n)[0] for n in numbers][-IN_MEMORY:]
                there = {name: run.patterns[name][-1:] for name in last[:3]}
                if not in_memory(server, there):
                    wrong.append("who is enrolled was not found in memory: the search is no good")
            with load(server, stayer):
                _delete(server, run, numbers, dice.uniform(0.1, 1.0) if dies else 0.0)
            server = _alive(server, run)
            with server.client(timeout=60) as client:
                for name in everybody(client):  # told as failed, or never tried
                    run.receipts[name] = client.erase_subject(name).receipt
                    run.deleted += 1
        returned = time.monotonic()
        time.sleep(max(0.0, returned + AFTER_RECEIPT_S - time.monotonic()))
        # A name may stand in a buffer of the transport that is in use again: docs/privacy.md.
        mine = {name: run.patterns[name][2:] for name in last if name in run.receipts}
        wrong += [f"memory {hit}" for hit in in_memory(server, mine)]
        wrong += in_files(folder, run.patterns)
        wrong += _receipts(server, run, folder)
        server.stop()
        wrong += [f"after the end: {hit}" for hit in in_files(folder, run.patterns)]
        wrong += _planted(folder, run)
    finally:
        server.stop()
    return run, wrong


def _enroll(server: RunningServer, run: Run, numbers: Sequence[int], kill_after: float) -> None:
    with server.client(timeout=30) as client, ThreadPoolExecutor(AT_ONCE) as pool:

        def enroll(number: int) -> bool:
            name, shown, picture, _ = person(number)
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
    again = RunningServer(server.folder, server.config.read_text())
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
    (folder / "planted").write_bytes(b"x" * 5000 + run.patterns[name][-1])
    if len(in_files(folder, {name: run.patterns[name]})) != 1:
        missed.append("a planted vector is not found")
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
        "patterns": sum(map(len, run.patterns.values())),
        "seconds": round(time.monotonic() - begun),
        "found": wrong[:20],
    }
    print(json.dumps(told, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
