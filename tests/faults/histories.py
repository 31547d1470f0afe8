"""Histories of a gallery's changes against a model, while the server's processes are killed.

``python -m tests.faults.histories [--engine sqlite|postgresql] [--operations N] [--seconds S]``

A server of several shards; writers on connections of their own create, enrol, read and delete
subjects, each those of its own, and all of them one that they share. Meanwhile a shard, the keeper
(the server is then begun again) and PostgreSQL are killed. An operation that was answered has
happened; one that failed may have happened. So each subject is in one of a set of states, and every
answer must fit one of them: what was acknowledged is never lost, what was deleted is never named,
by whichever shard. Prints one JSON line; exit status 1 when something did not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from tests import postgres
from tests.e2e import wire
from tests.running_server import NULL_POOLS, RunningServer, free_port, toml

import facelane

WRITERS = 8
SUBJECTS = 6
"""Of each writer."""
FAULT_S = 8.0


class History:
    """One run. ``wrong``: what did not fit the model."""

    def __init__(self, folder: Path, *, shards: int, database: postgres.Postgres | None) -> None:
        self.folder = folder
        self.database = database
        self.port = free_port()
        store = "" if database is None else f'[store]\nurl = "{database.url()}"\n'
        text = toml(folder, NULL_POOLS, f'{store}[auth]\nmode = "none"\n', f"127.0.0.1:{self.port}")
        self.config = text.replace("[server]", f"[server]\nshards = {shards}\ndrain_grace_s = 2.0")
        self.server = RunningServer(folder, self.config)
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def operations(self) -> int:
        return sum(self.done.values())

    def wait_serving(self) -> None:
        with facelane.Client(self.target, timeout=5.0) as client:
            client.wait_until_serving(120.0)

    # -- what is done ------------------------------------------------------------------------

    def write(self, number: int) -> None:
        """One writer, until ``stop``."""
        chance = random.Random(number)
        states: dict[str, frozenset[bool]] = {}
        while not self.stop.is_set():
            # A connection each time: it leads to any shard.
            lost = contextlib.suppress(facelane.FacelaneError)
            with lost, facelane.Client(self.target, timeout=10.0) as client:
                for _ in range(20):
                    if self.stop.is_set():
                        return
                    if chance.random() < 0.05:
                        self._shared(client, chance)
                    else:
                        self._own(client, chance, number, states)

    def _own(
        self,
        client: facelane.Client,
        chance: random.Random,
        number: int,
        states: dict[str, frozenset[bool]],
    ) -> None:
        index = chance.randrange(SUBJECTS)
        subject = f"w{number}-{index}"
        picture = wire.picture(1 + number * SUBJECTS + index)
        before = states.get(subject, frozenset({False}))
        match chance.choice(("enrol", "enrol", "delete", "read", "name")):
            case "enrol":
                states[subject] = before | {True}
                client.enroll(subject, picture)
                states[subject] = frozenset({True})
                self.done["enrol"] += 1
            case "delete":
                states[subject] = before | {False}
                try:
                    client.delete_subject(subject)
                except facelane.NotFoundError:
                    # Perhaps by a call of ours that was not answered.
                    if before == {True}:
                        self._fail(f"{subject}: was acknowledged, and is gone")
                states[subject] = frozenset({False})
                self.done["delete"] += 1
                if subject in self._named(client, picture):
                    self._fail(f"{subject}: is named behind its deletion")
                self.done["name"] += 1
            case "read":
                try:
                    client.get_subject(subject)
                    found = True
                except facelane.NotFoundError:
                    found = False
                if found not in before:
                    self._fail(f"{subject}: {'is there' if found else 'is gone'}, against {before}")
                states[subject] = frozenset({found})
                self.done["read"] += 1
            case "name":
                named = subject in self._named(client, picture)
                if named and before == {False}:
                    self._fail(f"{subject}: is named, and was deleted")
                self.done["name"] += 1

    def _shared(self, client: facelane.Client, chance: random.Random) -> None:
        """A subject that all write: no answer is foreseen, none may break anything."""
        with contextlib.suppress(facelane.NotFoundError):
            if chance.random() < 0.5:
                client.enroll("shared", wire.picture(0))
            else:
                client.delete_subject("shared")
        self.done["shared"] += 1

    def _named(self, client: facelane.Client, picture: facelane.Picture) -> list[str]:
        return [face.identity.subject_id for face in client.identify(picture)]

    def _fail(self, what: str) -> None:
        self.wrong.append(what)
        self.stop.set()

    # -- what goes wrong ---------------------------------------------------------------------

    def kill_shard(self) -> None:
        shards = [
            child
            for child in psutil.Process(self.server.process.pid).children()
            if "shard" in child.cmdline()
        ]
        if shards:
            random.choice(shards).kill()

    def kill_keeper(self) -> None:
        children = self.server.children()
        self.server.process.kill()
        self.server.process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=30)
        if alive:
            self._fail(f"{len(alive)} processes outlived the keeper")
        self.server.stop()
        self.server = RunningServer(self.folder, self.config)
        self.wait_serving()

    def kill_postgres(self) -> None:
        assert self.database is not None
        self.database.kill()
        time.sleep(0.5)  # away for a while
        self.database.start()

    def run(self, operations: int, seconds: float) -> None:
        """So many operations, or as many as there is time for."""
        faults: list[Callable[[], None]] = [self.kill_shard, self.kill_keeper]
        if self.database is not None:
            faults.append(self.kill_postgres)
        self.wait_serving()
        writers = [threading.Thread(target=self.write, args=(n,)) for n in range(WRITERS)]
        for writer in writers:
            writer.start()
        begun = time.monotonic()
        due, turn = begun + FAULT_S / 2, 0
        try:
            while self.operations < operations or not all(
                self.faults[fault.__name__] for fault in faults
            ):
                if self.stop.is_set() or time.monotonic() > begun + seconds:
                    break
                if time.monotonic() > due:
                    fault = faults[turn % len(faults)]
                    fault()
                    self.faults[fault.__name__] += 1
                    due, turn = time.monotonic() + FAULT_S, turn + 1
                self.stop.wait(0.1)
        finally:
            self.stop.set()
            for writer in writers:
                writer.join(60)
            self.server.stop()

    def report(self) -> dict[str, object]:
        return {
            "engine": "sqlite" if self.database is None else "postgresql",
            "operations": self.operations,
            "done": dict(self.done),
            "faults": dict(self.faults),
            "wrong": self.wrong,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.histories")
    parser.add_argument("--engine", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="facelane-history-")))
        database = None
        if args.engine == "postgresql":
            if not postgres.present():
                parser.error(postgres.WITHOUT)
            database = stack.enter_context(postgres.running())
        history = History(folder, shards=args.shards, database=database)
        history.run(args.operations, args.seconds)
    print(json.dumps(history.report()))
    return 1 if history.wrong or history.operations < args.operations else 0


if __name__ == "__main__":
    sys.exit(main())
