"""The asyncio client against a scripted server: what differs from the blocking one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.waiting import auntil

import facelane

JPEG = b"\xff\xd8\xff\xe0" + b"x" * 60
PICTURE = facelane.Picture.encoded(JPEG)
QUICK = facelane.Reconnect(initial_delay=0.01, max_delay=0.05, jitter=0.0)


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


@pytest.fixture
async def client(server: fake.ScriptedServer) -> AsyncIterator[facelane.aio.Client]:
    async with facelane.aio.Client(server.target, timeout=30.0) as made:
        yield made


async def collect(outcomes: AsyncIterator[facelane.Outcome], into: list[facelane.Outcome]) -> None:
    """Keeps what came before an error."""
    async for outcome in outcomes:
        into.append(outcome)  # noqa: PERF401 - a comprehension would lose it


def tasks() -> set[str]:
    return {t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("facelane")}


async def test_a_stream_from_open_to_summary(client: facelane.aio.Client) -> None:
    async with client.analyze_stream(source_id="door", overload="lossless") as stream:
        assert stream.opened is not None
        assert stream.limits is not None
        assert stream.connected
        for _ in range(100):
            await stream.send(PICTURE)
        stream.close_send()
        outcomes = [o async for o in stream]
        assert stream.ended
    assert [o.frame_id for o in outcomes] == list(range(1, 101))
    assert stream.summary.results == 100
    assert await stream.recv() is None
    await auntil(lambda: not tasks(), what="no task left")


async def test_analyze_takes_both_kinds_of_iterables(client: facelane.aio.Client) -> None:
    async def camera() -> AsyncIterator[facelane.Frame]:
        for number in range(40):
            await asyncio.sleep(0)
            yield facelane.Frame(PICTURE, stream_offset=number / 25)

    assert len([o async for o in client.analyze([PICTURE] * 40)]) == 40
    offsets = [o.stream_offset async for o in client.analyze(camera())]
    assert offsets == pytest.approx([n / 25 for n in range(40)])
    await auntil(lambda: not tasks(), what="no task left")


async def test_analyze_raises_the_iterable_s_error(client: facelane.aio.Client) -> None:
    async def camera() -> AsyncIterator[facelane.Picture]:
        yield PICTURE
        raise OSError("the camera is gone")

    got: list[facelane.Outcome] = []
    with pytest.raises(OSError, match="camera is gone"):
        await collect(client.analyze(camera()), got)
    assert [o.frame_id for o in got] == [1]


async def test_analyze_can_be_left(client: facelane.aio.Client) -> None:
    async def endless() -> AsyncIterator[facelane.Picture]:
        while True:
            yield PICTURE

    async with contextlib.aclosing(client.analyze(endless())) as outcomes:
        async for outcome in outcomes:
            assert outcome.frame_id == 1
            break
    await auntil(lambda: not tasks(), what="no task left")


async def test_analyze_ends_with_its_client_though_the_camera_gives_nothing(
    server: fake.ScriptedServer,
) -> None:
    async def camera() -> AsyncIterator[facelane.Picture]:
        yield PICTURE
        await asyncio.Event().wait()

    async with facelane.aio.Client(server.target) as client:
        outcomes = client.analyze(camera())
        assert (await anext(outcomes)).frame_id == 1
        waiting = asyncio.create_task(anext(outcomes, None))
        await asyncio.sleep(0)
        await client.close()
        assert await asyncio.wait_for(waiting, 30) is None
    await auntil(lambda: not tasks(), what="no task left")


async def test_analyze_raises_when_the_stream_breaks(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.scripts.append(fake.breaking_after(answered=1, received=2))
    got: list[facelane.Outcome] = []
    with pytest.raises(facelane.ConnectionLostError):
        await collect(client.analyze([PICTURE] * 10), got)
    assert got[0].result is not None
    assert all(o.error for o in got[1:])


async def test_a_full_window_holds_send_back_and_try_send_declines(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=2))
    async with client.analyze_stream() as stream:
        await stream.send(PICTURE)
        assert stream.try_send(PICTURE) == 2
        assert stream.try_send(PICTURE) is None
        with pytest.raises(facelane.DeadlineExceededError) as caught:
            await stream.send(PICTURE, timeout=0.05)
        assert caught.value.reason == "WINDOW_FULL"
        with pytest.raises(facelane.DeadlineExceededError):
            await stream.recv(timeout=0.05)
        released.set()
        assert await stream.send(PICTURE) == 3


async def test_a_cancelled_sender_takes_no_place_and_no_wake(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=1))
    async with client.analyze_stream() as stream:
        await stream.send(PICTURE)
        senders = [asyncio.create_task(stream.send(PICTURE)) for _ in range(3)]
        await asyncio.sleep(0)
        senders[0].cancel()
        released.set()
        done = await asyncio.gather(*senders, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert sorted(n for n in done if isinstance(n, int)) == [2, 3]


async def test_cancelling_the_user_s_task_cleans_up(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released))
    entered = asyncio.Event()

    async def work() -> None:
        async with client.analyze_stream() as stream:
            await stream.send(PICTURE)
            entered.set()
            await stream.recv()

    task = asyncio.create_task(work())
    await asyncio.wait_for(entered.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    released.set()
    await auntil(lambda: not tasks(), what="no task left")


async def test_closing_the_client_closes_its_streams(server: fake.ScriptedServer) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released))
    client = facelane.aio.Client(server.target)
    stream = await client.analyze_stream().__aenter__()
    await stream.send(PICTURE)
    await client.close()
    released.set()
    assert [o.error.reason async for o in stream if o.error] == ["CANCELLED"]
    with pytest.raises(RuntimeError, match="was closed"):
        await client.server_info()
    for use in (client.analyze_stream, client.watch_events):
        with pytest.raises(RuntimeError, match="was closed"):
            use()


async def test_a_stream_that_was_not_entered_says_so(client: facelane.aio.Client) -> None:
    stream = client.analyze_stream()
    with pytest.raises(RuntimeError, match="async with"):
        await stream.send(PICTURE)
    with pytest.raises(RuntimeError, match="async with"):
        stream.try_send(PICTURE)
    with pytest.raises(RuntimeError, match="async with"):
        await anext(stream)
    await stream.close()
    with pytest.raises(RuntimeError, match="opened once"):
        await stream.__aenter__()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, facelane.ArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, facelane.OverloadedError),
    ],
)
async def test_a_refused_stream_raises_on_entering(
    server: fake.ScriptedServer,
    client: facelane.aio.Client,
    code: grpc.StatusCode,
    kind: type[facelane.FacelaneError],
) -> None:
    server.scripts.append(fake.refusing(code, "STREAM_LIMIT", "do this instead"))
    with pytest.raises(kind, match="do this instead"):
        async with client.analyze_stream():
            pass
    await auntil(lambda: not tasks(), what="no task left")


async def test_nobody_there() -> None:
    async with facelane.aio.Client("127.0.0.1:1", timeout=2.0) as client:
        with pytest.raises(facelane.UnavailableError, match="check that it runs"):
            async with client.analyze_stream():
                pass


async def test_a_server_that_never_opens_is_given_up(server: fake.ScriptedServer) -> None:
    released = threading.Event()

    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        released.wait(30)
        yield fake.opened()

    server.scripts.append(script)
    async with facelane.aio.Client(server.target, timeout=0.2) as client:
        with pytest.raises(facelane.UnavailableError, match="did not open the stream"):
            async with client.analyze_stream():
                pass
    released.set()


async def test_a_hanging_server_is_noticed(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=1))
    told: list[facelane.StreamUpdate] = []
    async with client.analyze_stream(
        stall_timeout=0.1, reconnect=QUICK, on_update=told.append
    ) as stream:
        await stream.send(PICTURE)
        outcome = await stream.recv(timeout=30)
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.reason == "CONNECTION_LOST"
        assert await stream.send(PICTURE) == 2
        assert stream.summary.connections == 2
        assert [u.kind.value for u in told] == ["CONNECTION_LOST", "RECONNECTED"]
    released.set()


async def test_a_server_that_breaks_the_rules(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.scripts.append(fake.saying(fake.summary(results=5)))
    async with client.analyze_stream(reconnect=QUICK) as stream:
        await stream.send(PICTURE)
        assert await stream.recv(timeout=30) is not None
        with pytest.raises(facelane.ProtocolError, match="counted 5"):
            await stream.recv(timeout=30)


async def test_a_reader_ends_with_an_error_whatever_happens_to_it(
    client: facelane.aio.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_pb: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(facelane.convert, "stream_message", explode)
    with pytest.raises(facelane.ProtocolError, match="ZeroDivisionError"):
        async with client.analyze_stream(reconnect=QUICK):
            pass
    await auntil(lambda: not tasks(), what="no task left")


async def test_waiting_in_vain_leaves_nothing_behind(client: facelane.aio.Client) -> None:
    """A program that polls a camera at rest must not grow."""
    async with client.analyze_stream() as stream:
        for _ in range(20):
            with pytest.raises(facelane.DeadlineExceededError):
                await stream.recv(timeout=0.002)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.recv(), 0.002)
        gc.collect()
        kept = {id(f) for f in gc.get_referrers(asyncio.get_running_loop()) if is_future(f)}
        assert len(kept) < 10


def is_future(found: object) -> bool:
    return type(found).__name__ == "Future"


async def test_reconnect_keeps_counting_and_loses_nothing(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.scripts.extend(
        [
            fake.breaking_after(answered=2, received=4),
            fake.refusing(grpc.StatusCode.UNAVAILABLE, "DRAINING"),
            fake.breaking_after(answered=0, received=1),
        ]
    )
    updates: list[facelane.StreamUpdate] = []
    async with client.analyze_stream(
        reconnect=QUICK, overload="lossless", on_update=updates.append
    ) as stream:

        async def send_all() -> None:
            for _ in range(30):
                await stream.send(PICTURE)
            stream.close_send()

        sender = asyncio.create_task(send_all())
        got = [o async for o in stream]
        await sender
    assert [o.frame_id for o in got] == list(range(1, 31))
    assert stream.summary.lost == sum(1 for o in got if o.error) > 0
    assert stream.summary.connections == 3
    assert [u.kind.value for u in updates].count("RECONNECTED") == 2


async def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s.sock"
    first = fake.ScriptedServer(address=target)
    async with (
        facelane.aio.Client(target, timeout=30) as client,
        client.analyze_stream(reconnect=QUICK) as stream,
    ):
        await stream.send(PICTURE)
        assert await stream.recv(timeout=30) is not None
        await asyncio.to_thread(first.stop)
        await auntil(lambda: not stream.connected, what="the loss to be noticed")
        with fake.ScriptedServer(address=target):
            assert await stream.send(PICTURE, timeout=30) == 2
            assert await stream.recv(timeout=30) is not None


async def test_updates_reach_the_callback_and_its_failure_harms_nobody(
    server: fake.ScriptedServer, client: facelane.aio.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        yield fake.update("TRACK_ENDED", track_id=9)
        for request in requests:
            yield fake.outcome(request.frame)
        yield fake.summary(results=1)

    server.scripts.append(script)

    def callback(update: facelane.StreamUpdate) -> None:
        raise RuntimeError("the user's")

    async with client.analyze_stream(on_update=callback) as stream:
        await stream.send(PICTURE)
        stream.close_send()
        assert len([o async for o in stream]) == 1
        assert stream.updates[0].track_id == 9
    assert "on_update raised" in caplog.text


async def test_every_single_call(server: fake.ScriptedServer, client: facelane.aio.Client) -> None:
    assert (await client.analyze_image(PICTURE)).width == 640
    made = await client.create_subject("grace", labels={"team": "navy"})
    changed = await client.update_subject("grace", display_name="Grace", etag=made.etag)
    assert await client.get_subject("grace") == changed
    enrollment = await client.enroll("grace", PICTURE)
    assert await client.list_templates("grace") == [enrollment.template]
    assert (await client.verify("grace", PICTURE)).verified
    assert (await client.identify(PICTURE))[0].identity.matched
    await client.delete_template(enrollment.template.template_id)
    for number in range(3):
        await client.create_subject(f"s{number}")
    listed = [s.subject_id async for s in client.list_subjects(page_size=2)]
    assert listed == ["grace", "s0", "s1", "s2"]
    assert await client.delete_subject("grace") == 1
    with pytest.raises(facelane.NotFoundError):
        await client.get_subject("grace")
    assert (await client.server_info()).version == "1.2.3"
    assert (await client.pools())[0].pool == "detector"
    assert await client.restart_worker("detector#0") == facelane.WorkerRestarted(1, 2)
    assert (await client.reload_model("detector", "m@2")).new_model_id == "m@2"
    await client.drain(1.0)
    assert server.admin[-1].grace.seconds == 1


async def test_health(server: fake.ScriptedServer, client: facelane.aio.Client) -> None:
    assert await client.health() == "SERVING"
    assert await client.health("what") is facelane.HealthStatus.SERVICE_UNKNOWN
    await client.wait_until_serving(30)
    server.health[""] = 2
    with pytest.raises(facelane.DeadlineExceededError, match="NOT_SERVING"):
        await client.wait_until_serving(1.0, poll_interval=0.01)
    async with facelane.aio.Client("127.0.0.1:1") as lonely:
        with pytest.raises(facelane.DeadlineExceededError, match="UNREACHABLE"):
            await lonely.wait_until_serving(1.0, poll_interval=0.01)


async def test_what_was_heard_last_is_told(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.health = fake.LosingItsTongue(2)
    with pytest.raises(facelane.DeadlineExceededError, match="NOT_SERVING"):
        await client.wait_until_serving(1.0, poll_interval=0.01)
    server.health.found.set()


async def test_events(server: fake.ScriptedServer, client: facelane.aio.Client) -> None:
    async with client.watch_events(kinds=["SUBJECT_SEEN"], reconnect=QUICK) as events:
        got = []
        async for event in events:
            got.append(event.sequence)
            if len(got) == 5:
                break
    assert got == [1, 2, 3, 4, 5]
    assert [s.resume_token for s in server.subscriptions] == ["", "3"]
    assert [e async for e in events] == []

    plain = client.watch_events()
    for _ in range(3):
        await anext(plain)
    with pytest.raises(facelane.UnavailableError):
        await anext(plain)
    server.failures.append((grpc.StatusCode.OUT_OF_RANGE, "HISTORY_LOST", "too old"))
    with pytest.raises(facelane.HistoryLostError):
        await anext(client.watch_events("1", reconnect=QUICK))


async def test_a_quiet_subscription_resumes_where_it_began(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.events_before, server.event_burst = 7, 0
    async with client.watch_events(reconnect=QUICK) as events:
        assert [s.resume_token for s in server.subscriptions] == [""]
        assert events.resume_token == "7"
        server.event_burst = 1
        assert (await anext(events)).sequence == 8
    assert {s.resume_token for s in server.subscriptions[1:]} == {"7"}


async def test_entering_waits_for_a_server_no_longer_than_its_timeout() -> None:
    forever = facelane.Reconnect(initial_delay=0.05, max_delay=0.05)
    async with facelane.aio.Client("127.0.0.1:1", timeout=30) as lonely:
        with pytest.raises(facelane.UnavailableError):
            await lonely.watch_events().__aenter__()
    async with (
        asyncio.timeout(30),
        facelane.aio.Client("127.0.0.1:1", timeout=0.2) as lonely,
        lonely.watch_events(reconnect=forever),
    ):
        pass


async def test_a_subscription_that_never_begins_is_given_up(server: fake.ScriptedServer) -> None:
    server.released.clear()
    async with facelane.aio.Client(server.target, timeout=0.2) as client:
        with pytest.raises(facelane.DeadlineExceededError, match="did not begin"):
            await client.watch_events().__aenter__()
        async with client.watch_events(reconnect=QUICK) as events:
            # It goes on trying, and a server that comes to itself is heard.
            server.released.set()
            assert (await anext(events)).sequence == 1


async def test_waiting_for_an_event_with_a_timeout_harms_nothing(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.event_burst, server.events_stay_open = 1, True
    async with client.watch_events() as events:
        assert (await anext(events)).sequence == 1
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.05)
        assert len(server.subscriptions) == 1
        server.say_event.set()
        assert (await asyncio.wait_for(anext(events), 30)).sequence == 2


async def test_events_can_be_closed_from_another_task(
    server: fake.ScriptedServer, client: facelane.aio.Client
) -> None:
    server.event_burst, server.events_stay_open = 1, True
    events = client.watch_events()
    await anext(events)
    waiting = asyncio.create_task(anext(events, None))
    await asyncio.sleep(0)
    await events.close()
    assert await asyncio.wait_for(waiting, 30) is None


def test_both_clients_are_one_interface() -> None:
    """What a program can call, and how, does not depend on how it waits."""

    def interface(kind: type) -> dict[str, list[tuple[object, ...]]]:
        return {
            name: [
                # An asynchronous client draws from asynchronous iterables as well.
                (p.name, p.kind, p.default, None if p.name == "frames" else p.annotation)
                for p in inspect.signature(member).parameters.values()
            ]
            if inspect.isfunction(member)
            else []
            for name, member in inspect.getmembers(kind)
            if not name.startswith("_")
        }

    for blocking in (facelane.Client, facelane.AnalyzeStream, facelane.EventStream):
        awaited = getattr(facelane.aio, blocking.__name__)
        assert interface(blocking) == interface(awaited)
        assert all(getattr(blocking, name).__doc__ for name in interface(blocking))


async def test_events_that_are_closed_while_the_token_is_asked_for(
    server: fake.ScriptedServer,
) -> None:
    """No call is begun that nobody would end, and no connection taken that nobody gives back."""
    asked, may = asyncio.Event(), asyncio.Event()

    async def token() -> str:
        asked.set()
        await may.wait()
        return "secret"

    async with facelane.aio.Client(server.target, token=token) as client:
        events = client.watch_events()
        entering = asyncio.create_task(events.__aenter__())
        await asked.wait()
        await events.close()
        may.set()
        async with asyncio.timeout(30):
            await entering
        assert (events._call, client._channels._calls) == (None, {None: 0})


async def test_tls_and_target_are_those_of_the_endpoint() -> None:
    client = facelane.aio.Client("127.0.0.1:1")
    assert client.target == "127.0.0.1:1"
    assert repr(client) == "facelane.aio.Client('127.0.0.1:1')"
    await client.close()
    await client.close()
