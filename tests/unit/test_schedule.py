"""What goes next, to whom, and who is to blame: no loop, no clock, no worker."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Picture, Reason, Stage
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import DetectDone, InferDone, InferFailed, ItemFailed
from facelane_server.pools.offenders import Offenders
from facelane_server.pools.schedule import Schedule
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import (
    AnyTask,
    DetectAnswer,
    DetectRequest,
    Job,
    Sender,
    Task,
)

S = 1_000_000_000
CODEC = Codec(Stage.DETECTOR, [8])
SLOT = memoryview(bytearray(4096))
CAMERA = Sender("camera")


@dataclass(eq=False)
class Seat:
    """A worker, as far as the schedule sees one."""

    jobs: deque[Job] = field(default_factory=deque)
    batch_max: int = 4
    overlaps: bool = False
    service_ns: float = 0.0
    free_slots: int = 2
    places: int = 2


def task(lane: int = 1, *, sender: Sender = CAMERA, deadline: int = 100 * S) -> AnyTask:
    future: Any = Future()
    picture = Picture(Encoding.JPEG, b"\0" * 100)
    return Task(DetectRequest(picture, 1, 10**6), lane, 1, deadline, future, sender=sender)


def always(_: int) -> bool:
    return True


def never(_: int) -> bool:
    return False


def schedule(*tasks: AnyTask) -> Schedule:
    made = Schedule("detector", CODEC)
    for item in tasks:
        assert made.submit(item, 0, always) is None
    return made


def give(made: Schedule, *seats: Seat) -> Job:
    """The next batch, on its seat."""
    given = made.next(seats)
    assert given is not None
    seat, tasks = given
    job = Job(1, 0, tasks)
    seat.jobs.append(job)
    return job


def reason(error: object) -> Reason:
    assert isinstance(error, FacelaneError)
    return error.reason


# -- refusals and deadlines -----------------------------------------------------------------


def test_what_cannot_be_served_is_refused_with_the_reason() -> None:
    made = schedule()
    assert reason(made.submit(task(deadline=5), 5, always)) is Reason.DEADLINE_EXCEEDED
    assert reason(made.submit(task(), 0, never)) is Reason.POOL_UNAVAILABLE
    huge = task()
    huge.request = DetectRequest(
        Picture(Encoding.JPEG, bytes(limits.REQUEST_SLOT_BYTES + 1)), 1, 10**6
    )
    assert reason(made.submit(huge, 0, always)) is Reason.PICTURE_TOO_LARGE
    assert made.queued == 0


def test_one_key_cannot_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KEY_QUEUE", 3)
    monkeypatch.setattr(limits, "MAX_POOL_QUEUE", 4)
    monkeypatch.setattr(limits, "SPARED_KEY_QUEUE", 2)
    made = schedule(*(task(lane) for lane in range(3)))
    assert reason(made.submit(task(9), 0, always)) is Reason.POOL_OVERLOADED
    assert made.submit(task(sender=Sender("another")), 0, always) is None
    assert reason(made.submit(task(sender=Sender()), 0, always)) is Reason.POOL_OVERLOADED


def test_a_full_queue_keeps_nobody_from_renewing_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_POOL_QUEUE", 2)
    nobody = Sender()
    old, other, new = task(1, sender=nobody), task(2, sender=nobody), task(1, sender=nobody)
    made = schedule(old, other)
    assert reason(made.submit(task(3, sender=nobody), 0, always)) is Reason.POOL_OVERLOADED
    assert made.replace(old, new, 0, always)
    assert set(made.waiting()) == {new, other}


def test_keys_whose_files_fill_the_queue_keep_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KEY_QUEUE", 2)
    monkeypatch.setattr(limits, "MAX_POOL_QUEUE", 4)
    monkeypatch.setattr(limits, "SPARED_KEY_QUEUE", 1)
    files = (Sender("files"), Sender("more files"))
    made = schedule(*(task(sender=sender) for sender in files for _ in range(2)))
    cameras = [Sender(f"camera{number}") for number in range(6)]
    let_in = [made.submit(task(sender=sender), 0, always) is None for sender in cameras]
    assert let_in == [True] * 4 + [False] * 2, "within a bound"
    again = task(sender=cameras[0])
    assert reason(made.submit(again, 0, always)) is Reason.POOL_OVERLOADED


def test_what_waited_too_long_is_told_why() -> None:
    first, second = task(deadline=10), task(deadline=20)
    made = schedule(first, second)
    [(late, why)] = made.expire(15, serving=True)
    assert (late, reason(why)) == (first, Reason.DEADLINE_EXCEEDED)
    [(late, why)] = made.expire(25, serving=False)
    assert (late, reason(why)) == (second, Reason.POOL_UNAVAILABLE)
    assert made.next_deadline() is None


def test_only_the_hopeless_are_refused_after_a_loss() -> None:
    soon, patient = task(deadline=10), task(2, deadline=90)
    made = schedule(soon, patient)
    [(told, why)] = made.refuse_hopeless(lambda deadline: deadline > 50)
    assert (told, reason(why)) == (soon, Reason.POOL_UNAVAILABLE)
    assert made.queued == 1


# -- batches and seats ----------------------------------------------------------------------


def test_an_idle_worker_comes_before_staging_and_nobody_is_given_three_jobs() -> None:
    made = schedule(*(task(lane) for lane in range(12)))
    busy, idle = Seat(jobs=deque([Job(0, 0, [task()])])), Seat()
    give(made, busy, idle)
    assert len(idle.jobs) == 1
    give(made, busy, idle)
    give(made, busy, idle)
    assert (len(busy.jobs), len(idle.jobs)) == (2, 2)
    assert made.next([busy, idle]) is None


@pytest.mark.parametrize(("overlaps", "given"), [(False, False), (True, True)])
def test_staging_pays_where_jobs_are_short_or_overlap(overlaps: bool, given: bool) -> None:
    slow = Seat(jobs=deque([Job(0, 0, [task()])]), overlaps=overlaps, service_ns=50e6)
    assert (schedule(task()).next([slow]) is not None) is given


def test_who_gave_up_is_not_sent() -> None:
    gone, there = task(1), task(2)
    made = schedule(gone, there)
    gone.future.cancel()
    assert give(made, Seat()).tasks == [there]
    made = schedule(gone := task())
    gone.future.cancel()
    assert made.next([Seat()]) is None


# -- failures and losses --------------------------------------------------------------------


def test_another_number_of_answers_is_no_answer() -> None:
    made = schedule(task())
    job = give(made, Seat())
    for items in ([], [DetectDone(1, 1, 0, 0, 0)] * 2):
        with pytest.raises(ProtocolError):
            made.answered(job, InferDone(1, list(items)), CODEC, SLOT, 0)


def test_an_unforeseen_error_of_a_batch_tries_each_alone() -> None:
    tasks = [task(lane) for lane in range(3)]
    made = schedule(*tasks)
    job = give(made, Seat())
    assert made.failed(job, InferFailed(1, "INTERNAL", "")) == []
    for expected in tasks:
        job = give(made, Seat())
        assert job.tasks == [expected]
        [(_, why)] = made.failed(job, InferFailed(1, "INTERNAL", ""))
        assert reason(why) is Reason.INTERNAL


def test_a_crash_tries_once_more_alone_and_then_never_again() -> None:
    tasks = [task(lane) for lane in range(2)]
    made = schedule(*tasks)
    job = give(made, Seat())
    assert not made.excuses([job], "EXITED", 0, overlaps=False), "nobody knows which it was"
    assert made.taken_back([job], "EXITED", 0, overlaps=False) == []
    job = give(made, Seat())
    assert job.tasks == tasks[:1]
    assert made.excuses([job], "EXITED", 0, overlaps=False), "now it is known"
    [(_, why)] = made.taken_back([job], "EXITED", 0, overlaps=False)
    assert reason(why) is Reason.POISONED
    assert give(made, Seat()).tasks == tasks[1:]


def test_a_picture_over_which_a_worker_hung_is_not_tried_again() -> None:
    guilty, staged = task(1), task(2)
    made = schedule(guilty, staged)
    seat = Seat(batch_max=1)
    give(made, seat), give(made, seat)
    assert made.excuses(seat.jobs, "HUNG", 0, overlaps=False)
    [(told, why)] = made.taken_back(seat.jobs, "HUNG", 0, overlaps=False)
    assert (told, reason(why)) == (guilty, Reason.PICTURE_TOO_COSTLY)
    assert (guilty.attempts, staged.attempts) == (1, 0)
    assert give(made, Seat()).tasks == [staged]


def test_of_a_batch_that_hung_each_is_tried_alone_and_the_guilty_one_found() -> None:
    innocent, guilty = task(1), task(2)
    made = schedule(innocent, guilty)
    job = give(made, Seat())
    assert not made.excuses([job], "HUNG", 0, overlaps=False)
    assert made.taken_back([job], "HUNG", 0, overlaps=False) == []
    job = give(made, Seat())
    assert job.tasks == [innocent]
    made.answered(job, InferDone(1, [DetectDone(10, 10, 0, 0, 0)]), CODEC, SLOT, 0)
    job = give(made, Seat())
    [(told, why)] = made.taken_back([job], "HUNG", 0, overlaps=False)
    assert (told, reason(why)) == (guilty, Reason.PICTURE_TOO_COSTLY)


@pytest.mark.parametrize(
    "why", ["STOPPED", "DRAINED", "OVER_BUDGET", "HALTED", "WORN_OUT", "NOT_SENT"]
)
def test_nobody_is_blamed_for_what_the_pool_or_an_operator_did(why: str) -> None:
    made = schedule(innocent := task())
    job = give(made, Seat())
    for _ in range(5):
        assert not made.excuses([job], why, 0, overlaps=True)
        assert made.taken_back([job], why, 0, overlaps=True) == []
        assert made.next([Seat()]) is not None
    assert innocent.attempts == 0


def test_a_sender_that_hangs_up_is_blamed_all_the_same() -> None:
    made = schedule()
    for _ in range(limits.BAD_PICTURES):
        bad = task()
        assert made.submit(bad, 0, always) is None
        job = give(made, Seat())
        bad.future.cancel()
        assert made.excuses([job], "HUNG", 0, overlaps=False)
        assert made.taken_back([job], "HUNG", 0, overlaps=False) == []
    assert reason(made.submit(task(), 0, always)) is Reason.TOO_MANY_BAD_PICTURES


def test_a_worker_that_bad_pictures_wore_out_is_excused() -> None:
    made = schedule()
    assert not made.excuses([], "WORN_OUT", 0, overlaps=False), "by nobody's pictures"
    costly(made, CAMERA, 1, 0)
    assert made.excuses([], "WORN_OUT", 0, overlaps=False)


def test_when_everybodys_pictures_end_workers_it_is_the_worker() -> None:
    made = schedule()
    for number in range(limits.MAX_ACCUSERS):
        job = Job(1, 0, [task(number, sender=Sender(f"key{number}"))])
        excused = made.excuses([job], "HUNG", number, overlaps=False)
        assert excused is (number < limits.MAX_ACCUSERS - 1)
    later = limits.BAD_PICTURES_S * S + 10
    assert made.excuses([Job(1, 0, [task()])], "HUNG", later, overlaps=False)


def test_a_canary_accuses_nobody() -> None:
    made = schedule()
    canary = task()
    canary.canary = True
    job = Job(1, 0, [canary])
    assert not made.excuses([job], "HUNG", 0, overlaps=False)
    [(_, why)] = made.taken_back([job], "HUNG", 0, overlaps=False)
    assert reason(why) is Reason.WORKER_LOST


# -- who sends bad pictures -----------------------------------------------------------------


def costly(made: Schedule, sender: Sender, lane: int, now_ns: int) -> None:
    """The worker says that this sender's picture costs too much."""
    job = Job(1, 0, [task(lane, sender=sender)])
    failed = ItemFailed("PICTURE_TOO_COSTLY", "too many scans")
    made.answered(job, InferDone(1, [failed]), CODEC, SLOT, now_ns)


