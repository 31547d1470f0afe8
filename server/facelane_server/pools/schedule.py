"""What goes next, to whom, and who is to blame: the decisions of a pool, pure.

Pull, not push: when a worker has room, it is given the best batch that exists now
(``queue``), up to ``batch_max`` and the bytes of a slot. Nothing waits for a batch to
fill. Idle workers come first; a second job is staged on a busy worker only while all are
busy, and only where overlap pays (a device, or jobs so short that the hop counts).

What a loss costs: the tasks in flight on the lost worker are tried once more, each
alone, in front of the queue and with their old deadline; a task that kills a second
worker is POISONED. A picture that was alone on a worker that hung is the one over which
it hung: it is not tried again (PICTURE_TOO_COSTLY). Tasks that wait are not touched. When
no worker can be back before a task's deadline, it is refused at once instead of waiting.

Whose pictures end workers, or cost too much, is refused for a while (``offenders``), and
what they end costs the worker's restart budget nothing (``excuses``), or three pictures
would put a pool into quarantine. Only when pictures of many senders do so, it is the
worker's fault after all.

Nothing here knows a loop, a clock or a socket: times are arguments, and what has ended
is handed back (``Ended``) for the pool to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import InferDone, InferFailed, PictureHeld
from facelane_server.pools.groups import Decoders, Group
from facelane_server.pools.holding import Holding, note
from facelane_server.pools.lineup import Lineup
from facelane_server.pools.offenders import Offenders
from facelane_server.pools.slots import Codec, failure_of
from facelane_server.pools.tasks import (
    Answer,
    AnyTask,
    DetectAnswer,
    DetectRequest,
    Job,
    Undecoded,
    VideoRequest,
)

log = structlog.get_logger(__name__)

Ended = list[tuple[AnyTask, Answer | FacelaneError]]
"""Tasks and what became of them; futures that are done already (given up) stay as they are."""

_S: Final = 1_000_000_000
_OVERLAP_NS: Final = 5_000_000
"""A CPU worker whose jobs are longer gains nothing from a staged one: the hop is short
beside them, and a staged frame can no longer be replaced by a newer one."""
_STUCK_NS: Final = 500_000_000
_STUCK_MEANS: Final = 4
"""A job that takes so long, and so many times the mean, may never end."""
HUNG: Final = "HUNG"
_WORN_OUT: Final = "WORN_OUT"
"""It has given up decodings that go on for ever; their pictures have been answered."""
_NOT_TO_BLAME: Final = frozenset((
    "NOT_SENT", "STOPPED", "RESTARTED", "DRAINED", "GALLERY_STALE", "OVER_BUDGET", "HALTED",
    _WORN_OUT,
))  # fmt: skip
"""Losses that the tasks in flight have nothing to do with."""


class Seat(Protocol):
    """A ready worker, as far as what it is given depends on it."""

    @property
    def jobs(self) -> Sequence[Job]:
        """In flight, in the order sent."""

    @property
    def places(self) -> int:
        """Jobs that it has at most in flight."""

    @property
    def free_slots(self) -> int: ...

    @property
    def batch_max(self) -> int: ...

    @property
    def overlaps(self) -> bool:
        """It begins a job before the one before it has ended."""

    @property
    def service_ns(self) -> float:
        """Running mean of a job's time."""

    @property
    def decoders(self) -> Decoders:
        """Of the lanes of video that it has."""


S = TypeVar("S", bound=Seat)


