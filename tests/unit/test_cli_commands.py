"""The ``facelane`` command against a scripted server, as a process would see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import grpc
import numpy as np
import pytest
from tests.fakes import scripted_server as fake
from tests.waiting import until
from typer.testing import CliRunner

import facelane
from facelane.cli.app import app
from facelane.cli.sources import SourceError

REFUSED_CODE = 3
runner = CliRunner()


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    cv2.imwrite(str(path), np.full((480, 640, 3), 90, np.uint8))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """30 frames of 320x240 at 15 frames/s."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(30):
            pixels = np.full((240, 320, 3), number * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        container.mux(stream.encode())
    return path


def run(server: fake.ScriptedServer | None, *words: object, code: int = 0, **more: Any) -> Any:
    target = "127.0.0.1:1" if server is None else server.target
    result = runner.invoke(
        app, ["--target", target, *map(str, words)], prog_name="facelane", **more
    )
    assert result.exit_code == code, (result.output, result.exception)
    return result


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# analyze


def test_a_picture(server: fake.ScriptedServer, photo: Path) -> None:
    result = run(server, "analyze", photo)
    assert "MATCH" in result.stdout
    assert "grace" in result.stdout
    assert "1 frames = 1 results + 0 drops + 0 errors; 1 faces" in result.stdout
    config = server.streams[0][0].config
    assert config.disable_tracking
    assert config.overload_policy == 2
    # The bytes go as they are.
    assert server.streams[0][1].frame.picture.data == photo.read_bytes()


def test_a_picture_as_json_lines(server: fake.ScriptedServer, photo: Path) -> None:
    result, summary = lines(run(server, "analyze", photo, "--format", "jsonl").stdout)
    assert result["type"] == "result"
    assert (result["source"], result["camera"]) == (str(photo), "photo")
    assert result["frame_id"] == 1
    face = result["faces"][0]
    assert (face["decision"], face["subject_id"]) == ("MATCH", "grace")
    assert face["box"] == [10.0, 20.0, 60.0, 80.0]
    assert face["ood_score"] == 0.8
    assert summary["type"] == "summary"
    assert summary["frames"] == summary["results"] == 1
    assert server.streams[0][0].config.source_id == "photo"


def test_a_folder_with_a_damaged_picture(
    server: fake.ScriptedServer, photo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo.read_bytes())
    (folder / "b.jpg").write_bytes(b"nonsense")
    (folder / "c.jpg").write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    result = run(server, "analyze", folder, "-o", out, code=1)
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg", "c.jpg"]
    assert "2 frames = 2 results" in result.stdout
    assert "b.jpg" in result.stderr
    assert "damaged" in result.stderr
    # The ids on the wire tell which were left out.
    assert [r.frame.frame_id for r in server.streams[0][1:]] == [1, 3]
    unreadable = lines(run(server, "analyze", folder, "-f", "jsonl", code=1).stdout)
    kinds = [u["type"] for u in unreadable]
    assert kinds == ["result", "error", "result", "passed_over", "summary"]


def test_an_annotated_picture_differs_where_the_face_is(
    server: fake.ScriptedServer, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    run(server, "analyze", photo, "--out", out)
    drawn = cv2.imread(str(out))
    assert drawn is not None
    assert drawn.shape == (480, 640, 3)
    assert abs(int(drawn[20, 40, 1]) - 200) < 30, "the box's upper edge is green"
    assert abs(int(drawn[300, 400, 1]) - 90) < 10, "far away nothing is drawn"


def test_a_video_with_an_annotated_copy(
    server: fake.ScriptedServer, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    result = run(server, "analyze", clip, "-o", out)
    assert "30 frames = 30 results" in result.stdout
    assert "grace" in result.stdout
    frames = [r.frame for r in server.streams[0][1:]]
    offsets = [f.stream_offset.seconds + f.stream_offset.nanos / 1e9 for f in frames]
    assert offsets == pytest.approx([n / 15 for n in range(30)], abs=1e-3)
    assert not server.streams[0][0].config.disable_tracking
    with av.open(str(out)) as made:
        assert made.streams.video[0].average_rate == 15
        assert sum(1 for _ in made.decode(video=0)) == 30


def test_a_name_with_a_colon_is_a_file(
    server: fake.ScriptedServer, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recorders call them, after the time of day."""
    monkeypatch.chdir(tmp_path)
    clip.rename(tmp_path / "cam1-12:30:00.mp4")
    done = run(server, "analyze", "cam1-12:30:00.mp4", "-o", "out-12:30.mp4", "-f", "jsonl")
    assert lines(done.stdout)[-1]["results"] == 30
    assert (tmp_path / "out-12:30.mp4").stat().st_size


def test_a_video_that_is_damaged_in_the_middle_goes_on_and_tells(
    server: fake.ScriptedServer, clip: Path, tmp_path: Path
) -> None:
    damaged = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    at, size = places[12]
    damaged[at + 4 : at + size] = b"\xff" * (size - 4)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damaged)
    done = run(server, "analyze", path, "--video", "decode", "-f", "jsonl", code=1)
    *told, summary = lines(done.stdout)
    assert summary["type"] == "summary"
    assert summary["results"] >= 20, "those behind the damage are analysed too"
    assert {line["reason"] for line in told if line["type"] == "error"} == {"PICTURE_CORRUPT"}
    assert "a picture is damaged" in done.stderr


def test_what_was_found_before_a_video_broke_off_is_told(
    server: fake.ScriptedServer, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from facelane.cli import videos

    take = videos._Moving._item

    def broken(self: Any, frame: Any, want_pixels: bool) -> Any:
        if self._number == 21:
            raise SourceError("clip.mp4 broke off: Input/output error")
        return take(self, frame, want_pixels)

    monkeypatch.setattr(videos._Moving, "_item", broken)
    for form in ("jsonl", "table"):
        done = run(server, "analyze", clip, "--video", "decode", "-f", form, code=2)
        assert "broke off" in done.stderr
        if form == "table":
            assert "20 frames = 20 results" in done.stdout
        else:
            totals = lines(done.stdout)[-1]
            assert totals["results"] == 20
            assert next(iter(totals["cameras"].values()))["state"] == "FAILED"


def test_a_video_at_its_own_pace_drops_at_the_source(
    server: fake.ScriptedServer, clip: Path, tmp_path: Path
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=2))

    def hold_back() -> None:
        until(lambda: server.streams)
        # Frames of a second of the clip, counted from the stream's opening.
        threading.Event().wait(1.0)
        released.set()

    opener = threading.Thread(target=hold_back)
    opener.start()
    out = tmp_path / "out.mp4"
    result = run(server, "analyze", clip, "--realtime", "-f", "jsonl", "-o", out)
    opener.join(30)
    *told, summary = lines(result.stdout)
    assert server.streams[0][0].config.overload_policy == 1
    not_sent = [line for line in told if line["type"] == "drop"]
    assert {(line["where"], line["reason"]) for line in not_sent} == {("client", "WINDOW_FULL")}
    assert sum(line["count"] for line in not_sent) == summary["drops"] > 0
    assert summary["frames"] == summary["results"] + summary["drops"] == 30
    # Frames are missing from the copy; not a moment is.
    with av.open(str(clip)) as given, av.open(str(out)) as made:
        assert made.duration == pytest.approx(given.duration, abs=1e6 / 15)
        assert sum(1 for _ in made.decode(video=0)) < 30


def test_max_frames_and_options(server: fake.ScriptedServer, clip: Path) -> None:
    run(
        server, "analyze", clip, "--max-frames", 5, "--gallery", "staff", "--skip-liveness",
        "--skip-recognition", "--max-faces", 2, "--max-candidates", 3, "--min-face-size", 40,
        "--overload", "latest_wins",
    )  # fmt: skip
    config = server.streams[0][0].config
    assert config.overload_policy == 1
    assert config.options.gallery_id == "staff"
    assert config.options.skip_liveness
    assert config.options.skip_recognition
    assert (config.options.max_faces, config.options.max_candidates) == (2, 3)
    assert len(server.streams[0]) == 1 + 5


def test_frame_errors_are_told_and_counted(server: fake.ScriptedServer, photo: Path) -> None:
    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        broken = fake.status(grpc.StatusCode.INVALID_ARGUMENT, "PICTURE_CORRUPT", "cut off")
        yield fake.outcome(next(requests).frame, error=broken)
        for _ in requests:
            raise AssertionError
        yield fake.summary(errors=1)

    server.scripts.append(script)
    result = run(server, "analyze", photo, code=1)
    assert "PICTURE_CORRUPT: cut off" in result.stderr
    assert "1 errors" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["analyze", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["analyze", "EMPTY"], "holds no pictures"),
        (["analyze", "NOVIDEO"], "cannot be opened"),
        (["analyze", "PHOTO", "-o", "x.mp4"], "written as .jpg"),
        (["analyze", "CLIP", "-o", "x.jpg"], "written as .mp4"),
        (["analyze", "CLIP", "-o", "no/where/x.mp4"], "create the folder first"),
        (["analyze", "PHOTO", "--overload", "never"], "overload"),
        (["enroll", "ada", "nowhere.jpg"], "nowhere.jpg"),
        (["subjects", "create", "ada", "--label", "oops"], "KEY=VALUE"),
        (["nonsense"], "nonsense"),
        (["--token-file", "EMPTY/none", "server", "info"], "none"),
        (["--token-file", "PHOTO", "server", "info"], "must hold one token"),
        (["--tls-ca", "NOVIDEO", "server", "info"], "is not PEM"),
        (["analyze", "rtsp://[::1/x"], "cannot be opened"),
    ],
)
def test_wrong_usage(
    server: fake.ScriptedServer,
    photo: Path,
    clip: Path,
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    no_video = tmp_path / "notes.txt"
    no_video.write_text("no video")
    names = {
        "EMPTY": str(empty),
        "NOVIDEO": str(no_video),
        "PHOTO": str(photo),
        "CLIP": str(clip),
        "EMPTY/none": str(empty / "none"),
    }
    result = run(server, *[names.get(word, word) for word in words], code=2)
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_an_unreachable_server(photo: Path) -> None:
    result = run(None, "analyze", photo, code=4)
    assert result.stderr.startswith("facelane: UNREACHABLE: no server answers")
    assert len(result.stderr.splitlines()) == 1
    assert run(None, "server", "health", code=4).stdout == ""


def test_a_refusing_server(server: fake.ScriptedServer, photo: Path) -> None:
    server.scripts.append(
        fake.refusing(grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND", "create it first")
    )
    result = run(server, "analyze", photo, code=REFUSED_CODE)
    assert result.stderr == "facelane: SUBJECT_NOT_FOUND: create it first\n"


def test_urls_are_shown_without_their_credentials(server: fake.ScriptedServer) -> None:
    result = run(server, "analyze", "rtsp://admin:s3cret@127.0.0.1:1/live", code=2)
    assert "s3cret" not in result.output
    assert "rtsp://127.0.0.1:1/live cannot be opened" in result.stderr
    assert "--credentials-file takes it from a file" in result.stderr
    plain = run(server, "analyze", "rtsp://127.0.0.1:1/live", code=2)
    assert "password" not in plain.stderr


# The gallery.


def test_enrolling_and_asking(server: fake.ScriptedServer, photo: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.png"
    cv2.imwrite(str(twin), np.zeros((64, 64, 3), np.uint8))
    result = run(server, "enroll", "ada", photo, twin, "--display-name", "Ada", "--skip-liveness")
    assert "enrolled as ada (template t1, OOD 0.80, 1 in all)" in result.stdout
    assert server.enrolments[0].skip_liveness
    assert server.enrolments[1].display_name == "Ada"

    assert "grace" in run(server, "identify", photo, twin).stdout
    found = lines(run(server, "identify", photo, "-f", "jsonl").stdout)
    assert found[0]["type"] == "face"
    assert found[0]["source"] == str(photo)
    assert (
        "verified: similarity 0.750, threshold 0.340" in run(server, "verify", "ada", photo).stdout
    )
    assert lines(run(server, "verify", "ada", photo, "-f", "jsonl").stdout)[0]["verified"]
    result = run(server, "verify", "nobody", photo, code=REFUSED_CODE)
    assert "SUBJECT_NOT_FOUND" in result.stderr


def test_refused_enrolments_are_told_one_by_one(server: fake.ScriptedServer, photo: Path) -> None:
    refusal = (grpc.StatusCode.FAILED_PRECONDITION, "NO_FACE", "show the face")
    server.failures.append(refusal)
    result = run(server, "enroll", "ada", photo, photo, code=1)
    assert "NO_FACE: show the face" in result.stderr
    assert "enrolled as ada" in result.stdout
    server.failures.append(refusal)
    run(server, "enroll", "ada", photo, code=REFUSED_CODE)
    assert not run(server, "enroll", "bob", photo, "--must-exist", code=REFUSED_CODE).stdout


def test_an_unreadable_picture_among_good_ones(
    server: fake.ScriptedServer, photo: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    result = run(server, "identify", bad, photo, code=1)
    assert "PICTURE_EMPTY" in result.stderr
    assert "grace" in result.stdout
    assert "PICTURE_EMPTY" in run(server, "enroll", "ada", bad, photo, code=1).stderr


def test_subjects(server: fake.ScriptedServer, photo: Path) -> None:
    assert "no subjects in gallery default" in run(server, "subjects", "list").stdout
    run(server, "subjects", "create", "ada", "--display-name", "Ada", "--label", "team=math")
    run(server, "enroll", "ada", photo)
    listed = run(server, "subjects", "list").stdout
    assert "Ada" in listed
    assert "team=math" in listed
    assert lines(run(server, "subjects", "list", "-f", "jsonl").stdout)[0]["subject_id"] == "ada"
    shown = run(server, "subjects", "show", "ada").stdout
    assert "t1" in shown
    assert "null@1" in shown
    kinds = [x["type"] for x in lines(run(server, "subjects", "show", "ada", "-f", "jsonl").stdout)]
    assert kinds == ["subject", "template"]
    run(server, "subjects", "delete", "ada", input="n\n", code=1)
    assert "ada" in server.gallery.subjects
    assert "deleted ada and 1 templates" in run(server, "subjects", "delete", "ada", "-y").stdout
    assert "ada" not in server.gallery.subjects
    run(server, "subjects", "show", "ada", code=REFUSED_CODE)


def test_a_receipt_has_a_place_before_anything_is_deleted(
    server: fake.ScriptedServer, photo: Path, tmp_path: Path
) -> None:
    """It is given once: what cannot be kept is not deleted."""
    run(server, "enroll", "ada", photo)
    for path in (tmp_path / "none" / "receipt", Path("/dev/full/receipt")):
        run(server, "subjects", "delete", "ada", "-y", "--receipt", path, code=2)
    run(server, "subjects", "show", "ada")
    path = tmp_path / "receipt"
    run(server, "subjects", "delete", "nobody", "-y", "--receipt", path, code=REFUSED_CODE)
    assert not path.exists()
    run(server, "subjects", "delete", "ada", "-y", "--receipt", path)
    assert path.exists()
    assert len(path.read_text().splitlines()) <= 1


def test_a_name_is_text_and_nothing_else(server: fake.ScriptedServer, photo: Path) -> None:
    name = "[admin] Bob :car: [/x]"
    run(server, "subjects", "create", "bob", "--display-name", name, "--label", "a=[/b]")
    for shown in (run(server, "subjects", "list"), run(server, "subjects", "show", "bob")):
        assert name in shown.stdout
        assert "a=[/b]" in shown.stdout
    run(server, "subjects", "create", "eve", "--display-name", "\x1b[2J\x9b2Jlove\rly")
    assert "\\x1b[2J\\x9b2Jlove\\x0dly" in run(server, "subjects", "list").stdout
    odd = photo.parent / "[red]"
    odd.mkdir()
    for letter in "ab":
        (odd / f"{letter}[x].jpg").write_bytes(photo.read_bytes())
    assert "[red]/a[x].jpg" in run(server, "analyze", odd).stdout


# The server.


def test_the_server_s_state(server: fake.ScriptedServer) -> None:
    info = run(server, "server", "info").stdout
    assert "version 1.2.3" in info
    assert "recognizer" in info
    assert lines(run(server, "server", "info", "-f", "jsonl").stdout)[0]["version"] == "1.2.3"
    pools = run(server, "server", "pools").stdout
    assert "DEGRADED" in pools
    assert "detector#0" in pools
    assert "123 MiB" in pools
    pool = lines(run(server, "server", "pools", "-f", "jsonl").stdout)[0]
    assert pool["workers"][0]["state"] == "READY"


def test_health_is_an_exit_code(server: fake.ScriptedServer) -> None:
    assert run(server, "server", "health").stdout == "SERVING\n"
    assert run(server, "server", "health", "--wait", 30).stdout == "SERVING\n"
    server.health[""] = 2
    assert run(server, "server", "health", code=1).stdout == "NOT_SERVING\n"
    assert "SERVICE_UNKNOWN" in run(server, "server", "health", "what", code=1).stdout
    assert "NOT_SERVING" in run(server, "server", "health", "--wait", 1.0, code=4).stderr


def test_administration(server: fake.ScriptedServer) -> None:
    assert "pid 1 -> 2" in run(server, "server", "restart-worker", "detector#0").stdout
    assert "-> other@2" in run(server, "server", "reload", "detector", "other@2").stdout
    assert "within 2.5 s" in run(server, "server", "drain", "--grace", 2.5).stdout
    assert server.admin[-1].grace.seconds == 2


def test_events(server: fake.ScriptedServer) -> None:
    result = run(server, "events", "--count", 4, "--kind", "SUBJECT_SEEN", "--resume-token", "7")
    assert len(result.stdout.splitlines()) == 4
    assert "SUBJECT_SEEN source=door" in result.stdout
    assert [s.resume_token for s in server.subscriptions] == ["7", "10"]
    found = lines(run(server, "events", "--count", 1, "-f", "jsonl").stdout)
    assert found[0]["resume_token"] == "1"


def test_kinds_of_events_are_those_that_there_are(server: fake.ScriptedServer) -> None:
    shown = runner.invoke(app, ["events", "--help"], prog_name="facelane", env={"COLUMNS": "400"})
    assert "SUBJECT_SEEN" in shown.output
    assert "UNSPECIFIED" not in shown.output
    run(server, "events", "--kind", "UNSPECIFIED", code=2)
    with facelane.Client(server.target) as client:
        for kinds in (["UNSPECIFIED"], ["seen"], [facelane.EventKind.UNSPECIFIED]):
            with pytest.raises(facelane.ArgumentError, match="SUBJECT_SEEN"):
                client.watch_events(kinds=kinds)
            with pytest.raises(facelane.ArgumentError, match="SUBJECT_SEEN"):
                client.list_events(kinds=kinds)


def test_events_that_were_lost_are_told_and_the_watch_goes_on(server: fake.ScriptedServer) -> None:
    # The first subscription ends after three events; the server has forgotten the rest.
    server.after_subscription.append((grpc.StatusCode.OUT_OF_RANGE, "HISTORY_LOST", "restarted"))
    result = run(server, "events", "--count", 4)
    assert len(result.stdout.splitlines()) == 4
    assert result.stderr == "facelane: restarted\n"
    assert [s.resume_token for s in server.subscriptions] == ["", "3", ""]
    server.failures.append((grpc.StatusCode.OUT_OF_RANGE, "HISTORY_LOST", "restarted"))
    assert "HISTORY_LOST" in run(server, "events", "--resume-token", "3", code=3).stderr


def test_version_and_help() -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == facelane.__version__
    shown = runner.invoke(app, ["--help"]).stdout
    assert "Exit codes" in shown


# The process.


def command(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    done = command("-m", "facelane.cli", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == "facelane: typer is not installed: run  pip install 'facelane[cli]'\n"


def test_the_process_exits_as_documented() -> None:
    done = command("-m", "facelane.cli", "--target", "127.0.0.1:1", "server", "health")
    assert done.returncode == 4
    assert done.stderr.startswith("facelane: UNREACHABLE: ")
    assert done.stdout == ""


def test_a_bare_import_stays_light() -> None:
    heavy = ("torch", "numpy", "cv2", "av", "typer", "rich", "facelane_server")
    code = f"import facelane, sys; print([m for m in {heavy} if m in sys.modules])"
    assert command("-c", code).stdout == "[]\n"


def long_clip(path: Path) -> Path:
    """20 s of 64x48 at 10 frames/s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(200):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("live", "code"), [(True, 0), (False, 130)])
def test_an_interrupt_ends_a_camera_well_and_a_file_early(
    server: fake.ScriptedServer, tmp_path: Path, live: bool, code: int
) -> None:
    released = threading.Event()
    if not live:
        server.scripts.append(fake.silent(released))
    clip = long_clip(tmp_path / "clip.mp4")
    words = [sys.executable, "-m", "facelane.cli", "--target", server.target, "analyze"]
    words += [str(clip), "-f", "jsonl", *(["--realtime"] if live else [])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        wanted = 3 if live else 1
        until(lambda: any(len(s) >= wanted for s in server.streams), what="the stream")
        done.send_signal(signal.SIGINT)
        out, err = done.communicate(timeout=30)
    released.set()
    assert done.returncode == code, err
    assert "Traceback" not in err
    if live:
        summary = json.loads(out.splitlines()[-1])
        assert summary["type"] == "summary"
        assert 0 < summary["frames"] < 200


def test_a_reader_of_a_table_that_goes_away_is_no_error(server: fake.ScriptedServer) -> None:
    words = [sys.executable, "-m", "facelane.cli", "--target", server.target, "server", "pools"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert done.wait(30) == 0
        assert done.stderr.read() == ""


def test_a_reader_that_goes_away_is_no_error(server: fake.ScriptedServer, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "facelane.cli", "--target", server.target, "analyze"]
    words += [str(long_clip(tmp_path / "clip.mp4")), "-f", "jsonl", "--realtime"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        assert json.loads(done.stdout.readline())["frame_id"] == 1
        done.stdout.close()
        assert done.wait(30) == 0
        assert done.stderr.read() == ""
