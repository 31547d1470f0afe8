"""Shards and their keeper as far as they are pure: lives, openings, health, dealing, the board,
merged answers and metrics."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import until

from facelane.v1 import admin_service_pb2 as admin_pb
from facelane.v1 import server_service_pb2 as pb
from facelane_server import config, limits
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import whole
from facelane_server.keeper import exposition
from facelane_server.keeper.child import Child
from facelane_server.keeper.keeper import Keeper
from facelane_server.keeper.roster import HANG_TICKS, HOLD_S, START_TICKS, Do, Roster, What
from facelane_server.pools.restart import Happening, Life, Notice, Policy
from facelane_server.shards import dealing, link
from facelane_server.shards.board import Board, Holdings, Seat, better
from facelane_server.shards.messages import (
    Answer,
    Began,
    Drain,
    Failure,
    Open,
    Overall,
    Pulse,
    Standing,
)

READY = Pulse(ready=True, alive=True, health={"": True, "facelane.v1.AnalysisService": True})
LOADING = Pulse(ready=False, alive=False, health={"": False})


class Server:
    """A roster whose orders are carried out at once; ``shards``: those with a process."""

    def __init__(self, count: int) -> None:
        policy = Policy(initial_s=0.1, start_timeout_s=float("inf"), drain_timeout_s=20.0)
        self.roster = Roster(count, policy, unit=lambda: 0.5)
        self.now = 0.0
        self.shards: set[int] = set()
        self.open: set[int] = set()
        self.did: list[Do] = []
        self.carry(self.roster.start(self.now))

    def carry(self, orders: list[Do]) -> None:
        for order in orders:
            self.did.append(order)
            match order.what:
                case What.SPAWN:
                    self.shards.add(order.shard)
                    self.carry(self.roster.spawned(order.shard, 100 + order.shard, self.now))
                case What.OPEN:
                    assert order.shard in self.shards
                    self.open.add(order.shard)
                case What.KILL if order.shard in self.shards:
                    self.gone(order.shard, "SIGKILL")

    def gone(self, shard: int, how: str = "SIGKILL") -> None:
        self.shards.discard(shard)
        self.open.discard(shard)
        self.carry(self.roster.happened(shard, Notice(Happening.LOSS, how), self.now))
        self.carry(self.roster.happened(shard, Notice(Happening.GONE), self.now))

    def began(self, shard: int) -> None:
        self.carry(self.roster.began(shard, self.now))

    def pulse(self, shard: int, pulse: Pulse) -> None:
        self.carry(self.roster.pulsed(shard, pulse, self.now))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.carry(self.roster.due(self.now))

    @classmethod
    def serving(cls, count: int) -> Server:
        server = cls(count)
        for shard in range(count):
            server.began(shard)
        for shard in range(count):
            server.pulse(shard, READY)
        assert server.roster.ready
        assert not server.roster.starting
        return server


def test_the_first_shard_begins_alone_and_all_take_connections_together() -> None:
    server = Server(3)
    assert server.shards == {0}, "one makes or migrates the store"
    server.began(0)
    assert server.shards == {0, 1, 2}
    assert not server.open
    server.pulse(0, READY)
    assert not server.open, "who comes now would all be on it"
    server.began(1)
    server.began(2)
    assert server.open == {0, 1, 2}
    assert not server.roster.health()[""]
    for shard in range(3):
        assert not server.roster.ready
        server.pulse(shard, READY)
    assert server.roster.ready
    assert server.roster.health() == {
        "": True,
        "facelane.v1.AnalysisService": True,
        "facelane.process": True,
    }


def test_a_shard_that_does_not_begin_holds_the_others_up_for_a_while_only() -> None:
    server = Server(2)
    server.began(0)
    assert not server.open
    assert server.roster.next_due == HOLD_S
    server.wait(HOLD_S)
    assert server.open == {0}


def test_a_lost_shard_comes_back_and_takes_connections_when_it_is_ready() -> None:
    server = Server.serving(2)
    server.gone(1)
    assert server.roster.life(1) is Life.BACKOFF
    assert server.roster.health()[""], "what clients reach is able"
    assert not server.roster.ready
    assert "DEGRADED: shard 1 BACKOFF SIGKILL" in server.roster.status(7)
    assert server.shards == {0}
    server.wait(0.2)
    assert server.shards == {0, 1}
    server.began(1)
    server.pulse(1, LOADING)
    assert server.open == {0}
    server.pulse(1, READY)
    assert server.open == {0, 1}
    assert server.roster.ready
    (zero, one) = server.roster.standings()
    assert (zero.restarts, one.restarts, one.lost) == (0, 1, "SIGKILL")


def test_without_any_other_a_shard_takes_connections_before_it_is_ready() -> None:
    """It says NOT_SERVING, and what ails it can be asked."""
    server = Server.serving(2)
    server.gone(0)
    server.gone(1)
    assert not any(
        able for name, able in server.roster.health().items() if name != "facelane.process"
    )
    assert not server.roster.alive
    server.wait(1.0)
    server.began(1)
    assert server.open == {1}
    server.began(0)
    assert server.open == {1}


def test_health_is_of_all_that_take_connections() -> None:
    server = Server.serving(2)
    server.pulse(1, Pulse(ready=False, alive=False, health={"": False, "x": True}))
    assert server.roster.health() == {
        "": False,
        "facelane.v1.AnalysisService": False,
        "x": False,
        "facelane.process": True,
    }
    assert server.roster.alive, "one of them can infer"


def test_a_shard_that_crashes_on_and_on_backs_off_and_is_quarantined() -> None:
    server = Server.serving(2)
    waits = []
    for _ in range(5):
        server.gone(1, "EXIT_1")
        waits.append(server.roster.next_due - server.now)
        server.wait(waits[-1])
        assert 1 in server.shards
    assert waits[1] > waits[0]
    assert waits[-1] == 60.0
    assert server.roster.health()[""]


def test_a_shard_that_hangs_before_it_has_said_anything_is_started_again() -> None:
    server = Server(2)
    for _ in range(START_TICKS):
        server.carry(server.roster.tick(server.now))
    assert server.shards == {0}
    server.carry(server.roster.tick(server.now))
    assert server.roster.loss(0) == "HUNG"


def test_a_silent_shard_hangs_but_not_while_this_process_stands_still() -> None:
    server = Server.serving(2)
    server.now += 3600.0
    server.carry(server.roster.tick(server.now))
    assert server.shards == {0, 1}
    for _ in range(HANG_TICKS - 1):
        server.roster.heard(0)
        server.carry(server.roster.tick(server.now))
    assert server.shards == {0, 1}
    server.roster.heard(0)
    server.carry(server.roster.tick(server.now))
    assert server.shards == {0}
    assert server.roster.loss(1) == "HUNG"


def test_a_shard_that_is_given_no_processor_does_not_hang_yet() -> None:
    server = Server.serving(2)
    for _ in range(5 * HANG_TICKS):
        server.carry(server.roster.tick(server.now, {0, 1}))
    assert server.shards == {0, 1}
    for _ in range(6 * HANG_TICKS):
        server.roster.heard(0)
        server.carry(server.roster.tick(server.now, {0, 1}))
    assert server.shards == {0}, "it may turn in a circle"
    assert server.roster.loss(1) == "HUNG"


SPINS = "while True: pass"


def test_who_waits_for_a_processor_is_told_from_who_waits_for_something_else() -> None:
    one = min(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:

        def begin(*command: str) -> subprocess.Popen[bytes]:
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            os.sched_setaffinity(process.pid, {one})
            return process

        def child(process: subprocess.Popen[bytes]) -> Child:
            return Child(0, process, None)  # type: ignore[arg-type]

        calm = begin("cat")
        assert calm.stdin
        assert calm.stdout
        calm.stdin.write(b"here\n")
        calm.stdin.flush()
        assert calm.stdout.readline() == b"here\n"
        until(lambda: psutil.Process(calm.pid).status() == psutil.STATUS_SLEEPING)
        idle, busy = child(calm), [child(begin(sys.executable, "-c", SPINS)) for _ in range(4)]
        idle.was_starved(1.0)  # until here
        at = time.monotonic()

        def starved() -> bool:
            nonlocal at
            elapsed, at = time.monotonic() - at, time.monotonic()
            assert not idle.was_starved(elapsed)
            return sum(one.was_starved(elapsed) for one in busy) > 0

        until(starved, what="one of four on one processor waits")


def test_the_end_drains_those_that_are_ready_and_kills_those_on_their_way() -> None:
    server = Server.serving(3)
    server.gone(2)
    server.wait(0.2)
    server.did.clear()
    server.carry(server.roster.stop(server.now))
    assert server.did[:3] == [Do(0, What.DRAIN), Do(1, What.DRAIN), Do(2, What.KILL)]
    assert not server.roster.health()[""], "none takes connections"
    server.shards.discard(0)
    server.carry(server.roster.happened(0, Notice(Happening.GONE), server.now))
    assert not server.roster.gone
    server.wait(30.0)  # the other one does not end
    assert Do(1, What.KILL) in server.did
    assert server.roster.gone
    server.wait(1000.0)
    assert not server.shards


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("bpPgtw")), max_size=60))
def test_whatever_happens_somebody_takes_connections_where_anybody_has_begun(
    happenings: list[tuple[int, str]],
) -> None:
    server = Server.serving(3)
    begun = {0, 1, 2}
    for shard, what in happenings:
        if what == "g" and shard in server.shards:
            server.gone(shard)
            begun.discard(shard)
        elif what == "b" and shard in server.shards:
            server.began(shard)
            begun.add(shard)
        elif what in "pP" and shard in begun:
            server.pulse(shard, READY if what == "P" else LOADING)
        elif what == "w":
            server.wait(61.0)
        assert server.open <= begun
        assert bool(server.open) == bool(begun)


# -- dealing -------------------------------------------------------------------------------


def settings(text: str) -> config.Config:
    return config.parse(text)


@pytest.mark.parametrize(
    ("said", "cores", "cards", "shards"),
    [
        ("1", 64, 8, 1),
        ("3", 2, 0, 3),
        ('"auto"', 2, 0, 1),
        ('"auto"', 16, 0, 4),
        ('"auto"', 64, 1, 4),
        ('"auto"', 64, 8, 16),
        ('"auto"', 4096, 0, limits.MAX_SHARDS),
    ],
)
def test_how_many(said: str, cores: int, cards: int, shards: int) -> None:
    made = settings(f"[server]\nshards = {said}")
    assert dealing.count(made, cores=cores, cards=cards) == shards


def test_cards_that_no_pool_uses_do_not_count() -> None:
    pools = "".join(
        f'[pools.{n}]\ndevices = ["cpu"]\n' for n in ("detector", "recognizer", "liveness")
    )
    made = settings(f'[server]\nshards = "auto"\n{pools}')
    assert dealing.count(made, cores=64, cards=1) == 16


@pytest.mark.parametrize("wrong", ["0", "65", '"many"', "-1", "true"])
def test_other_numbers_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="shards"):
        settings(f"[server]\nshards = {wrong}")


@given(st.integers(1, 8), st.integers(1, 9))
def test_devices_are_dealt_evenly_and_none_is_left_out(devices: int, shards: int) -> None:
    names = tuple(f"cuda:{n}" for n in range(devices))
    hands = [dealing.dealt(names, shard, shards) for shard in range(shards)]
    uses = Counter(device for hand in hands for device in hand)
    assert set(uses) == set(names)
    assert all(hands)
    assert max(uses.values()) - min(uses.values()) <= 1


def test_what_a_shard_is_given() -> None:
    made = settings(
        '[server]\nlisten = "127.0.0.1:0"\nshards = 2\n[auth]\nmode = "none"\n'
        '[pools.detector]\ndevices = ["cuda:0", "cuda:1"]\nisolation = "external"\nsocket = "/x"\n'
    )
    one = dealing.settings_of(
        made, 1, 2, runtime_dir="/run/1", port=7, models={"recognizer": "other"}
    )
    assert one.listen == "127.0.0.1:7"
    assert one.pools.detector.devices == ("cuda:1",)
    assert one.pools.detector.socket == "/x.1"
    assert one.pools.recognizer is not None
    assert one.pools.recognizer.model == "other"
    assert (one.metrics.listen, one.runtime_dir) == ("", "/run/1")
    local = settings('[server]\nlisten = "unix:/a/b"\n[pools]\nliveness = false\n')
    zero, two = (dealing.settings_of(local, n, 3, runtime_dir="/r") for n in (0, 2))
    assert (zero.listen, two.listen) == ("unix:/a/b", "unix:/a/b.2")
    assert two.pools.liveness is None


# -- the board -----------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.booleans()), min_size=1, max_size=8)
)
def test_a_stream_is_sent_on_only_where_it_is_better_off(
    found: list[tuple[bool, int, bool]],
) -> None:
    seats = [Seat(n, takes, streams, full) for n, (takes, streams, full) in enumerate(found)]
    for mine in range(len(seats)):
        there = better(seats, mine)
        if there is None:
            continue
        assert there != mine
        assert seats[there].takes
        assert seats[mine].full or not seats[there].full
        if seats[mine].full == seats[there].full:
            assert seats[there].streams < seats[mine].streams


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_streams_that_come_by_chance_end_up_nearly_even(shards: int) -> None:
    """As the SDK has it: three moves, each to a shard by chance."""
    chance = random.Random(shards)
    streams = [0] * shards
    for _ in range(40 * shards):
        for move in range(4):
            landed = chance.randrange(shards)
            seats = [Seat(n, True, number) for n, number in enumerate(streams)]
            if move == 3 or better(seats, landed) is None:
                break
        streams[landed] += 1
    assert max(streams) <= 40 * 1.1
    assert min(streams) >= 40 * 0.9


async def test_a_shard_whose_folder_cannot_be_made_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the runtime folder is full, for a while: no process waits for ever to be told
    what to do."""
    begun: list[int] = []

    async def start(index: int, *_given: object, **_named: object) -> NoReturn:
        begun.append(index)
        raise OSError(errno.EAGAIN, "no process today")

    monkeypatch.setattr(Child, "start", start)
    kept = Keeper(config.Config(), None, 2)
    kept._runtime = tmp_path / "full"
    kept._board, kept._mps_pipes = Board.make(2), ""
    for there in (False, True):
        if there:
            kept._runtime.mkdir()
        kept._roster = Roster(2, Policy())
        kept._roster.start(time.monotonic())
        assert kept._roster.life(0) is Life.SPAWNED
        await kept._spawn(0)
        assert kept._roster.life(0) is Life.BACKOFF
        assert begun == [0] * there
    kept._board.close()


