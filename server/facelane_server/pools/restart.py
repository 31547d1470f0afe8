"""The life of one worker as a pure function: ``step(state, notice, now) -> (state, actions)``.

::

      SPAWNED --HELLO--> LOADING --WARMING--> WARMING --READY--> READY
         |                  |                    |                 | RESTART, STOP, LEFT
         |  LOSS, start     |                    |                 v
         |  deadline        |                    |   LOSS      DRAINING --GONE--> EXITED
         v                  v                    v    |            |              (RESTART: SPAWNED,
       LOST <----------------------------------------+-------------+               LEFT: BACKOFF)
         | GONE (killed and reaped)
         v
      BACKOFF --TIMER--> SPAWNED          while the restart budget lasts
      QUARANTINED --TIMER--> SPAWNED      one more try after a long pause

The budget is ``limit`` losses within ``window_s``. A loss waits for
``initial_s * 2 ** (n - 1)``, n being the losses in the window, at most ``max_s``, times a
random factor in [0.5, 1], so that workers that died together do not come back together.
A ready worker that leaves in order (LEFT: it said so, as upon SIGTERM) is no loss: it
costs no budget, only the first back-off. One that ends without a word is lost, whatever
its exit code. A loss that is somebody else's fault (``excused``: a picture's, over which it
hung) costs no budget either. A worker that comes back from quarantine has one try.

The time to start counts from ATTACHED where the process is started by somebody else
(``Policy.attaches``), and waiting for it is no failure; else from SPAWN.

Nothing here waits, spawns or kills: the owner performs the actions and reports what
happened as notices. Times are seconds of any monotonic clock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final


class Life(enum.StrEnum):
    """Where a worker is in its life."""

    SPAWNED = "SPAWNED"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    """The only one in which it is given jobs."""
    DRAINING = "DRAINING"
    EXITED = "EXITED"
    LOST = "LOST"
    BACKOFF = "BACKOFF"
    QUARANTINED = "QUARANTINED"


STARTING: Final = frozenset({Life.SPAWNED, Life.LOADING, Life.WARMING})
"""A process exists and is not ready yet."""
ALIVE: Final = STARTING | {Life.READY, Life.DRAINING}
"""A process exists and nobody has told it to die."""
WAITING: Final = frozenset({Life.BACKOFF, Life.QUARANTINED})
"""No process; a timer brings the next one."""


_DOUBLINGS: Final = 64
"""Beyond any ``max_s``; after a thousand a float could not hold it."""


class Happening(enum.Enum):
    """What can happen to a worker."""

    START = enum.auto()
    """The first spawn."""
    ATTACHED = enum.auto()
    """There is a channel to its process."""
    HELLO = enum.auto()
    WARMING = enum.auto()
    READY = enum.auto()
    """Loaded, warmed up, and the first real inference succeeded."""
    LOSS = enum.auto()
    """Crash, hang, protocol breach, last words: it is of no use any more."""
    LEFT = enum.auto()
    """It has drained and ends, by our wish or by its own."""
    GONE = enum.auto()
    """The process was reaped, whatever the reason."""
    TIMER = enum.auto()
    """``State.wake_at`` has come."""
    RESTART = enum.auto()
    """Drain and start again, by an operator or because it outgrew its budget."""
    STOP = enum.auto()
    """Drain and do not come back."""


@dataclass(frozen=True, slots=True)
class Notice:
    """``reason``: of a LOSS, RESTART or STOP, one constant word; ``detail``: for the log;
    ``excused``: a LOSS that is not the worker's fault."""

    what: Happening
    reason: str = ""
    detail: str = ""
    excused: bool = False


class Action(enum.Enum):
    """What the owner has to do."""

    SPAWN = enum.auto()
    """Start a process; answer with ATTACHED and HELLO, or LOSS."""
    DRAIN = enum.auto()
    """Send Drain and see to its end within the drain bound; answer with GONE."""
    KILL = enum.auto()
    """End the process at once and reap it; answer with GONE."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds, in seconds; ``limit`` losses within ``window_s`` are one too many."""

    limit: int = 5
    window_s: float = 120.0
    initial_s: float = 0.05
    max_s: float = 15.0
    quarantine_s: float = 60.0
    start_timeout_s: float = 120.0
    """Until READY."""
    drain_timeout_s: float = 30.0
    attaches: bool = False
    """Its process is started by somebody else."""


@dataclass(frozen=True, slots=True)
class State:
    """``wake_at``: when TIMER is due, None = never."""

    life: Life = Life.EXITED
    wake_at: float | None = None
    losses: tuple[float, ...] = ()
    """Times of the losses within the window, oldest first, at most ``limit``."""
    lost: int = 0
    """Losses in all."""
    reason: str = ""
    """Of the last loss."""
    restarts: int = 0
    """Processes after the first one."""
    then: Life = Life.EXITED
    """DRAINING: what follows, EXITED, SPAWNED or BACKOFF."""
    excused: bool = False
    """LOST: at no cost."""


Step = tuple[State, tuple[Action, ...]]