def test_three_costly_pictures_of_a_stream_refuse_it_for_a_while_and_no_other() -> None:
    made = schedule()
    for _ in range(limits.BAD_PICTURES):
        assert made.submit(task(7), 0, always) is None
        costly(made, CAMERA, 7, 0)
    refusal = made.submit(task(7), S, always)
    assert reason(refusal) is Reason.TOO_MANY_BAD_PICTURES
    assert refusal is not None
    assert refusal.metadata["retry_after_s"] == str(limits.BAD_PICTURES_S - 1)
    for other in (task(8), task(7, sender=Sender("another")), task(7, sender=Sender())):
        assert made.submit(other, S, always) is None
    assert made.submit(task(7), limits.BAD_PICTURES_S * S, always) is None


def analysed(made: Schedule, sender: Sender, lane: int, now_ns: int = 0) -> None:
    """A picture of this stream was looked at."""
    job = Job(1, 0, [task(lane, sender=sender)])
    made.answered(job, InferDone(1, [DetectDone(10, 20, 0, 0, 0)]), CODEC, SLOT, now_ns)


def camera(source: str) -> Sender:
    """One of a bridge's, whose key they share."""
    return Sender("bridge", source=source)


def refused(made: Schedule, source: str, lane: int, now_ns: int = 0) -> bool:
    return made.submit(task(lane, sender=camera(source)), now_ns, always) is not None


