"""Looking at streams: a real server, the real SDK, and the audit log of who looked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.e2e import wire
from tests.fakes import access_units
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until

import facelane
from facelane.v1 import view_service_pb2, view_service_pb2_grpc
from facelane_server.edge.auth import new_key
from facelane_server.edge.roles import Role


@contextlib.contextmanager
def playing(client: facelane.Client, source: str, **options: object) -> Iterator[None]:
    """A camera that sends pictures until the block is left."""
    over = threading.Event()

    def send() -> None:
        with client.analyze_stream(source_id=source, **options) as stream:  # type: ignore[arg-type]
            number = 0
            while not over.wait(0.01):
                stream.send(wire.picture(number % 3), timeout=50.0)
                stream.recv(timeout=50.0)
                number += 1

    camera = threading.Thread(target=send)
    camera.start()
    try:
        yield
    finally:
        over.set()
        camera.join(60)


def sources(client: facelane.Client) -> set[str]:
    return {stream.source_id for stream in client.list_streams()}


def test_streams_are_listed_with_their_figures(client: facelane.Client) -> None:
    with playing(client, "yard"):

        def known() -> facelane.OpenStream | None:
            found = client.list_streams(source_ids=["yard"])
            # Rates are those of the last seconds, in which this machine may have done nothing.
            return found[0] if found and found[0].results > 5 and found[0].result_fps else None

        stream = until(known)
        assert stream.encoding is facelane.Encoding.JPEG
        assert stream.outcome_fps >= stream.result_fps > 0
        assert 0 < stream.age_median <= stream.age_p95
        assert stream.received >= stream.results + stream.drops + stream.errors
        assert stream.gallery_id == "default"
    until(lambda: "yard" not in sources(client), what="the stream's end")


def test_pictures_come_as_they_were_sent_with_their_outcomes(client: facelane.Client) -> None:
    sent = {wire.encoded(seed=seed) for seed in range(3)}
    with playing(client, "lobby"):
        until(lambda: "lobby" in sources(client))
        with contextlib.closing(client.watch_stream("lobby", results_only=True)) as shown:
            for _ in range(5):
                seen = next(shown)
                assert seen.picture.data in sent
                assert seen.outcome is not None
                assert seen.outcome.result is not None
                assert seen.outcome.result.width == 96
            [stream] = client.list_streams(source_ids=["lobby"])
            assert stream.watchers == 1
        # The same stream by its id, to its end.
        last = client.watch_stream(stream_id=stream.stream_id)
        next(last)
    assert sum(1 for _ in last) >= 0, "ends with the stream, without an error"


async def test_the_asyncio_client_looks_too(server: RunningServer, client: facelane.Client) -> None:
    with playing(client, "hall"):
        until(lambda: "hall" in sources(client))
        async with facelane.aio.Client(server.target) as looking:
            async with contextlib.aclosing(looking.watch_stream("hall")) as shown:
                seen = await anext(shown)
            assert seen.picture.encoding is facelane.Encoding.JPEG
            assert [s.source_id for s in await looking.list_streams()] == ["hall"]


def test_video_is_seen_from_the_middle_of_a_group(client: facelane.Client) -> None:
    units = access_units.clip("h264", 30, keyint=30)
    pictures = [facelane.Picture.access_unit(unit, "h264") for unit in units]
    with client.analyze_stream(source_id="gate", overload="lossless") as stream:
        for picture in pictures[:10]:
            stream.send(picture)
        for _ in range(10):
            assert stream.recv(timeout=50.0) is not None
        shown = client.watch_stream("gate")
        before = [next(shown) for _ in range(10)]
        assert [s.picture.data for s in before] == units[:10]
        assert [s.key_frame for s in before] == [True, *[False] * 9]
        assert {s.outcome for s in before} == {None}
        for picture in pictures[10:]:
            stream.send(picture)
        after = [next(shown) for _ in range(20)]
        assert [s.picture.data for s in after] == units[10:]
        assert all(s.outcome is not None and s.outcome.result for s in after)
        stream.close_send()
        assert list(shown) == []


def test_private_streams_are_shown_to_nobody(client: facelane.Client) -> None:
    with playing(client, "changing-room", private=True), playing(client, "open"):
        until(lambda: "open" in sources(client))
        assert "changing-room" not in sources(client)
        with pytest.raises(facelane.NotFoundError) as error:
            next(client.watch_stream("changing-room"))
        assert error.value.reason == facelane.Reason.STREAM_NOT_FOUND


def test_what_cannot_be_asked_is_refused(client: facelane.Client, channel: grpc.Channel) -> None:
    stub = view_service_pb2_grpc.ViewServiceStub(channel)
    for fields in ({}, {"stream_id": "a", "source_id": "b"}, {"source_id": "a", "max_fps": 1e9}):
        with pytest.raises(grpc.RpcError) as error:
            next(stub.WatchStream(view_service_pb2.WatchStreamRequest(**fields), timeout=50))
        assert wire.refusal(error.value)[1] == "ARGUMENT_INVALID"
    with pytest.raises(facelane.ArgumentError):
        next(client.watch_stream())


CONFIG = """[view]
watchers_of_key = 2
[sources."ward-*"]
private = true
"""


def test_keys_see_what_is_theirs_for_as_long_as_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secrets, entries = {}, []
    role = Role("guard", ("view",), sources=("door-*",))
    entries.append(f'[[roles]]\nname = "{role.name}"\nverbs = ["view"]\nsources = ["door-*"]\n')
    for name, scopes, roles in (("camera", ("analyze",), ()), ("guard", (), ("guard",))):
        secrets[name], key = new_key(name, scopes, roles=roles)  # type: ignore[arg-type]
        entries.append(key.entry())
    file.write_text("\n".join(entries))
    auth = f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n{CONFIG}'
    server = RunningServer(tmp_path, toml(tmp_path, THREAD_POOLS, auth))
    with server, contextlib.ExitStack() as stack:
        camera, guard = (
            stack.enter_context(server.client(token=secrets[name])) for name in ("camera", "guard")
        )

        def serving() -> bool:
            try:
                return camera.health() == "SERVING"
            except facelane.FacelaneError:
                return False

        until(serving)
        for source in ("door-1", "hall", "ward-3"):
            stack.enter_context(playing(camera, source))
        until(lambda: sources(guard) == {"door-1"})
        with pytest.raises(facelane.PermissionDeniedError):
            next(guard.watch_stream("hall"))
        with pytest.raises(facelane.PermissionDeniedError):
            camera.list_streams()
        # Without `identify` nobody is named, and its share is two looks.
        looks = [guard.watch_stream("door-1", results_only=True) for _ in range(3)]
        for look in looks[:2]:
            seen = next(look)
            assert seen.outcome is not None
            assert seen.outcome.result is not None
            faces = seen.outcome.result.faces
            assert {face.identity.decision for face in faces} == {facelane.Decision.NOT_EVALUATED}
        with pytest.raises(facelane.OverloadedError) as error:
            next(looks[2])
        assert error.value.reason == "QUOTA_EXCEEDED"
        # The key goes, and what it looks at ends.
        (tmp_path / "keys.toml.denied").write_text("guard\n")
        with pytest.raises(facelane.AuthenticationError):
            for _ in looks[0]:
                pass
    assert server.stop() == 0
    assert "VIEWED" in _audit(server)


def _audit(server: RunningServer) -> str:
    from typer.testing import CliRunner

    from facelane_server import auditing

    listed = CliRunner().invoke(
        auditing.app, ["list", "-n", "1000", "--json", "--config", str(server.config)]
    )
    assert listed.exit_code == 0, listed.stderr
    return listed.stdout
