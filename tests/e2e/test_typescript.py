"""The TypeScript client, against real servers: its own tests, and the same outcomes as Python's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.fakes.cameras import jpeg
from tests.running_example import RunningExample
from tests.running_server import RunningServer, toml
from tests.waiting import until

import facelane
from facelane_bridge.demo_clip import FPS, Camera, photos

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "clients" / "typescript"


@pytest.fixture(scope="module")
def built() -> Path:
    """What tsc makes of it, types checked."""
    if shutil.which("node") is None:
        pytest.skip("needs node 20 or later")
    if not (CLIENT / "node_modules").is_dir():
        pytest.skip("needs its modules: npm ci --prefix clients/typescript")
    done = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", "-p", "."],
        cwd=CLIENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return CLIENT / "dist"


def test_the_generated_code_is_current() -> None:
    texts = [path.read_bytes() for path in sorted((ROOT / "protos/facelane/v1").glob("*.proto"))]
    recorded = (CLIENT / "src/gen/PROTO_SHA256").read_text().strip()
    assert hashlib.sha256(b"".join(texts)).hexdigest() == recorded, (
        "run `make protos`, then `npm run generate` in clients/typescript"
    )


@pytest.mark.timeout(400)
def test_its_own_tests_pass_against_a_real_server(
    built: Path, server: RunningServer, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(jpeg(1))
    environment = os.environ | {
        "FACELANE_TEST_TARGET": server.target,
        "FACELANE_TEST_PICTURE": str(picture),
    }
    tests = sorted(str(path) for path in (built / "test").glob("*.test.js"))
    assert len(tests) == 3
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "--test-timeout=120000", *tests],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout


def test_a_server_that_is_killed_and_comes_back(built: Path, start: Start, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    first = start()
    out = tmp_path / "out"
    with out.open("wb") as file:
        streaming = subprocess.Popen(
            ["node", str(built / "examples/frames.js"), str(tmp_path)],
            env=os.environ | {"FACELANE_TARGET": first.target, "FACELANE_LOOP": "1"},
            stdout=file,
            stderr=subprocess.PIPE,
        )

    def results() -> int:
        return out.read_bytes().count(b'"result"')

    try:
        until(lambda: results() > 20, what="outcomes")
        first.process.kill()
        first.process.wait(30)
        with RunningServer(first.folder, toml(first.folder)) as second:
            second.wait_serving()
            before = results()
            until(lambda: results() > before + 20, what="outcomes of the second server")
            streaming.terminate()
            _, said = streaming.communicate(timeout=60)
    finally:
        streaming.kill()
    assert streaming.returncode == 0, said.decode()
    *lines, last = map(json.loads, out.read_text().splitlines())
    assert [line["frame"] for line in lines] == list(range(1, len(lines) + 1))
    lost = [line for line in lines if line["kind"] == "error"]
    assert {line["reason"] for line in lost} <= {"CONNECTION_LOST"}
    assert last["counts"]["connections"] == 2
    assert last["counts"]["submitted"] == len(lines)
    assert last["counts"]["lost"] == len(lost)


def test_the_door_and_the_alarm_beside_a_server(
    built: Path, server: RunningServer, tmp_path: Path
) -> None:
    """As ``test_examples.py`` has it of Python's."""
    opened = tmp_path / "opened"
    opener = tmp_path / "opener"
    opener.write_text(f'#!/bin/sh\nprintf %s "$1" >>{opened}\n')
    opener.chmod(0o755)
    at = {"FACELANE_TARGET": server.target}
    source = ("--source", "typed-front")
    examples = built / "examples"
    with (
        server.client() as client,
        RunningExample(
            examples / "door.js", *source, "--latest", "600", "--", str(opener), env=at
        ) as door,
        RunningExample(examples / "alarm.js", *source, env=at) as alarm,
    ):
        client.enroll("ada-of-the-typed-door", wire.picture(35))
        for program in (door, alarm):
            program.wait_for(lambda line: line.get("listening"))

        def film(seed: int, source: str) -> str:
            frames = [facelane.Frame(wire.picture(seed), stream_offset=k * 0.1) for k in range(50)]
            return list(client.analyze(frames, source_id=source))[-1].stream_id

        film(35, "typed-back")
        unknown = film(36, "typed-front")
        ada = film(35, "typed-front")
        line = door.wait_for(lambda line: line.get("open"))
        assert (line["open"], line["stream"]) == ("ada-of-the-typed-door", ada)
        told = [line for line in door.lines if line.get("closed")]
        assert {(line["closed"], line["stream"]) for line in told} == {("UNKNOWN", unknown)}
        until(opened.exists, what="the command")
        line = alarm.wait_for(lambda line: line.get("alarm"))
        assert (line["alarm"], line["stream"]) == ("UNKNOWN_SEEN", unknown)
        client.delete_subject("ada-of-the-typed-door")
    assert opened.read_text() == "ada-of-the-typed-door"


def test_without_a_server_the_door_and_the_alarm_say_so(built: Path, tmp_path: Path) -> None:
    at = {"FACELANE_TARGET": f"unix:{tmp_path}/nobody.sock"}
    for name, what in (("door", "closed"), ("alarm", "blind")):
        program = built / "examples" / f"{name}.js"
        with RunningExample(program, "--source", "front", env=at) as running:
            running.wait_for(lambda line, what=what: line.get(what))
            assert all(what in line for line in running.lines)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With the models that ship."""
    folder = tmp_path_factory.mktemp("starter")
    with RunningServer(folder, toml(folder, pools="[pools]\n")) as made:
        made.wait_serving(120)
        yield made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_clip_has_the_same_outcomes(
    built: Path, starter: RunningServer, tmp_path: Path
) -> None:
    camera = Camera()
    numbers = range(0, 400, 8)
    frames = [cv2.imencode(".jpg", camera.frame(number))[1].tobytes() for number in numbers]
    for number, frame in enumerate(frames):
        (tmp_path / f"{number:03d}.jpg").write_bytes(frame)
    rate = FPS / 8
    with starter.client() as client:
        for name, photo in photos().items():
            client.enroll(
                name,
                facelane.Picture.from_file(photo.path),
                skip_liveness=True,
                allow_multiple_faces=True,
            )
        expected: list[dict[str, Any]] = []
        with client.analyze_stream(
            source_id="frames", overload=facelane.Overload.LOSSLESS
        ) as stream:
            for number, frame in enumerate(frames):
                stream.send(facelane.Picture.encoded(frame), stream_offset=number / rate)
            stream.close_send()
            for outcome in stream:
                assert isinstance(outcome.body, facelane.FrameResult)
                faces = [
                    (face.track_id, face.identity.decision.value, face.identity.subject_id,
                     face.liveness.verdict.value, round(face.box.x), round(face.box.width))
                    for face in outcome.body.faces
                ]  # fmt: skip
                expected.append({"frame": outcome.frame_id, "faces": faces})
    done = subprocess.run(
        ["node", str(built / "examples/frames.js"), str(tmp_path), str(rate)],
        env=os.environ | {"FACELANE_TARGET": starter.target},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = []
    for line in map(json.loads, done.stdout.splitlines()[:-1]):
        assert line["kind"] == "result"
        faces = [
            (face["track"], face["decision"], face["subject"], face["live"],
             round(face["box"][0]), round(face["box"][2]))
            for face in line["faces"]
        ]  # fmt: skip
        found.append({"frame": line["frame"], "faces": faces})
    assert found == expected
    assert any(face[1] == "MATCH" for one in found for face in one["faces"])