@pytest.mark.parametrize("shown", [False, True], ids=["at once", "after good pictures"])
@pytest.mark.parametrize("hostile", [4, 20])
def test_hostile_cameras_do_not_get_the_honest_ones_of_their_key_refused(
    hostile: int, shown: bool
) -> None:
    made = schedule()
    analysed(made, camera("door"), 1000)
    for lane in range(hostile if shown else 0):
        analysed(made, camera(f"hostile-{lane}"), lane)
    for lane in range(hostile):
        for _ in range(limits.BAD_PICTURES):
            if not refused(made, f"hostile-{lane}", lane):
                costly(made, camera(f"hostile-{lane}"), lane, 0)
    assert all(refused(made, f"hostile-{lane}", lane) for lane in range(hostile))
    assert not refused(made, "door", 1000), "its stream has sent nothing bad"
    assert not refused(made, "door", 1001), "it comes back as the camera that is known"
    assert refused(made, "anybody", 1002), "who is new may be one of them"
    assert not refused(made, "anybody", 1002, limits.BAD_PICTURES_S * S)


def test_a_hostile_camera_that_comes_back_is_known() -> None:
    made = schedule()
    for lane in range(limits.BAD_PICTURES):
        assert not refused(made, "hostile", lane)
        costly(made, camera("hostile"), lane, 0)
    assert refused(made, "hostile", 99)
    assert not refused(made, "door", 100)