def step(
    state: State, notice: Notice, now: float, policy: Policy, random: Callable[[], float]
) -> Step:
    """The state after ``notice`` and what to do about it. A notice that means nothing in the
    present state (a late message of a worker already lost) changes nothing.

    ``random`` gives numbers in [0, 1).
    """
    life = state.life
    match notice.what:
        case Happening.START if life is Life.EXITED:
            return _spawn(state, now, policy)
        case Happening.ATTACHED if life is Life.SPAWNED:
            return replace(state, wake_at=now + policy.start_timeout_s), ()
        case Happening.HELLO if life is Life.SPAWNED:
            return replace(state, life=Life.LOADING), ()
        case Happening.WARMING if life is Life.LOADING:
            return replace(state, life=Life.WARMING), ()
        case Happening.READY if life is Life.WARMING:
            return replace(state, life=Life.READY, wake_at=None), ()
        case Happening.LOSS if life in ALIVE:
            return _lose(state, notice.reason, excused=notice.excused)
        case Happening.LEFT if life in STARTING:
            return _lose(state, "EXITED")
        case Happening.LEFT if life is Life.READY:
            return _drain(state, Life.BACKOFF, now, policy)
        case Happening.GONE:
            return _gone(state, now, policy, random)
        case Happening.TIMER if state.wake_at is not None and now >= state.wake_at:
            return _timer(state, now, policy)
        case Happening.RESTART:
            return _end(state, Life.SPAWNED, now, policy)
        case Happening.STOP:
            return _end(state, Life.EXITED, now, policy)
    return state, ()


def can_be_ready_by(state: State, when: float) -> bool:
    """Whether a worker may still be READY at that time, given what is known now."""
    if state.life in WAITING:
        return state.wake_at is not None and state.wake_at < when
    return state.life is not Life.EXITED


def _spawn(state: State, now: float, policy: Policy, *, restarts: int = 0) -> Step:
    spawned = replace(
        state,
        life=Life.SPAWNED,
        wake_at=None if policy.attaches else now + policy.start_timeout_s,
        restarts=state.restarts + restarts,
    )
    return spawned, (Action.SPAWN,)


def _lose(state: State, reason: str, *, excused: bool = False) -> Step:
    # A draining worker that must not come back does not come back by dying either.
    stays_away = state.life is Life.DRAINING and state.then is Life.EXITED
    lost = replace(
        state,
        life=Life.DRAINING if stays_away else Life.LOST,
        wake_at=None,
        reason=reason,
        lost=state.lost + 1,
        excused=excused,
    )
    return lost, (Action.KILL,)


def _drain(state: State, then: Life, now: float, policy: Policy) -> Step:
    wake_at = now + policy.drain_timeout_s
    return replace(state, life=Life.DRAINING, wake_at=wake_at, then=then), (Action.DRAIN,)


def _gone(state: State, now: float, policy: Policy, random: Callable[[], float]) -> Step:
    if state.life is Life.LOST and state.excused:
        return _pause(state, now, policy, random)
    if state.life is Life.LOST:
        return _back_off(state, now, policy, random)
    if state.life is not Life.DRAINING:
        return state, ()
    if state.then is Life.SPAWNED:
        return _spawn(state, now, policy, restarts=1)
    if state.then is Life.BACKOFF:
        return _pause(state, now, policy, random)
    return replace(state, life=Life.EXITED, wake_at=None), ()


def _pause(state: State, now: float, policy: Policy, random: Callable[[], float]) -> Step:
    """The first back-off, at no cost."""
    wake_at = now + policy.initial_s * (0.5 + 0.5 * random())
    return replace(state, life=Life.BACKOFF, wake_at=wake_at), ()


def _back_off(state: State, now: float, policy: Policy, random: Callable[[], float]) -> Step:
    recent = tuple(t for t in state.losses if now - t < policy.window_s)
    losses = (*recent, now)[-policy.limit :]
    if len(losses) >= policy.limit:
        life, pause = Life.QUARANTINED, policy.quarantine_s
    else:
        life = Life.BACKOFF
        doublings = min(len(losses) - 1, _DOUBLINGS)
        pause = min(policy.initial_s * 2.0**doublings, policy.max_s)
        pause *= 0.5 + 0.5 * random()
    return replace(state, life=life, wake_at=now + pause, losses=losses), ()


def _timer(state: State, now: float, policy: Policy) -> Step:
    if state.life is Life.QUARANTINED:
        # One try: the budget is full but for one loss, whatever the window.
        tried = replace(state, losses=(now,) * (policy.limit - 1))
        return _spawn(tried, now, policy, restarts=1)
    if state.life is Life.BACKOFF:
        return _spawn(state, now, policy, restarts=1)
    if state.life in STARTING:
        return _lose(state, "START_TIMEOUT")
    assert state.life is Life.DRAINING
    return replace(state, wake_at=None), (Action.KILL,)


def _end(state: State, then: Life, now: float, policy: Policy) -> Step:
    if state.life is Life.READY:
        return _drain(state, then, now, policy)
    if state.life in STARTING:
        return replace(state, life=Life.DRAINING, wake_at=None, then=then), (Action.KILL,)
    if state.life in WAITING:
        if then is Life.SPAWNED:
            return _spawn(replace(state, losses=()), now, policy, restarts=1)
        return replace(state, life=Life.EXITED, wake_at=None), ()
    if then is Life.EXITED and state.life in (Life.LOST, Life.DRAINING):
        return replace(state, life=Life.DRAINING, then=Life.EXITED), ()
    return state, ()  # it comes back anyway, or was stopped