class Schedule:
    """The tasks of one pool that wait, and the rules by which they go and end.

    ``codec`` knows what a request takes in the slots; it changes with a reload.
    """

    def __init__(self, pool: str, codec: Codec) -> None:
        self.codec = codec
        self.retried = 0
        self.offenders = Offenders()
        self._accusers: dict[str | int, int] = {}
        """Senders whose picture ended a worker, and when."""
        self._pool = pool
        self._queue: Lineup[Seat] = Lineup()
        self._held = Holding()

    @property
    def queued(self) -> int:
        return len(self._queue) + len(self._held)

    def waiting(self) -> list[AnyTask]:
        """All that is queued, in no order."""
        return [*self._queue.tasks(), *self._held.tasks()]

    # -- in and out -----------------------------------------------------------------------

    def submit(
        self,
        task: AnyTask,
        now_ns: int,
        can_be_served: Callable[[int], bool],
        seats: Sequence[Seat] = (),
    ) -> FacelaneError | None:
        """Queue a task, or say why not. ``can_be_served``: by that deadline. ``seats``: the workers
        that there are, one of which the lanes of video belong to."""
        refusal = self._no_room(task) or self._refusal(task, now_ns, can_be_served)
        if refusal is None and not self._queue.has_home(task, seats):
            refusal = FacelaneError(
                Reason.POOL_OVERLOADED,
                f"every worker of the {self._pool} pool decodes {limits.MAX_DECODERS} streams of "
                "video; add workers",
                retryable=True,
                metadata={"pool": self._pool},
            )
        if refusal is None:
            if task.lane in self._held:
                self._held.put(task)
            else:
                self._queue.put(task, seats)
        return refusal

    def release(self, lane: int) -> None:
        """The lane, of video, has ended."""
        self._queue.release(lane)
        for task in self._held.release(lane):
            self._queue.put(task)

    def _no_room(self, task: AnyTask) -> FacelaneError | None:
        """Why there is no place for one more task of this sender."""
        queued = len(self._queue)
        if queued < min(limits.MAX_KEY_QUEUE, limits.MAX_POOL_QUEUE):
            return None
        key = task.sender.key
        mine = self._queue.waiting_of(key) if key else 0
        spared = bool(key) and mine < limits.SPARED_KEY_QUEUE
        if queued >= limits.MAX_POOL_QUEUE * (1 + spared):
            return FacelaneError(
                Reason.POOL_OVERLOADED,
                f"the {self._pool} pool has {limits.MAX_POOL_QUEUE} tasks waiting; send less, or "
                "add workers",
                retryable=True,
                metadata={"pool": self._pool},
            )
        if key and mine >= limits.MAX_KEY_QUEUE:
            return FacelaneError(
                Reason.POOL_OVERLOADED,
                f"the {self._pool} pool has {limits.MAX_KEY_QUEUE} tasks of this key; send less",
                retryable=True,
                metadata={"pool": self._pool},
            )
        return None

    def _refusal(
        self, task: AnyTask, now_ns: int, can_be_served: Callable[[int], bool]
    ) -> FacelaneError | None:
        if (refused_s := self.offenders.refused_s(task, now_ns)) > 0:
            return _too_many(refused_s)
        try:
            request, response = self.codec.cost(task.request)
        except FacelaneError as error:
            return error
        if request > limits.REQUEST_SLOT_BYTES or response > limits.RESPONSE_SLOT_BYTES:
            return FacelaneError(
                Reason.PICTURE_TOO_LARGE, "the picture does not fit between the processes"
            )
        if task.deadline_ns <= now_ns:
            return self._too_late()
        if not can_be_served(task.deadline_ns):
            return unavailable(self._pool, "has no worker and none comes back in time")
        return None

    def pass_by(self, task: AnyTask) -> None:
        """A picture of video that nobody looks at: what it takes is decoded beside what goes to
        the lane's worker anyway, or with the lane's next picture."""
        self._queue.pass_by(task)

    def withdraw(self, task: AnyTask) -> bool:
        """Take a task out that still waits."""
        return self._queue.withdraw(task) or self._held.withdraw(task)

    def replace(
        self, task: AnyTask, by: AnyTask, now_ns: int, can_be_served: Callable[[int], bool]
    ) -> bool:
        """Put a task in the place of another of its lane that still waits, which takes no further
        one; see ``submit``."""
        if self._refusal(by, now_ns, can_be_served) is not None:
            return False
        return self._held.replace(task, by) or (
            task in self._queue and self._queue.replace(task, by)
        )

    def next_deadline(self) -> int | None:
        first, behind = self._queue.next_deadline(), self._held.next_deadline()
        return behind if first is None or (behind is not None and behind < first) else first

    def expire(self, now_ns: int, *, serving: bool) -> Ended:
        """What has waited until its deadline. ``serving``: some worker can infer."""
        expired = [*self._queue.expire(now_ns), *self._held.expire(now_ns)]
        if serving:
            return [(task, self._too_late()) for task in expired]
        why = unavailable(self._pool, "had no worker until the deadline")
        return [(task, why) for task in expired]

    def refuse_hopeless(self, can_be_served: Callable[[int], bool]) -> Ended:
        """After a loss: what cannot be served in time is told so now."""
        hopeless = [t for t in self.waiting() if not can_be_served(t.deadline_ns)]
        for task in hopeless:
            self.withdraw(task)
        why = unavailable(self._pool, "has no worker and none is back in time")
        return [(task, why) for task in hopeless]

    def close(self) -> Ended:
        """Everything that waits, refused."""
        why = unavailable(self._pool, "is shutting down")
        return [(task, why) for task in (*self._queue.clear(), *self._held.clear())]

    def answering(self, seats: Sequence[S], now_ns: int) -> Sequence[S]:
        """Those who do not look as if they hung, while there are others: what belongs to a worker
        that hangs need not wait until that is certain."""
        if not self._queue.has_homes:
            return seats
        return [seat for seat in seats if not _seems_stuck(seat, now_ns)] or seats

    # -- what goes next -------------------------------------------------------------------

    def next(self, seats: Sequence[S]) -> tuple[S, list[AnyTask]] | None:
        """Whom to give which batch now; None when nothing waits or nobody has room."""
        queue = self._queue
        for task in self._held.released():
            queue.put(task, seats)
        queue.settle(seats)
        while len(queue):
            seat = self._next_seat(seats)
            if seat is None:
                return None
            # A caller that gave up (cancelled future) costs no inference.
            taken, room = self._take_batch(seat)
            tasks = [t for t in taken if not t.future.done()]
            if tasks:
                return seat, tasks + self._beside(seat, tasks, room)
        return None

    def _next_seat(self, seats: Iterable[S]) -> S | None:
        """Of those for whom there is something: an idle worker; else the one whose staged place is
        free and whose first job began longest ago. Where jobs overlap, the end of a worker is
        blamed on both: a task that may be the guilty one shares it with no other."""
        best: S | None = None
        for seat in seats:
            alone = self._queue.is_alone(seat)
            if alone is None:
                continue
            jobs = seat.jobs
            if not jobs:
                return seat
            if len(jobs) >= seat.places or not seat.free_slots:
                continue
            if not seat.overlaps and seat.service_ns > _OVERLAP_NS:
                continue
            if seat.overlaps and (alone or any(task.attempts for task in jobs[0].tasks)):
                continue
            if best is None or jobs[0].started_ns < best.jobs[0].started_ns:
                best = seat
        return best

    def _take_batch(self, seat: Seat) -> tuple[list[AnyTask], int]:
        """The batch, and the bytes that are left in the request slot."""
        room = [limits.REQUEST_SLOT_BYTES, limits.RESPONSE_SLOT_BYTES]

        def accept(task: AnyTask) -> bool:
            request, response = (
                self.codec.cost(task.request, seat.decoders)
                if isinstance(task.request, VideoRequest)
                else self.codec.cost(task.request)
            )
            if request > room[0] or response > room[1]:
                return False
            room[0] -= request
            room[1] -= response
            return True

        return self._queue.take(seat, seat.batch_max, accept), room[0]

    def _beside(self, seat: Seat, tasks: Sequence[AnyTask], room: int) -> list[AnyTask]:
        """What nobody looks at of other lanes of video: it goes with the job, is decoded once that
        is answered, and their next pictures need not wait for it. Only what goes on where a
        decoder is; nothing shares a job with what may have ended a worker."""
        found: list[AnyTask] = []
        passed = self._queue.passed(seat)
        if not passed or any(task.attempts for task in tasks):
            return found
        # Of these the decoder may be less far than it seems.
        busy = {task.lane for task in tasks}
        busy |= {task.lane for task in passed if task.lane in self._held}
        busy.update(task.lane for job in seat.jobs for task in job.tasks if not task.ahead)
        for task in passed:
            if len(found) == limits.MAX_AHEAD or len(found) + len(tasks) == limits.MAX_BATCH:
                break
            if task.lane in busy:
                continue
            assert isinstance(task.request, VideoRequest)
            wanted = task.request.wanted
            span = None if wanted.drains else seat.decoders.onward(wanted)
            if span is not None and 0 <= span.last - span.first < limits.MAX_AHEAD_UNITS:
                room -= self.codec.cost(task.request, seat.decoders)[0]
                if room < 0:
                    break
                found.append(task)
            self._queue.forget_passed(task.lane)
        return found

    def without_pictures(self, tasks: Sequence[AnyTask], seat: Seat) -> Ended:
        """Those of video that cannot be decoded any more: what they need is not kept."""
        return [
            (task, Undecoded())
            for task in tasks
            if isinstance(task.request, VideoRequest)
            and seat.decoders.span(task.request.wanted) is None
        ]

    # -- what came of it ------------------------------------------------------------------

    def cannot_be_sent(self, tasks: list[AnyTask]) -> Ended:
        """A request that no message can carry: its own failure, and nobody else's."""
        if len(tasks) > 1:
            for task in reversed(tasks):
                if not task.ahead:
                    self._retry(task, alone=True)
            return []
        log.error("request cannot be sent to a worker", pool=self._pool)
        return [(tasks[0], FacelaneError(Reason.INTERNAL, "the request cannot be sent"))]

    def answered(
        self,
        job: Job,
        message: InferDone,
        codec: Codec,
        slot: memoryview,
        now_ns: int,
        decoders: Decoders | None = None,
    ) -> tuple[Ended, int]:
        """A job's answers, and the bytes that they took in the response slot. ``codec`` and
        ``decoders``: of the worker that answers. Raises ProtocolError for what cannot be an
        answer."""
        if len(message.items) != len(job.tasks):
            raise ProtocolError("another number of answers than of items")
        read = [
            (task, *codec.read(task.request, item, slot))
            for task, item in zip(job.tasks, message.items, strict=True)
        ]
        for task, answer, _ in read:
            if task.ahead:
                continue
            if isinstance(answer, DetectAnswer):
                if task.sender.key:
                    self.offenders.passed(task, now_ns)
            elif isinstance(answer, FacelaneError) and answer.reason is Reason.PICTURE_TOO_COSTLY:
                self.offenders.strike(task, now_ns)
        if decoders is not None:
            for task, answer, _ in read:
                if isinstance(task.request, VideoRequest):
                    note(task, answer, decoders, now_ns)
        ended: Ended = []
        again: list[AnyTask] = []
        for task, answer, _ in read:
            if task.ahead:
                continue
            if not isinstance(answer, PictureHeld):
                ended.append((task, answer))
            elif answer.held:
                ended.append((task, Undecoded(answer.held)))
                self._queue.forget_passed(task.lane)  # or what is held back would be let go of
            else:
                again.append(task)
        # Before any of them waits again: with the worker that is lost for it they all come back.
        if again:
            if any(task.slices >= limits.MAX_GROUP_UNITS for task in again):
                raise ProtocolError("a picture that never comes")
            for task in reversed([task for task in again if self._hold(task)]):
                self._go_on(task)
        return ended, max(end for _, _, end in read)

    def _hold(self, task: AnyTask) -> bool:
        """Whether the picture is asked for again now: nothing else of its lane is then."""
        if not self._held.hold(task):
            return False
        for other in [one for one in self._queue.tasks() if one.lane == task.lane]:
            self._queue.withdraw(other)
            self._held.put(other)
        return True

    def _go_on(self, task: AnyTask) -> None:
        """Others have had their turn: the rest of what it takes is decoded."""
        task.slices += 1
        if not task.future.done():
            self._queue.put_back(task, alone=task.attempts > 0)

    def failed(self, job: Job, message: InferFailed) -> Ended:
        """A job failed whole: its tasks are tried once more, or end."""
        ended: Ended = []
        alone = len(job.tasks) == 1
        waited_for = [task for task in job.tasks if not task.ahead and not task.future.done()]
        _count_loss(waited_for)
        for task in reversed(waited_for):
            # Out of memory may pass; an error that nobody foresaw may be one item's fault.
            again = message.retryable or (message.reason == Reason.INTERNAL and not alone)
            if not task.canary and again and task.attempts < limits.MAX_TASK_ATTEMPTS:
                self._retry(task, alone=True)
            else:
                ended.append((task, failure_of(message, task.attempts)))
        return ended

    def excuses(self, jobs: Sequence[Job], reason: str, now_ns: int, *, overlaps: bool) -> bool:
        """Whether a worker with these jobs, lost for this reason, is not to blame for it: one
        picture is, and its like have not come from everywhere."""
        if reason == _WORN_OUT and len(self.offenders):
            return True
        guilty = _guilty(_suspects(jobs, reason, overlaps=overlaps), reason)
        if guilty is None:
            return False
        since = now_ns - limits.BAD_PICTURES_S * _S
        self._accusers = {who: at for who, at in self._accusers.items() if at > since}
        self._accusers[guilty.sender.key or guilty.lane] = now_ns
        return len(self._accusers) < limits.MAX_ACCUSERS

    def taken_back(self, jobs: Sequence[Job], reason: str, now_ns: int, *, overlaps: bool) -> Ended:
        """The jobs in flight of a worker that is gone for this reason: their tasks are tried
        once more, or end."""
        ended: Ended = []
        suspects = _suspects(jobs, reason, overlaps=overlaps)
        guilty = _guilty(suspects, reason)
        if guilty is not None:
            self.offenders.strike(guilty, now_ns)  # also when its sender has gone since
        _count_loss(suspects)
        for task in reversed([task for job in jobs for task in job.tasks]):
            if task.ahead or task.future.done():
                continue
            if task.canary:
                ended.append((task, self._worker_lost()))
            elif task is guilty:
                ended.append((task, self._hung() if reason == HUNG else self._poisoned()))
            elif task.attempts < limits.MAX_TASK_ATTEMPTS:
                self._retry(task, alone=task in suspects)
            else:
                ended.append((task, self._poisoned()))
        return ended

    def _retry(self, task: AnyTask, *, alone: bool) -> None:
        self.retried += 1
        task.dispatched_ns = 0
        # Once a suspect, always one: two of them in a batch would be condemned together.
        self._queue.put_back(task, alone=alone or task.attempts > 0)

    # -- errors ---------------------------------------------------------------------------

    def _too_late(self) -> FacelaneError:
        return FacelaneError(
            Reason.DEADLINE_EXCEEDED,
            f"no worker of the {self._pool} pool was free before the deadline; send less, or add "
            "workers",
            retryable=True,
            metadata={"pool": self._pool},
        )

    def _worker_lost(self) -> FacelaneError:
        return FacelaneError(
            Reason.WORKER_LOST,
            f"a worker of the {self._pool} pool ended; try again",
            retryable=True,
            metadata={"pool": self._pool},
        )

    def _hung(self) -> FacelaneError:
        return FacelaneError(
            Reason.PICTURE_TOO_COSTLY,
            f"a worker of the {self._pool} pool hung over this picture; it is not tried again",
            metadata={"pool": self._pool},
        )

    def _poisoned(self) -> FacelaneError:
        return FacelaneError(
            Reason.POISONED,
            f"two workers of the {self._pool} pool ended over this item; it is not tried again",
            metadata={"pool": self._pool},
        )


