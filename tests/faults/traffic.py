"""Load for the fault tests: clients that keep books, so that nothing can be lost unseen.

They speak the protocol themselves instead of using the SDK: what they check must not be
what is under test.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from tests.e2e import wire
from tests.fakes.access_units import clip

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane.v1 import face_pb2
from facelane.v1 import gallery_service_pb2 as gallery_pb
from facelane.v1 import gallery_service_pb2_grpc as gallery_grpc

CALL_S = 200.0
KEYINT = 50
STAGES = {face_pb2.STAGE_DETECTOR: "detector", face_pb2.STAGE_RECOGNIZER: "recognizer",
          face_pb2.STAGE_LIVENESS: "liveness"}  # fmt: skip


def reason_of(error: grpc.RpcError) -> str:
    """The reason of a failed call; the bare code's name where the server gave none."""
    for key, value in error.trailing_metadata() or ():  # type: ignore[attr-defined]
        if key == "grpc-status-details-bin":
            return wire.reason_of(status_pb2.Status.FromString(value))
    return str(error.code().name)  # type: ignore[attr-defined]


@dataclass
class Books:
    """What one client sent and what came back."""

    name: str
    sent: int = 0
    results: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Violations of the protocol, in words."""
    ended: str = ""
    """Why the stream ended before its summary; empty when it ended well."""
    longest_gap_s: float = 0.0
    """Between two outcomes."""

    @property
    def outcomes(self) -> int:
        return self.results + self.drops.total() + self.errors.total()

    def absent(self, result: face_pb2.FrameResult, late: bool) -> None:
        """Notes missing stages; a verdict without its stage is a violation (the pictures
        hold one face each, so what is missing is missing for it). ``late``: the frame is older
        than its stream allows, and what was not asked by then is not asked any more."""
        stages = {STAGES[s] for s in result.missing_stages}
        if not late:
            self.missing.update(stages)
        for face in result.faces:
            if "liveness" in stages and face.liveness.verdict == face_pb2.LIVENESS_VERDICT_LIVE:
                self.broken.append("LIVE while the liveness stage is missing")
            if "recognizer" in stages and face.identity.decision == face_pb2.DECISION_MATCH:
                self.broken.append("MATCH while the recogniser stage is missing")


@dataclass(frozen=True)
class Pattern:
    """How a stream behaves. ``jumps``: its media time leaps ahead and its wall clock goes
    anywhere. ``limit``: frames; 0 = until told to stop. ``video``: access units, with a key frame
    every ``KEYINT``. ``analyses``: so many a second are asked for; 0 = of all frames."""

    policy: int = pb.OVERLOAD_POLICY_LATEST_WINS
    pace_s: float = 0.04
    tracking: bool = True
    jumps: bool = False
    video: bool = False
    analyses: float = 0.0
    limit: int = 0
    marked: int = 0
    """The number of the one frame that is ``special``."""
    special: bytes = b""

    @property
    def lossless(self) -> bool:
        return self.policy == pb.OVERLOAD_POLICY_LOSSLESS


def lossless(**fields: Any) -> Pattern:
    return Pattern(policy=pb.OVERLOAD_POLICY_LOSSLESS, **fields)


async def stream(
    channel: grpc.aio.Channel,
    pattern: Pattern,
    stop: asyncio.Event,
    seed: int,
    name: str,
    timeout_s: float = CALL_S,
    books: Books | None = None,
) -> Books:
    """One stream from its config to its summary, in ``books`` while it goes on."""
    books = books or Books(name)
    rng = random.Random(seed)
    call = pb_grpc.AnalysisServiceStub(channel).AnalyzeStream(timeout=timeout_s)  # type: ignore[arg-type]
    stamps: dict[int, tuple[int, int]] = {}
    await call.write(
        pb.AnalyzeStreamRequest(
            config=pb.StreamConfig(
                overload_policy=pattern.policy,  # type: ignore[arg-type]
                disable_tracking=not pattern.tracking,
                analysis_fps=pattern.analyses,
            )
        )
    )

    async def write() -> None:
        offset = 0
        for number in itertools.count(1):
            if stop.is_set() or (pattern.limit and number > pattern.limit):
                break
            offset += int(pattern.pace_s * 1e9)
            wall = time.time_ns()
            if pattern.jumps and rng.random() < 0.2:
                offset += rng.randrange(86_400) * 10**9
                wall = rng.randrange(4 * 10**18)
            if pattern.video:
                units = clip("h264", 2 * KEYINT, size=(96, 80), keyint=KEYINT)
                unit = units[(number - 1) % len(units)]
                picture = wire.pb_picture(unit, face_pb2.PICTURE_ENCODING_H264)
            else:
                picture = wire.pb_picture(wire.encoded(96, 80, rng.randrange(4)))
            if number == pattern.marked:
                raw = pattern.special + bytes(64 * 64 * 3 - len(pattern.special))
                picture = wire.pb_picture(raw, face_pb2.PICTURE_ENCODING_BGR24, width=64, height=64)
            stamps[number] = (offset, wall)
            books.sent += 1
            await call.write(
                wire.frame(
                    number,
                    picture,
                    stream_offset=Duration(seconds=offset // 10**9, nanos=offset % 10**9),
                    capture_time=Timestamp(seconds=wall // 10**9, nanos=wall % 10**9),
                )
            )
            await asyncio.sleep(pattern.pace_s * rng.uniform(0.5, 1.5))
        await call.done_writing()

    async def read() -> None:
        expected, last, summary = 0, time.monotonic(), None
        most_ns = 0
        while (message := await call.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "opened":
                most_ns = message.opened.limits.max_frame_age.ToNanoseconds()
            if kind == "summary":
                summary = message.summary
            if kind != "outcome":
                continue
            now = time.monotonic()
            books.longest_gap_s, last = max(books.longest_gap_s, now - last), now
            outcome = message.outcome
            expected += 1
            if outcome.frame_id != expected:
                books.broken.append(f"frame {outcome.frame_id} where {expected} was due")
            offset, wall = outcome.stream_offset, outcome.capture_time
            echoed = (
                offset.seconds * 10**9 + offset.nanos,
                wall.seconds * 10**9 + wall.nanos,
            )
            if stamps.pop(outcome.frame_id, None) != echoed:
                books.broken.append("times are not echoed")
            match outcome.WhichOneof("outcome"):
                case "result":
                    books.results += 1
                    books.absent(outcome.result, outcome.age.ToNanoseconds() > most_ns)
                case "drop":
                    books.drops[pb.DropReason.Name(outcome.drop.reason)[12:]] += 1
                case "error":
                    books.errors[wire.reason_of(outcome.error)] += 1
                case other:
                    books.broken.append(f"an outcome that is {other}")
        if summary is None:
            books.broken.append("no summary")
            return
        told = (summary.received, summary.results, summary.drops, summary.errors)
        mine = (books.sent, books.results, books.drops.total(), books.errors.total())
        if told != mine:
            books.broken.append(f"summary {told}, books {mine}")

    writer, reader = asyncio.create_task(write()), asyncio.create_task(read())
    try:
        await reader
        await writer
    except (grpc.RpcError, asyncio.InvalidStateError) as error:
        books.ended = reason_of(error) if isinstance(error, grpc.RpcError) else "CLOSED"
    finally:
        for task in (writer, reader):
            task.cancel()
        await asyncio.gather(writer, reader, return_exceptions=True)
        call.cancel()
    if books.outcomes != books.sent and not books.ended:
        books.broken.append(f"{books.sent} frames, {books.outcomes} outcomes")
    return books


@dataclass
class Ledger:
    """What the server acknowledged about subjects; it must still be true at the end."""

    templates: dict[str, set[str]] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    """Subjects with a call whose fate was not told (deadline, connection)."""
    calls: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


async def enrolments(
    channel: grpc.aio.Channel, stop: asyncio.Event, seed: int, name: str, pace_s: float = 0.02
) -> Ledger:
    """Enrols, identifies and deletes until told to stop. Refused enrolments are tried again
    under the same request id: each must be stored exactly once."""
    rng = random.Random(seed)
    stub = gallery_grpc.GalleryServiceStub(channel)
    ledger = Ledger()

    async def call(method: Any, request: Any, subject: str) -> Any:
        ledger.calls += 1
        try:
            return await method(request, timeout=20.0)
        except grpc.RpcError as error:
            ledger.refusals[reason_of(error)] += 1
            if error.code() in (  # type: ignore[attr-defined]
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.CANCELLED,
            ) or reason_of(error) in ("UNAVAILABLE", "GALLERY_UNAVAILABLE"):
                ledger.unsure.add(subject)
            return None

    for number in itertools.count():
        if stop.is_set():
            return ledger
        subject = f"{name}-{seed}-{number}"
        picture = wire.pb_picture(wire.encoded(96, 80, rng.randrange(50)))
        request = gallery_pb.EnrollFaceRequest(
            subject_id=subject,
            picture=picture,
            request_id=f"{subject}-enrol",
            create_subject=True,
        )
        while not stop.is_set():
            answer = await call(stub.EnrollFace, request, subject)
            if answer is not None:
                ledger.templates.setdefault(subject, set()).add(answer.template.template_id)
                ledger.unsure.discard(subject)
                break
            await asyncio.sleep(0.05)  # the pace of a clerk who tries again
        if subject in ledger.templates and rng.random() < 0.3:
            again = await call(stub.EnrollFace, request, subject)
            if again is not None and {again.template.template_id} != ledger.templates[subject]:
                ledger.broken.append("one request id, two templates")
        if subject in ledger.templates and rng.random() < 0.3:
            gone = await call(
                stub.DeleteSubject, gallery_pb.DeleteSubjectRequest(subject_id=subject), subject
            )
            if gone is not None:
                ledger.deleted.add(subject)
                ledger.unsure.discard(subject)
                del ledger.templates[subject]
        await asyncio.sleep(pace_s)
    raise AssertionError("unreachable")


async def audit(channel: grpc.aio.Channel, ledger: Ledger) -> list[str]:
    """What the server says now against what it acknowledged."""
    stub = gallery_grpc.GalleryServiceStub(channel)
    wrong = list(ledger.broken)

    async def stored(subject: str) -> set[str] | None:
        try:
            answer = await stub.ListTemplates(
                gallery_pb.ListTemplatesRequest(subject_id=subject), timeout=CALL_S
            )
        except grpc.RpcError as error:
            if reason_of(error) == "SUBJECT_NOT_FOUND":
                return None
            raise
        return {t.template_id for t in answer.templates}

    for subject, templates in ledger.templates.items():
        if subject not in ledger.unsure and await stored(subject) != templates:
            wrong.append("an acknowledged template is gone, or there is another")
    back = [s for s in ledger.deleted - ledger.unsure if await stored(s) is not None]
    return wrong + ["a deleted subject is back"] * len(back)
