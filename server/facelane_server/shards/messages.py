"""Everything that a keeper and its shards say to each other, and nothing else.

Two closed unions: ``ToShard`` and ``ToKeeper``. Both ask: the keeper a shard (``Put``, answered by
``Reply``), and a shard the others by way of the keeper (``Ask``, answered by ``Answers``). What a
shard answers is opaque to the keeper where the edge has made it (``body``: a protobuf message).
"""

from __future__ import annotations

from typing import Final

import msgspec

from facelane_server.config import Config

ALL: Final = -1
"""Of ``Ask``: every shard that serves or is about to, the one that asks included."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, kw_only=True):
    pass


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard is told on its command line, which everybody can read. ``link``, ``board``:
    descriptors; ``mps_pipes``: of the daemon that all share, empty = none."""

    index: int
    count: int
    link: int
    board: int
    mps_pipes: str = ""


# -- questions ----------------------------------------------------------------------------


class DescribeServer(Message, frozen=True):
    """Answered by a ``GetServerInfoResponse``."""


class DescribePools(Message, frozen=True):
    """Answered by a ``ListPoolsResponse``."""


class Expose(Message, frozen=True):
    """Answered by the shard's metrics, as text."""


class RestartWorker(Message, frozen=True):
    """Answered by a ``RestartWorkerResponse``."""

    worker_id: str


class ReloadModel(Message, frozen=True):
    """Answered by a ``ReloadModelResponse``."""

    pool: str
    model: str
    forget_templates: bool


class ReloadConfig(Message, frozen=True):
    """Answered when what can be taken over was."""

    settings: Config


class ListStreams(Message, frozen=True):
    """Answered by a ``ListStreamsResponse``: of those that ``caller`` may view (opaque here)."""

    source_ids: tuple[str, ...]
    caller: bytes


class WatchStream(Message, frozen=True):
    """Answered by a ticket (``edge/looks.py``). ``request``: a ``WatchStreamRequest``."""

    request: bytes
    caller: bytes


Question = (
    DescribeServer
    | DescribePools
    | Expose
    | RestartWorker
    | ReloadModel
    | ReloadConfig
    | ListStreams
    | WatchStream
)

IN_TURN: Final = (ReloadModel, ReloadConfig)
"""One shard after the other, in the order of their numbers; one such question at a time."""


class Failure(Message, frozen=True):
    """A ``FacelaneError``. ``reason`` NO_ANSWER: the shard was lost, or did not answer in time."""

    reason: str
    message: str
    retryable: bool = False
    metadata: dict[str, str] = {}


class Answer(Message, frozen=True):
    """One shard's."""

    shard: int
    body: bytes = b""
    failure: Failure | None = None


# -- what is known of each ------------------------------------------------------------------


class Standing(Message, frozen=True):
    """A shard as the keeper sees it. ``life``: of ``pools.restart.Life``; ``takes``: it takes
    connections; ``lost``: why it was lost last, empty = never."""

    shard: int
    pid: int
    life: str
    takes: bool
    restarts: int
    lost: str = ""


# -- to a shard -----------------------------------------------------------------------------


class Begin(Message, frozen=True):
    """The first message. ``settings``: this shard's part of the configuration."""

    settings: Config


class Open(Message, frozen=True):
    """Take connections."""


class Overall(Message, frozen=True):
    """What health says of all, by name, and how each fares."""

    health: dict[str, bool]
    shards: tuple[Standing, ...]


class Drain(Message, frozen=True):
    """End. ``grace_s`` None: as configured."""

    grace_s: float | None = None


class Put(Message, frozen=True):
    number: int
    question: Question


class Answers(Message, frozen=True):
    """To an ``Ask``: of the shards that were asked."""

    number: int
    answers: tuple[Answer, ...]


ToShard = Begin | Open | Overall | Drain | Put | Answers


# -- to the keeper ----------------------------------------------------------------------------


class Began(Message, frozen=True):
    """The store is open; others may open it."""


class Pulse(Message, frozen=True):
    """At every change, and every ``PULSE_S``: the loop lives. ``ready``: every pool has inferred;
    ``alive``: the detector can infer; ``health``: what this shard would say alone."""

    ready: bool
    alive: bool
    health: dict[str, bool]
    amiss: str = ""
    """For ``systemctl status``."""


class Ask(Message, frozen=True):
    """``shard``: ALL, or one. Those that have not answered after ``timeout_s`` are told as
    NO_ANSWER."""

    number: int
    question: Question
    shard: int = ALL
    timeout_s: float = 5.0


class Reply(Message, frozen=True):
    """To a ``Put``."""

    number: int
    body: bytes = b""
    failure: Failure | None = None


class End(Message, frozen=True):
    """The whole server is to end: ``AdminService.Drain``."""

    grace_s: float | None = None


ToKeeper = Began | Pulse | Ask | Reply | End

PULSE_S: Final = 1.0