def test_nobody_is_blinded_by_who_calls_himself_alike() -> None:
    made = schedule()
    analysed(made, camera("door"), 1)
    for lane in range(2, 2 + limits.BAD_PICTURES):
        costly(made, camera("door"), lane, 0)
    assert refused(made, "door", 99)
    assert not refused(made, "door", 1)


def test_good_pictures_in_between_earn_no_further_bad_ones() -> None:
    """Streams and sources that were prepared: each has one, once its key has had too many."""
    made = schedule()
    let_in = 0
    for lane in range(200):
        analysed(made, camera(f"made-up-{lane}"), lane)
    for turn in range(3):
        for lane in range(200):
            if not refused(made, f"made-up-{lane}", lane, turn):
                let_in += 1
                costly(made, camera(f"made-up-{lane}"), lane, turn)
                if not refused(made, f"made-up-{lane}", lane, turn):
                    analysed(made, camera(f"made-up-{lane}"), lane, turn)
    assert let_in == limits.MOST_BAD_PICTURES_OF_KEY


def test_what_is_known_of_good_senders_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PROVEN", 8)
    offenders = Offenders()
    for lane in range(100):
        offenders.passed(task(lane, sender=camera(f"source-{lane}")), 0)
        assert max(len(offenders._lanes), len(offenders._sources)) <= 8


def test_three_costly_single_pictures_of_a_key_leave_its_streams_alone() -> None:
    made = schedule()
    calls = Sender("camera", live=False)
    for lane in range(limits.BAD_PICTURES):
        costly(made, calls, lane, 0)
    assert reason(made.submit(task(99, sender=calls), 0, always)) is Reason.TOO_MANY_BAD_PICTURES
    assert made.submit(task(7), 0, always) is None


def test_a_key_that_opens_a_stream_for_every_bad_picture_is_known() -> None:
    made = schedule()
    for lane in range(limits.BAD_PICTURES_OF_KEY):
        assert made.submit(task(lane), 0, always) is None
        costly(made, CAMERA, lane, 0)
    assert reason(made.submit(task(999), 0, always)) is Reason.TOO_MANY_BAD_PICTURES
    assert made.submit(task(sender=Sender("another")), 0, always) is None


def test_callers_without_a_key_cannot_get_each_other_refused() -> None:
    made = schedule()
    nobody = Sender(live=False)
    for lane in range(50):
        costly(made, nobody, lane, 0)
    assert made.submit(task(sender=nobody), 0, always) is None
    assert len(made.offenders) == 0


def test_a_bad_picture_now_and_then_is_forgiven() -> None:
    made = schedule()
    for number in range(20):
        now = number * limits.BAD_PICTURES_S * S // 2
        assert made.submit(task(7, deadline=now + S), now, always) is None
        costly(made, CAMERA, 7, now)


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 10**6)), max_size=60))
def test_memory_of_offenders_is_bounded(names: list[tuple[str, int]]) -> None:
    most, limits.MAX_OFFENDERS = limits.MAX_OFFENDERS, 8  # type: ignore[misc]
    try:
        offenders = Offenders()
        for now, (key, lane) in enumerate(names):
            offenders.strike(task(lane, sender=Sender(key)), now)
            assert len(offenders) <= 8
    finally:
        limits.MAX_OFFENDERS = most  # type: ignore[misc]


def test_answers_are_the_tasks_own() -> None:
    first, second = task(1), task(2)
    made = schedule(first, second)
    job = give(made, Seat())
    items = [DetectDone(10, 20, 0, 0, 0), ItemFailed("PICTURE_CORRUPT", "damaged")]
    ended, used = made.answered(job, InferDone(1, list(items)), CODEC, SLOT, 0)
    assert [told for told, _ in ended] == [first, second]
    assert ended[0][1] == DetectAnswer(10, 20, ())
    assert reason(ended[1][1]) is Reason.PICTURE_CORRUPT
    assert used == 0
