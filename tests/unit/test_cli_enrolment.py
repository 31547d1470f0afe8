"""``facelane enroll FOLDER``: a folder of people in one command, and an account of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from tests.fakes import scripted_server as fake
from typer.testing import CliRunner

from facelane.cli import enrolment
from facelane.cli.app import app
from facelane.cli.sources import SourceError


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


@pytest.fixture
def people(tmp_path: Path) -> Path:
    folder = tmp_path / "people"
    shades = iter(range(0, 250, 10))
    for name, files in (
        ("grace", ("1.jpg", "2.jpg", "notes.txt")),
        ("Ada Lovelace", ("a.png",)),
        ("nobody", ()),
        ("hopper@navy", ("x.jfif",)),
    ):
        (folder / name).mkdir(parents=True)
        for file in files:
            if file.endswith(".txt"):
                (folder / name / file).write_text("x")
                continue
            pixels = np.full((48, 64, 3), next(shades), np.uint8)
            suffix = Path(file).suffix.replace(".jfif", ".jpg")
            done, data = cv2.imencode(suffix, pixels)
            assert done
            (folder / name / file).write_bytes(data.tobytes())
    (folder / "stray.jpg").write_bytes(b"x")
    return folder


def run(server: fake.ScriptedServer, *words: object, code: int = 0) -> Any:
    start = ["--target", server.target, "enroll", *map(str, words)]
    result = CliRunner().invoke(app, start, prog_name="facelane")
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_everybody_in_one_command(server: fake.ScriptedServer, people: Path) -> None:
    result = run(server, people)
    enrolled = {(r.subject_id, r.display_name) for r in server.enrolments}
    assert enrolled == {("grace", ""), ("Ada-Lovelace", "Ada Lovelace"), ("hopper@navy", "")}
    assert len(server.enrolments) == 4
    assert "4 of 4 pictures enrolled, 3 of 3 subjects" in result.stdout
    for left in (
        "stray.jpg (in no subject's folder)",
        "notes.txt (no picture)",
        "nobody (holds no",
    ):
        assert left in result.stderr


def test_each_refusal_is_told_and_the_rest_is_kept(
    server: fake.ScriptedServer, people: Path
) -> None:
    refusals = {"NO_FACE": "send a picture from the front", "OOD_REJECTED": "take a sharper one"}
    for reason, message in refusals.items():
        server.failures.append((grpc.StatusCode.FAILED_PRECONDITION, reason, message))
    (people / "nobody" / "broken.jpg").write_bytes(b"no picture")
    result = run(server, people, "--format", "jsonl", code=1)
    *lines, summary = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["type"] for line in lines} == {"enrollment"}
    told = {line["reason"]: line["message"] for line in lines if not line["enrolled"]}
    assert refusals.items() <= told.items()
    assert told["PICTURE_CORRUPT"]
    assert all(line["template_id"] and line["ood_score"] for line in lines if line["enrolled"])
    assert summary["type"] == "enrollment_summary"
    assert summary["pictures"] == 5
    assert summary["enrolled"] == 2
    assert summary["refused_by_reason"] == {"NO_FACE": 1, "OOD_REJECTED": 1, "PICTURE_CORRUPT": 1}
    assert "nobody" in summary["subjects_without"]
    table = run(server, people, code=1)
    assert "4 of 5 pictures enrolled" in table.stdout
    assert re.search(r"broken\.jpg: PICTURE_CORRUPT: .*save it again", table.stderr)
    assert "nobody can recognise yet: nobody" in table.stderr


def test_done_again_it_adds_what_is_new(server: fake.ScriptedServer, people: Path) -> None:
    for _ in range(2):
        run(server, people)
    ids = [request.request_id for request in server.enrolments]
    assert len(set(ids)) == 4
    assert len(ids) == 8
    assert len(server.gallery.templates) == 4
    # What was enrolled and deleted since is enrolled again.
    server.failures.append((grpc.StatusCode.NOT_FOUND, "TEMPLATE_NOT_FOUND", "deleted since"))
    run(server, people)
    assert len({request.request_id for request in server.enrolments}) == 5


def test_a_subject_s_own_folder(server: fake.ScriptedServer, people: Path) -> None:
    result = run(server, "grace", people / "grace", "--display-name", "Grace Hopper")
    assert [r.display_name for r in server.enrolments] == ["Grace Hopper"] * 2
    assert "notes.txt (no picture)" in result.stderr


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "holds no subjects"),
        (("grace hopper/a.jpg", "grace-hopper/b.jpg"), "rename one of the folders"),
        (("画像/a.jpg",), "no id can be made"),
    ],
)
def test_folders_that_cannot_be(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SourceError, match=said):
        enrolment.plan(tmp_path)


def test_wrong_usage(server: fake.ScriptedServer, people: Path) -> None:
    assert "facelane enroll SUBJECT" in run(server, "nobody", code=2).stderr
    assert "--display-name" in run(server, people, "--display-name", "x", code=2).stderr
