"""The lives of shards, who of them takes connections, and what follows for the whole: pure.

A shard's life is that of ``pools.restart``: SPAWNED, LOADING (its link is up), WARMING (it has the
store open), READY (every pool has inferred). The first shard begins alone, so that the store is
made or migrated by one; the others follow when it has begun.

Until all were ready once the server is *starting*, and shards take connections together, as soon
as all have begun, ready or not: who comes then is spread over them. Later a shard that comes back
takes connections when it is ready, or when nobody else takes any.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from facelane_server.pools import restart
from facelane_server.pools.restart import Happening, Life, Notice
from facelane_server.shards.messages import Overall, Pulse, Standing

HANG_TICKS: Final = 12
"""Looks, a second apart, at which nothing was heard of a shard that is up."""
START_TICKS: Final = 120
"""The same of one that was started and has not been heard of yet: on a machine that has no
processor to spare, its imports take a while."""
STARVED: Final = 0.1
"""What a look counts at a shard that wanted to run meanwhile and was hardly let: it is the machine
that keeps it, and another in its place would be kept just so. One that turns in a circle on such a
machine is found out later."""
HOLD_S: Final = 20.0
"""While the server starts, shards that have begun wait so long for those that have not."""
PROCESS: Final = "facelane.process"
"""Of ``grpc.health.v1``: always serves."""


class What(enum.Enum):
    """What the driver has to do."""

    SPAWN = enum.auto()
    DRAIN = enum.auto()
    KILL = enum.auto()
    OPEN = enum.auto()


@dataclass(frozen=True, slots=True)
class Do:
    shard: int
    what: What


_ACTIONS: Final = {
    restart.Action.SPAWN: What.SPAWN,
    restart.Action.DRAIN: What.DRAIN,
    restart.Action.KILL: What.KILL,
}


@dataclass(slots=True)
class _Shard:
    state: restart.State = field(default_factory=restart.State)
    pid: int = 0
    began: bool = False
    takes: bool = False
    pulse: Pulse | None = None
    silent: float = 0.0

    def forget(self) -> None:
        """Another process comes, or none."""
        self.pid, self.began, self.takes, self.pulse, self.silent = 0, False, False, None, 0.0


class Roster:
    """Times are seconds of any monotonic clock."""

    def __init__(
        self,
        count: int,
        policy: restart.Policy,
        *,
        unit: Callable[[], float] = random.random,
    ) -> None:
        self._shards = [_Shard() for _ in range(count)]
        self._policy = policy
        self._unit = unit
        self._hold_until = float("inf")
        self._gate = False
        self.starting = True
        """Not all have been ready at one time yet."""
        self.stopping = False
        self._names: dict[str, None] = {PROCESS: None}

    # -- what happens ----------------------------------------------------------------------

    def start(self, now: float) -> list[Do]:
        return self.happened(0, Notice(Happening.START), now)

    def happened(self, index: int, notice: Notice, now: float) -> list[Do]:
        """What is to be done about it, in this order."""
        shard = self._shards[index]
        shard.state, actions = restart.step(shard.state, notice, now, self._policy, self._unit)
        if notice.what in (Happening.GONE, Happening.LOSS):
            shard.forget()
        if restart.Action.DRAIN in actions or shard.state.life is Life.DRAINING:
            shard.takes = False
        return [*(Do(index, _ACTIONS[action]) for action in actions), *self._openings(now)]

    def spawned(self, index: int, pid: int, now: float) -> list[Do]:
        """Its process runs, and there is a link to it."""
        self._shards[index].pid = pid
        return self.happened(index, Notice(Happening.HELLO), now)

    def began(self, index: int, now: float) -> list[Do]:
        """It has the store open."""
        shard = self._shards[index]
        shard.silent, shard.began = 0.0, True
        self._hold_until = min(self._hold_until, now + HOLD_S)
        done = self.happened(index, Notice(Happening.WARMING), now)
        for other in range(len(self._shards)):
            if not self.stopping and self._shards[other].state.life is Life.EXITED:
                done += self.happened(other, Notice(Happening.START), now)
        return done

    def pulsed(self, index: int, pulse: Pulse, now: float) -> list[Do]:
        shard = self._shards[index]
        shard.silent, shard.pulse = 0.0, pulse
        self._names.update(dict.fromkeys(pulse.health))
        done: list[Do] = []
        if pulse.ready and shard.state.life is Life.WARMING:
            done = self.happened(index, Notice(Happening.READY), now)
            if all(one.state.life is Life.READY for one in self._shards):
                self.starting = False
        return done

    def heard(self, index: int) -> None:
        """Anything at all: its loop lives."""
        self._shards[index].silent = 0.0

    def due(self, now: float) -> list[Do]:
        """What time alone brings: see ``next_due``."""
        done: list[Do] = []
        for index, shard in enumerate(self._shards):
            if shard.state.wake_at is not None and now >= shard.state.wake_at:
                done += self.happened(index, Notice(Happening.TIMER), now)
        return [*done, *self._openings(now)]

    def tick(self, now: float, starved: Container[int] = ()) -> list[Do]:
        """Once a second of this process's own life: while the machine stands still nobody hangs.
        ``starved``: shards that were given no processor."""
        done: list[Do] = []
        for index, shard in enumerate(self._shards):
            if not shard.pid or shard.state.life not in restart.ALIVE:
                continue
            shard.silent += STARVED if index in starved else 1.0
            if shard.silent > (START_TICKS if shard.pulse is None else HANG_TICKS):
                done += self.happened(index, Notice(Happening.LOSS, "HUNG"), now)
        return done

    def stop(self, now: float) -> list[Do]:
        self.stopping = True
        done: list[Do] = []
        for index in range(len(self._shards)):
            done += self.happened(index, Notice(Happening.STOP), now)
        return done

    def _openings(self, now: float) -> list[Do]:
        if self.stopping:
            return []
        begun = [shard.began for shard in self._shards]
        self._gate = self._gate or all(begun) or now >= self._hold_until
        done = []
        for index, shard in enumerate(self._shards):
            if shard.takes or not shard.began:
                continue
            if shard.state.life not in (Life.WARMING, Life.READY):
                continue
            alone = not any(other.takes for other in self._shards)
            if self._gate if self.starting else shard.state.life is Life.READY or alone:
                shard.takes = True
                done.append(Do(index, What.OPEN))
        return done

    # -- what is known -----------------------------------------------------------------------

    def life(self, index: int) -> Life:
        return self._shards[index].state.life

    def loss(self, index: int) -> str:
        """Why it was lost last; empty = never."""
        return self._shards[index].state.reason

    @property
    def next_due(self) -> float:
        """When ``due`` has something to do; infinity = never by itself."""
        wakes = [one.state.wake_at for one in self._shards if one.state.wake_at is not None]
        return min([*wakes, float("inf") if self._gate else self._hold_until])

    @property
    def begun(self) -> list[int]:
        """Shards that can be asked."""
        return [index for index, shard in enumerate(self._shards) if shard.began]

    @property
    def settled(self) -> bool:
        """No shard is on its way up."""
        return all(shard.state.life not in restart.STARTING for shard in self._shards)

    @property
    def gone(self) -> bool:
        return all(shard.state.life is Life.EXITED for shard in self._shards)

    @property
    def ready(self) -> bool:
        """Every shard serves."""
        return all(shard.state.life is Life.READY for shard in self._shards)

    @property
    def alive(self) -> bool:
        """Some shard that takes connections can infer, and its loop lives."""
        return any(
            shard.takes and shard.pulse is not None and shard.pulse.alive for shard in self._shards
        )

    def health(self) -> dict[str, bool]:
        """A name serves when it does at every shard that takes connections, and there is one: what
        a client reaches is able, whichever shard it meets."""
        there = [shard.pulse.health if shard.pulse else {} for shard in self._shards if shard.takes]
        told = {
            name: bool(there) and all(one.get(name, False) for one in there) for name in self._names
        }
        return told | {PROCESS: True}

    def standings(self) -> tuple[Standing, ...]:
        return tuple(
            Standing(
                shard=index,
                pid=shard.pid,
                life=shard.state.life.value,
                takes=shard.takes,
                restarts=shard.state.restarts,
                lost=shard.state.reason,
            )
            for index, shard in enumerate(self._shards)
        )

    def overall(self) -> Overall:
        return Overall(health=self.health(), shards=self.standings())

    def status(self, streams: int) -> str:
        """One line for ``systemctl status``."""
        up = sum(shard.state.life is Life.READY for shard in self._shards)
        amiss = sorted({s.pulse.amiss for s in self._shards if s.pulse and s.pulse.amiss})
        down = [
            f"shard {index} {shard.state.life.value} {shard.state.reason}".rstrip()
            for index, shard in enumerate(self._shards)
            if shard.state.life is not Life.READY
        ]
        told = f"{streams} streams in {up} of {len(self._shards)} shards"
        if (amiss or down) and not self.starting:
            told += "; DEGRADED: " + "; ".join([*down, *amiss])
        return told
