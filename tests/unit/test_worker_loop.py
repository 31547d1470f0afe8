"""The inference loop in a thread of the test, with a model that the test steers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.real_pool import PACKAGES
from tests.waiting import until

from facelane_server import wiping
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.ipc import gallery_table, messages
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.channel import ChannelClosed, WorkerChannel, socket_pair
from facelane_server.ipc.messages import (
    Cancel,
    CloseVideo,
    DetectItem,
    Drain,
    Drained,
    EmbedItem,
    Fatal,
    FromWorker,
    GallerySnapshot,
    Hello,
    Infer,
    InferDone,
    InferFailed,
    Item,
    ItemDone,
    LivenessDone,
    LivenessItem,
    Load,
    Ping,
    Pong,
    Ready,
    Scrub,
    ToWorker,
    Warming,
)
from facelane_server.models import api
from facelane_server.models.catalog import Catalog
from facelane_server.worker import exit_codes, loop, search
from facelane_server.worker.failpoints import InjectedOutOfMemoryError
from facelane_server.worker.loop import Loop
from facelane_server.worker.networks.load import batch_for, load_model
from facelane_server.worker.search import Searcher

SIZE = 16
SLOT = 1 << 20


class SteeredModel(api.LivenessModel):
    """Computes on a "device": ``finish`` waits for the test's permission."""

    crops = (api.ContextCrop(2.7, SIZE),)
    batch_max = 4

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.permits = threading.Semaphore(0)
        self.fail: dict[str, Exception] = {}
        self.warming = True

    def warm_up(self) -> None:
        pass

    def begin(self, crops: Sequence[api.U8]) -> api.Pending[api.F32]:
        if self.warming:
            return api.Immediate(np.zeros(1, np.float32))
        name = f"job{int(crops[0][0, 0, 0, 0])}"
        self.calls.append(f"begin {name}")
        if (error := self.fail.get(f"begin {name}")) is not None:
            raise error
        return _Steered(self, name, crops[0][:, 0, 0, 0].astype(np.float32) / 64)


class _Steered(api.Pending[api.F32]):
    def __init__(self, model: SteeredModel, name: str, value: api.F32) -> None:
        self.model, self.name, self.value = model, name, value

    def finish(self) -> api.F32:
        assert self.model.permits.acquire(timeout=30)
        self.model.calls.append(f"finish {self.name}")
        if (error := self.model.fail.get(f"finish {self.name}")) is not None:
            raise error
        return self.value


