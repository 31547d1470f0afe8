"""Every method with every role, in its own and in foreign galleries and at foreign sources:
allowed exactly as docs/roles.md says."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until
from typer.testing import CliRunner

import facelane
import facelane.v1
from facelane.v1 import face_pb2
from facelane_server import auditing
from facelane_server.edge.auth import new_key
from facelane_server.edge.roles import VERBS, Role

ROOT = Path(__file__).parents[2]
# Whatever is added: a service that is not in the table fails the tests by being there.
SERVICES = [
    service
    for module in pkgutil.iter_modules(facelane.v1.__path__)
    if module.name.endswith("_service_pb2")
    for service in importlib.import_module(
        f"facelane.v1.{module.name}"
    ).DESCRIPTOR.services_by_name.values()
]
METHODS = {f"{s.full_name}/{m.name}": m for s in SERVICES for m in s.methods}
Row = tuple[str | None, frozenset[str]]


def table() -> dict[str, Row]:
    """Of the page: by method, its verb (None = any key) and what must fit."""
    text = (ROOT / "docs/roles.md").read_text()
    rows = re.findall(
        r"^\| `([\w./]+/\w+)` \| (any|`[\w.-]+`) \| ([\w -]+) \|$", text, re.MULTILINE
    )
    return {
        method: (
            None if verb == "any" else verb.strip("`"),
            frozenset(word for word in bound.split() if word in ("gallery", "source")),
        )
        for method, verb, bound in rows
    }


@pytest.fixture(scope="module")
def holders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, dict]]:  # type: ignore[type-arg]
    """A server with a key for each verb, bound to the gallery `own` and the source `own`."""
    folder = tmp_path_factory.mktemp("roles")
    file = folder / "keys.toml"
    roles = [Role("nothing", ()), *(Role(verb, (verb,)) for verb in VERBS)]
    secrets, entries = {}, []
    for role in roles:
        verbs = "[" + ", ".join(f'"{verb}"' for verb in role.verbs) + "]"
        entries.append(
            f'[[roles]]\nname = "{role.name}"\nverbs = {verbs}\n'
            'galleries = ["own"]\nsources = ["own"]\n'
        )
        secrets[role.name], key = new_key(role.name, (), roles=(role.name,))
        entries.append(key.entry())
    for name in ("door-a", "door-b"):  # of before there were roles
        secrets[name], key = new_key(name, ("analyze",))
        entries.append(key.entry())
    file.write_text("\n".join(entries))
    auth = f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n'
    with RunningServer(folder, toml(folder, THREAD_POOLS, auth)) as server:

        def serving() -> bool:
            with server.client(token=secrets["nothing"], timeout=2.0) as client:
                try:
                    return client.health() == "SERVING"
                except facelane.FacelaneError:
                    return False

        until(serving, 60, "SERVING")
        yield server, secrets


def request(method: str, gallery: str, source: str) -> Any:
    """The least that names the place; what else it lacks is refused later."""
    kind = METHODS[method].input_type._concrete_class
    made = kind()
    fields = METHODS[method].input_type.fields_by_name
    if "gallery_id" in fields:
        made.gallery_id = gallery
    if "source_id" in fields:
        made.source_id = source
    if "subject" in fields:
        made.subject.CopyFrom(face_pb2.Subject(gallery_id=gallery))
    if "options" in fields:
        made.options.gallery_id = gallery
    if "config" in fields:
        made.config.source_id = source
        made.config.options.gallery_id = gallery
    if method.endswith("/Drain"):
        made.grace.seconds = -1  # asked of an administrator who is let in, it is refused
    return made


def denied(channel: grpc.Channel, method: str, message: Any, secret: str) -> bool:
    described = METHODS[method]
    made = channel.stream_stream(
        f"/{method}",
        request_serializer=described.input_type._concrete_class.SerializeToString,
        response_deserializer=described.output_type._concrete_class.FromString,
    )
    metadata = [("authorization", f"Bearer {secret}")]
    call = made(iter([message]), metadata=metadata, timeout=60)
    try:
        next(call)
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
    finally:
        call.cancel()
    assert code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.DEADLINE_EXCEEDED)
    return code is grpc.StatusCode.PERMISSION_DENIED


def test_every_method_stands_in_the_table_and_the_table_is_current() -> None:
    rows = table()
    assert set(METHODS) <= set(rows)
    beyond = {m for m in rows if m not in METHODS}
    assert {m.split("/")[0].split(".")[0] for m in beyond} == {"grpc"}, "health and reflection"
    done = subprocess.run(
        [sys.executable, "docs/generate_roles.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_method_with_every_role_here_and_elsewhere(
    holders: tuple[RunningServer, dict[str, str]],
) -> None:
    server, secrets = holders
    rows = table()
    wrong = []
    tried = 0
    with grpc.insecure_channel(server.target) as channel:
        of_roles = {name: secret for name, secret in secrets.items() if name in ("nothing", *VERBS)}
        for method, (role, secret) in itertools.product(METHODS, of_roles.items()):
            verb, bound = rows[method]
            for gallery, source in itertools.product(("own", "foreign"), repeat=2):
                here = not (
                    ("gallery" in bound and gallery == "foreign")
                    or ("source" in bound and source == "foreign")
                )
                allowed = verb is None or (verb == role and here)
                tried += 1
                answer = denied(channel, method, request(method, gallery, source), secret)
                if answer is allowed:
                    wrong.append((method, role, gallery, source, allowed))
    assert wrong == []
    assert tried == len(METHODS) * len(of_roles) * 4


def test_whoever_may_not_identify_gets_no_names(
    holders: tuple[RunningServer, dict[str, str]],
) -> None:
    from tests.e2e import wire

    server, secrets = holders
    with server.client(token=secrets["analyze"]) as client:
        result = client.analyze_image(wire.picture(), gallery="own")
        outcomes = list(client.analyze([wire.picture()] * 3, gallery="own", source_id="own"))
    results = [result, *(outcome.result for outcome in outcomes)]
    faces = [face for result in results if result is not None for face in result.faces]
    assert len(faces) >= 4
    assert {face.identity.decision.name for face in faces} == {"NOT_EVALUATED"}
    assert {face.identity.similarity for face in faces} == {None}


def test_a_camera_hears_of_no_other(holders: tuple[RunningServer, dict[str, str]]) -> None:
    """Not of what happens at others' streams, whatever source they give, and not from a token."""
    from tests.e2e import wire

    server, secrets = holders
    with (
        server.client(token=secrets["door-a"], timeout=20) as a,
        server.client(token=secrets["door-b"], timeout=20) as b,
        a.watch_events() as live,
    ):
        begun = live.resume_token
        for source in ("vault", "door-a", ""):
            list(b.analyze([wire.picture()] * 3, source_id=source))
        list(a.analyze([wire.picture()] * 3, source_id="mine"))
        for watched in (live, a.watch_events(resume_token=begun)):
            heard = []
            for event in watched:
                heard.append(event)
                if event.kind.name == "STREAM_CLOSED":
                    break
            watched.close()
            assert {event.source_id for event in heard} == {"mine"}
            assert {event.stream_id for event in heard} == {heard[0].stream_id}
            assert {"STREAM_OPENED", "TRACK_STARTED"} <= {event.kind.name for event in heard}


