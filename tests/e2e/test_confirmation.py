"""A gallery where two people have to say that it is somebody, over the wire."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
from tests.e2e import wire
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until

import facelane
from facelane_server.edge.auth import new_key

ROLES = """
[[roles]]
name = "camera"
verbs = ["analyze"]
[[roles]]
name = "guard"
verbs = ["events", "confirm", "gallery.read"]
[[roles]]
name = "door"
verbs = ["events"]
[[roles]]
name = "desk"
verbs = ["enroll"]
"""


def test_nobody_was_seen_before_two_keys_say_so(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secrets, entries = {}, [ROLES]
    for name, role in (
        ("camera", "camera"), ("guard-1", "guard"), ("guard-2", "guard"), ("door", "door"),
        ("desk", "desk"),
    ):  # fmt: skip
        secrets[name], key = new_key(name, (), roles=(role,))
        entries.append(key.entry())
    file.write_text("\n".join(entries))
    extra = f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n[galleries.vault]\nconfirm = 2\n'
    with RunningServer(tmp_path, toml(tmp_path, THREAD_POOLS, extra)) as server:

        def serving() -> bool:
            with server.client(token=secrets["door"], timeout=2.0) as client:
                try:
                    return client.health() == "SERVING"
                except facelane.FacelaneError:
                    return False

        until(serving, 60, "SERVING")
        with server.client(token=secrets["desk"]) as desk:
            desk.enroll("ada", wire.picture(1), gallery="vault")
        heard: dict[str, queue.SimpleQueue[facelane.Event]] = {}
        readers, streams, clients = [], [], []
        try:
            for name in ("guard-1", "door"):
                client = server.client(token=secrets[name])
                clients.append(client)
                events = client.watch_events()
                streams.append(events)
                told = heard[name] = queue.SimpleQueue()

                def read(
                    events: facelane.EventStream = events,
                    told: queue.SimpleQueue[facelane.Event] = told,
                ) -> None:
                    for event in events:
                        told.put(event)

                readers.append(threading.Thread(target=read))
                readers[-1].start()
            with server.client(token=secrets["camera"]) as camera:
                frames = [facelane.Frame(wire.picture(1), stream_offset=k * 0.1) for k in range(12)]
                list(camera.analyze(frames, source_id="door-1", gallery="vault"))

            def until_kind(name: str, kind: str) -> list[facelane.Event]:
                found = [heard[name].get(timeout=30)]
                while found[-1].kind != kind:
                    found.append(heard[name].get(timeout=30))
                return found

            of_guard = until_kind("guard-1", "STREAM_CLOSED")
            of_door = until_kind("door", "STREAM_CLOSED")
            [candidate] = [e for e in of_guard if e.kind == "SUBJECT_CANDIDATE"]
            assert candidate.candidate_subject_id == "ada"
            assert not candidate.identity.matched, "no door opens for a candidate"
            assert "SUBJECT_CANDIDATE" not in {e.kind for e in of_door}
            named = {e.identity.subject_id for e in [*of_guard, *of_door]}
            assert named == {""}, "nobody else was told a name"
            first, second = (server.client(token=secrets[f"guard-{n}"]) for n in (1, 2))
            clients += [first, second]
            assert first.confirm_sighting(candidate, gallery="vault").state == "OPEN"
            assert first.confirm_sighting(candidate, gallery="vault").agreed == 1
            with pytest.raises(facelane.NotFoundError) as missing:
                second.confirm_sighting(candidate.sequence + 1000, gallery="vault")
            assert missing.value.reason == "EVENT_NOT_FOUND"
            with pytest.raises(facelane.ArgumentError):
                second.confirm_sighting(candidate)  # of another gallery, which asks nobody
            with (
                server.client(token=secrets["door"]) as door,
                pytest.raises(facelane.PermissionDeniedError),
            ):
                door.confirm_sighting(candidate, gallery="vault")
            done = second.confirm_sighting(candidate.sequence, gallery="vault")
            assert (done.state, done.agreed, done.needed) == ("CONFIRMED", 2, 2)
            for name in ("guard-1", "door"):
                seen = until_kind(name, "SUBJECT_SEEN")[-1]
                assert seen.identity.subject_id == "ada"
                assert seen.candidate_sequence == candidate.sequence
        finally:
            for events in streams:
                events.close()
            for reader in readers:
                reader.join(30)
            for client in clients:
                client.close()