def test_keys_are_counted_over_all_shards() -> None:
    board = Board.make(3)
    zero, one = Holdings(board, 0), Holdings(board, 1)
    zero.tell("camera", (3, 1, 0, 0, 0))
    one.tell("other", (5, 0, 0, 0, 0))
    one.tell("camera", (2, 0, 0, 0, 0))
    assert (zero.of("camera", 0), one.of("camera", 0), one.of("camera", 1)) == (2, 3, 1)
    assert zero.of("nobody", 0) == 0
    zero.tell_lookups("camera", 4)
    assert one.looked_up("camera") == 0, "what was before is not taken off"
    zero.tell_lookups("camera", 9)
    assert one.looked_up("camera") == 5
    assert one.looked_up("camera") == 0
    board.tell(0, streams=4, takes=True, full=True)
    zero.tell_taken((4, 1, 0, 2, 0))
    assert [one.taken(kind) for kind in range(5)] == [4, 1, 0, 2, 0]
    assert board.seats()[0] == Seat(0, True, 4, True)
    board.clear(0)
    assert board.seats()[0] == Seat(0, False, 0, False)
    assert one.of("camera", 0) == 0
    assert one.looked_up("camera") == 0, "a shard that begins anew gives nothing back"
    board.close()
    board.close()


def test_keys_beyond_the_board_are_counted_in_their_shard_alone() -> None:
    board = Board.make(2)
    zero, one = Holdings(board, 0), Holdings(board, 1)
    for number in range(limits.MAX_SHARED_KEYS + 1):
        zero.tell(f"key {number}", (1, 0, 0, 0, 0))
    assert one.of(f"key {limits.MAX_SHARED_KEYS - 1}", 0) == 1
    assert one.of(f"key {limits.MAX_SHARED_KEYS}", 0) == 0
    board.close()