class Server:
    """The server's end of the channel, blocking, and the loop in its thread."""

    def __init__(self) -> None:
        ours, theirs = socket_pair()
        self.sock = ours
        self.sock.settimeout(30)
        self.model = SteeredModel()
        self.stopping = threading.Event()
        self.request = Arena.create("request", 2, SLOT)
        self.response = Arena.create("response", 2, SLOT)
        self.code: int | None = None
        self.wake, self._wake_writer = os.pipe()
        self.loop = Loop(WorkerChannel(theirs, wake_fd=self.wake), self.stopping.is_set)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.code = self.loop.run()

    def send(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        import socket

        packet = messages.encode(message)
        if fds:
            socket.send_fds(self.sock, [packet], list(fds))
        else:
            self.sock.send(packet)

    def receive(self) -> FromWorker:
        packet = self.sock.recv(1 << 18)
        if not packet:
            raise ChannelClosed("end of file")
        return messages.decode_from_worker(packet)

    def load(self, **changes: object) -> None:
        assert isinstance(self.receive(), Hello)
        package = PACKAGES[Stage.LIVENESS]
        fields: dict[str, object] = {
            "worker_id": "liveness#0",
            "stage": "liveness",
            "package": str(package.folder),
            "device": "cpu",
            "batch_max": 4,
            "slots": 2,
            "request_slot_bytes": SLOT,
            "response_slot_bytes": SLOT,
            **changes,
        }
        fds = [self.request.fileno(), self.response.fileno()]
        self.send(Load(**fields), fds)  # type: ignore[arg-type]

    def become_ready(self, **changes: object) -> Ready:
        self.load(**changes)
        assert isinstance(self.receive(), Warming)
        ready = self.receive()
        assert isinstance(ready, Ready), ready
        self.model.warming = False
        return ready

    def infer(self, job_id: int, slot: int, items: list[Item] | None = None) -> None:
        self.request.slot(slot % 2)[:] = bytes([job_id]) * SLOT
        self.send(Infer(job_id, slot, items if items is not None else [LivenessItem((0,))]))

    def stop(self) -> None:
        self.stopping.set()
        os.write(self._wake_writer, b"x")

    def close(self) -> None:
        self.model.permits.release(100)
        self.sock.close()
        self.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.loop._channel.close()
        for fd in (self.wake, self._wake_writer):
            os.close(fd)
        self.request.close()
        self.response.close()

    def exit_code(self) -> int:
        self.thread.join(30)
        assert self.code is not None
        return self.code


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    comm = Path("/proc/self/comm").read_text(encoding="ascii")
    made = Server()
    monkeypatch.setattr(loop, "load_model", lambda load: (made.model, "steered", "cpu"))
    yield made
    made.close()
    assert Path("/proc/self/comm").read_text(encoding="ascii") == comm


def test_the_next_job_is_begun_while_the_first_is_on_the_device(server: Server) -> None:
    server.become_ready()
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    server.infer(2, 1)
    server.model.permits.release()
    first = server.receive()
    assert isinstance(first, InferDone)
    assert (first.job_id, first.items) == (1, [LivenessDone(1 / 64)])
    server.model.permits.release()
    second = server.receive()
    assert isinstance(second, InferDone)
    assert (second.job_id, second.items) == (2, [LivenessDone(2 / 64)])
    # Whether job 2 was begun before job 1 was waited for depends on when it arrived; two
    # jobs that are both there are always begun before the first is finished:
    server.model.calls.clear()
    server.infer(3, 0)
    until(lambda: server.model.calls == ["begin job3"])
    server.infer(4, 1)
    server.infer(5, 0)
    server.model.permits.release(3)
    assert [server.receive().job_id for _ in range(3)] == [3, 4, 5]  # type: ignore[union-attr]
    assert server.model.calls.index("begin job5") < server.model.calls.index("finish job4")


def send_at_once(server: Server, monkeypatch: pytest.MonkeyPatch, *jobs: int) -> None:
    """Jobs that the loop finds there together, once it is done with what it has."""
    there, receive = threading.Event(), server.loop._receive

    def receive_them(timeout_s: float) -> None:
        assert there.wait(30)
        receive(timeout_s)

    with monkeypatch.context() as patch:
        patch.setattr(server.loop, "_receive", receive_them)
        for job in jobs:
            server.infer(job, job % 2)
        there.set()
        until(lambda: f"begin job{jobs[0]}" in server.model.calls)


def decodes_what_is_in_jobs(server: Server, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """As a detector does; what decodes goes on once that is set."""
    decoded, begin = threading.Event(), server.loop._work.begin

    def begin_later(
        job: Infer, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Callable[[], list[ItemDone]], api.Pending[Any]]:
        if meanwhile is not None:
            meanwhile()
            server.model.calls.append(f"decode job{job.job_id}")
            until(lambda: meanwhile() or decoded.is_set())
        return begin(job)

    monkeypatch.setattr(server.loop._work, "begin", begin_later)
    return decoded


def test_a_job_is_answered_while_the_next_ones_pictures_are_decoded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    decoded = decodes_what_is_in_jobs(server, monkeypatch)
    server.model.permits.release(2)
    send_at_once(server, monkeypatch, 1, 2)
    first = server.receive()
    assert isinstance(first, InferDone)
    assert first.job_id == 1
    until(lambda: server.model.calls == ["begin job1", "finish job1", "decode job2"])
    decoded.set()
    second = server.receive()
    assert isinstance(second, InferDone)
    assert second.job_id == 2


def test_how_long_video_waits_for_those_who_decode_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    server.model.permits.release(2)
    server.infer(1, 0)
    assert server.receive().waited_us == 0  # type: ignore[union-attr]
    monkeypatch.setattr(type(server.loop._work), "waited_s", 0.25)
    server.infer(2, 1)
    assert server.receive().waited_us == 250_000  # type: ignore[union-attr]


def reads_early(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As a detector whose card decodes; the jobs that it reads before their turn."""
    read: list[int] = []

    def note(job: Infer) -> bool:
        read.append(job.job_id)
        return True

    monkeypatch.setattr(type(server.loop._work), "reads_early", True)
    monkeypatch.setattr(server.loop._work, "read", note)
    return read


def test_a_job_is_read_as_soon_as_it_has_come(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While those before it are on the device, and while the pictures of one are waited for; it is
    not cancelled any more. What is on the device is not waited for either."""
    server.become_ready()
    read = reads_early(server, monkeypatch)
    decoded = decodes_what_is_in_jobs(server, monkeypatch)
    ready = threading.Event()
    monkeypatch.setattr(_Steered, "poll", lambda _: ready.is_set())
    server.infer(1, 0)
    until(lambda: server.model.calls == ["decode job1"])
    server.infer(2, 1)
    until(lambda: read == [1, 2])
    server.send(Cancel(2))
    server.send(Ping(7))
    assert server.receive() == Pong(7, server.loop._memory())
    decoded.set()
    until(lambda: server.model.calls[1:] == ["begin job1", "decode job2", "begin job2"])
    server.model.permits.release(2)
    ready.set()
    assert [server.receive().job_id for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    assert read == [1, 2], "once each"


def test_a_job_behind_a_lane_that_ends_is_read_when_that_has(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    read = reads_early(server, monkeypatch)
    decoded = decodes_what_is_in_jobs(server, monkeypatch)
    ended: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(
        server.loop._work, "close_video", lambda lane: ended.append((lane, list(read)))
    )
    server.model.permits.release(2)
    server.infer(1, 0)
    until(lambda: server.model.calls == ["decode job1"])
    server.send(CloseVideo(7))
    server.infer(2, 1)
    server.send(Ping(7))
    assert isinstance(server.receive(), Pong)
    assert read == [1]
    decoded.set()
    assert [server.receive().job_id for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    assert ended == [(7, [1])]
    assert read == [1, 2]


def test_a_worn_out_worker_answers_what_it_has_begun_to_decode(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    decodes_what_is_in_jobs(server, monkeypatch).set()
    monkeypatch.setattr(type(server.loop._work), "worn_out", True)
    server.model.permits.release(2)
    send_at_once(server, monkeypatch, 1, 2)
    answers = [server.receive() for _ in range(2)]
    assert [a.job_id for a in answers if isinstance(a, InferDone)] == [1, 2]
    assert isinstance(server.receive(), Fatal)
    assert server.exit_code() == exit_codes.WORN_OUT


def test_what_ends_the_worker_is_not_the_fault_of_what_is_decoded_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    decodes_what_is_in_jobs(server, monkeypatch).set()
    server.model.permits.release(10)
    for job in (1, 2, 3):
        server.model.fail[f"finish job{job}"] = InjectedOutOfMemoryError("full")
    for job in (1, 2):
        server.infer(job, 0)
        assert isinstance(server.receive(), InferFailed)
    send_at_once(server, monkeypatch, 3, 4)
    last = server.receive()
    assert isinstance(last, InferFailed)
    assert last.job_id == 3
    assert isinstance(server.receive(), Fatal)
    assert server.exit_code() == exit_codes.OUT_OF_MEMORY


def test_a_failure_does_not_overtake_the_answer_before_it(server: Server) -> None:
    server.become_ready()
    server.model.fail["begin job3"] = ValueError("broken")
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    server.infer(2, 1)
    server.infer(3, 0)
    server.model.permits.release(3)
    answers = [server.receive() for _ in range(3)]
    assert [answer.job_id for answer in answers] == [1, 2, 3]  # type: ignore[union-attr]
    failed = answers[2]
    assert isinstance(failed, InferFailed)
    assert (failed.reason, failed.retryable) == ("INTERNAL", False)
    assert "broken" not in failed.message, "an exception's text may hold data"


def test_a_model_may_refuse_a_job_with_its_own_reason(server: Server) -> None:
    server.become_ready()
    server.model.fail["finish job1"] = FacelaneError(Reason.PICTURE_TOO_LARGE, "too large")
    server.infer(1, 0)
    server.model.permits.release()
    assert server.receive() == InferFailed(1, "PICTURE_TOO_LARGE", "too large")


def test_errors_in_a_row_end_the_worker_and_a_success_between_them_does_not(
    server: Server,
) -> None:
    server.become_ready()
    for job in (1, 2, 4, 5, 6):
        server.model.fail[f"finish job{job}"] = ValueError("broken")
    server.model.permits.release(10)
    for job in range(1, 7):
        server.infer(job, 0)
        expected = InferDone if job == 3 else InferFailed
        assert isinstance(server.receive(), expected)
    fatal = server.receive()
    assert isinstance(fatal, Fatal)
    assert fatal.reason == "INTERNAL"
    assert server.exit_code() == exit_codes.INTERNAL


def test_memory_that_runs_out_three_times_ends_the_worker(server: Server) -> None:
    server.become_ready()
    server.model.permits.release(10)
    for job in (1, 2, 3):
        server.model.fail[f"finish job{job}"] = InjectedOutOfMemoryError("full")
        server.infer(job, 0)
        failed = server.receive()
        assert isinstance(failed, InferFailed)
        assert (failed.reason, failed.retryable) == ("OUT_OF_MEMORY", True)
    assert isinstance(server.receive(), Fatal)
    assert server.exit_code() == exit_codes.OUT_OF_MEMORY


def test_memory_that_runs_out_beside_the_jobs_ends_the_worker_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong with what nobody looks at is nobody's answer."""
    server.become_ready()
    server.model.permits.release(10)

    def settle(_: object = None) -> None:
        raise InjectedOutOfMemoryError("full")

    monkeypatch.setattr(server.loop._work, "settle", settle)
    for job in (1, 2, 3):
        server.infer(job, 0)
        answer = server.receive()
        if isinstance(answer, Fatal):
            break
        assert isinstance(answer, InferDone)
    assert server.exit_code() == exit_codes.OUT_OF_MEMORY


@pytest.mark.parametrize("ended", [False, True])
def test_what_went_wrong_beside_a_job_is_not_the_next_ones_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Nor that of a lane that ends: only the worker may end over it."""
    server.become_ready()
    server.model.permits.release(10)
    failures = iter([MemoryError("full")])

    def settle(_: object = None) -> None:
        for error in failures:
            raise error

    monkeypatch.setattr(server.loop._work, "settle", settle)
    if ended:
        server.send(CloseVideo(7))
    for job in (1, 2):
        server.infer(job, 0)
        assert isinstance(server.receive(), InferDone)
    assert next(failures, None) is None, "it was raised"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_lane_of_video_ends_once_the_jobs_before_are_begun(
    server: Server, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """Closed before, a job that it is in would open another decoder, which nobody closes."""
    server.become_ready()
    calls = server.model.calls
    monkeypatch.setattr(
        server.loop._work, "close_video", lambda lane: calls.append(f"close {lane}")
    )
    server.send(CloseVideo(7))
    until(lambda: calls == ["close 7"])
    server.infer(1, 0)
    until(lambda: calls[1:] == ["begin job1"])
    server.infer(2, 1)
    server.infer(3, 0)
    server.send(CloseVideo(8))
    server.send(CloseVideo(9))
    if cancelled:
        server.send(Cancel(3))
    server.model.permits.release(3)
    answers = {server.receive().job_id for _ in range(3)}  # type: ignore[union-attr]
    assert answers == {1, 2, 3}
    ended = calls.index("close 8"), calls.index("close 9")
    assert ended == (ended[0], ended[0] + 1)
    assert ended[0] > calls.index("begin job2" if cancelled else "begin job3")


def test_ping_is_answered_between_jobs_and_by_the_loop_alone(server: Server) -> None:
    server.become_ready()
    server.send(Ping(7))
    pong = server.receive()
    assert isinstance(pong, Pong)
    assert pong.sequence == 7
    assert pong.memory_mib > 0
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    server.send(Ping(8))
    server.model.permits.release()
    assert isinstance(server.receive(), InferDone), "the device first: that is what a ping shows"
    assert isinstance(server.receive(), Pong)


def test_a_deletion_has_the_memory_scrubbed_beside_the_jobs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.become_ready()
    scrubbed = threading.Event()
    monkeypatch.setattr(wiping, "scrub", scrubbed.set)
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    server.send(Scrub())
    server.model.permits.release()
    assert isinstance(server.receive(), InferDone)
    assert scrubbed.wait(60)


def test_cancel_skips_a_job_that_was_not_begun(server: Server) -> None:
    server.become_ready()
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    server.infer(2, 1)
    server.infer(3, 0)
    server.send(Cancel(3))
    server.send(Cancel(99))
    server.model.permits.release(2)
    answers = {server.receive().job_id: None for _ in range(3)}  # type: ignore[union-attr]
    assert set(answers) == {1, 2, 3}
    assert "begin job3" not in server.model.calls


def test_drain_answers_what_was_sent_and_then_leaves(server: Server) -> None:
    server.become_ready()
    server.infer(1, 0)
    server.infer(2, 1)
    server.send(Drain())
    server.model.permits.release(2)
    assert [type(server.receive()) for _ in range(3)] == [InferDone, InferDone, Drained]
    assert server.exit_code() == exit_codes.OK
    assert server.loop.drained


def test_a_gallery_that_is_built_during_a_drain_is_not_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group the channel is the next model's by then, which would take it for a breach."""
    begun, permit = threading.Event(), threading.Event()

    def build(snapshot: GallerySnapshot, fd: int, device: str) -> Searcher:
        begun.set()
        assert permit.wait(30)
        return Searcher(snapshot, fd, device)

    monkeypatch.setattr(search, "Searcher", build)
    server.become_ready()
    message, table = gallery_table.detach(GallerySnapshot(1, 0, 512, ()))
    matrix = os.memfd_create("snapshot")
    server.send(message, [matrix, table])
    assert begun.wait(30)
    (builder,) = [thread for thread in threading.enumerate() if thread.name == "gallery"]
    server.send(message, [matrix, table])
    server.send(Drain())
    for fd in (matrix, table):
        os.close(fd)
    assert server.receive() == Drained()
    permit.set()
    builder.join(30)
    assert not builder.is_alive()
    server.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.receive()


def test_what_was_meant_for_the_model_before_is_no_breach(server: Server) -> None:
    server.send(Cancel(7))
    server.become_ready()


def test_sigterm_drains_too(server: Server) -> None:
    server.become_ready()
    server.stop()
    assert server.receive() == Drained()
    assert server.exit_code() == exit_codes.OK


def test_the_servers_end_is_the_workers_end(server: Server) -> None:
    server.become_ready()
    server.sock.close()
    assert server.exit_code() == exit_codes.OK


def test_a_drain_before_load_is_obeyed(server: Server) -> None:
    assert isinstance(server.receive(), Hello)
    server.send(Drain())
    assert server.receive() == Drained()
    assert server.exit_code() == exit_codes.OK


@pytest.mark.parametrize(
    "send",
    [
        lambda s: s.infer(1, 2),
        lambda s: s.infer(1, -1),
        lambda s: s.infer(1, 0, []),
        lambda s: s.infer(1, 0, [LivenessItem((0,))] * 5),
        lambda s: s.infer(1, 0, [LivenessItem((SLOT - 1,))]),
        lambda s: s.infer(1, 0, [LivenessItem((-1,))]),
        lambda s: s.infer(1, 0, [LivenessItem((0, 0))]),
        lambda s: s.infer(1, 0, [EmbedItem(0)]),
        lambda s: s.infer(1, 0, [DetectItem(0, 1, "jpeg")]),
        lambda s: s.send(Ping(1), [0]),
        lambda s: s.send(GallerySnapshot(1, 0, 1, ())),
        lambda s: s.sock.send(b"garbage"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left(
    server: Server, send: Callable[[Server], object]
) -> None:
    server.become_ready()
    send(server)
    fatal = server.receive()
    assert isinstance(fatal, Fatal), fatal
    assert fatal.reason == "PROTOCOL"
    server.model.permits.release(10)
    assert server.exit_code() == exit_codes.PROTOCOL


def test_more_jobs_at_once_than_there_are_slots_break_the_protocol(server: Server) -> None:
    server.become_ready()
    server.infer(1, 0)
    until(lambda: server.model.calls == ["begin job1"])
    for job in range(2, 6):
        server.infer(job, 1)
    server.model.permits.release(10)
    told = server.receive()
    if isinstance(told, InferDone):  # the first one may be done before the last has come
        told = server.receive()
    assert isinstance(told, Fatal)
    assert told.reason == "PROTOCOL"
    assert server.exit_code() == exit_codes.PROTOCOL


@pytest.mark.parametrize("changes", [{"slots": 3}, {"request_slot_bytes": 4096}])
def test_arenas_that_are_not_what_load_says_are_refused(
    server: Server, changes: dict[str, object]
) -> None:
    server.load(**changes)
    fatal = server.receive()
    assert isinstance(fatal, Fatal)
    assert fatal.reason == "PROTOCOL"
    assert server.exit_code() == exit_codes.PROTOCOL


def test_load_without_arenas_is_refused(server: Server) -> None:
    assert isinstance(server.receive(), Hello)
    server.send(Ping(1))
    assert isinstance(server.receive(), Fatal)
    assert server.exit_code() == exit_codes.PROTOCOL


def test_a_model_that_cannot_be_loaded_says_why_without_the_details(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(load: Load) -> None:
        raise ValueError("the details")

    monkeypatch.setattr(loop, "load_model", broken)
    server.load()
    fatal = server.receive()
    assert isinstance(fatal, Fatal)
    assert fatal.reason == "LOAD_FAILED"
    assert "ValueError" in fatal.message
    assert "details" not in fatal.message
    assert server.exit_code() == exit_codes.LOAD_FAILED
    assert "the details" in capsys.readouterr().err


def test_the_real_loader_reads_a_package() -> None:
    package = PACKAGES[Stage.RECOGNIZER]
    load = Load("r#0", "recognizer", str(package.folder), "auto", 4, 2, SLOT, SLOT)
    model, model_id, device = load_model(load)
    assert isinstance(model, api.Recognizer)
    assert (model_id, device, model.embedding_dim) == (package.model_id, "cpu", 512)


@pytest.mark.parametrize(
    ("name", "device", "batch"),
    [
        ("facelane-detector", "cpu", 1),
        ("facelane-recognizer", "cpu", 4),
        ("facelane-liveness", "cpu", 4),
        ("facelane-detector", "cuda:0", 8),
        ("facelane-recognizer", "cuda:1", 8),
        ("null-detector", "cpu", 8),
    ],
)
def test_batches_where_they_pay(name: str, device: str, batch: int) -> None:
    package = Catalog().resolve(name)
    assert batch_for(package, device) == batch


def test_the_batch_that_was_asked_for_is_taken_anywhere() -> None:
    package = PACKAGES[Stage.DETECTOR]
    load = Load("d#0", "detector", str(package.folder), "cpu", 3, 2, SLOT, SLOT)
    assert load_model(load)[0].batch_max == 3
    load = Load("d#0", "detector", str(package.folder), "cpu", 0, 2, SLOT, SLOT)
    assert load_model(load)[0].batch_max == 8