def test_what_they_did_stands_in_the_audit_log(
    holders: tuple[RunningServer, dict[str, str]],
) -> None:
    from tests.e2e import wire

    server, secrets = holders
    with server.client(token=secrets["enroll"]) as client:
        client.enroll("lovelace", wire.picture(), gallery="own")
        with pytest.raises(facelane.PermissionDeniedError):
            client.identify(wire.picture(), gallery="own")
    with server.client(token=secrets["identify"]) as client:
        client.identify(wire.picture(), gallery="own")
    with server.client(token=secrets["admin"]) as client, pytest.raises(facelane.FacelaneError):
        client.restart_worker("none#0")
    command = ["list", "-n", "100000", "--json", "--config", str(server.config)]

    def done() -> set[tuple[str, str, str]]:
        listed = CliRunner().invoke(auditing.app, command)
        assert listed.exit_code == 0, listed.stderr
        assert "lovelace" not in listed.stdout
        lines = [json.loads(line) for line in listed.stdout.splitlines()]
        return {(e["action"], e.get("by", ""), e.get("method", "")) for e in lines}

    expected = {
        ("STARTED", "", ""),
        ("ENROLLED", "enroll", "EnrollFace"),
        ("REFUSED", "enroll", "IdentifyFace"),
        ("LOOKED_UP", "identify", "IdentifyFace"),
        ("ADMINISTERED", "admin", "RestartWorker"),
    }
    until(lambda: expected <= done(), what="the entries")
    verified = CliRunner().invoke(auditing.app, ["verify", "--config", str(server.config)])
    assert verified.exit_code == 0, verified.output
