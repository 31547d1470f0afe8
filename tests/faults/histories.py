"""Histories of changes against a model, while something is killed, cut off or full.

``python -m tests.faults.histories [CELL ...] [--engine sqlite|postgresql] [--operations N]``

A server of several shards; writers enrol, read, delete and look people up, each those of its own,
and open streams. Every operation goes to a shard by chance. One that was answered has happened; one
that failed may have happened. So each subject is in one of a set of states, and every answer must
fit one of them: what was acknowledged is never lost, and what was deleted is named by no shard once
the call has returned. Watchers write down what they are told, over whatever breaks: the numbers of
events have no gap, all are told the same, and whoever goes on from any token is told what came
after it. The cells:

``shard``, ``keeper``, ``postgres``
    kill -9, at even distances; keeper and PostgreSQL are begun again
``network``
    a server in a network of its own is cut off from its clients and, on PostgreSQL, where a second
    server shares the store, from the store; needs root
``disk``
    the store lies on a small disk that is filled; needs root
``writers``
    two writers on one subject, move by move: their answers must fit one of both orders
``enrolling``
    eight shards enrol at once; who was enrolled is then named by each of them

Prints a JSON line for each cell; exit status 1 when something did not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil
from tests import postgres
from tests.e2e import wire
from tests.faults.places import Cable, UnavailableError, fill, small_disk
from tests.running_server import NULL_POOLS, RunningServer, free_port, toml
from tests.waiting import until

import facelane

ENGINES: Final = ("sqlite", "postgresql")
CELLS: Final = ("shard", "keeper", "postgres", "network", "disk", "writers", "enrolling")
WRITERS: Final = 8
SUBJECTS: Final = 6
"""Of each writer."""
WATCHERS: Final = 2
STREAMS: Final = 0.05
"""The share of operations that are a stream."""
DISK_MIB: Final = {"sqlite": 32, "postgresql": 192}


def cells(engine: str) -> tuple[str, ...]:
    return tuple(cell for cell in CELLS if engine == "postgresql" or cell != "postgres")


class Watcher:
    """Writes down what it is told, over whatever breaks."""

    def __init__(self, targets: Sequence[str], fail: Callable[[str], None]) -> None:
        self.told: list[facelane.Event] = []
        self.tokens: list[str] = []
        """Behind each of ``told``, and before the first."""
        self._targets = targets
        self._fail = fail
        self._stop = threading.Event()
        self._open: facelane.EventStream | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, token: str) -> None:
        self.tokens.append(token)
        self._thread.start()

    def has_heard(self, source_id: str) -> bool:
        return any(event.source_id == source_id for event in self.told[-50:])

    def close(self) -> None:
        """Idempotent."""
        self._stop.set()
        if self._open is not None:
            self._open.close()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            # By hand, so that each connection is to any shard.
            try:
                self._watch()
            except facelane.FacelaneError as error:
                if error.reason == "HISTORY_LOST":
                    self._fail("a watcher's token is not known any more")
            self._stop.wait(0.05)

    def _watch(self) -> None:
        with facelane.Client(random.choice(self._targets), timeout=10.0) as client:
            stream = self._open = client.watch_events(self.tokens[-1])
            with stream:
                for event in stream:
                    if self.told and event.sequence != self.told[-1].sequence + 1:
                        self._fail(f"event {event.sequence} behind {self.told[-1].sequence}")
                    self.told.append(event)
                    self.tokens.append(event.resume_token)
                    if random.random() < 0.01 or self._stop.is_set():
                        return  # and goes on at another shard


class History:
    """One run. ``wrong``: what did not fit the model."""

    def __init__(
        self,
        folder: Path,
        cell: str,
        *,
        shards: int,
        database: postgres.Postgres | None = None,
        disk: Path | None = None,
        cable: Cable | None = None,
    ) -> None:
        """``disk``: what the cell fills; ``cable``: what it cuts."""
        self.folder, self.cell, self.database = folder, cell, database
        self.disk, self.cable = disk, cable
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.events = 0
        self.stop = threading.Event()
        self.states: dict[str, frozenset[bool]] = {}
        self._counted = threading.Lock()
        url = "" if database is None else f'[store]\nurl = "{database.url()}"\n'
        extra = f'{url}[auth]\nmode = "none"\n'
        self.servers: list[RunningServer] = []
        self.targets: list[str] = []
        if cable is not None:
            self._begin(folder / "far", extra, shards, f"{cable.far}:{free_port()}", cable.prefix)
        if cable is None or database is not None:
            self._begin(folder / "near", extra, shards, "", ())

    def _begin(
        self, folder: Path, extra: str, shards: int, listen: str, prefix: Sequence[str]
    ) -> None:
        folder.mkdir()
        text = toml(folder, NULL_POOLS, extra, listen)
        if self.disk is not None and self.database is None:
            text = text.replace(f"{folder}/state", str(self.disk))
        text = text.replace("[server]", f"[server]\nshards = {shards}\ndrain_grace_s = 2.0")
        if listen:
            self.targets.append(listen)
        else:
            # Each shard has a socket of its own.
            path = f"unix:{folder}/grpc.sock"
            self.targets += [path, *(f"{path}.{n}" for n in range(1, shards))]
        self.servers.append(RunningServer(folder, text, prefix=prefix))

    @property
    def operations(self) -> int:
        return sum(self.done.values())

    def wait_serving(self) -> None:
        for target in self.targets:
            until(lambda to=target: self._serves(to), 600.0, f"{target} SERVING")  # type: ignore[misc]

    def _serves(self, target: str) -> bool:
        for server in self.servers:
            assert server.process.poll() is None, f"a server ended:\n{server.text()[-2000:]}"
        away = contextlib.suppress(facelane.FacelaneError)
        with away, facelane.Client(target, timeout=2.0) as client:
            return client.health() == "SERVING"
        return False

    def client(self) -> facelane.Client:
        return facelane.Client(random.choice(self.targets), timeout=15.0)

    def fail(self, what: str) -> None:
        self.wrong.append(what)
        self.stop.set()

    def count(self, what: str) -> None:
        with self._counted:
            self.done[what] += 1

    # -- what is done ------------------------------------------------------------------------

    def write(self, number: int) -> None:
        """One writer, until ``stop``."""
        chance = random.Random(number)
        while not self.stop.is_set():
            try:
                with self.client() as client, self.client() as other:
                    for _ in range(20):
                        if self.stop.is_set():
                            return
                        if chance.random() < STREAMS:
                            self._stream(client, number)
                        else:
                            self._own(client, other, chance, number)
            except facelane.FacelaneError as error:
                with self._counted:
                    self.failed[str(error.reason)] += 1
                self.stop.wait(0.05)

    def _own(
        self, client: facelane.Client, other: facelane.Client, chance: random.Random, number: int
    ) -> None:
        """One change or question about a subject of this writer's. ``other``: another shard's."""
        index = chance.randrange(SUBJECTS)
        subject = f"w{number}-{index}"
        picture = wire.picture(1 + number * SUBJECTS + index)
        before = self.states.get(subject, frozenset({False}))
        does = ("enrol", "enrol", "delete", "read", "name")
        match chance.choice(does if self.cell != "enrolling" else ("enrol", *does)):
            case "enrol":
                self.states[subject] = before | {True}
                client.enroll(subject, picture)
                self.states[subject] = frozenset({True})
                self.count("enrol")
                if self.cell == "enrolling":
                    self._named_everywhere(subject, picture)
            case "delete":
                self.states[subject] = before | {False}
                try:
                    client.delete_subject(subject)
                except facelane.NotFoundError:
                    # Perhaps by a call of ours that was not answered.
                    if before == {True}:
                        self.fail(f"{subject}: was acknowledged, and is gone")
                self.states[subject] = frozenset({False})
                self.count("delete")
                if subject in _named(other, picture):
                    self.fail(f"{subject}: is named behind its deletion")
                self.count("name")
            case "read":
                try:
                    client.get_subject(subject)
                    found = True
                except facelane.NotFoundError:
                    found = False
                if found not in before:
                    self.fail(f"{subject}: {'is there' if found else 'is gone'}, against {before}")
                self.states[subject] = frozenset({found})
                self.count("read")
            case "name":
                if subject in _named(client, picture) and before == {False}:
                    self.fail(f"{subject}: is named, and was deleted")
                self.count("name")

    def _named_everywhere(self, subject: str, picture: facelane.Picture) -> None:
        for target in self.targets:
            with facelane.Client(target, timeout=15.0) as client:
                _until_named(client, subject, picture, True)
            self.count("name")

    def _stream(self, client: facelane.Client, number: int) -> None:
        """Of which events come."""
        with client.analyze_stream(source_id=f"w{number}", overload="lossless") as stream:
            stream.send(wire.picture(1 + number * SUBJECTS))
            stream.close_send()
            for _ in stream:
                pass
        self.count("stream")

    def take_turns(self, _number: int) -> None:
        """Two writers on one subject, until ``stop``: both make a move at once, then both wait."""
        chance = random.Random(7)
        held: frozenset[str] | None = None
        """Ids of its templates; None = there is no such subject."""
        ends = (self.targets[0], self.targets[-1])
        with contextlib.ExitStack() as stack:
            first, second = (
                stack.enter_context(facelane.Client(end, timeout=15.0)) for end in ends
            )
            with contextlib.suppress(facelane.NotFoundError):
                first.delete_subject("shared")
            while not self.stop.is_set():
                moves = [chance.choice(("enrol", "enrol", "delete", "read")) for _ in range(2)]
                answers: list[object] = [None, None]

                def make(at: int, client: facelane.Client, move: str, into: list[object]) -> None:
                    try:
                        into[at] = _move(client, move, at)
                    except facelane.FacelaneError as error:
                        into[at] = _FAILED  # and may have happened
                        with self._counted:
                            self.failed[str(error.reason)] += 1

                threads = [
                    threading.Thread(target=make, args=(at, client, moves[at], answers))
                    for at, client in enumerate((first, second))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                pairs = list(zip(moves, answers, strict=True))
                reader = second if chance.random() < 0.5 else first
                found = until(lambda by=reader: _answered(by), what="what there is now")[0]  # type: ignore[misc]
                after = [
                    end
                    for first_too, second_too in itertools.product(
                        *(_perhaps(pair, found) for pair in pairs)
                    )
                    for order in ((*first_too, *second_too), (*second_too, *first_too))
                    if (end := _played(held, order)) is not _IMPOSSIBLE
                ]
                if found not in after:
                    self.fail(f"{pairs} from {held} gave {found}: no order of both does")
                held = found  # type: ignore[assignment]
                for move in (*moves, "read"):
                    self.count(move)
                if held is not None and len(held) > 8:
                    with contextlib.suppress(facelane.NotFoundError):
                        until(lambda: _deleted(first), what="a deletion that is confirmed")
                    held = None
                    self.count("delete")

    # -- what goes wrong ---------------------------------------------------------------------

    def kill_shard(self) -> None:
        shards = [
            child
            for server in self.servers
            for child in psutil.Process(server.process.pid).children()
            if "shard" in child.cmdline()
        ]
        if shards:
            random.choice(shards).kill()

    def kill_keeper(self) -> None:
        old = self.servers[0]
        children = old.children()
        old.process.kill()
        old.process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=30)
        if alive:
            self.fail(f"{len(alive)} processes outlived the keeper")
        old.stop()
        self.servers[0] = RunningServer(old.folder, old.config.read_text())
        self.wait_serving()

    def kill_postgres(self) -> None:
        assert self.database is not None
        self.database.kill()
        time.sleep(0.5)  # away for a while
        self.database.start()

    def cut_network(self) -> None:
        assert self.cable is not None
        which = self.cable.links[self.faults["cut_network"] % len(self.cable.links)]
        with self.cable.cut(which):
            time.sleep(random.choice((1.0, 3.0, 12.0)))  # how long it lasts

    def fill_disk(self) -> None:
        assert self.disk is not None
        filler = self.disk / "filler"
        fill(filler)
        time.sleep(1.5)  # how long it lasts
        fill(filler)
        time.sleep(0.5)  # and what was freed meanwhile
        filler.unlink(missing_ok=True)
        if self.database is not None and not self.database.runs:
            self.database.start()  # it gave up, as PostgreSQL does without room for its log

    def _fault(self) -> Callable[[], None] | None:
        return {
            "shard": self.kill_shard,
            "keeper": self.kill_keeper,
            "postgres": self.kill_postgres,
            "network": self.cut_network,
            "disk": self.fill_disk,
        }.get(self.cell)

    # -- all of it ---------------------------------------------------------------------------

    def run(self, operations: int, seconds: float, faults: int = 20) -> None:
        """At least so many operations, or as many as there is time for, with ``faults`` spread over
        them: while one lasts that half of the writers do not notice, many may be done."""
        fault = self._fault()
        watchers = [Watcher(self.targets, self.fail) for _ in range(WATCHERS)]
        pair = self.cell == "writers"
        writers = [
            threading.Thread(target=self._guarded, args=(n, pair))
            for n in range(1 if pair else WRITERS)
        ]
        try:
            self.wait_serving()
            begun = time.monotonic()
            with self.client() as client, client.watch_events() as first:
                token = first.resume_token
            for one in watchers:
                one.start(token)
            for writer in writers:
                writer.start()
            wanted = faults if fault is not None else 0
            while self.operations < operations or sum(self.faults.values()) < wanted:
                if self.stop.is_set() or time.monotonic() > begun + seconds:
                    break
                due = operations * (sum(self.faults.values()) + 0.5) / faults
                if fault is not None and self.operations >= due:
                    fault()
                    self.faults[fault.__name__] += 1
                self.stop.wait(0.05)
            self.stop.set()
            for writer in writers:
                writer.join(90)
            if not self.wrong:
                self.settle(watchers)
        except (AssertionError, facelane.FacelaneError) as error:  # of what was waited for
            self.fail(f"{type(error).__name__}: {error}"[:2000])
        finally:
            self.stop.set()
            for one in watchers:
                if one.tokens:
                    one.close()
            self.close()

    def close(self) -> None:
        """Idempotent."""
        for server in self.servers:
            server.stop()

    def _guarded(self, number: int, pair: bool) -> None:
        try:
            (self.take_turns if pair else self.write)(number)
        except Exception as error:
            self.fail(f"writer {number}: {type(error).__name__}: {error}"[:500])

    def settle(self, watchers: Sequence[Watcher]) -> None:
        """When all is calm: everything acknowledged is there, at every shard, and all that was told
        is told again to whoever asks."""
        self.wait_serving()
        for subject, states in self.states.items():
            number, _, index = subject.removeprefix("w").partition("-")
            picture = wire.picture(1 + int(number) * SUBJECTS + int(index))
            for target in self.targets:
                with facelane.Client(target, timeout=15.0) as client:
                    there = subject in {one.subject_id for one in client.list_subjects()}
                    if there not in states:
                        self.fail(f"{subject}: in the end {there}, against {states}")
                    _until_named(client, subject, picture, there)
        with self.client() as client, client.analyze_stream(source_id="the-end"):
            pass
        for one in watchers:
            until(lambda by=one: by.has_heard("the-end"), what="the last event")  # type: ignore[misc]
            one.close()
        longest = max(watchers, key=lambda one: len(one.told))
        self.events = len(longest.told)
        told = [_told(event) for event in longest.told]
        for one in watchers:
            if [_told(event) for event in one.told] != told[: len(one.told)]:
                self.fail("two who watched were told different things")
        for target in self.targets:
            for at in {0, *(random.randrange(len(told) + 1) for _ in range(4))}:
                if (again := _again(target, longest.tokens[at], len(told) - at)) != told[at:]:
                    self.fail(f"from event {at}: {len(again)} of {len(told) - at} told again")

    def report(self) -> dict[str, object]:
        return {
            "cell": self.cell,
            "engine": "sqlite" if self.database is None else "postgresql",
            "operations": self.operations,
            "done": dict(self.done),
            "failed": dict(self.failed),
            "faults": dict(self.faults),
            "events": self.events,
            "wrong": self.wrong,
        }


# -- moves of two -----------------------------------------------------------------------------

_IMPOSSIBLE: Final = frozenset({"impossible"})
_FAILED: Final = "failed"


def _answered(client: facelane.Client) -> tuple[frozenset[str] | None] | None:
    with contextlib.suppress(facelane.UnavailableError):
        return (_move(client, "read", 0),)  # type: ignore[return-value]
    return None


def _deleted(client: facelane.Client) -> bool:
    with contextlib.suppress(facelane.UnavailableError):
        client.delete_subject("shared")
        return True
    return False


def _perhaps(
    pair: tuple[str, object], found: frozenset[str] | None
) -> list[tuple[tuple[str, object], ...]]:
    """What a move may have been: that itself, or for one that failed nothing, or any answer to it
    that nobody heard."""
    move, answer = pair
    if answer is not _FAILED:
        return [(pair,)]
    heard: list[object] = []
    if move == "enrol":
        heard = [*(found or ()), "of which nothing is left"]
    elif move == "delete":
        heard = [True, False]
    return [(), *(((move, one),) for one in heard)]


def _move(client: facelane.Client, move: str, at: int) -> object:
    """Its answer: of an enrolment the template's id, of a deletion whether there was somebody,
    of a reading the ids of its templates, None = nobody."""
    if move == "enrol":
        return client.enroll("shared", wire.picture(at)).template.template_id
    try:
        if move == "delete":
            client.delete_subject("shared")
            return True
        return frozenset(one.template_id for one in client.list_templates("shared"))
    except facelane.NotFoundError:
        return False if move == "delete" else None


def _played(held: frozenset[str] | None, order: Sequence[tuple[str, object]]) -> object:
    """What is held after moves in this order, or ``_IMPOSSIBLE`` for their answers."""
    for move, answer in order:
        if move == "enrol":
            held = (held or frozenset()) | {str(answer)}
        elif move == "delete":
            if answer is not (held is not None):
                return _IMPOSSIBLE
            held = None
        elif answer != held:
            return _IMPOSSIBLE
    return held


def _named(client: facelane.Client, picture: facelane.Picture) -> list[str]:
    return [face.identity.subject_id for face in client.identify(picture)]


def _until_named(
    client: facelane.Client, subject: str, picture: facelane.Picture, so: bool
) -> None:
    until(lambda: (subject in _named(client, picture)) is so, what=f"{subject} named: {so}")


def _told(event: facelane.Event) -> tuple[object, ...]:
    """What stays of an event, whoever is deleted."""
    return (event.sequence, event.kind, event.event_time, event.source_id, event.stream_id)


def _again(target: str, token: str, count: int) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    with facelane.Client(target, timeout=15.0) as client, client.watch_events(token) as events:
        timer = threading.Timer(60.0, events.close)
        timer.start()
        while len(found) < count:
            try:
                found.append(_told(next(events)))
            except StopIteration:
                break
        timer.cancel()
    return found


@contextlib.contextmanager
def prepared(cell: str, engine: str, folder: Path, shards: int) -> Iterator[History]:
    """A history that can be run. Raises ``UnavailableError``."""
    if engine == "postgresql" and not postgres.present():
        raise UnavailableError(postgres.WITHOUT)
    with contextlib.ExitStack() as stack:
        disk, cable, address = None, None, ""
        if cell == "disk":
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="facelane-disk-")))
            root.chmod(0o755)
            disk = stack.enter_context(small_disk(root / "disk", DISK_MIB[engine]))
        if cell == "network":
            links = ("clients",) if engine == "sqlite" else ("store", "clients")
            cable = stack.enter_context(Cable(links))
            address = cable.near
        database = None
        if engine == "postgresql":
            room = None
            if disk is not None:
                room = disk / "postgres"
                disk.chmod(0o755)
                room.mkdir()
            database = stack.enter_context(postgres.running(address, room))
        history = History(folder, cell, shards=shards, database=database, disk=disk, cable=cable)
        stack.callback(history.close)
        yield history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.histories")
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--engine", choices=ENGINES, default="sqlite")
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1_800.0)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--shards", type=int, default=0, help="default 4, enrolling 8")
    args = parser.parse_args()
    if unknown := set(args.cells) - set(cells(args.engine)):
        parser.error(f"{', '.join(sorted(unknown))}: with {args.engine} there are "
                     f"{', '.join(cells(args.engine))}")  # fmt: skip
    # As an exception, so that servers, disks and networks are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bad = False
    for cell in args.cells or cells(args.engine):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="facelane-history-") as scratch:
            shards = args.shards or (8 if cell == "enrolling" else 4)
            try:
                with prepared(cell, args.engine, Path(scratch), shards) as history:
                    history.run(args.operations, args.seconds, args.faults)
            except UnavailableError as error:
                print(json.dumps({"cell": cell, "engine": args.engine, "left_out": str(error)}))
                continue
            seconds = round(time.monotonic() - begun, 1)
            print(json.dumps(history.report() | {"shards": shards, "seconds": seconds}), flush=True)
            if history.wrong:
                kept = Path(tempfile.mkdtemp(prefix="facelane-history-wrong-"))
                for server in history.servers:
                    shutil.copy(server.log, kept / f"{server.folder.name}.log")
                print(f"logs: {kept}", file=sys.stderr)
        bad = bad or bool(history.wrong) or history.operations < args.operations
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