def _seems_stuck(seat: Seat, now_ns: int) -> bool:
    began_ns = seat.jobs[0].started_ns if seat.jobs else 0
    return began_ns > 0 and now_ns - began_ns > max(_STUCK_NS, _STUCK_MEANS * seat.service_ns)


def _count_loss(tasks: Sequence[AnyTask]) -> None:
    """A worker ended, or failed whole, over these. Pictures of a group answer for each other: the
    newest one takes over from one that was given up, and must not cost worker after worker. What
    was only decoded is not counted: if it was to blame, so is the lane's next picture."""
    tasks = [task for task in tasks if not task.ahead]
    groups = {id(group): group for task in tasks if (group := _group_of(task))}
    for group in groups.values():
        group.losses += 1
        group.broken = group.broken or group.losses >= limits.MAX_TASK_ATTEMPTS
    for task in tasks:
        task.attempts = max(task.attempts + 1, group.losses if (group := _group_of(task)) else 0)


def _group_of(task: AnyTask) -> Group | None:
    return task.request.wanted.group if isinstance(task.request, VideoRequest) else None


def _suspects(jobs: Sequence[Job], reason: str, *, overlaps: bool) -> list[AnyTask]:
    """Who may have ended a worker. A staged job has not been begun by a worker that computes in
    order."""
    if reason in _NOT_TO_BLAME:
        return []
    begun = list(jobs) if overlaps else list(jobs)[:1]
    return [task for job in begun for task in job.tasks if not task.canary]


def _guilty(suspects: Sequence[AnyTask], reason: str) -> AnyTask | None:
    """The picture that has ended a worker, where that is known: it was alone on one that hung,
    or on a second one that ended."""
    if len(suspects) != 1 or not isinstance(suspects[0].request, DetectRequest | VideoRequest):
        return None
    ended_before = suspects[0].attempts + 1 >= limits.MAX_TASK_ATTEMPTS
    return suspects[0] if reason == HUNG or ended_before else None


def _too_many(refused_s: float) -> FacelaneError:
    seconds = math.ceil(refused_s)
    return FacelaneError(
        Reason.TOO_MANY_BAD_PICTURES,
        "too many pictures of this sender, or of others with its key, cost too much; they are "
        f"refused for another {seconds} s. Send baseline JPEG, or let the bridge encode anew",
        metadata={"retry_after_s": str(seconds)},
    )


def unavailable(pool: str, why: str) -> FacelaneError:
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        f"the {pool} pool {why}; try again later",
        retryable=True,
        metadata={"pool": pool},
    )