# -- the link ------------------------------------------------------------------------------


async def test_messages_cross_a_link_and_nonsense_ends_it() -> None:
    ours, theirs = socket.socketpair()
    keeper, shard = await link.at_keeper(ours), await link.at_shard(theirs)
    keeper.send(Open())
    keeper.send(Drain(grace_s=2.0))
    assert [await shard.receive(), await shard.receive()] == [Open(), Drain(grace_s=2.0)]
    shard.send(Began())
    assert await keeper.receive() == Began()
    shard.send(Open())  # not what a keeper hears
    assert await keeper.receive() is None
    keeper.close()
    assert await shard.receive() is None
    shard.send(Began())  # nobody is there: nothing happens
    shard.close()


async def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINK_BACKLOG_BYTES", 100_000)
    ours, theirs = socket.socketpair()
    with theirs:
        keeper = await link.at_keeper(ours)
        for _ in range(1000):
            keeper.send(Overall(health={str(n): True for n in range(1000)}, shards=()))
        assert await keeper.receive() is None


# -- merged answers --------------------------------------------------------------------------


def standing(shard: int, life: Life = Life.READY, lost: str = "") -> Standing:
    return Standing(shard=shard, pid=10 + shard, life=life.value, takes=True, restarts=0, lost=lost)


def test_the_server_is_described_as_a_whole() -> None:
    def info(**fields: object) -> bytes:
        return pb.GetServerInfoResponse(version="1", **fields).SerializeToString()  # type: ignore[arg-type]

    away = pb.Degradation(component="store", cause="UNREACHABLE")
    answers = [
        Answer(
            shard=0,
            body=info(
                open_streams=3,
                load=pb.ServerLoad(offered_fps=10, capacity_fps=100, headroom_streams=5),
                degradations=[away],
            ),
        ),
        Answer(
            shard=1,
            body=info(
                open_streams=2,
                load=pb.ServerLoad(offered_fps=20, capacity_fps=100, headroom_streams=1),
                degradations=[away],
            ),
        ),
        Answer(shard=2, failure=Failure(reason="NO_ANSWER", message="it is away")),
    ]
    standings = [standing(0), standing(1), standing(2), standing(3, Life.BACKOFF, "SIGKILL")]
    found = whole.server(answers, standings, [Seat(0, True, 3), Seat(1, True, 2)])
    assert found.open_streams == 5
    assert (found.load.offered_fps, found.load.capacity_fps, found.load.load) == (30, 200, 0.15)
    assert found.load.headroom_streams == 6
    assert [s.open_streams for s in found.shards] == [3, 2, 0, 0]
    told = [(d.component, d.cause) for d in found.degradations]
    assert told == [("store", "UNREACHABLE"), ("shards", "NO_ANSWER"), ("shards", "BACKOFF")]
    assert "SIGKILL" in found.degradations[2].message
    with pytest.raises(FacelaneError) as caught:
        whole.server(answers[2:], standings, [])
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (("SERVING", "SERVING"), "SERVING"),
        (("SERVING", "NOT_SERVING"), "DEGRADED"),
        (("STARTING", "NOT_SERVING"), "STARTING"),
        (("STARTING", "DEGRADED"), "DEGRADED"),
        (("DRAINING", "DRAINING"), "DRAINING"),
    ],
)
def test_pools_of_all_shards_are_one(states: tuple[str, ...], state: str) -> None:
    answers = [
        Answer(
            shard=shard,
            body=pb.ListPoolsResponse(
                pools=[
                    pb.PoolInfo(
                        pool="detector",
                        state=pb.PoolState.Value(f"POOL_STATE_{one}"),
                        queued=2,
                        completed=10,
                        workers=[pb.WorkerInfo(worker_id="detector#0")],
                        memory_budget_bytes=600,
                    )
                ]
            ).SerializeToString(),
        )
        for shard, one in enumerate(states)
    ]
    (pool,) = whole.pools(answers).pools
    assert pb.PoolState.Name(pool.state) == f"POOL_STATE_{state}"
    assert [w.worker_id for w in pool.workers] == ["0/detector#0", "1/detector#0"]
    assert (pool.queued, pool.completed) == (4, 20)
    assert pool.memory_budget_bytes == 600, "of each worker"


