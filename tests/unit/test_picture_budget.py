"""What a picture may cost: refused before it is decoded, or given up while it is."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable

import pytest
from tests.waiting import until

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.worker.decoding.headers import examine
from facelane_server.worker.decoding.patience import Decoders, Lanes
from facelane_server.worker.decoding.pictures import decode


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def progressive(side: int, scans: int, components: int = 1) -> bytes:
    """A legal file whose every scan after the first refines nothing: runs of empty blocks."""
    blocks = (side // 8) ** 2
    table = b"".join(bytes((i + 1, 0x11, 0)) for i in range(components))
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    out += segment(0xC2, struct.pack(">BHHB", 8, side, side, components) + table)
    out += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\0")
    out += segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\0")
    for i in range(components):
        out += segment(0xDA, bytes((1, i + 1, 0, 0, 0, 0))) + bytes(blocks // 8)
    run = ("0" + "1" * 14) * (blocks // 32767 + 1)
    bits = run + "1" * (-len(run) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    out += segment(0xDA, bytes((1, 1, 0, 1, 63, 0x01))) + data
    out += (segment(0xDA, bytes((1, 1, 0, 1, 63, 0x10))) + data) * (scans - components - 1)
    return out + b"\xff\xd9"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    side: int, rows: bytes, *, before: bytes = b"", depth: int = 8, color: int = 2, adam7: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, adam7)
    data = zlib.compress(rows, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def rows(side: int, pixel_bytes: int = 3) -> bytes:
    return (b"\0" + bytes(side * pixel_bytes)) * side


def reason(data: bytes, encoding: Encoding) -> Reason:
    with pytest.raises(FacelaneError) as caught:
        decode(memoryview(data), encoding)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (progressive(64, 4_000), Encoding.JPEG),
        (progressive(4_000, 60), Encoding.JPEG),
        (progressive(4_000, 64, components=3), Encoding.JPEG),
        (b"\xff\xd8" + segment(0xFE, b"") * 5_000 + b"\xff\xd9", Encoding.JPEG),
        (b"\xff\xd8" + b"\xff\xd0" * 5_000 + b"\xff\xd9", Encoding.JPEG),
        (b"\xff\xd8\xff\xfe\0\2" + (b"stray" + segment(0xFE, b"")) * 300, Encoding.JPEG),
        (png(64, bytes(1 << 24)), Encoding.PNG),
        (png(64, rows(64), before=chunk(b"teSt", b"") * 20_000), Encoding.PNG),
        (png(64, rows(64), before=chunk(b"IDAT", b"") * 20_000), Encoding.PNG),
        (png(7_000, b"", depth=16, color=6), Encoding.PNG),
    ],
    ids=[
        "scans", "scans of a large picture", "of three planes", "segments", "restarts", "strays",
        "overlong data", "chunks", "empty data chunks", "rows of eight bytes a pixel",
    ],
)  # fmt: skip
def test_too_much_work_is_refused_before_decoding(data: bytes, encoding: Encoding) -> None:
    assert reason(data, encoding) is Reason.PICTURE_TOO_COSTLY


def test_the_walk_ends_where_the_budget_does() -> None:
    """However long the file: what comes after is not looked at."""
    short, long = progressive(64, 70), progressive(64, 70) + b"\xff" * 1_000_000
    messages = []
    for data in (short, long):
        with pytest.raises(FacelaneError) as caught:
            examine(memoryview(data), Encoding.JPEG)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_honest_pictures_are_within_the_budget() -> None:
    assert examine(memoryview(progressive(64, limits.MAX_PICTURE_SCANS)), Encoding.JPEG).scans == 64
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 22)))
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 22)))
    for extra in (bomb * 8, profile, chunk(b"tEXt", b"k\0v") * 100):
        data = png(64, rows(64), before=extra)
        header = examine(memoryview(data), Encoding.PNG)
        assert sum(b - a for a, b in header.chunks) < 400, "what nobody needs is left out"
        assert decode(memoryview(data), Encoding.PNG).shape == (64, 64, 3)


@pytest.mark.parametrize("side", [16, 17, 21, 33])
def test_the_rows_of_an_interlaced_png_are_counted(side: int) -> None:
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    data = b""
    for x, y, dx, dy in (*passes, (0, 1, 1, 2)):
        width, height = len(range(x, side, dx)), len(range(y, side, dy))
        data += (b"\0" + b"\x40" * 3 * width) * height
    assert decode(memoryview(png(side, data, adam7=1)), Encoding.PNG).min() == 0x40
    assert reason(png(side, data + b"\0", adam7=1), Encoding.PNG) is Reason.PICTURE_TOO_COSTLY
    assert reason(png(side, data[:-1], adam7=1), Encoding.PNG) is Reason.PICTURE_CORRUPT


# -- while it is decoded ------------------------------------------------------------------


def spin(stop: threading.Event) -> Callable[[], str]:
    """Computes until it is told to stop."""

    def call() -> str:
        while not stop.is_set():
            sum(range(1000))
        return "late"

    return call


@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_that_hangs_is_given_up_and_the_others_are_not(threads: int) -> None:
    decoders = Decoders(threads, picture_s=0.1, job_s=30.0)
    stop = threading.Event()
    found = decoders.run([lambda: "first", spin(stop), lambda: "third", lambda: "fourth"])
    assert [f for f in found if isinstance(f, str)] == ["first", "third", "fourth"]
    assert isinstance(found[1], FacelaneError)
    assert found[1].reason is Reason.PICTURE_TOO_COSTLY
    assert decoders.run([lambda: "later"]) == ["later"], "a fresh thread is there"
    assert not decoders.worn_out
    stop.set()


def test_what_is_done_meanwhile_is_done_while_threads_decode() -> None:
    decoders = Decoders(1, picture_s=30.0, job_s=30.0)
    begun, done = threading.Event(), threading.Event()

    def decode() -> bool:
        begun.set()
        return done.wait(30)

    def meanwhile() -> None:
        assert begun.wait(30)
        done.set()

    assert decoders.run([decode, lambda: "second"], meanwhile) == [True, "second"]
    done.clear()
    assert decoders.run([], meanwhile) == []
    assert not done.is_set(), "nothing is decoded"
    first, second = decoders.begin([decode]), decoders.begin([lambda: "second"])
    assert not first.is_over
    done.set()
    assert decoders.settle(first) == [True]
    assert decoders.settle(second) == ["second"]


def test_who_is_given_up_takes_no_thread_from_the_runs_behind() -> None:
    decoders = Decoders(1, picture_s=0.05, job_s=30.0)
    stop = threading.Event()
    first = decoders.begin([spin(stop), lambda: "beside it"])
    second = decoders.begin([lambda: "behind it"])
    found = decoders.settle(first)
    assert isinstance(found[0], FacelaneError)
    assert found[1] == "beside it"
    assert decoders.settle(second) == ["behind it"], "it has a thread"
    stop.set()


def test_a_lanes_calls_are_made_in_their_order_whoevers_threads_make_them() -> None:
    lanes, made, let = Lanes(), [], threading.Event()
    one, other = (Decoders(2, 30.0, 30.0, lanes) for _ in range(2))

    def call(name: str, wait: bool = False) -> Callable[[], None]:
        def make() -> None:
            assert not wait or let.wait(30)
            made.append(name)

        return make

    first = one.begin([call("first", wait=True), call("another lane's")], [1, 2])
    second = other.begin([call("second")], [1])
    third = one.begin([call("third")], [1])
    until(lambda: made == ["another lane's"])
    let.set()
    for decoders, run in ((one, third), (other, second), (one, first)):
        decoders.settle(run)
    assert made[1:] == ["first", "second", "third"]


def test_what_waits_for_a_thread_is_told_and_what_waits_for_its_lane_is_not() -> None:
    decoders, free = Decoders(1, 30.0, 60.0), threading.Event()
    held = decoders.begin([lambda: free.wait(30)], [7])
    behind = decoders.begin([lambda: True], [7])
    beside = decoders.begin([lambda: True], [8])
    until(lambda: held.tasks[0].began is not None)
    assert not behind.tasks[0].queued
    assert beside.tasks[0].queued
    assert beside.waited_s == 0.0, "nobody knows yet"
    free.set()
    assert [decoders.settle(run) for run in (held, behind, beside)] == [[True]] * 3
    of_lane, of_thread = behind.tasks[0], beside.tasks[0]
    assert of_thread.began is not None
    assert of_thread.ready < of_lane.ready
    assert beside.waited_s == of_thread.began - of_thread.ready > 0.0


def test_who_is_given_up_lets_the_lane_go_on_once_it_is_told() -> None:
    told: list[tuple[int, bool]] = []
    stop, made = threading.Event(), threading.Event()
    decoders = Decoders(1, 0.05, 30.0, given_up=lambda lane: told.append((lane, made.is_set())))
    first = decoders.begin([spin(stop)], [7])
    second = decoders.begin([lambda: made.set()], [7])  # noqa: PLW0108
    (found,) = decoders.settle(first)
    assert isinstance(found, FacelaneError)
    decoders.settle(second)
    assert told == [(7, False)], "before its next call"
    assert made.is_set()
    stop.set()


def test_threads_that_cannot_settle_in_decode_all_the_same() -> None:
    def first() -> None:
        raise RuntimeError("no device")

    assert Decoders(1, 30.0, 30.0, first=first).run([lambda: "decoded"]) == ["decoded"]


def test_a_run_that_fails_is_over() -> None:
    decoders = Decoders(1, picture_s=30.0, job_s=30.0)

    def fail() -> str:
        raise MemoryError

    first, second = decoders.begin([fail, lambda: "beside it"]), decoders.begin([lambda: "behind"])
    with pytest.raises(MemoryError):
        decoders.settle(first)
    assert decoders.settle(second) == ["behind"]
    assert not decoders._open


def test_with_too_many_given_up_the_worker_is_worn_out() -> None:
    decoders = Decoders(1, picture_s=0.05, job_s=30.0)
    stop = threading.Event()
    for given_up in range(limits.MAX_ABANDONED_DECODERS + 1):
        assert not decoders.worn_out, given_up
        decoders.run([spin(stop)])
    assert decoders.worn_out
    stop.set()


def test_who_waited_for_others_is_not_blamed() -> None:
    """One that got no processor at all, and one that never began."""
    decoders = Decoders(1, picture_s=0.05, job_s=0.2)
    stop = threading.Event()
    found = decoders.run([lambda: str(stop.wait(60)), lambda: "second"])
    stop.set()
    reasons = [f.reason for f in found if isinstance(f, FacelaneError)]
    assert reasons == [Reason.DEADLINE_EXCEEDED] * 2
    assert all(f.retryable for f in found if isinstance(f, FacelaneError))
