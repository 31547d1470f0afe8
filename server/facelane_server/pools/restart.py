"""The life of one worker as a pure function: ``step(worker, event, now) -> (worker, actions)``.

::

      SPAWNED --HELLO--> LOADING --WARMING--> WARMING --READY--> READY
         |                  |                    |                 | DRAIN, RESTART, STOP
         |  LOSS, start     |                    |                 v
         |  deadline        |                    |   LOSS      DRAINING --GONE--> EXITED
         v                  v                    v    |            |              (or SPAWNED,
       LOST <----------------------------------------+-------------+               if RESTART)
         | GONE (killed and reaped)
         v
      BACKOFF --TIMER--> SPAWNED          while the restart budget lasts
      QUARANTINED --TIMER--> SPAWNED      one more try after a long pause

The budget is ``limit`` losses within ``window_s``. A loss waits for
``initial_s * 2 ** (n - 1)``, n being the losses in the window, at most ``max_s``, times a
random factor in [0.5, 1], so that workers that died together do not come back together.
A clean exit of a ready worker is no crash: it costs no budget, only the first back-off.
A worker that comes back from quarantine has one try.

Nothing here waits, spawns or kills: the owner performs the actions and reports what
happened as events. Times are seconds of any monotonic clock.
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

    HELLO = enum.auto()
    WARMING = enum.auto()
    READY = enum.auto()
    """Loaded, warmed up, and the first real inference succeeded."""
    LOSS = enum.auto()
    """Crash, hang, protocol breach, last words: it is of no use any more."""
    GONE = enum.auto()
    """The process was reaped, whatever the reason; ``clean`` = exit code 0."""
    TIMER = enum.auto()
    """``Worker.wake_at`` has come."""
    RESTART = enum.auto()
    """Drain and start again, by an operator or because it outgrew its budget."""
    STOP = enum.auto()
    """Drain and do not come back."""


@dataclass(frozen=True, slots=True)
class Event:
    what: Happening
    reason: str = ""
    clean: bool = False


class Action(enum.Enum):
    """What the owner has to do."""

    SPAWN = enum.auto()
    """Start a process; answer with HELLO, or LOSS and GONE."""
    JOIN = enum.auto()
    """It may take jobs from now on."""
    LEAVE = enum.auto()
    """It takes no more jobs."""
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
    """From SPAWNED until READY."""
    drain_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Worker:
    """State of one worker. ``wake_at``: when TIMER is due, None = never."""

    life: Life = Life.EXITED
    wake_at: float | None = None
    losses: tuple[float, ...] = ()
    """Times of the losses within the window, oldest first, at most ``limit``."""
    reason: str = ""
    """Of the last loss."""
    restarts: int = 0
    """Processes after the first one."""
    comes_back: bool = False
    """DRAINING: start again afterwards."""


Step = tuple[Worker, tuple[Action, ...]]


def start(worker: Worker, now: float, policy: Policy) -> Step:
    """The first spawn, or one after EXITED."""
    assert worker.life is Life.EXITED
    return _spawn(worker, now, policy)


def step(
    worker: Worker, event: Event, now: float, policy: Policy, random: Callable[[], float]
) -> Step:
    """The state after ``event`` and what to do about it. An event that means nothing in the
    present state (a late message of a worker already lost) changes nothing.

    ``random`` gives numbers in [0, 1).
    """
    match event.what:
        case Happening.HELLO if worker.life is Life.SPAWNED:
            return replace(worker, life=Life.LOADING), ()
        case Happening.WARMING if worker.life is Life.LOADING:
            return replace(worker, life=Life.WARMING), ()
        case Happening.READY if worker.life is Life.WARMING:
            return replace(worker, life=Life.READY, wake_at=None), (Action.JOIN,)
        case Happening.LOSS if worker.life in ALIVE:
            return _lose(worker, event.reason)
        case Happening.GONE:
            return _gone(worker, event, now, policy, random)
        case Happening.TIMER if worker.wake_at is not None and now >= worker.wake_at:
            return _timer(worker, now, policy)
        case Happening.RESTART | Happening.STOP:
            return _end(worker, event.what is Happening.RESTART, now, policy)
    return worker, ()


def _spawn(worker: Worker, now: float, policy: Policy, *, restarts: int = 0) -> Step:
    spawned = replace(
        worker,
        life=Life.SPAWNED,
        wake_at=now + policy.start_timeout_s,
        restarts=worker.restarts + restarts,
        comes_back=False,
    )
    return spawned, (Action.SPAWN,)


def _lose(worker: Worker, reason: str) -> Step:
    actions = (Action.LEAVE, Action.KILL) if worker.life is Life.READY else (Action.KILL,)
    # A draining worker that must not come back does not come back by dying either.
    stays_away = worker.life is Life.DRAINING and not worker.comes_back
    lost = replace(
        worker,
        life=Life.DRAINING if stays_away else Life.LOST,
        wake_at=None,
        reason=reason,
        comes_back=False,
    )
    return lost, actions


def _gone(
    worker: Worker, event: Event, now: float, policy: Policy, random: Callable[[], float]
) -> Step:
    if worker.life is Life.DRAINING:
        if worker.comes_back:
            return _spawn(worker, now, policy, restarts=1)
        return replace(worker, life=Life.EXITED, wake_at=None), ()
    if worker.life is Life.LOST:
        return _back_off(worker, worker.reason, now, policy, random)
    if worker.life is Life.READY:
        if event.clean:
            pause = policy.initial_s * (0.5 + 0.5 * random())
            waiting = replace(worker, life=Life.BACKOFF, wake_at=now + pause, reason=event.reason)
            return waiting, (Action.LEAVE,)
        backed_off, _ = _back_off(worker, event.reason, now, policy, random)
        return backed_off, (Action.LEAVE,)
    if worker.life in STARTING:
        return _back_off(worker, event.reason, now, policy, random)
    return worker, ()


def _back_off(
    worker: Worker, reason: str, now: float, policy: Policy, random: Callable[[], float]
) -> Step:
    recent = tuple(t for t in worker.losses if now - t < policy.window_s)
    losses = (*recent, now)[-policy.limit :]
    if len(losses) >= policy.limit:
        life, pause = Life.QUARANTINED, policy.quarantine_s
    else:
        life = Life.BACKOFF
        doublings = min(len(losses) - 1, _DOUBLINGS)
        pause = min(policy.initial_s * 2.0**doublings, policy.max_s)
        pause *= 0.5 + 0.5 * random()
    return replace(worker, life=life, wake_at=now + pause, losses=losses, reason=reason), ()


def _timer(worker: Worker, now: float, policy: Policy) -> Step:
    if worker.life is Life.QUARANTINED:
        # One try: the budget is full but for one loss, whatever the window.
        tried = replace(worker, losses=(now,) * (policy.limit - 1))
        return _spawn(tried, now, policy, restarts=1)
    if worker.life is Life.BACKOFF:
        return _spawn(worker, now, policy, restarts=1)
    if worker.life in STARTING:
        return _lose(worker, "START_TIMEOUT")
    if worker.life is Life.DRAINING:
        return replace(worker, wake_at=None), (Action.KILL,)
    return worker, ()


def _end(worker: Worker, comes_back: bool, now: float, policy: Policy) -> Step:
    if worker.life is Life.READY:
        draining = replace(
            worker,
            life=Life.DRAINING,
            wake_at=now + policy.drain_timeout_s,
            comes_back=comes_back,
        )
        return draining, (Action.LEAVE, Action.DRAIN)
    if worker.life in STARTING:
        ended = replace(worker, life=Life.DRAINING, wake_at=None, comes_back=comes_back)
        return ended, (Action.KILL,)
    if worker.life is Life.DRAINING:
        return replace(worker, comes_back=worker.comes_back and comes_back), ()
    if worker.life is Life.LOST:
        if comes_back:
            return worker, ()
        return replace(worker, life=Life.DRAINING, comes_back=False), ()
    if comes_back:
        return _spawn(replace(worker, losses=()), now, policy, restarts=1)
    return replace(worker, life=Life.EXITED, wake_at=None), ()