@pytest.mark.parametrize(
    "wrong", ["detector#0", "/detector#0", "x/detector#0", "-1/d#0", "1234/d#0"]
)
def test_workers_of_no_shard(wrong: str) -> None:
    with pytest.raises(FacelaneError) as caught:
        whole.worker(wrong)
    assert caught.value.reason is Reason.WORKER_NOT_FOUND
    assert whole.worker("12/detector#3") == (12, "detector#3")


def test_a_reload_that_one_shard_refuses_says_who_has_the_new_model() -> None:
    done = admin_pb.ReloadModelResponse(
        old_model_id="a", new_model_id="b", remembered=True
    ).SerializeToString()
    refused = Failure(reason="MODEL_INVALID", message="no such model", metadata={"m": "x"})
    assert whole.reloaded([Answer(shard=0, body=done)]).new_model_id == "b"
    with pytest.raises(FacelaneError, match="shards 0, 1 have the new model") as caught:
        whole.reloaded(
            [
                Answer(shard=0, body=done),
                Answer(shard=1, body=done),
                Answer(shard=2, failure=refused),
            ]
        )
    assert caught.value.reason is Reason.MODEL_INVALID
    assert caught.value.metadata == {"m": "x", "shard": "2"}
    with pytest.raises(FacelaneError, match=r"no such model$"):
        whole.reloaded([Answer(shard=0, failure=refused)])
    with pytest.raises(FacelaneError, match="no shard answers"):
        whole.reloaded([])


def test_metrics_of_all_shards_are_one_exposition() -> None:
    text = """# HELP facelane_frames_total Frames.
# TYPE facelane_frames_total counter
facelane_frames_total{{outcome="result"}} {frames}
# HELP facelane_device_memory_used_bytes Memory in use.
# TYPE facelane_device_memory_used_bytes gauge
facelane_device_memory_used_bytes{{device="0"}} 7.0
# HELP facelane_frame_age_seconds Age.
# TYPE facelane_frame_age_seconds histogram
facelane_frame_age_seconds_bucket{{le="1.0"}} 2.0
facelane_frame_age_seconds_bucket{{le="+Inf"}} 3.0
facelane_frame_age_seconds_count 3.0
facelane_frame_age_seconds_sum 1.5
"""
    merged = exposition.merged(
        {1: text.format(frames=5.0), 0: text.format(frames=3.0)},
        [standing(0), standing(1, Life.LOST, "SIGKILL")],
    ).decode()
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    frames = {s.labels["shard"]: s.value for s in families["facelane_frames"].samples}
    assert frames == {"0": 3.0, "1": 5.0}
    (device,) = families["facelane_device_memory_used_bytes"].samples
    assert (device.labels, device.value) == ({"device": "0"}, 7.0)
    ages = families["facelane_frame_age_seconds"]
    assert ages.type == "histogram"
    assert len(ages.samples) == 8
    serving = {s.labels["shard"]: s.value for s in families["facelane_shard_serving"].samples}
    assert serving == {"0": 1.0, "1": 0.0}
    assert merged.count("# TYPE facelane_frames_total ") == 1
    assert 'shard="keeper"' in merged
